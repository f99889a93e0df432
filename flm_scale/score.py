"""How well pictures and captions go together, by an open_clip model: a column of the index, made once and filtered by as often as wanted."""

import io
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from flm_scale.data.derive import Advance, Rewriter, Task, derive, in_order
from flm_scale.data.images import on_white, read_header
from flm_scale.data.index import Index, read_index
from flm_scale.data.manifest import Derivation, Shard, Shards
from flm_scale.data.shards import Dataset
from flm_scale.errors import ConfigError
from flm_scale.model.vision import Clip, load_clip

COLUMN = "clip_score"
Device = Literal["auto", "cpu", "cuda"]


def score(dataset: Dataset, out: Path, *, model: str, pretrained: str, batch: int = 64, device: Device = "auto", workers: int = 4) -> Dataset:
    """Make a dataset with the column `clip_score`: the cosine of each picture and the caption that fits it best; tars are linked.

    NaN where there is no caption or the picture does not decode. pretrained: a tag of the model, or a file.   workers: threads that decode.
    Raises ConfigError and CheckpointError as `load_clip`, and ConfigError without a GPU where one is asked for.
    """
    if min(batch, workers) < 1:
        raise ConfigError(f"--batch ({batch}) and --workers ({workers}) must be at least 1")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU; say --device cpu")
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    clip = load_clip(model, pretrained, device=place)
    with ThreadPoolExecutor(workers) as pool:
        rewriter, scorer = Rewriter(dataset, out), Scorer(clip, batch=batch, device=place, pool=pool)
        tasks = {split: [Task(shard.name, shard.count, partial(_score_shard, rewriter, shard, scorer)) for shard in dataset.shards(split)]
                 for split in dataset.splits}
        values = {"column": COLUMN, "model": model, "weights_sha256": clip.weights}
        return derive(dataset, out, Derivation(parent=dataset.root, by="score", values=values), tasks)


class Scorer:
    """A model and how it is fed: threads decode the pictures of the next two batches while it runs."""

    def __init__(self, clip: Clip, *, batch: int, device: str, pool: ThreadPoolExecutor) -> None:
        self.clip, self.batch, self.device, self.pool = clip, batch, device, pool

    def pictures(self, index: Index) -> Iterator[Tensor | None]:
        """Return [3, height, width] of each, in order; None for one that does not decode."""
        # Read here: descriptors of the index are for one thread.
        return in_order(self.pool, self._decode, map(index.read_image, range(len(index))), ahead=3 * self.batch)

    def _decode(self, data: bytes) -> Tensor | None:
        from PIL import Image

        try:
            return self.clip.preprocess(on_white(Image.open(io.BytesIO(data), formats=[read_header(data).format])))
        except Exception:  # noqa: BLE001 - Pillow's decoders raise almost any class on damaged data; the caller counts them
            return None

    @torch.inference_mode()
    def best_cosines(self, pictures: Sequence[Tensor | None], captions: Sequence[Sequence[str]]) -> np.ndarray:
        """Return [pictures] the greatest cosine of each with one of its captions; NaN where there is none."""
        pairs = [(number, caption) for number, picture in enumerate(pictures) if picture is not None for caption in captions[number]]
        best = torch.full((len(pictures),), -torch.inf, device=self.device)
        if pairs:
            decoded = torch.stack([torch.zeros_like(next(p for p in pictures if p is not None)) if p is None else p for p in pictures])
            images = normalize(self.clip.model.encode_image(decoded.to(self.device)).float(), dim=-1)
            for first in range(0, len(pairs), self.batch):
                numbers, texts = zip(*pairs[first:first + self.batch], strict=True)
                encoded = normalize(self.clip.model.encode_text(self.clip.tokenize(list(texts)).to(self.device)).float(), dim=-1)
                owners = torch.tensor(numbers, device=self.device)
                best.scatter_reduce_(0, owners, (images[owners] * encoded).sum(-1), "amax")
        return best.masked_fill(best.isneginf(), torch.nan).cpu().numpy()


def _score_shard(rewriter: Rewriter, shard: Shard, scorer: Scorer, advance: Advance) -> tuple[Shard, dict[str, int]]:
    import pyarrow as pa

    batch = read_index(rewriter.parent.folder, shard)
    captions, scores, undecoded = iter(batch.column("captions").to_pylist()), [np.zeros(0, np.float32)], 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow warns of, an odd animation or profile, is not ours to print for every file
        pictures = scorer.pictures(Index(rewriter.parent.folder, Shards.of([shard])))
        while chunk := list(islice(pictures, scorer.batch)):
            scores.append(scorer.best_cosines(chunk, list(islice(captions, len(chunk)))))
            undecoded += sum(picture is None for picture in chunk)
            advance(len(chunk))
    best = np.concatenate(scores)
    column = pa.array(best, pa.float32())
    place = batch.schema.get_field_index(COLUMN)
    scored = batch.append_column(COLUMN, column) if place < 0 else batch.set_column(place, COLUMN, column)
    counts = {"images": shard.count, "without a score": int(np.isnan(best).sum()), "of which do not decode": undecoded}
    return rewriter.write(shard, scored, counts=counts), counts
