"""Micro-batches, ready to train on, in an order that depends on dataset, seed and epoch alone.

order.py says which samples of a dataset make its micro-batch k, a fixed schedule says which dataset of a mixture comes when; workers read,
decode, corrupt and pack; every process takes its share of a step. The state is small JSON, a counter of micro-batches and what they are of,
without a rank or a worker count in it, so a run goes on with the next sample on any layout.
"""

import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from itertools import count, islice
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from flm_scale.batch import Batch, Example
from flm_scale.config import AugmentConfig, DataConfig, Run, micro_steps
from flm_scale.data import shards
from flm_scale.data.ahead import LEAST_SHARE, Chunks, Droppable, ReadAhead, machines_of, tasks
from flm_scale.data.augment import decode_augmented
from flm_scale.data.feeders import fed_by_ray
from flm_scale.data.index import Index
from flm_scale.data.order import Costs, MicroBatch, Shuffle, keyed_rng, plan_in_order
from flm_scale.data.pack import pack, without_targets
from flm_scale.data.sidecars import TokenIds
from flm_scale.data.storage import StorageError, Url
from flm_scale.data.tokens import AnyTokenizer, LmTokenizer, Tokenizer
from flm_scale.errors import DataError
from flm_scale.objectives.objective import Objective

PREFETCHED = 4
"""Micro-batches a worker that are asked for before they are needed."""


class Order(NamedTuple):
    """One micro-batch to make."""

    epoch: int
    entries: MicroBatch
    counts: bool = True
    """False for one that only keeps the ranks in step at the end of an evaluation."""
    source: int = 0
    """Which dataset of a mixture it is of."""


class MicroBatches(Dataset[Batch]):
    """Makes the micro-batch that an Order names; lives in the workers."""

    def __init__(self, index: Index, token_ids: TokenIds | Sequence[Sequence[np.ndarray]], objective: Objective, *, seed: int, image_size: int,
                 frames: int = 1, prefix: str = "", augment: AugmentConfig | None = None) -> None:
        """token_ids: of each caption of each image.   frames: that are seen of a clip.   augment: of training pictures.
        prefix: stands before every sample key, so that the keys of a mixture are distinct.
        """
        self.index, self.token_ids, self.objective, self.seed, self.image_size = index, token_ids, objective, seed, image_size
        self.frames = frames
        self.prefix, self.augment = prefix, augment or AugmentConfig()

    def __getitem__(self, order: Order) -> Batch:
        """Read, decode, corrupt, pack."""
        self.fetch(order)
        pixels = np.empty((len(order.entries), *clip_axis(self.frames), 3, self.image_size, self.image_size), np.uint8)
        images: list[list[Example]] = []
        keys, bad_keys = self.keys(order), []
        for row, ((image, captions), key) in enumerate(zip(order.entries, keys, strict=True)):
            token_ids = self.token_ids[image]
            views = [view for caption in captions
                     for view in self.objective.corrupt(token_ids[caption], keyed_rng("corrupt", self.seed, order.epoch, key, caption))]
            try:
                pixels[row] = decode_augmented(self.index.read_image(image), size=self.image_size, frames=self.frames, augment=self.augment,
                                               rng=keyed_rng("augment", self.seed, order.epoch, key))
            except DataError:
                # The picture keeps its place, so that nothing behind it moves, and teaches nothing.
                pixels[row] = 128
                bad_keys.append(key)
            images.append(views if order.counts and key not in bad_keys else [without_targets(view) for view in views])
        state = pack(images, pixels)
        return Batch(state, keys=tuple(keys), num_captions=sum(len(entry.captions) for entry in order.entries), num_tokens=len(state.ids),
                     bad_keys=tuple(bad_keys), part_counts=torch.bincount(state.target_parts, minlength=len(self.objective.parts)))

    def fetch(self, order: Order) -> None:
        """Have what lies elsewhere read all at once."""
        images = [entry.image for entry in order.entries]
        if isinstance(self.token_ids, TokenIds):
            self.token_ids.fetch(images)
        self.index.fetch(images)

    def keys(self, order: Order) -> list[str]:
        """Return the sample key of each image, without reading a picture."""
        return [self.prefix + self.index.keys[entry.image] for entry in order.entries]


class Mixture(Dataset[Batch]):
    """The same for several datasets."""

    def __init__(self, sources: Sequence[MicroBatches]) -> None:
        self.sources = sources

    def __getitem__(self, order: Order) -> Batch:
        """Let the order's dataset make it."""
        return self.sources[order.source][order]

    def keys(self, order: Order) -> list[str]:
        """Return the sample key of each image, without reading a picture."""
        return self.sources[order.source].keys(order)


def clip_axis(frames: int) -> tuple[int, ...]:
    """Return the axis between a batch and its colours: none for single pictures."""
    return (frames,) if frames > 1 else ()


class Loader:
    """Endless training micro-batches of one rank, a step at a time."""

    def __init__(self, run: Run, datasets: Sequence[shards.Dataset], tokenizer: AnyTokenizer, objective: Objective, *, rank: int = 0, size: int = 1,
                 state: dict[str, Any] | None = None) -> None:
        """datasets: those of `open_mixture`.   rank, size: this process among the data-parallel ones.   state: to go on where an earlier run stopped.

        Raises DataError when a dataset has no caption to train on, or the state is of other data.
        """
        self.run, self.rank, self.size = run, rank, size
        self.micro_steps = micro_steps(run.batch, data_parallel_size=size)
        self._shuffles: list[Shuffle] = []
        sources = []
        for number, dataset in enumerate(datasets):
            token_ids = TokenIds(dataset, "train", tokenizer, max_length=run.text.max_length)
            if not len(token_ids.lengths):
                raise DataError(f"{dataset.folder}: the split has no caption to train on; build the dataset again")
            costs = costs_of(token_ids.lengths, token_ids.starts, objective, longest=run.text.max_length)
            self._shuffles.append(Shuffle(costs, dataset.shards("train").counts, run.batch, seed=run.seed,
                                          captions_per_image=run.data.captions_per_image))
            sources.append(MicroBatches(dataset.index("train"), token_ids, objective, seed=run.seed, image_size=run.vision.image_size,
                                        frames=run.vision.frames, prefix=f"{number}/" if len(datasets) > 1 else "", augment=run.data.augment))
        self._dataset = Mixture(sources)
        self._shares = mixture_shares(run.data.weights or [shuffle.length(0) for shuffle in self._shuffles])
        start: dict[str, Any] = {"seed": run.seed, "data": [dataset.root[:16] for dataset in datasets], "tokenizer": tokenizer.fingerprint[:16],
                                 "micro_batch": 0}
        self.state = start if state is None else state
        if self.state | {"micro_batch": 0} != start:
            raise DataError(f"{run.data.path}: the checkpoint's place in the data is {self.state}, and a run on this data begins at {start}; "
                            "resume with the data it had, or train anew in another --run-dir")
        orders = self._orders(self.state["micro_batch"] + rank, stride=size)
        local = partial(torch_loader, self._dataset, workers=run.data.workers, replicas=size)
        self._batches = iter(fed_by_ray(self._dataset, orders, run, otherwise=local) if run.data.feeder == "ray" else local(orders))

    def next_step(self) -> list[Batch]:
        """Return this rank's micro-batches of the next optimizer step and move the state behind it."""
        with _in_one_line():
            batches = list(islice(self._batches, self.micro_steps))
        self.state = self.state | {"micro_batch": self.state["micro_batch"] + self.run.batch.micro_batches}
        return batches

    def keys_of_step(self, step: int) -> list[list[str]]:
        """Return the sample keys of each micro-batch of a step, counted from 1, without reading a picture."""
        return self._keys((step - 1) * self.run.batch.micro_batches)

    def keys_of_last(self, steps: int) -> list[list[list[str]]]:
        """Return the sample keys of each micro-batch, over all replicas, of each of the last steps."""
        first = self.state["micro_batch"] - steps * self.run.batch.micro_batches
        return [self._keys(number) for number in range(first, self.state["micro_batch"], self.run.batch.micro_batches)]

    def _keys(self, first: int) -> list[list[str]]:
        return [self._dataset.keys(order) for order in islice(self._orders(first, stride=1), self.run.batch.micro_batches)]

    def _orders(self, first: int, *, stride: int) -> Iterator[Order]:
        """Return every stride-th micro-batch of the endless row."""
        return mixed_orders(self._shuffles, self._shares, first, stride=stride)


def open_mixture(config: DataConfig, language_tokens: LmTokenizer | None = None) -> list[shards.Dataset]:
    """Open the datasets that a run trains on, the first one first.

    language_tokens: of a frozen language model, which then cuts the captions and not the datasets' own tokenizer.
    Raises DataError when one is not as expected, has another tokenizer, or no token ids.
    """
    first = shards.open_dataset(config.path, manifest_hash=config.manifest_hash, tokenizer_hash="" if language_tokens else config.tokenizer_hash)
    others = [shards.open_dataset(path, manifest_hash=manifest_hash)
              for path, manifest_hash in zip(config.also, config.also_hashes or [""] * len(config.also), strict=True)]
    for other in others:
        if not language_tokens and other.tokenizer_fingerprint != first.tokenizer_fingerprint:
            raise DataError(f"dataset {other.folder} has the tokenizer {other.tokenizer_fingerprint[:12] or '(none)'}; {first.folder} has "
                            f"{first.tokenizer_fingerprint[:12] or '(none)'}; a run has one: build both with the same, or leave data.also out")
    datasets, tokenizer = [first, *others], language_tokens or Tokenizer(first.tokenizer_file)
    for dataset in datasets:
        TokenIds(dataset, "train", tokenizer)  # before a run makes its directory
    return datasets


def mixed_orders(shuffles: Sequence[Shuffle], shares: Sequence[Fraction], first: int, *, stride: int) -> Iterator[Order]:
    """Yield every stride-th micro-batch of a mixture's endless row. Knows no loader, so that one that is dropped ends its feeders at once."""
    for number in count(first, stride):
        source, place = place_in_mixture(number, shares)
        epoch, place = shuffles[source].find(place)
        yield Order(epoch, shuffles[source].micro_batch(epoch, place), source=source)


def mixture_shares(weights: Sequence[float]) -> list[Fraction]:
    """Return for each dataset its share of the micro-batches that no dataset before it takes; the last one's is 1."""
    exact = [Fraction(weight).limit_denominator(10**6) or Fraction(weight) for weight in weights]
    return [weight / sum(exact[number:]) for number, weight in enumerate(exact)]


def place_in_mixture(number: int, shares: Sequence[Fraction]) -> tuple[int, int]:
    """Return which dataset the `number`-th micro-batch of a mixture is of, and how many of that dataset come before it.

    After k micro-batches the first dataset has had floor(k * share), the second as much of what the first one left, and so on: evenly spread,
    each dataset's part a function of the counter alone. Shares 1/3, 1: 1 1 0 1 1 0 ...
    """
    for source, share in enumerate(shares):
        before = number * share.numerator // share.denominator
        if (number + 1) * share.numerator // share.denominator > before:
            return source, before
        number -= before
    raise AssertionError("the last share is 1")


def one_pass(run: Run, dataset: shards.Dataset, split: str, tokenizer: AnyTokenizer, objective: Objective, *, rank: int = 0,
             size: int = 1) -> Iterator[Batch]:
    """Yield every caption of a split once, in order, with corruption that never changes; all ranks get equally many batches."""
    token_ids = TokenIds(dataset, split, tokenizer, max_length=run.text.max_length)
    plan = plan_in_order(costs_of(token_ids.lengths, token_ids.starts, objective, longest=run.text.max_length), run.batch)
    orders = [Order(0, entries) for entries in plan]
    orders += [Order(0, plan[-1], counts=False)] * (-len(plan) % size)
    batches = MicroBatches(dataset.index(split), token_ids, objective, seed=run.seed, image_size=run.vision.image_size,
                           frames=run.vision.frames)
    with _in_one_line():
        yield from torch_loader(batches, orders[rank::size], workers=run.data.workers, replicas=size)


class LookedUp:
    """A table's value for each caption's length. Lengths stay mapped: only those that are asked for are looked up."""

    def __init__(self, table: np.ndarray, lengths: np.ndarray) -> None:
        """table: [longest + 1]; greater lengths count as the longest."""
        self.table, self.lengths = table, lengths

    def __len__(self) -> int:
        """Return the number of captions."""
        return len(self.lengths)

    def __getitem__(self, places: slice | np.ndarray) -> np.ndarray:
        """Return some captions' values."""
        values: np.ndarray = self.table.take(self.lengths[places], mode="clip")
        return values


def costs_of(lengths: np.ndarray, starts: np.ndarray | None, objective: Objective, *, longest: int) -> Costs:
    """Return what each caption takes in a batch. lengths, starts: of `TokenIds`.   longest: captions are cut to so many tokens."""
    views = np.array([objective.num_views(length) for length in range(longest + 1)], np.int64)
    return Costs(LookedUp((np.arange(longest + 1) + objective.num_added) * views, lengths), LookedUp(views, lengths), starts)


def torch_loader(dataset: MicroBatches | Mixture, orders: Iterable[Order], *, workers: int, replicas: int = 1) -> Iterable[Batch]:
    """Return torch's loader over our orders: it keeps their sequence whatever the number of workers.

    replicas: that have their part of a common order; this is one's. The seed that torch draws for its workers is of no use here; from the process's
    generator it would leave that other than in an unbroken run.
    """
    def load(made: Dataset[Batch], asked: Iterable[Any]) -> "DataLoader[Batch]":
        return DataLoader(made, batch_size=None, sampler=asked, num_workers=workers, prefetch_factor=PREFETCHED if workers else None,
                          pin_memory=torch.cuda.is_available(), worker_init_fn=outlive_sigterm, generator=torch.Generator())

    sources = dataset.sources if isinstance(dataset, Mixture) else [dataset]
    if not any(isinstance(source.index.folder, Url) for source in sources):
        return load(dataset, orders)
    least_share = LEAST_SHARE * min(machines_of(os.environ), replicas)
    processes = max(workers, 1)
    reader = ReadAhead(dataset, sources, processes=processes, least_share=least_share)
    chunks = Chunks([source.index for source in sources], replicas=replicas, least_share=least_share)
    asked = tasks(orders, chunks, processes=processes, under_way=workers * PREFETCHED + 1)
    return Droppable(iter(load(reader, asked)), reader.dropped)


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Let a worker's error say what it said there: torch puts the worker's traceback before it."""
    try:
        yield
    except (DataError, StorageError) as error:
        kind = type(error)
        raise kind(str(error).splitlines()[-1].removeprefix(f"{kind.__module__}.{kind.__name__}: ")) from error


def outlive_sigterm(_worker: int) -> None:
    """Ignore a SIGTERM that is not the training process's own: launchers send theirs to workers too, but the step is to be finished."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def end_with_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    Thread(target=end_with_parent, daemon=True).start()
