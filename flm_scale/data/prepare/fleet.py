"""A supervised pool of Ray actors that do tasks, whatever happens to them.

A task goes in, a small result comes out; bytes go from storage to storage and never through Ray's object store. Actors are never restarted by Ray:
one that dies, hangs or runs out of time is killed and replaced here, and its task is done again under a new attempt number. An attempt may still be
at work when the next one starts (a node that is cut off, a straggler that was started twice), so a task must be idempotent: whichever attempt
finishes last leaves the same bytes.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Generic, Literal, NamedTuple, Self, TypeVar

from flm_scale.data.actors import (
    LostError,
    RaisedError,
    answer,
    arrived,
    cluster_address,
    cluster_cpus,
    cluster_gpus,
    joined_ray,
    kill_actor,
    start_actor,
)
from flm_scale.data.prepare.worker import START, Task, Work, Worker, note_of, read_note
from flm_scale.errors import ConfigError, UserError

FAILURES, LOSSES, ROW_DEATHS = 3, 10, 3
"""A task is given up when it has raised or run out of time so often, or when so many of its workers have died: the first is its own doing, the
second mostly the machines'. A row that was at a risky stage at so many deaths is left out."""
TICK_SECONDS, PULSE_SECONDS, COUNT_SECONDS, REMEMBERED = 0.5, 2.0, 10.0, 200
STRAGGLER_FACTOR, DONE_BEFORE_STRAGGLERS = 2.0, 3


class FleetError(UserError):
    """Workers that do not start."""


T = TypeVar("T", bound=Task)


@dataclass(frozen=True)
class FleetOptions:
    """Who does the work, and how long and how much it may take. Nothing of it changes a byte of what comes out."""

    workers: int = 0
    """Worker processes, a CPU each; 0 takes every CPU of this machine, or of the cluster."""
    ray_address: str = ""
    """Of a running Ray cluster; empty takes RAY_ADDRESS, or else starts Ray on this machine."""
    labels: tuple[str, ...] = ()
    """NAME=VALUE that a worker's node must have, as in Ray's label selectors: role=data, or role=!gpu to stay off the GPU hosts."""
    gpu_workers: int | None = None
    """Workers that score, a GPU each, wherever one is; None takes every GPU of the cluster. 0, or a cluster without any, has the others score."""
    row_seconds: float = 300.0
    """Without a sign of progress, after which a worker is replaced."""
    task_seconds: float = 4 * 3600.0
    """For one attempt at a task (a shard)."""
    straggler_seconds: float = 30.0
    """Below this nothing is started twice."""
    memory_gb: float = 4.0
    """What a worker may ask for beyond what it has when it starts, in 10**9 bytes: a decoder that wants more gets an error, and the node lives."""

    def __post_init__(self) -> None:
        if min(self.workers, self.gpu_workers or 0) < 0 or min(self.row_seconds, self.task_seconds, self.memory_gb) <= 0:
            raise ConfigError(f"--workers ({self.workers}) and --gpu-workers ({self.gpu_workers}) must be 0 or more; --row-seconds "
                              f"({self.row_seconds}), --task-seconds ({self.task_seconds}) and --memory-gb ({self.memory_gb}) above 0")

    @property
    def label_selector(self) -> dict[str, str]:
        """The labels by name. Raises ConfigError."""
        for label in self.labels:
            if not label.partition("=")[2]:
                raise ConfigError(f"--labels ({label}) must be NAME=VALUE, such as role=data or role=!gpu")
        return dict(label.split("=", 1) for label in self.labels)


class Beat(NamedTuple):
    """What a worker is at."""

    task: str
    node: str
    row: int
    stage: str
    row_seconds: float
    """Since it began with that."""
    task_seconds: float


class Event(NamedTuple, Generic[T]):
    """What has become of one attempt."""

    kind: Literal["started", "done", "failed", "killed", "given_up"]
    """failed: it raised, or ran out of time. killed: its process or node is gone, or another attempt was quicker. given_up: the task is left out."""
    task: T
    attempt: int
    node: str
    seconds: float = 0.0
    reason: str = ""
    result: Mapping[str, Any] = {}


@dataclass(eq=False)
class _Entry(Generic[T]):
    """One task on its way."""

    task: T
    attempt: int
    """Number of the next one."""
    at_work: int = 0
    failures: int = 0
    losses: int = 0
    deaths: Counter[int] = field(default_factory=Counter)
    skip: set[int] = field(default_factory=set)


@dataclass(eq=False)
class _Hand(Generic[T]):
    """The driver's view of one worker."""

    actor: Any
    pulse: Any = None
    """Reference of the answer that is awaited."""
    asked: float = 0.0
    heard: float = 0.0
    node: str = ""
    """Empty until it has answered for the first time."""
    row: int = -1
    stage: str = START
    row_seconds: float = 0.0
    entry: "_Entry[T] | None" = None
    attempt: int = 0
    started: float = 0.0
    result: Any = None


@contextmanager
def ray_session(options: FleetOptions) -> Iterator[None]:
    """Start Ray on this machine or join a cluster; inside another session it is that one. Raises ConfigError when there is no cluster there."""
    with joined_ray(cluster_address(options.ray_address), option="--ray-address", cpus=options.workers):
        yield


class Fleet(Generic[T]):
    """The pool; a context manager, which starts Ray on this machine or joins a cluster."""

    def __init__(self, work: Work[T], options: FleetOptions, *, folder: Path, risky_stages: Collection[str] = (), on_gpus: bool = False) -> None:
        """folder: for the workers' notes, on a file system that all nodes share.

        risky_stages: at which a row, and not its task, is at fault for a death.   on_gpus: of `gpu_workers`, whatever the labels of their nodes.
        """
        self.options, self._work, self._folder, self._risky = options, work, folder, frozenset(risky_stages)
        self._wanted, self._labels = (options.gpu_workers or 0, {}) if on_gpus else (options.workers, options.label_selector)
        self.workers, self._on_gpus = self._wanted, on_gpus
        self._hands: list[_Hand[T]] = []
        self._waiting: deque[_Entry[T]] = deque()
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)
        self._failed_starts, self._counted = 0, float("-inf")
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Open Ray. Raises ConfigError when there is no cluster at the address."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stack.enter_context(ray_session(self.options))
        self._count_workers()
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        """Kill what is at work: what it has not finished is as if it had not begun."""
        for hand in list(self._hands):
            self._let_go(hand)
        self._stack.close()

    def _count_workers(self) -> None:
        """Take every CPU, or GPU, that the cluster has by now, unless told how many: nodes come and go."""
        if not self._wanted and time.monotonic() - self._counted > COUNT_SECONDS:
            self.workers, self._counted = max(1, cluster_gpus()) if self._on_gpus else cluster_cpus(), time.monotonic()

    @property
    def ready(self) -> int:
        """Return how many workers are there."""
        return sum(bool(hand.node) for hand in self._hands)

    def beats(self) -> list[Beat]:
        """Return what the workers are at, as of a few seconds ago at most; the longest first."""
        now = time.monotonic()
        beats = [Beat(hand.entry.task.name, hand.node, hand.row, hand.stage, hand.row_seconds + now - hand.heard, now - hand.started)
                 for hand in self._hands if hand.entry]
        return sorted(beats, key=lambda beat: -beat.task_seconds)

    @property
    def straggler_seconds(self) -> float:
        """Return after how many seconds an attempt is a straggler; infinite while nothing is known of the usual."""
        usual = median(self._seconds) if len(self._seconds) >= DONE_BEFORE_STRAGGLERS else float("inf")
        return max(self.options.straggler_seconds, STRAGGLER_FACTOR * usual)

    def run(self, tasks: Iterable[T], *, first_attempt: Callable[[T], int] = lambda _: 0) -> Iterator[Event[T] | None]:
        """Do tasks, in about this order, and yield what happens; None at least once a second, so that a caller can tell how it goes.

        first_attempt: the number of a task's first attempt, above those of earlier drivers, whose workers may still be at work.
        Raises FleetError when worker after worker fails to start.
        """
        source = iter(tasks)
        while True:
            self._count_workers()
            while len(self._waiting) < self.workers and (task := next(source, None)) is not None:
                self._waiting.append(_Entry(task, first_attempt(task)))
            if not self._waiting and not any(hand.entry for hand in self._hands):
                return
            yield from self._hand_out()
            yield from self._collect()
            yield from self._check_time()
            yield None

    def _hand_out(self) -> Iterator[Event[T]]:
        wanted = min(self.workers, len(self._waiting) + sum(hand.entry is not None for hand in self._hands))
        while len(self._hands) < wanted:
            self._hands.append(self._start_worker())
        for hand in self._hands:
            if not hand.node or hand.entry:
                continue
            entry, reason = (self._waiting.popleft(), "") if self._waiting else (self._straggler(), "a second time: the first is slow")
            if entry is None:
                return
            hand.entry, hand.attempt, hand.started, hand.heard = entry, entry.attempt, time.monotonic(), time.monotonic()
            hand.row, hand.stage, hand.row_seconds = -1, START, 0.0
            hand.result = hand.actor.do.remote(entry.task, entry.attempt, frozenset(entry.skip))
            entry.attempt += 1
            entry.at_work += 1
            yield Event("started", entry.task, hand.attempt, hand.node, reason=reason)

    def _straggler(self) -> "_Entry[T] | None":
        """Return the task that has taken longest, when that is too long and nobody else does it."""
        alone = [hand for hand in self._hands if hand.entry and hand.entry.at_work == 1]
        slowest = min(alone, key=lambda hand: hand.started, default=None)
        return slowest.entry if slowest and time.monotonic() - slowest.started > self.straggler_seconds else None

    def _start_worker(self) -> "_Hand[T]":
        memory_bytes = int(self.options.memory_gb * 1e9)
        return self._ask(_Hand(start_actor(Worker, self._work, self._folder, memory_bytes, labels=self._labels, threads=["pulse"],
                                           gpus=int(self._on_gpus))))

    def _ask(self, hand: "_Hand[T]") -> "_Hand[T]":
        hand.pulse, hand.asked = hand.actor.pulse.options(concurrency_group="pulse").remote(), time.monotonic()
        return hand

    def _collect(self) -> Iterator[Event[T]]:
        """Wait a moment for results and answers, and take in what has come."""
        hands: dict[Any, _Hand[T]] = {}
        for hand in self._hands:
            if hand.pulse is None and time.monotonic() - hand.heard > PULSE_SECONDS:
                self._ask(hand)
            hands |= {reference: hand for reference in (hand.pulse, hand.result) if reference is not None}
        if not hands:
            time.sleep(TICK_SECONDS)
            return
        for reference in arrived(list(hands), seconds=TICK_SECONDS):
            hand = hands[reference]
            if hand in self._hands:  # not let go a moment ago
                yield from self._take(hand, reference)

    def _take(self, hand: "_Hand[T]", reference: object) -> Iterator[Event[T]]:
        try:
            value = answer(reference)
        except RaisedError as error:
            yield from self._end(hand, "failed", str(error), died=False)
        except LostError as error:
            yield from self._gone(hand, error)
        else:
            if reference is hand.pulse:
                hand.node, hand.row, hand.stage, hand.row_seconds = value
                hand.pulse, hand.heard, self._failed_starts = None, time.monotonic(), 0
            else:
                yield from self._done(hand, value)

    def _done(self, hand: "_Hand[T]", result: Mapping[str, Any]) -> Iterator[Event[T]]:
        entry, seconds = self._free(hand)
        self._seconds.append(seconds)
        note_of(self._folder, entry.task, hand.attempt).unlink(missing_ok=True)
        for other in [other for other in self._hands if other.entry is entry]:
            self._let_go(other)
            _, late_seconds = self._free(other)
            note_of(self._folder, entry.task, other.attempt).unlink(missing_ok=True)
            yield Event("killed", entry.task, other.attempt, other.node, late_seconds, "another attempt was quicker")
        yield Event("done", entry.task, hand.attempt, hand.node, seconds, result=result)

    def _gone(self, hand: "_Hand[T]", error: LostError) -> Iterator[Event[T]]:
        """Replace a worker that has died, or whose node cannot be reached."""
        self._let_go(hand)
        if not hand.node:
            self._failed_starts += 1
            if self._failed_starts > max(FAILURES, self.workers):
                raise FleetError(f"no worker starts: {error.last_line}; every node needs this Python environment and the folder") from error
        if hand.entry:
            yield from self._end(hand, "killed", str(error), died=True)

    def _check_time(self) -> Iterator[Event[T]]:
        now = time.monotonic()
        for hand in [hand for hand in self._hands if hand.entry]:
            silent = now - hand.asked if hand.pulse is not None else 0.0
            for seconds, limit, what in ((hand.row_seconds + now - hand.heard, self.options.row_seconds, "has not moved"),
                                         (silent, self.options.row_seconds, "has not answered"),
                                         (now - hand.started, self.options.task_seconds, "is not done")):
                if seconds > limit:
                    self._let_go(hand)
                    yield from self._end(hand, "failed", f"{what} after {limit:g} s", died=True)
                    break

    def _end(self, hand: "_Hand[T]", kind: Literal["failed", "killed"], reason: str, *, died: bool) -> Iterator[Event[T]]:
        """Take in that an attempt came to nothing: do the task again, or give it up."""
        attempt = hand.attempt
        entry, seconds = self._free(hand)
        row, stage = read_note(note_of(self._folder, entry.task, attempt))
        reason = f"{reason} (row {row}, {stage})" if row >= 0 else reason
        yield Event(kind, entry.task, attempt, hand.node, seconds, reason)
        entry.losses += died
        if died and stage in self._risky:
            entry.deaths[row] += 1
            if entry.deaths[row] == ROW_DEATHS:
                entry.skip.add(row)
                entry.losses = 0
        else:
            entry.failures += kind == "failed"
        if entry.failures >= FAILURES or entry.losses >= LOSSES:
            yield from self._give_up(entry, attempt, hand.node, reason)
        elif not entry.at_work:
            self._waiting.appendleft(entry)

    def _give_up(self, entry: "_Entry[T]", attempt: int, node: str, reason: str) -> Iterator[Event[T]]:
        for other in [other for other in self._hands if other.entry is entry]:
            self._let_go(other)
            self._free(other)
        yield Event("given_up", entry.task, attempt, node, reason=reason)

    def _free(self, hand: "_Hand[T]") -> tuple["_Entry[T]", float]:
        entry, hand.entry, hand.result = hand.entry, None, None
        assert entry
        entry.at_work -= 1
        return entry, time.monotonic() - hand.started

    def _let_go(self, hand: "_Hand[T]") -> None:
        self._hands.remove(hand)
        kill_actor(hand.actor)
