"""Captions said by the model against those written for the picture. The one door to pycocoevalcap, to its pure-Python scorers.

Words are lower-cased runs of letters and digits, not the Java PTB tokenizer's, so scores compare between runs of this package only. CIDEr
weighs words by the scored pictures' own references, and averages over 1- to 4-grams: captions of three words reach 7.5, not 10.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from flm_scale.batch import Example
from flm_scale.config import Run
from flm_scale.data.clips import decode_sample
from flm_scale.data.index import Index
from flm_scale.data.order import keyed_rng
from flm_scale.data.pack import pack
from flm_scale.data.tokens import AnyTokenizer
from flm_scale.errors import DataError
from flm_scale.model.assemble import VisionLanguageModel
from flm_scale.model.frozen_lm import FrozenLm
from flm_scale.model.generate import generate
from flm_scale.objectives.captioning import Captioning
from flm_scale.objectives.objective import Objective
from flm_scale.parallel.processes import Processes

Item = TypeVar("Item")

BEAMS = 5
IMAGES_PER_BATCH = 64


class Caption(NamedTuple):
    """What the model says of a picture."""

    text: str
    score: float
    """Mean log-probability of a token, in nats."""


def evaluate_caption(run: Run, model: VisionLanguageModel, *, index: Index, tokenizer: AnyTokenizer, objective: Objective, split: str,
                     processes: Processes) -> dict[str, Any]:
    """Return the content of evals/caption.json, over the pictures that have a caption. Raises DataError when there is none."""
    from rich.progress import track

    images = [image for image, captions in enumerate(index.captions) if captions]
    if not images:
        raise DataError(f"--split {split}: no picture with a caption; score another split")
    said: dict[str, list[str]] = {"greedy": [], "beam": []}
    batches = list(batches_of(processes.share(images)))
    for chosen in track(batches, description="captions", transient=True, disable=processes.rank > 0):
        pixels = read_pixels(run, index, chosen)
        for kind, beams in (("greedy", 1), ("beam", BEAMS)):
            captions = write_captions(run, model, pixels, tokenizer=tokenizer, objective=objective, beams=beams)
            said[kind] += [caption.text for caption in captions]
    references = [index.captions[image] for image in images]
    everywhere = {kind: processes.gather(texts) for kind, texts in said.items()}
    scores: dict[str, Any] = {kind: score_captions(texts, references) for kind, texts in everywhere.items()}
    if isinstance(objective, Captioning):
        scores["controls"] = score_controls(run, model, images, everywhere["beam"], index=index, tokenizer=tokenizer, objective=objective,
                                            processes=processes)
    return {"task": "caption", "split": split, "num_images": len(images), **scores}


def score_controls(run: Run, model: VisionLanguageModel, images: Sequence[int], captions: Sequence[str], *, index: Index, tokenizer: AnyTokenizer,
                   objective: Captioning, processes: Processes) -> dict[str, dict[str, float]]:
    """Return what the picture is worth to a frozen language model: scores with the right one, with another one, and with none in front of the text.

    To those of the captions comes `log_likelihood`, the mean log-probability of a token of the references in nats, EOS counted.
    captions: those that beam search found for each of the images.
    """
    assert isinstance(model.head, FrozenLm)
    references = [index.captions[image] for image in images]
    others = other_pictures([words(texts[0]) for texts in references], seed=run.seed)
    prompt = [tokenizer.bos_id, *objective.prompt.tolist()]
    (ids, _), = model.head.generate(model.head.no_pictures(1), [prompt], end_ids=[tokenizer.eos_id], max_new=run.text.max_length - 1, beams=BEAMS)
    said = {"picture": captions, "another picture": [captions[other] for other in others], "no picture": [tokenizer.decode(ids)] * len(images)}
    seen = {"picture": images, "another picture": [images[other] for other in others], "no picture": [None] * len(images)}
    return {name: {**score_captions(said[name], references),
                   "log_likelihood": log_likelihood(run, model, list(zip(images, seen[name], strict=True)), index=index, tokenizer=tokenizer,
                                                    objective=objective, processes=processes)} for name in said}


@torch.no_grad()
def log_likelihood(run: Run, model: VisionLanguageModel, pairs: Sequence[tuple[int, int | None]], *, index: Index, tokenizer: AnyTokenizer,
                   objective: Objective, processes: Processes) -> float:
    """Return the mean log-probability of a token of the references, in nats, EOS counted.

    pairs: whose captions are read, and the picture in front of them; None, for all of them or none, leaves a frozen language model alone.
    """
    def views_of(image: int) -> list[Example]:
        texts = (np.array(tokenizer.encode(text, max_length=run.text.max_length), np.int32) for text in index.captions[image])
        return [view for ids in texts for view in objective.likelihood(ids)]

    sums, device = list[tuple[float, int]](), next(model.parameters()).device
    for chosen in batches_of(processes.share(pairs)):
        views = [views_of(image) for image, _ in chosen]
        pictures = [picture for _, picture in chosen if picture is not None]
        if pictures:
            loss, _ = model(pack(views, read_pixels(run, index, pictures)).to(device))
        else:
            assert isinstance(model.head, FrozenLm)
            state = pack(views, np.empty((len(chosen), 3, 0, 0), np.uint8)).to(device)
            loss, _ = model.head(state._replace(rows=model.head.no_pictures(len(chosen)).flatten(0, 1)))
        sums.append((float(loss.double().sum()), len(loss)))
    found = processes.gather(sums)
    return -sum(loss for loss, _ in found) / sum(count for _, count in found)


def other_pictures(labels: Sequence[str], *, seed: int) -> list[int]:
    """Return for each picture the number of another one, each taken once, whose label is another; drawn from the seed.

    Pictures stand in a row, those of one label together, and each takes the one as far on as the longest group is long. Only where one label
    has more than half of the pictures, some of them meet it again.
    """
    groups: dict[str, list[int]] = {}
    for number in keyed_rng("another picture", seed).permutation(len(labels)).tolist():
        groups.setdefault(labels[number], []).append(number)
    row, far = [number for group in groups.values() for number in group], max(map(len, groups.values()))
    other = {number: row[(place + far) % len(row)] for place, number in enumerate(row)}
    return [other[number] for number in range(len(labels))]


def write_captions(run: Run, model: VisionLanguageModel, pixels: np.ndarray, *, tokenizer: AnyTokenizer, objective: Objective,
                   beams: int) -> list[Caption]:
    """Return a caption for each picture. pixels: uint8 [N, 3, height, width], of clips [N, F, 3, height, width]."""
    device = next(model.parameters()).device
    found = generate(model, objective, torch.from_numpy(pixels).to(device), bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id,
                     vocab_size=tokenizer.vocab_size, max_length=run.text.max_length, beams=beams)
    return [Caption(tokenizer.decode(one.ids), one.score) for one in found]


def score_captions(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return CIDEr, BLEU-1, BLEU-4 and the share of captions that equal one of their references, word for word."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    said = {i: [words(caption)] for i, caption in enumerate(captions)}
    written = {i: [words(text) for text in texts] for i, texts in enumerate(references)}
    cider, _ = Cider().compute_score(written, said)
    bleu, _ = Bleu(4).compute_score(written, said, verbose=0)
    exact = sum(said[i][0] in written[i] for i in said) / len(said)
    return {"CIDEr": float(cider), "BLEU-1": float(bleu[0]), "BLEU-4": float(bleu[3]), "exact": exact}


def words(text: str) -> str:
    """Return the text's lower-cased words with single spaces between them."""
    return " ".join(re.findall(r"\w+", text.lower()))


def read_pixels(run: Run, index: Index, images: Sequence[int]) -> np.ndarray:
    """Return pictures of a split as the run's tower sees them, uint8 [N, 3, size, size], or clips [N, F, 3, size, size].

    Raises DataError that names the sample which cannot be decoded.
    """
    pixels = []
    for image in images:
        try:
            pixels.append(decode_sample(index.read_image(image), size=run.vision.image_size, frames=run.vision.frames))
        except DataError as error:
            raise DataError(f"sample {index.keys[image]}: {error}") from error
    return np.stack(pixels)


def batches_of(images: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """Yield the pictures, or what stands for them, some at a time."""
    for start in range(0, len(images), IMAGES_PER_BATCH):
        yield images[start:start + IMAGES_PER_BATCH]
