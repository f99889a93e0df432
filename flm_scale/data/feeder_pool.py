"""The process that has Ray: it asks feeders, Ray actors, for micro-batches and hands them to the trainer in order.

It is a process of its own because Ray ends one whose cluster has lost its head. Orders and batches go through it as bytes, so it needs no torch,
and any feeder makes the same bytes of an order: one that dies or hangs is replaced, and what it was asked for is asked of another.
"""

import os
import pickle
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from flm_scale.data.actors import LostError, RaisedError, answer, arrived, joined_ray, kill_actor, start_actor
from flm_scale.errors import UserError

DEPTH = 2
"""Orders that a feeder has: one that it makes, one for when it is done."""
LOSSES = 3
"""Feeders in a row, or as many as there are, without a batch between them: then the pool is given up."""
TICK_SECONDS, PULSE_SECONDS = 0.1, 1.0


class GoneError(Exception):
    """There are no feeders any more, and why."""


class PoolOptions(NamedTuple):
    """Which feeders there are, and what is waited for."""

    feeders: int
    labels: dict[str, str]
    """That a feeder's node must have."""
    address: str
    """Of `cluster_address`."""
    store_bytes: int
    """Of Ray's object store, where Ray is started on this machine."""
    start_seconds: float
    """Until a feeder is there."""
    batch_seconds: float
    """For one micro-batch."""


Answer = tuple[bytes, np.ndarray] | Exception
"""A batch without its pixels, pickled, and the pixels; or what was raised instead."""


class Feeder:
    """An actor's process."""

    def __init__(self, dataset: bytes) -> None:
        """dataset: pickled; makes a batch of an order."""
        self._dataset = pickle.loads(dataset)  # noqa: S301 - the trainer's

    def host(self) -> str:
        """Return where it runs, as a sign that it does."""
        return socket.gethostname()

    def make(self, order: bytes) -> tuple[bytes, np.ndarray]:
        """Return the order's batch: all but the pixels pickled, and the pixels, which Ray does not copy again."""
        from flm_scale.batch import without_pixels

        batch = self._dataset[pickle.loads(order)]  # noqa: S301 - the trainer's
        return pickle.dumps(without_pixels(batch)), batch.state.rows.numpy()


@dataclass(eq=False)
class _Call:
    """An order on its way."""

    order: bytes
    is_asked: bool = False
    answer: Answer | None = None


@dataclass(eq=False)
class _Hand:
    """The pool's view of one feeder."""

    actor: Any
    hello: Any
    """Reference of its first answer, until that is there."""
    heard: float
    host: str = ""
    calls: dict[Any, _Call] = field(default_factory=dict)
    """What it was asked for, by reference."""


class FeederPool:
    """The feeders, and what they were asked for."""

    def __init__(self, dataset: bytes, options: PoolOptions) -> None:
        """dataset: of `Feeder`."""
        self._dataset, self._options = dataset, options
        self._hands: list[_Hand] = []
        self._calls: deque[_Call] = deque()
        self._losses = 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing was asked for that has not been handed out."""
        return not self._calls

    def ask(self, order: bytes) -> None:
        """Have a batch made."""
        self._calls.append(_Call(order))

    def tend(self) -> Iterator[Answer | str]:
        """Wait a moment for the feeders; yield what has come, in the order it was asked for, and remarks for people.

        Raises GoneError when feeder after feeder comes to nothing.
        """
        while len(self._hands) < self._options.feeders:
            actor = start_actor(Feeder, self._dataset, labels=self._options.labels)
            self._hands.append(_Hand(actor, actor.host.remote(), time.monotonic()))
        self._hand_out()
        hands = {reference: hand for hand in self._hands for reference in ([hand.hello] if hand.hello else hand.calls)}
        for reference in arrived(list(hands), seconds=TICK_SECONDS) if hands else ():
            yield from self._take(hands[reference], reference)
        now = time.monotonic()
        for hand in list(self._hands):
            limit = self._options.start_seconds if hand.hello else self._options.batch_seconds
            if (hand.hello or hand.calls) and now - hand.heard > limit:
                yield from self._replace(hand, f"has not {'answered' if hand.host else 'started'} after {limit:g} s")
        while self._calls and (come := self._calls[0].answer) is not None:
            self._calls.popleft()
            yield come

    def _hand_out(self) -> None:
        for call in [call for call in self._calls if not call.is_asked]:
            hand = min((hand for hand in self._hands if hand.host), key=lambda hand: len(hand.calls), default=None)
            if hand is None or len(hand.calls) == DEPTH:
                return
            if not hand.calls:
                hand.heard = time.monotonic()
            hand.calls[hand.actor.make.remote(call.order)] = call
            call.is_asked = True

    def _take(self, hand: _Hand, reference: object) -> Iterator[str]:
        if hand not in self._hands:  # replaced a moment ago
            return
        value: Any
        try:
            value = answer(reference)
        except LostError as error:
            yield from self._replace(hand, str(error) if hand.host else error.last_line)
            return
        except RaisedError as error:
            value = error.original if isinstance(error.original, UserError) else RuntimeError(str(error.__cause__))
        hand.heard = time.monotonic()
        if reference == hand.hello:
            hand.host, hand.hello = value, None
        else:
            hand.calls.pop(reference).answer = value
            self._losses = 0

    def _replace(self, hand: _Hand, reason: str) -> Iterator[str]:
        """Let a feeder go; the next `tend` starts another."""
        self._hands.remove(hand)
        kill_actor(hand.actor)
        for call in hand.calls.values():
            call.is_asked = False
        self._losses += 1
        if self._losses >= max(LOSSES, self._options.feeders):
            raise GoneError(f"{self._losses} in a row have come to nothing, the last: {reason}")
        yield f"a feeder{f' on {hand.host}' if hand.host else ''} is replaced: {reason}"


def serve(connection: Connection, dataset: bytes, options: PoolOptions) -> None:
    """Be the process, until the trainer closes the connection or is gone.

    In come orders; out go batches (see `Answer`, the pixels' bytes behind the message), remarks, exceptions, None as a sign of life.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # goes to all of a terminal's processes; the trainer decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # Ray prints pages when it loses something; what matters is told.
    with open(os.devnull, "w") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    with suppress(EOFError, ConnectionError), socket.socket(fileno=os.dup(connection.fileno())) as pixels_out:
        try:
            with joined_ray(options.address, option="--data.ray-address", cpus=options.feeders, store_bytes=options.store_bytes):
                _serve(FeederPool(dataset, options), connection, pixels_out)
        except (EOFError, ConnectionError):
            raise
        except (GoneError, UserError) as error:
            connection.send(error)
        except Exception as error:  # noqa: BLE001 - whatever has become of Ray, the trainer can do without
            connection.send(GoneError(f"{type(error).__name__}: {error}"))


def _serve(pool: FeederPool, connection: Connection, pixels_out: socket.socket) -> None:
    told = 0.0
    while True:
        while connection.poll(PULSE_SECONDS if pool.is_idle else 0):
            pool.ask(connection.recv_bytes())
        messages: list[Answer | str | None] = [*pool.tend()]
        for message in messages or [None]:
            if isinstance(message, tuple):
                fields, pixels = message
                connection.send(fields)
                pixels_out.sendall(pixels.data)
            elif message is not None or time.monotonic() - told > PULSE_SECONDS:
                connection.send(message)
            else:
                continue
            told = time.monotonic()
