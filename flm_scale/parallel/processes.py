"""The launcher's processes: how they meet, what they tell each other, and their places when they evaluate a run.

An evaluating process holds its tensor piece of its stage's layers and works on its replica's share of the pictures. Without a launcher there
is one process, which holds everything; then no process group is made. Training has its own engines.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from flm_scale.config import ParallelConfig
from flm_scale.errors import ToldElsewhereError, UserError
from flm_scale.model.assemble import Relay, Turn, alone
from flm_scale.model.parts import Parts, PlainParts
from flm_scale.parallel.mesh import Layout, Ranks, find_layout, find_ranks, no_meeting

Item = TypeVar("Item")


def meet(*, patience_seconds: float = 1800.0) -> tuple[Ranks, torch.device]:
    """Bring the launcher's processes together, on gloo or NCCL; return this one's ranks and device. Collective; those that have met stay so.

    patience_seconds: that a collective waits for the slowest of them.
    Raises ConfigError when they cannot meet.
    """
    ranks, missing = find_ranks(os.environ)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", ranks.local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if ranks.size > 1 and not dist.is_initialized():
        os.environ.update(missing)
        try:
            dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=patience_seconds))
        except dist.DistError as error:
            raise no_meeting(error, os.environ) from error
    return ranks, device


def place() -> tuple[int, int]:
    """Return this rank, and how many have met."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def any_rank(asks: bool, device: torch.device) -> bool:
    """Return on every rank whether any of them asks; collective."""
    if not dist.is_initialized():
        return asks
    count = torch.tensor(float(asks), device=device)
    dist.all_reduce(count)
    return bool(count)


def gather(mine: Item) -> list[Item]:
    """Return what every rank gives, by rank; collective."""
    if not dist.is_initialized():
        return [mine]
    found = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def together(work: Callable[[], Item]) -> Item:
    """Return what some work gives on this rank, when it has gone well on all; collective.

    Raises the first rank's UserError on rank 0, which says so, and ToldElsewhereError on the others.
    """
    problem: UserError | None = None
    try:
        result = work()
    except UserError as error:
        problem = error
    for rank, found in enumerate(gather(problem)):
        if found is not None and place()[0]:
            raise ToldElsewhereError(str(found))
        if found is not None:
            raise type(found)(f"rank {rank}: {found}") if rank else found
    return result


@dataclass(frozen=True)
class Processes:
    """This process's place among those that evaluate a run."""

    rank: int
    layout: Layout
    device: torch.device
    parts: Parts
    relay: Relay

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this replica's run of the items. With fewer items than replicas some have none."""
        index, size = self.layout.data_index(self.rank), self.layout.data
        return items[len(items) * index // size : len(items) * (index + 1) // size]

    def gather(self, mine: Sequence[Item]) -> list[Item]:
        """Return what came of every replica's share, in the items' order, on every process. Collective where there are several replicas."""
        if self.layout.data == 1:
            return list(mine)
        found: list[Sequence[Item]] = [()] * self.layout.size
        dist.all_gather_object(found, mine)
        return [item for index in range(self.layout.data) for item in found[self.layout.rank(stage=0, data_index=index, tensor_index=0)]]


def start_processes(parallel: ParallelConfig) -> Processes:
    """Bring the launcher's processes together, on gloo or NCCL, and return this one's place; collective.

    Raises ConfigError, before any of it, when they cannot be cut as `parallel` says; and when they cannot meet.
    """
    layout = find_layout(parallel, world_size=find_ranks(os.environ)[0].size)
    ranks, device = meet()
    parts: Parts = PlainParts()
    if layout.tensor > 1:
        from flm_scale.parallel import tensor

        tensor.start_groups(layout)
        parts = tensor.TensorParts(tensor.tensor_group(), shares_images=parallel.vision == "shard_batch")
    return Processes(ranks.rank, layout, device, parts, _pipe_relay(layout, ranks.rank, device) if layout.pipe > 1 else alone)


def _pipe_relay(layout: Layout, rank: int, device: torch.device) -> "PipeRelay":
    """Return the relay of this rank's stages; collective, because every process takes part in making every group."""
    lines = [[layout.rank(stage=stage, data_index=data_index, tensor_index=tensor_index) for stage in range(layout.pipe)]
             for data_index in range(layout.data) for tensor_index in range(layout.tensor)]
    groups = [dist.new_group(ranks) for ranks in lines]
    return next(PipeRelay(ranks, group, rank, device) for ranks, group in zip(lines, groups, strict=True) if rank in ranks)


class PipeRelay:
    """A model.assemble.Relay over the stages of one replica: each one's rows go to all of them, so in the end all have the last one's.

    Forward only, float32. What a step of generation sends is small, so the rows are not spared the stages that only wait.
    """

    def __init__(self, ranks: Sequence[int], group: dist.ProcessGroup, rank: int, device: torch.device) -> None:
        """ranks: by stage."""
        self.ranks, self.group, self.rank, self.device = ranks, group, rank, device

    def __call__(self, rows: Tensor, turn: Turn) -> Tensor:
        """Return the last stage's rows. rows: what the first stage's turn begins with; the others' begin with those handed on."""
        for rank in self.ranks:
            if rank == self.rank:
                rows = turn(rows).contiguous()
            shape = torch.tensor(rows.shape if rank == self.rank else (0, 0), device=self.device)
            dist.broadcast(shape, rank, group=self.group)
            if rank != self.rank:
                rows = torch.empty(*shape.tolist(), device=self.device)
            dist.broadcast(rows, rank, group=self.group)
        return rows
