"""The processes that evaluate a run: each holds its tensor piece of its stage's layers and works on its replica's share of the pictures.

Without a launcher there is one process, which holds everything; then no process group is made. Training has its own set-up, DeepSpeed's.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from flm_scale.config import ParallelConfig
from flm_scale.model.assemble import Relay, Turn, alone
from flm_scale.model.parts import Parts, PlainParts
from flm_scale.parallel.mesh import Layout, find_layout, find_ranks, no_meeting

Item = TypeVar("Item")


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
    ranks, missing = find_ranks(os.environ)
    layout = find_layout(parallel, world_size=ranks.size)
    on_gpu = torch.cuda.is_available()
    if layout.size == 1:
        return Processes(0, layout, torch.device("cuda" if on_gpu else "cpu"), PlainParts(), alone)
    os.environ.update(missing)
    device = torch.device("cuda", ranks.local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if on_gpu else "gloo")
        except dist.DistError as error:
            raise no_meeting(error, os.environ) from error
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
