"""Where every rank is, in RUN/heartbeats/rank_N.json, and the end of a job that gets nowhere.

Ranks train in step: when one stops, all others soon wait for it. So each rank only watches its own main thread. When that has begun
nothing new for the timeout, the rank writes its stacks into its log, reads where all ranks are, and the job ends with one line that names
the rank which holds the others up: the one whose file grew old (stopped, or its node lost), else the one that is least far.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, TextIO, TypeVar, get_args

Item = TypeVar("Item")
Phase = Literal["start", "load", "receive", "train", "validate", "save", "done"]
"""In the order of a step: two ranks of one step wait for the one in the earlier phase."""

TICK_SECONDS = 10.0
"""Time between two looks, which also write the file; a twelfth of a timeout that is below two minutes."""


class Place(NamedTuple):
    """Where a rank is."""

    step: int
    phase: Phase


class Heartbeat:
    """Says where this rank is, from a thread of its own; a context manager."""

    def __init__(self, run_dir: Path, *, rank: int, size: int, timeout_seconds: float, log: TextIO) -> None:
        """timeout_seconds: without progress before the rank is named; 0 only writes.   log: an open file for the stacks."""
        self.rank, self.size, self.timeout_seconds = rank, size, timeout_seconds
        self._folder, self._log = run_dir / "heartbeats", log
        self._place, self._over = Place(0, "start"), Event()
        self._tick_seconds = min(timeout_seconds / 12 or TICK_SECONDS, TICK_SECONDS)
        self._thread = Thread(target=self._watch, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._folder.mkdir(exist_ok=True)
        self._write()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        if kind is None:
            self.beat(self._place.step, "done")
            self._write()

    def beat(self, step: int, phase: Phase) -> None:
        """Say that this rank begins something. step: counted from 1."""
        self._place = Place(step, phase)

    def along(self, step: int, phase: Phase, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items, with a beat at each."""
        for item in items:
            self.beat(step, phase)
            yield item

    def _watch(self) -> None:
        seen, idle_seconds = self._place, 0.0
        while not self._over.wait(self._tick_seconds):
            # Each beat is a new object, also where it says the same. Looks are counted, because a clock would go on while the job is suspended.
            idle_seconds = idle_seconds + self._tick_seconds if self._place is seen else 0.0
            seen = self._place
            self._write()
            if self.timeout_seconds and idle_seconds > 0.8 * self.timeout_seconds:
                self._end(idle_seconds)

    def _end(self, idle_seconds: float) -> None:
        faulthandler.dump_traceback(self._log)
        heard = [beat for rank in range(self.size) if (beat := self._read(rank))["phase"] != "done"]
        # Clocks of nodes agree to far less than half the timeout.
        silent = [beat for beat in heard if beat["rank"] != self.rank and beat["time"] < time.time() - self.timeout_seconds / 2]
        alive = [beat for beat in heard if beat not in silent]
        if self.rank == min(beat["rank"] for beat in alive):
            print(f"flm: {blame(silent, alive)}: nothing has moved for {idle_seconds:.0f} s, so the job ends; stacks are in "
                  f"{Path(self._log.name).parent}, and where each rank was in {self._folder}", file=sys.stderr, flush=True)
        # The others, a little behind, write their stacks before the launcher ends them all.
        time.sleep(0.1 * self.timeout_seconds)
        os._exit(1)

    def _write(self) -> None:
        beat = {"rank": self.rank, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()} | self._place._asdict()
        part = self._folder / f".rank_{self.rank}.part"
        # A full disk is met by the main thread, which says so; the watch goes on.
        with contextlib.suppress(OSError):
            part.write_text(json.dumps(beat))
            part.replace(self._folder / f"rank_{self.rank}.json")

    def _read(self, rank: int) -> dict[str, Any]:
        try:
            return dict(json.loads((self._folder / f"rank_{rank}.json").read_text()))
        except (OSError, ValueError):
            return {"rank": rank, "host": "unknown", "time": 0.0, "step": 0, "phase": "start"}


def blame(silent: list[dict[str, Any]], alive: list[dict[str, Any]]) -> str:
    """Return who holds the others up: whoever went silent, else who is least far."""
    places = [(beat["step"], get_args(Phase).index(beat["phase"])) for beat in alive]
    culprits = silent or [beat for beat, place in zip(alive, places, strict=True) if place == min(places)]
    named = ", ".join(f"rank {beat['rank']} ({beat['host']}, {beat['phase']} of step {beat['step']})" for beat in culprits[:8])
    return (f"{named}{f' and {len(culprits) - 8} more' if len(culprits) > 8 else ''} {'is' if len(culprits) == 1 else 'are'} "
            f"{'stopped or lost' if silent else 'stuck'}")
