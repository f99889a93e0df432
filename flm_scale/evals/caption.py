"""Captions said by the model against those written for the picture. The one door to pycocoevalcap, to its pure-Python scorers.

Words are lower-cased runs of letters and digits, not the Java PTB tokenizer's, so scores compare between runs of this package only. CIDEr
weighs words by the scored pictures' own references, and averages over 1- to 4-grams: captions of three words reach 7.5, not 10.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from flm_scale.config import Run
from flm_scale.data.clips import decode_sample
from flm_scale.data.index import Index
from flm_scale.data.tokens import AnyTokenizer
from flm_scale.errors import DataError
from flm_scale.model.assemble import VisionLanguageModel
from flm_scale.model.generate import generate
from flm_scale.objectives.objective import Objective
from flm_scale.parallel.processes import Processes

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
        pixels = read_pixels(index, chosen, size=run.vision.image_size, frames=run.vision.frames)
        for kind, beams in (("greedy", 1), ("beam", BEAMS)):
            captions = write_captions(run, model, pixels, tokenizer=tokenizer, objective=objective, beams=beams)
            said[kind] += [caption.text for caption in captions]
    references = [index.captions[image] for image in images]
    scores = {kind: score_captions(processes.gather(captions), references) for kind, captions in said.items()}
    return {"task": "caption", "split": split, "num_images": len(images), **scores}


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


def read_pixels(index: Index, images: Sequence[int], *, size: int, frames: int = 1) -> np.ndarray:
    """Return pictures of a split as uint8 [N, 3, size, size], or clips as [N, frames, 3, size, size].

    Raises DataError that names the sample which cannot be decoded.
    """
    pixels = []
    for image in images:
        try:
            pixels.append(decode_sample(index.read_image(image), size=size, frames=frames))
        except DataError as error:
            raise DataError(f"sample {index.keys[image]}: {error}") from error
    return np.stack(pixels)


def batches_of(images: Sequence[int]) -> Iterator[Sequence[int]]:
    """Yield the pictures, some at a time."""
    for start in range(0, len(images), IMAGES_PER_BATCH):
        yield images[start:start + IMAGES_PER_BATCH]
