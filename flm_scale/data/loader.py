"""Micro-batches, ready to train on, in an order that depends on dataset, seed and epoch alone.

order.py says which samples make micro-batch k; workers read, decode, corrupt and pack it; every process takes its share of a step. The
state is small JSON without a rank or a worker count in it, so a run goes on with the next sample on any layout.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from flm_scale.batch import Batch, Example
from flm_scale.config import Run, micro_steps
from flm_scale.data.images import decode_image
from flm_scale.data.order import MicroBatch, keyed_rng, plan_epoch, plan_in_order
from flm_scale.data.pack import pack, without_targets
from flm_scale.errors import DataError
from flm_scale.objectives.objective import Objective

if TYPE_CHECKING:
    from flm_scale.data.shards import Index
    from flm_scale.data.tokens import Tokenizer


class Order(NamedTuple):
    """One micro-batch to make."""

    epoch: int
    entries: MicroBatch
    counts: bool = True
    """False for one that only keeps the ranks in step at the end of an evaluation."""


class MicroBatches(Dataset[Batch]):
    """Makes the micro-batch that an Order names; lives in the workers."""

    def __init__(self, index: "Index", token_ids: list[list[np.ndarray]], objective: Objective, *, seed: int, image_size: int) -> None:
        self.index, self.token_ids, self.objective, self.seed, self.image_size = index, token_ids, objective, seed, image_size

    def __getitem__(self, order: Order) -> Batch:
        """Read, decode, corrupt, pack."""
        pixels = np.empty((len(order.entries), 3, self.image_size, self.image_size), np.uint8)
        images: list[list[Example]] = []
        bad_keys = []
        for row, (image, captions) in enumerate(order.entries):
            key = self.index.keys[image]
            views = [view for caption in captions for view in self.objective.corrupt(
                self.token_ids[image][caption], keyed_rng("corrupt", self.seed, order.epoch, key, caption))]
            try:
                pixels[row] = decode_image(self.index.read_image(image), size=self.image_size)
            except DataError:
                # The picture keeps its place, so that nothing behind it moves, and teaches nothing.
                pixels[row] = 128
                bad_keys.append(key)
            images.append(views if order.counts and key not in bad_keys else [without_targets(view) for view in views])
        state = pack(images, pixels)
        return Batch(state, keys=tuple(self.index.keys[entry.image] for entry in order.entries),
                     num_captions=sum(len(entry.captions) for entry in order.entries), num_tokens=len(state.ids), bad_keys=tuple(bad_keys),
                     part_counts=torch.bincount(state.target_parts, minlength=len(self.objective.parts)))


class Loader:
    """Endless training micro-batches of one rank, a step at a time."""

    def __init__(self, run: Run, index: "Index", tokenizer: "Tokenizer", objective: Objective, *, rank: int = 0, size: int = 1,
                 state: dict[str, Any] | None = None) -> None:
        """rank, size: this process among the data-parallel ones.   state: of an earlier run, to go on where it stopped."""
        self.run, self.rank, self.size = run, rank, size
        self.micro_steps = micro_steps(run.batch, data_parallel_size=size)
        token_ids = encode_captions(index, tokenizer, max_length=run.text.max_length)
        costs = costs_of(token_ids, objective)
        if not any(costs):
            raise DataError(f"{run.data.path}: the split has no caption to train on; build the dataset again")
        # Workers run ahead by an epoch at most.
        self._plan = lru_cache(maxsize=2)(lambda epoch: plan_epoch(costs, run.batch, seed=run.seed, epoch=epoch,
                                                                   captions_per_image=run.data.captions_per_image))
        self.state = state or {"seed": run.seed, "epoch": 0, "cursor": 0}
        dataset = MicroBatches(index, token_ids, objective, seed=run.seed, image_size=run.vision.image_size)
        orders = self._orders(self.state["epoch"], self.state["cursor"] + rank, stride=size)
        self._dataset, self._batches = dataset, iter(torch_loader(dataset, orders, workers=run.data.workers))

    def next_step(self) -> list[Batch]:
        """Return this rank's micro-batches of the next optimizer step and move the state behind it."""
        batches = list(islice(self._batches, self.micro_steps))
        epoch, cursor = self.state["epoch"], self.state["cursor"] + self.run.batch.micro_batches
        while cursor >= (length := len(self._plan(epoch))):
            epoch, cursor = epoch + 1, cursor - length
        self.state = self.state | {"epoch": epoch, "cursor": cursor}
        return batches

    def keys_of_step(self, step: int) -> list[list[str]]:
        """Return the sample keys of each micro-batch of a step, counted from 1, without reading a picture."""
        epoch, skip = 0, (step - 1) * self.run.batch.micro_batches
        while skip >= (length := len(self._plan(epoch))):
            epoch, skip = epoch + 1, skip - length
        return next(self._keys_from(epoch, skip))

    def keys_of_last(self, steps: int) -> list[list[list[str]]]:
        """Return the sample keys of each micro-batch, over all replicas, of each of the last steps."""
        epoch, skip = self.state["epoch"], self.state["cursor"] - steps * self.run.batch.micro_batches
        while skip < 0:
            epoch, skip = epoch - 1, skip + len(self._plan(epoch - 1))
        return list(islice(self._keys_from(epoch, skip), steps))

    def _keys_from(self, epoch: int, skip: int) -> Iterator[list[list[str]]]:
        """Yield the sample keys of each micro-batch, step after step, beginning `skip` micro-batches behind the start of an epoch."""
        upcoming = self._orders(epoch, skip, stride=1)
        while True:
            yield [[self._dataset.index.keys[entry.image] for entry in order.entries]
                   for order in islice(upcoming, self.run.batch.micro_batches)]

    def _orders(self, epoch: int, skip: int, *, stride: int) -> Iterator[Order]:
        """Yield every stride-th micro-batch of the endless row of epochs, beginning `skip` behind the start of one."""
        while True:
            plan = self._plan(epoch)
            yield from (Order(epoch, entries) for entries in plan[skip::stride])
            # The first of this row's micro-batches beyond the epoch's end, counted from the next epoch's start.
            skip = skip - len(plan) if skip >= len(plan) else (skip - len(plan)) % stride
            epoch += 1


def one_pass(run: Run, index: "Index", tokenizer: "Tokenizer", objective: Objective, *, rank: int = 0, size: int = 1) -> Iterator[Batch]:
    """Yield every caption of a split once, in order, with corruption that never changes; all ranks get equally many batches."""
    token_ids = encode_captions(index, tokenizer, max_length=run.text.max_length)
    plan = plan_in_order(costs_of(token_ids, objective), run.batch)
    orders = [Order(0, entries) for entries in plan]
    orders += [Order(0, plan[-1], counts=False)] * (-len(plan) % size)
    dataset = MicroBatches(index, token_ids, objective, seed=run.seed, image_size=run.vision.image_size)
    yield from torch_loader(dataset, orders[rank::size], workers=run.data.workers)


def encode_captions(index: "Index", tokenizer: "Tokenizer", *, max_length: int) -> list[list[np.ndarray]]:
    """Return the token ids of every image's captions; captions without content are dropped."""
    encoded: dict[str, np.ndarray] = {}
    for caption in {caption for captions in index.captions for caption in captions}:
        encoded[caption] = np.array(tokenizer.encode(caption, max_length=max_length), np.int32)
    return [[encoded[caption] for caption in captions if len(encoded[caption]) > 2] for captions in index.captions]


def costs_of(token_ids: list[list[np.ndarray]], objective: Objective) -> list[list[tuple[int, int]]]:
    """Return (text tokens, views) of each caption of each image."""
    views = {length: objective.num_views(length) for length in {len(ids) for captions in token_ids for ids in captions}}
    return [[(len(ids) * views[len(ids)], views[len(ids)]) for ids in captions] for captions in token_ids]


def torch_loader(dataset: Dataset[Batch], orders: Iterator[Order] | Sequence[Order], *, workers: int) -> "DataLoader[Batch]":
    """Return torch's loader over our orders: it keeps their sequence whatever the number of workers.

    The seed that it draws for its workers is of no use here; from the process's generator it would leave that other than in an unbroken run.
    """
    return DataLoader(dataset, batch_size=None, sampler=orders, num_workers=workers, prefetch_factor=4 if workers else None,
                      pin_memory=torch.cuda.is_available(), worker_init_fn=outlive_sigterm, generator=torch.Generator())


def outlive_sigterm(_worker: int) -> None:
    """Ignore a SIGTERM that is not the training process's own: launchers send theirs to workers too, but the step is to be finished."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def end_with_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    Thread(target=end_with_parent, daemon=True).start()
