"""Reading ahead where datasets lie elsewhere: a process reads the pictures of its next micro-batch while it decodes those of the present one, and
all processes of a machine share chunks on disk.

A window of the order takes its samples from the same 256 chunks for a thousand micro-batches. So a chunk that a coming one needs is read once, as
one range, and kept until none needs it any more. What is not there, yet or any more, is read as a range a picture: no batch depends on any of it.
"""

import multiprocessing
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import closing
from itertools import islice
from multiprocessing.synchronize import Event
from typing import Any, NamedTuple, Protocol

from torch.utils.data import Dataset, get_worker_info

from flm_scale.batch import Batch
from flm_scale.data.index import Index
from flm_scale.data.order import CHUNK, WINDOW, MicroBatch
from flm_scale.data.storage import Url, in_background

LEAST_SHARE = 0.25
"""Of a chunk's bytes that a machine must need; else it reads a range a picture."""
LOOKED_AHEAD = CHUNK * WINDOW // 2
"""Pictures of the common order whose chunks are read before they are needed: half a window."""
CHUNKS_AT_ONCE = 4
"""That a process reads."""
TICK_SECONDS = 0.1

Chunk = tuple[int, int]
"""A dataset of a mixture, and the first picture of a chunk of it."""


class OrderLike(Protocol):
    """The loader's Order."""

    @property
    def source(self) -> int:
        """Which dataset of a mixture it is of."""
    @property
    def entries(self) -> MicroBatch:
        """The images."""


class Source(Protocol):
    """One dataset of a mixture, as the loader has it."""

    index: Index

    def fetch(self, order: Any) -> None:  # noqa: ANN401 - the loader's Order
        """Have what lies elsewhere read all at once."""


class Task(NamedTuple):
    """What a process is asked for."""

    order: OrderLike
    following: OrderLike | None
    """What it will be asked for next."""
    chunks: tuple[Chunk, ...]
    """That it shall have kept."""


class DroppedError(Exception):
    """Nobody waits for the batch any more."""


def machines_of(environ: Mapping[str, str]) -> int:
    """Return how many machines this job runs on, as its launcher says; as many as processes where it does not."""
    if nodes := environ.get("SLURM_STEP_NUM_NODES"):
        return int(nodes)
    size = int(environ.get("WORLD_SIZE", "1"))
    return -(-size // int(environ.get("LOCAL_WORLD_SIZE", "1")))


class ReadAhead(Dataset[Batch]):
    """Makes what a Task asks for; lives in the workers."""

    def __init__(self, dataset: Dataset[Batch], sources: Sequence[Source], *, processes: int, least_share: float) -> None:
        """dataset: makes the batch of an order.   sources: its datasets.   processes: of `tasks`.   least_share: of `Index.keep_chunk`."""
        self.dataset, self.sources, self.least_share = dataset, sources, least_share
        self.dropped = multiprocessing.Event()
        self._begun: tuple[OrderLike, Future[None]] | None = None
        # Of all processes half a window: what has waited longer comes too late.
        self._chunks: deque[Chunk] = deque(maxlen=max(1, WINDOW // 2 // processes))
        self._copies: list[Future[None]] = []

    def __getitem__(self, task: Task) -> Batch:
        """Have the pictures read, begin with what comes next, make the batch."""
        begun = self._begun if self._begun and self._begun[0] == task.order else self._begin(task.order)
        self._copy(task.chunks)
        while not wait([begun[1]], TICK_SECONDS).done:
            if self.dropped.is_set():  # what a store does not answer may take half a minute
                raise DroppedError
        begun[1].result()
        self._begun = self._begin(task.following) if task.following else None
        return self.dataset[task.order]

    def _begin(self, order: OrderLike) -> tuple[OrderLike, Future[None]]:
        return order, in_background(lambda: self.sources[order.source].fetch(order), is_left=get_worker_info() is not None)

    def _copy(self, chunks: Iterable[Chunk]) -> None:
        """Go on with the chunks, some at a time; where the store is too slow, those that have waited longest are left out."""
        self._chunks.extend(chunks)
        self._copies = [copy for copy in self._copies if not copy.done()]
        while self._chunks and len(self._copies) < CHUNKS_AT_ONCE:
            source, first = self._chunks.popleft()
            self._copies.append(in_background(lambda index=self.sources[source].index, first=first:  # type: ignore[misc]
                                              index.keep_chunk(first, least_share=self.least_share),
                                              is_left=get_worker_info() is not None))


class Chunks:
    """The chunks that are needed from what is being made to the end of what is looked ahead, and which of them are still to be asked for."""

    def __init__(self, indexes: Sequence[Index], *, replicas: int, least_share: float) -> None:
        """indexes: of the datasets of a mixture.   replicas: each has its part of a common order; this is one's.   least_share: of `ReadAhead`."""
        self._indexes, self._replicas = [index if least_share < 1 and isinstance(index.folder, Url) else None for index in indexes], replicas
        self.looked_ahead = LOOKED_AHEAD // replicas if any(index is not None for index in self._indexes) else 0
        self._uses, self._asked, self._waiting, self._seen = Counter[Chunk](), dict[Chunk, int](), deque[Chunk](), 0

    def need(self, order: OrderLike) -> None:
        """Look at an order that comes."""
        self._seen += len(order.entries) * self._replicas
        for chunk in self._of(order):
            self._uses[chunk] += 1
            if chunk not in self._asked or self._asked[chunk] + CHUNK * WINDOW < self._seen:  # again, should another run have removed it
                self._waiting.append(chunk)
                self._asked[chunk] = self._seen

    def ask(self, order: OrderLike) -> tuple[Chunk, ...]:
        """Return what is to be read along with an order: four times what comes in on average, so a window's are read well before they are needed."""
        count, asked = -(-4 * len(order.entries) * self._replicas // CHUNK), list[Chunk]()
        while self._waiting and len(asked) < count:
            if (chunk := self._waiting.popleft()) in self._uses:  # not forgotten meanwhile
                asked.append(chunk)
        return tuple(asked)

    def leave(self, order: OrderLike) -> None:
        """Forget, on disk too, what no order after this one needs."""
        for chunk in self._of(order):
            self._uses[chunk] -= 1
            if not self._uses[chunk]:
                self._forget(chunk)

    def close(self) -> None:
        """Forget all."""
        for chunk in list(self._uses):
            self._forget(chunk)

    def _forget(self, chunk: Chunk) -> None:
        del self._uses[chunk], self._asked[chunk]
        source, first = chunk
        if (index := self._indexes[source]) is not None:
            index.forget_chunk(first)

    def _of(self, order: OrderLike) -> list[Chunk]:
        """Return the chunk of each picture; none of a dataset that is on disk."""
        index = self._indexes[order.source]
        return [(order.source, first) for first in index.chunks([entry.image for entry in order.entries])] if index is not None else []


def tasks(orders: Iterable[OrderLike], chunks: Chunks, *, processes: int, under_way: int) -> Iterator[Task]:
    """Yield a task for each order.

    processes: take them in turn.   under_way: tasks that are asked for before they are made.
    """
    rest, coming, behind, pictures = iter(orders), deque[OrderLike](), deque[OrderLike](), 0
    with closing(chunks):
        while True:
            for order in rest:
                coming.append(order)
                chunks.need(order)
                pictures += len(order.entries)
                if len(coming) > processes and pictures >= chunks.looked_ahead:
                    break
            if not coming:
                return
            order = coming.popleft()
            pictures -= len(order.entries)
            yield Task(order, next(islice(coming, processes - 1, None), None), chunks.ask(order))
            behind.append(order)
            if len(behind) > under_way:
                chunks.leave(behind.popleft())


class Droppable(Iterator[Batch]):
    """Batches of a loader, whose workers are called back from a store that does not answer before torch waits for them to end."""

    def __init__(self, batches: Iterator[Batch], dropped: Event) -> None:
        """dropped: of its ReadAhead."""
        self._batches, self._dropped = batches, dropped

    def __next__(self) -> Batch:
        """Return the next one."""
        return next(self._batches)

    def __del__(self) -> None:
        """Say that nobody waits any more."""
        self._dropped.set()
