"""Micro-batches made by a pool of Ray actors, the feeders, on whatever CPUs they have: the trainer's side.

The trainer asks for a bounded number ahead and gets them in order, whoever made them. It has no Ray itself: feeder_pool.py's process has, and when
that or the pool is gone, the trainer makes the next micro-batch with its own cores.
"""

import os
import pickle
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain, islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from torch.utils.data import Dataset

from flm_scale.batch import Batch, restored
from flm_scale.config import Run
from flm_scale.data.actors import LEAST_STORE_BYTES, cluster_address, remove_abandoned_folders
from flm_scale.data.feeder_pool import GoneError, PoolOptions, serve

AHEAD = 4
"""Micro-batches a feeder that are asked for before they are needed, as with torch's loader."""
START_SECONDS, BATCH_SECONDS = 120.0, 60.0
"""Until a feeder is there, and for one micro-batch, before it is replaced; both well below log.stall_timeout."""
END_SECONDS = 15.0
"""For Ray to end."""

Order = TypeVar("Order")


def fed_by_ray(dataset: Dataset[Batch], orders: Iterator[Order], run: Run, *,
               otherwise: Callable[[Iterator[Order]], Iterable[Batch]]) -> Iterator[Batch]:
    """Yield the batch that the dataset makes of each order.

    otherwise: makes those that the feeders have not handed over, when there are none any more.
    Raises what the dataset raises, in its place, and ConfigError when there is no cluster at data.ray_address.
    """
    ahead = AHEAD * run.data.feeders
    batch_bytes = run.batch.images * run.vision.frames * 3 * run.vision.image_size**2
    options = PoolOptions(run.data.feeders, dict(label.split("=", 1) for label in run.data.feeder_labels), cluster_address(run.data.ray_address),
                          LEAST_STORE_BYTES + ahead * batch_bytes, START_SECONDS, BATCH_SECONDS)
    asked: deque[Order] = deque()
    try:
        with Feeders(dataset, options) as feeders:
            while True:
                for order in islice(orders, ahead - len(asked)):
                    asked.append(order)
                    feeders.ask(order)
                if not asked:
                    return
                batch = feeders.next()
                asked.popleft()
                yield batch
    except GoneError as error:
        print(f"flm: the feeders are gone ({error}); from here on data.workers ({run.data.workers}) of the trainer's own machine decode",
              file=sys.stderr)
    yield from otherwise(chain(asked, orders))


class Feeders:
    """A pool in a process of its own; a context manager, which ends it and, where the pool has started it, Ray."""

    def __init__(self, dataset: Dataset[Batch], options: PoolOptions) -> None:
        """dataset: makes a batch of an order; sent to every feeder."""
        # Not a fork: that would carry over the trainer's memory and threads, and what it holds of Ray where it is one of Ray's workers.
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, pickle.dumps(dataset), options), name="feeders", daemon=True)
        self._come: SimpleQueue[Batch | Exception] = SimpleQueue()
        self._thread = Thread(target=_receive, args=(self._connection, self._come, options.start_seconds), name="feeders", daemon=True)
        self._process.start()
        theirs.close()
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        _hang_up(self._connection)
        self._thread.join()
        self._process.join(END_SECONDS)
        self._process.kill()
        self._process.join()
        self._connection.close()
        remove_abandoned_folders()  # where it was killed

    def ask(self, order: object) -> None:
        """Ask for a batch. Raises GoneError."""
        try:
            self._connection.send_bytes(pickle.dumps(order))
        except OSError as error:
            raise self._end() from error

    def next(self) -> Batch:
        """Return the next batch of those that were asked for. Raises GoneError, UserError and what the dataset raises."""
        come = self._come.get()
        if isinstance(come, Exception):
            raise come
        return come

    def _end(self) -> Exception:
        """Return why it has ended, behind the batches that had come before."""
        while not isinstance(come := self._come.get(), Exception):
            pass
        return come


def _receive(connection: Connection, come: "SimpleQueue[Batch | Exception]", seconds: float) -> None:
    """Take in what the process sends, beside the training; pixels go straight into memory that a GPU can read from.

    seconds: until its first sign of life.
    """
    with socket.socket(fileno=os.dup(connection.fileno())) as pixels_in:
        try:
            while True:
                pixels_in.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(seconds), 0))
                message: Any = connection.recv()
                seconds = BATCH_SECONDS
                if isinstance(message, bytes):
                    batch = restored(pickle.loads(message), room_for_pixels=True)  # noqa: S301 - the feeders are ours
                    _fill(batch.state.rows.numpy().data.cast("B"), pixels_in)
                    come.put(batch.pin_memory() if torch.cuda.is_available() else batch)
                elif isinstance(message, str):
                    print(f"flm: {message}", file=sys.stderr)
                elif message is not None:
                    come.put(message)
        except BlockingIOError:
            come.put(GoneError(f"their process has said nothing for {seconds:g} s"))
        except (EOFError, OSError):
            come.put(GoneError("their process has ended"))
        except Exception as error:  # noqa: BLE001 - or the trainer would wait for ever
            come.put(GoneError(f"their process has sent {error!r}"))
        finally:
            _hang_up(connection)


def _fill(memory: memoryview, source: socket.socket) -> None:
    while memory:
        count = source.recv_into(memory, 0, socket.MSG_WAITALL)
        if not count:
            raise EOFError
        memory = memory[count:]


def _hang_up(connection: Connection) -> None:
    """End a connection for all threads and both sides, also where a fork still holds it."""
    with socket.socket(fileno=os.dup(connection.fileno())) as both, suppress(OSError):  # the other side may have
        both.shutdown(socket.SHUT_RDWR)
