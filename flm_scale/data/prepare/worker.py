"""The worker's side of the fleet: what a task is, and the process that does one after another."""

import os
import re
import resource
import socket
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol, TypeVar

START = "start"
"""The stage before the first beat."""


class Task(Protocol):
    """What the fleet needs to know of a task."""

    @property
    def name(self) -> str:
        """Return what tells it from the others, and what people call it."""
        ...


T_contra = TypeVar("T_contra", bound=Task, contravariant=True)


class Work(Protocol[T_contra]):
    """What a worker does with a task; pickled once for each worker."""

    def __call__(self, task: T_contra, *, attempt: int, skip: Collection[int], beat: Callable[[int, str], None]) -> dict[str, Any]:
        """Do it and return small JSON.

        attempt: unlike any other attempt's.   skip: rows that have killed workers.   beat: to be told row and stage before each risky step.
        """
        ...


class Worker:
    """A Ray actor's process. `pulse` is answered by a thread of its own while `do` works."""

    def __init__(self, work: Work[Any], folder: Path, memory_bytes: int) -> None:
        """folder: for the notes.   memory_bytes: that it may take beyond what it has now."""
        self._work, self._folder = work, folder
        self._now: tuple[int, str, float] | None = None
        """Row, stage and since when; None between tasks."""
        limit_memory(memory_bytes)

    def pulse(self) -> tuple[str, int, str, float]:
        """Return host, row, stage, and since how many seconds."""
        row, stage, since = self._now or (-1, START, time.monotonic())
        return socket.gethostname(), row, stage, time.monotonic() - since

    def do(self, task: Task, attempt: int, skip: frozenset[int]) -> dict[str, Any]:
        """Do one task."""
        note = os.open(note_of(self._folder, task, attempt), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

        def beat(row: int, stage: str) -> None:
            self._now = row, stage, time.monotonic()
            os.pwrite(note, b"%-40s" % f"{row} {stage}".encode(), 0)

        try:
            beat(-1, START)
            return self._work(task, attempt=attempt, skip=skip, beat=beat)
        finally:
            os.close(note)
            self._now = None


def limit_memory(more_bytes: int) -> None:
    """Let this process take so much more memory of its own: what needs more ends in an error.

    Address space would count mapped files too, and libraries that are loaded later.
    """
    used = int(re.findall(r"VmData:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + more_bytes, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def note_of(folder: Path, task: Task, attempt: int) -> Path:
    """Return where an attempt notes what it is at: exact when the worker dies, unlike its last pulse, and written out however its process ends."""
    return folder / f"{task.name.replace('/', '-')}.{attempt}"


def read_note(note: Path) -> tuple[int, str]:
    """Return the row and stage that an attempt came to, and remove the note."""
    try:
        row, stage = note.read_text(encoding="ascii").split()
        note.unlink()
        return int(row), stage
    except (OSError, ValueError):  # never written, or on a node that took it along
        return -1, START
