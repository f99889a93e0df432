"""How well pictures and captions go together, by an open_clip model: a column of the index, made once and filtered by as often as wanted."""

import io
import socket
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from flm_scale.data.clips import is_clip, middle_frame
from flm_scale.data.derive import Advance, Rewriter, Task, derive, in_order
from flm_scale.data.images import on_white, read_header
from flm_scale.data.index import Index, index_columns, read_index
from flm_scale.data.manifest import Derivation, Shard, Shards
from flm_scale.data.prepare.spec import SCORE, ScoreConfig
from flm_scale.data.shards import Dataset
from flm_scale.errors import ConfigError
from flm_scale.model.vision import Clip, load_clip

Device = Literal["auto", "cpu", "cuda"]
DECODERS = {"cpu": 1, "cuda": 8}
"""Threads that decode pictures for one worker of a fleet: on a CPU it has a core, and beside a GPU as many as such a machine has to spare."""


def score(dataset: Dataset, out: Path, *, model: str, pretrained: str, batch: int = 64, device: Device = "auto", workers: int = 4) -> Dataset:
    """Make a dataset with the column `clip_score`: the cosine of each picture and the caption that fits it best; tars are linked.

    Of a clip the frame in its middle counts. NaN where there is no caption or the picture does not decode.
    pretrained: a tag of the model, or a file.   workers: threads that decode.
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
        values = {"column": SCORE, "model": model, "weights_sha256": clip.weights}
        return derive(dataset, out, Derivation(parent=dataset.root, by="score", values=values), tasks)


class Scorer:
    """A model and how it is fed: threads decode the pictures of the next two batches while it runs."""

    def __init__(self, clip: Clip, *, batch: int, device: str, pool: ThreadPoolExecutor) -> None:
        self.clip, self.batch, self.device, self.pool = clip, batch, device, pool

    def scores(self, index: Index, numbers: Sequence[int], captions: Sequence[Sequence[str]]) -> Iterator[tuple[np.ndarray, int]]:
        """Yield the scores of a batch of these pictures, in order, and how many of them do not decode. captions: [numbers] of each."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow warns of, an odd animation or profile, is not ours to print for every file
            # Read here: descriptors of the index are for one thread.
            pictures, texts = in_order(self.pool, self._decode, map(index.read_image, numbers), ahead=3 * self.batch), iter(captions)
            while batch := list(islice(pictures, self.batch)):
                yield self.best_cosines(batch, list(islice(texts, len(batch)))), sum(picture is None for picture in batch)

    def _decode(self, data: bytes) -> Tensor | None:
        from PIL import Image

        try:
            if is_clip(data):
                return self.clip.preprocess(Image.fromarray(middle_frame(data)))
            return self.clip.preprocess(on_white(Image.open(io.BytesIO(data), formats=[read_header(data).format])))
        except Exception:  # noqa: BLE001 - Pillow's decoders raise almost any class on damaged data; the caller counts them
            return None

    @torch.inference_mode()
    def best_cosines(self, pictures: Sequence[Tensor | None], captions: Sequence[Sequence[str]]) -> np.ndarray:
        """Return [pictures] the greatest cosine of each with one of its captions; NaN where there is none.

        The model always sees a whole batch, of zeros and empty texts where there are fewer: kernels are chosen by size, and with others a score's
        last bits would depend on its neighbours.
        """
        pairs = [(number, caption) for number, picture in enumerate(pictures) if picture is not None for caption in captions[number]]
        best = torch.full((len(pictures),), -torch.inf, device=self.device)
        if pairs:
            nothing = torch.zeros_like(next(picture for picture in pictures if picture is not None))
            rows = [nothing if picture is None else picture for picture in pictures] + [nothing] * (self.batch - len(pictures))
            images = normalize(self.clip.model.encode_image(torch.stack(rows).to(self.device)).float(), dim=-1)
            for first in range(0, len(pairs), self.batch):
                some = pairs[first:first + self.batch]
                numbers, texts = zip(*some, *[(0, "")] * (self.batch - len(some)), strict=True)
                encoded = normalize(self.clip.model.encode_text(self.clip.tokenize(list(texts)).to(self.device)).float(), dim=-1)
                owners = torch.tensor(numbers, device=self.device)
                cosines = (images[owners] * encoded).sum(-1)
                best.scatter_reduce_(0, owners[:len(some)], cosines[:len(some)], "amax")
        return best.masked_fill(best.isneginf(), torch.nan).cpu().numpy()


class ShardScorer:
    """What the workers of a preparation score with. It loads the model where it is unpickled, as a worker starts: one that cannot gets no shard."""

    def __init__(self, config: ScoreConfig, device: Literal["cpu", "cuda"]) -> None:
        self.config, self.device = config, device

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arrive in a worker. Raises ConfigError and CheckpointError as `load_scorer`."""
        self.__dict__.update(state)
        if self.device == "cpu":
            torch.set_num_threads(1)  # a worker has one CPU, and more threads would add in another order
        self._scorer = load_scorer(self.config, self.device)

    def __call__(self, folder: Path, shard: Shard, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield the scores of these samples of a shard, a batch at a time."""
        captions, = index_columns(folder, shard, ["captions"])
        for scores, _ in self._scorer.scores(Index(folder, Shards.of([shard])), numbers, [captions[number] for number in numbers]):
            yield scores


def load_scorer(config: ScoreConfig, device: Literal["cpu", "cuda"]) -> Scorer:
    """Return a scorer for one worker. Raises ConfigError and CheckpointError as `load_clip`, and ConfigError where there is no GPU and should be."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"Ray says that {socket.gethostname()} has a GPU, and torch finds none there; install a torch that does, or score on CPUs: "
                          "--gpu-workers 0")
    clip = load_clip(config.model, config.pretrained, device=device, options="--score.")
    return Scorer(clip, batch=config.batch, device=device, pool=ThreadPoolExecutor(DECODERS[device]))


def _score_shard(rewriter: Rewriter, shard: Shard, scorer: Scorer, advance: Advance) -> tuple[Shard, dict[str, int]]:
    import pyarrow as pa

    batch, found, undecoded = read_index(rewriter.parent.folder, shard), [np.zeros(0, np.float32)], 0
    index = Index(rewriter.parent.folder, Shards.of([shard]))
    for scores, damaged in scorer.scores(index, range(shard.count), batch.column("captions").to_pylist()):
        found.append(scores)
        undecoded += damaged
        advance(len(scores))
    best = np.concatenate(found)
    column = pa.array(best, pa.float32())
    place = batch.schema.get_field_index(SCORE)
    scored = batch.append_column(SCORE, column) if place < 0 else batch.set_column(place, SCORE, column)
    counts = {"images": shard.count, "without a score": int(np.isnan(best).sum()), "of which do not decode": undecoded}
    return rewriter.write(shard, scored, counts=counts), counts
