"""A few test pictures with what the model says of them and how it fills in their own captions: RUN/samples, for the report."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flm_scale.batch import Example
from flm_scale.config import Run
from flm_scale.data.clips import contact_sheet, is_clip
from flm_scale.data.index import Index
from flm_scale.data.order import keyed_rng
from flm_scale.data.pack import pack
from flm_scale.data.tokens import AnyTokenizer
from flm_scale.evals.caption import BEAMS, read_pixels, write_captions
from flm_scale.model.assemble import VisionLanguageModel
from flm_scale.objectives.objective import Objective
from flm_scale.parallel.processes import Processes

NUM_SAMPLES = 12
LEAST_SIDE = 192
"""Pixels; smaller pictures are enlarged without smoothing, so that their own pixels show."""


def write_samples(run: Run, model: VisionLanguageModel, run_dir: Path, *, index: Index, tokenizer: AnyTokenizer, objective: Objective,
                  processes: Processes) -> list[dict[str, Any]]:
    """Write the pictures as RUN/samples/NNN.png, evenly spread over the split, and return the content of samples.json."""
    captioned = [image for image, captions in enumerate(index.captions) if captions]
    images = [captioned[i] for i in np.linspace(0, len(captioned) - 1, min(NUM_SAMPLES, len(captioned))).astype(int)]
    if processes.rank == 0:
        (run_dir / "samples").mkdir(exist_ok=True)
        for number, image in enumerate(images):
            write_picture(index.read_image(image), run_dir / f"samples/{number:03d}.png")
    mine = processes.share(images)
    said = processes.gather(list(describe(run, model, mine, index=index, tokenizer=tokenizer, objective=objective)) if mine else [])
    return [{"image": f"samples/{number:03d}.png"} | sample for number, sample in enumerate(said)]


def describe(run: Run, model: VisionLanguageModel, images: Sequence[int], *, index: Index, tokenizer: AnyTokenizer,
             objective: Objective) -> Iterator[dict[str, Any]]:
    """Yield what is known and said of each picture."""
    pixels = read_pixels(run, index, images)
    greedy, beam = (write_captions(run, model, pixels, tokenizer=tokenizer, objective=objective, beams=beams) for beams in (1, BEAMS))
    for number, image in enumerate(images):
        key, truth = index.keys[image], index.captions[image][0]
        tokens = list(fill_in(run, model, pixels[number], truth, key=key, tokenizer=tokenizer, objective=objective))
        yield {"key": key, "truth": truth, "greedy": greedy[number].text, "beam": beam[number].text, "tokens": tokens}


@torch.no_grad()
def fill_in(run: Run, model: VisionLanguageModel, pixels: np.ndarray, caption: str, *, key: str, tokenizer: AnyTokenizer,
            objective: Objective) -> Iterator[dict[str, Any]]:
    """Yield each target of the objective's first part: its piece, what was hidden with it, and what the model says instead.

    pixels: uint8 [3, height, width], of a clip [F, 3, height, width].
    """
    ids = np.array(tokenizer.encode(caption, max_length=run.text.max_length), np.int32)
    shown = objective.whole(ids).ids
    for view in objective.corrupt(ids, keyed_rng("corrupt", run.seed, 0, key, 0)):
        state = pack([[view]], pixels[None]).to(next(model.parameters()).device)
        probabilities, predicted = model.logits(state)[:, :tokenizer.vocab_size].softmax(-1).max(-1)
        for target in np.flatnonzero(view.target_parts == 0):
            hidden = shown[hidden_from(view, shown, row=int(view.target_rows[target]))]
            piece, guess = tokenizer.pieces([int(view.target_ids[target]), int(predicted[target])])
            yield {"piece": piece, "hidden": tokenizer.pieces(hidden), "predicted": guess, "probability": float(probabilities[target]),
                   "correct": int(predicted[target]) == int(view.target_ids[target])}


def hidden_from(view: Example, ids: np.ndarray, *, row: int) -> np.ndarray:
    """Return the content positions that a source row of the view does not get to see. ids: of the caption and its prompt, before hiding."""
    content: np.ndarray = np.arange(1, len(ids) - 1)
    stream, position = divmod(row, view.length)
    if stream >= len(view.first):
        query = row - len(view.first) * view.length
        is_hidden = (content >= view.span_first[query]) & (content <= view.span_last[query])
    else:
        is_outside = (content < view.first[stream, position]) | (content > view.last[stream, position])
        is_hidden = is_outside | (view.ids[1:-1] != ids[1:-1])
    hidden: np.ndarray = content[is_hidden]
    return hidden


def write_picture(data: bytes, path: Path) -> None:
    """Write an encoded picture as PNG, enlarged by a whole factor to LEAST_SIDE at least; of a clip four frames in two rows."""
    from PIL import Image

    if is_clip(data):
        Image.fromarray(contact_sheet(data, side=2 * LEAST_SIDE)).save(path)
        return
    with Image.open(io.BytesIO(data)) as opened:
        picture = opened.convert("RGB")
    factor = max(1, -(-LEAST_SIDE // min(picture.size)))
    picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST).save(path)
