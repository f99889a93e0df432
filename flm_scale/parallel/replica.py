"""The loader of a model replica: one process reads, the others get what it read.

The tensor x pipe processes of a replica train on the same micro-batches. Integers, keys and counts go to all of them; pixels to the first
stage, which encodes them, while a later stage holds a stand-in: their shape, without memory. A replica of one process reads for itself and
sends nothing.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch.distributed as dist

from flm_scale.batch import Batch, restored, without_pixels
from flm_scale.data.loader import Loader
from flm_scale.errors import ToldElsewhereError
from flm_scale.parallel.mesh import Layout


class ReplicaLoader:
    """A replica's Loader and its pass over the validation split, on each of its processes; all of them make the same calls.

    Any call raises what the reading process raises there, and ToldElsewhereError on the others, so that none of them waits for one that has ended.
    """

    def __init__(self, layout: Layout, *, rank: int, build: Callable[[], Loader], one_pass: Callable[[], Iterator[Batch]]) -> None:
        """Collective over the processes of all replicas.   build, one_pass: run on the reading process alone; one_pass is a generator function."""
        self.reader = layout.reader(rank)
        self.reads = rank == self.reader
        self._one_pass = one_pass
        self._group: dist.ProcessGroup | None = None
        self._pixel_group: dist.ProcessGroup | None = None
        # gloo on GPUs too: batches are in the CPU's memory, and NCCL would queue them behind the kernels of the step.
        if layout.tensor * layout.pipe > 1:
            self._group = _own_group([layout.replica(data_index) for data_index in range(layout.data)])
        if layout.tensor > 1:
            self._pixel_group = _own_group([layout.replica(data_index)[:layout.tensor] for data_index in range(layout.data)])
        self._loader: Loader

        def load() -> list[Batch]:
            self._loader = build()
            return []

        self._share(load)

    @property
    def state(self) -> dict[str, Any]:
        """The loader's state, on the reading process; rank 0 is one."""
        return self._loader.state

    def keys_of_last(self, steps: int) -> list[list[list[str]]]:
        """Return the sample keys of each micro-batch, over all replicas, of each of the last steps; on a reading process."""
        return self._loader.keys_of_last(steps)

    def next_step(self) -> list[Batch]:
        """Return the replica's micro-batches of the next optimizer step and move the state behind it."""
        return self._share(lambda: self._loader.next_step())  # noqa: PLW0108 - the others have no loader

    def one_pass(self) -> Iterator[Batch]:
        """Yield the replica's micro-batches of the validation split, one at a time."""
        batches = self._one_pass()
        while batch := self._share(lambda: list(islice(batches, 1))):
            yield from batch

    def _share(self, read: Callable[[], list[Batch]]) -> list[Batch]:
        """Return on every process what `read` returns on the reading one."""
        if self._group is None:
            return read()
        if self.reads:
            try:
                batches = read()
            except Exception as error:
                self._told(f"{type(error).__name__}: {error}")
                raise
            self._told([without_pixels(batch) for batch in batches])
        else:
            told = self._told(None)
            if isinstance(told, str):
                raise ToldElsewhereError(f"rank {self.reader}, which reads for this one, has ended: {told}")
            batches = [restored(fields, room_for_pixels=self._pixel_group is not None) for fields in told]
        if self._pixel_group is not None:
            for batch in batches:
                dist.broadcast(batch.state.rows, self.reader, group=self._pixel_group)
        return batches

    def _told(self, message: list[dict[str, Any]] | str | None) -> Any:  # noqa: ANN401 - the reading process's message
        box = [message]
        dist.broadcast_object_list(box, self.reader, group=self._group)
        return box[0]


def _own_group(groups: list[list[int]]) -> dist.ProcessGroup | None:
    """Make all groups, in the same order on every process as torch wants it, and return the one that this process is in."""
    group: dist.ProcessGroup | None = dist.new_subgroups_by_enumeration(groups, backend="gloo")[0]
    return group
