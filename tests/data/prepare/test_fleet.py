"""The fleet on real Ray workers that raise, hang, die and are slow."""

import ctypes
import json
import math
import os
import signal
import time
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from flm_scale.data.prepare.fleet import Event, Fleet, FleetError, FleetOptions
from flm_scale.errors import ConfigError

pytestmark = pytest.mark.slow


class Job(NamedTuple):
    """A task that does as it is told, at each of its attempts."""

    name: str
    folder: Path
    does: tuple[str, ...] = ("well",)
    row: int = 3


def work(job: Job, *, attempt: int, skip: Collection[int], beat: Any) -> dict[str, Any]:
    does = job.does[min(attempt, len(job.does) - 1)]
    beat(0, "fetch")
    if job.row not in skip:
        beat(job.row, "fetch" if does == "dies fetching" else "decode")
        match does:
            case "raises":
                raise ValueError(f"no good: {job.name}")
            case "dies" | "dies fetching":
                os.kill(os.getpid(), signal.SIGKILL)
            case "sleeps":
                time.sleep(1000)
            case "is slow":
                time.sleep(6)
            case "holds the lock":
                ctypes.PyDLL(None).sleep(1000)
            case "wants memory":
                with pytest.raises(MemoryError):
                    bytearray(10**9)
    with (job.folder / job.name).open("a") as file:
        file.write(json.dumps({"pid": os.getpid(), "attempt": attempt, "skip": sorted(skip)}) + "\n")
    return {"name": job.name, "skip": sorted(skip)}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet[Job]]:
    options = FleetOptions(workers=2, row_seconds=3, task_seconds=60, straggler_seconds=1, memory_gb=0.4)
    with Fleet(work, options, folder=tmp_path_factory.mktemp("notes"), risky_stages={"decode"}) as fleet:
        yield fleet


def events_of(pool: Fleet[Job], jobs: list[Job]) -> list[Event[Job]]:
    return [event for event in pool.run(jobs) if event]


def told(events: list[Event[Job]], name: str) -> list[str]:
    return [event.kind for event in events if event.task.name == name]


def test_every_task_is_done_once_whatever_its_neighbours_do(pool: Fleet[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "options", replace(pool.options, straggler_seconds=math.inf))  # or what hangs might be overtaken first
    jobs = [Job("raises once", tmp_path, ("raises", "well")), Job("dies once", tmp_path, ("dies", "well")),
            Job("hangs", tmp_path, ("sleeps", "well")),
            Job("wedged", tmp_path, ("holds the lock", "well")), Job("raises", tmp_path, ("raises",)), Job("bomb", tmp_path, ("wants memory",)),
            *(Job(f"well {number}", tmp_path) for number in range(6))]
    events = events_of(pool, jobs)
    done = [event.task.name for event in events if event.kind == "done"]
    assert sorted(done) == sorted(job.name for job in jobs if job.name != "raises")
    assert told(events, "raises once") == ["started", "failed", "started", "done"]
    assert told(events, "dies once") == ["started", "killed", "started", "done"]
    assert told(events, "hangs") == told(events, "wedged") == ["started", "failed", "started", "done"]
    assert told(events, "raises") == ["started", "failed"] * 3 + ["given_up"]
    assert told(events, "bomb") == ["started", "done"]
    reasons = {(event.task.name, event.kind): event.reason for event in events}
    assert reasons["raises", "given_up"] == "ValueError: no good: raises (row 3, decode)"
    assert reasons["dies once", "killed"] == "its process died (row 3, decode)"
    assert reasons["wedged", "failed"].endswith("after 3 s (row 3, decode)")
    assert all(len((tmp_path / name).read_text().splitlines()) == 1 for name in done)


def test_a_row_that_kills_its_workers_is_left_out_and_the_task_is_done(pool: Fleet[Job], tmp_path: Path) -> None:
    events = events_of(pool, [Job("killer", tmp_path, ("dies",)), Job("wedges", tmp_path, ("holds the lock",))])
    for name in ("killer", "wedges"):
        assert json.loads((tmp_path / name).read_text())["skip"] == [3]
        assert told(events, name)[-2:] == ["started", "done"]
        assert told(events, name).count("started") == 4


def test_a_task_whose_workers_always_die_elsewhere_is_given_up(pool: Fleet[Job], tmp_path: Path) -> None:
    events = events_of(pool, [Job("doomed", tmp_path, ("dies fetching",))])
    assert told(events, "doomed") == ["started", "killed"] * 10 + ["given_up"]


def test_the_last_slow_task_is_started_twice_and_the_first_to_finish_wins(pool: Fleet[Job], tmp_path: Path) -> None:
    events = events_of(pool, [Job("slow", tmp_path, ("is slow", "well")), *(Job(f"quick {number}", tmp_path) for number in range(4))])
    assert told(events, "slow") == ["started", "started", "killed", "done"]
    assert events[-1].attempt == 1
    assert not list(pool._folder.iterdir())


def test_attempts_are_counted_on_from_an_earlier_driver(pool: Fleet[Job], tmp_path: Path) -> None:
    assert [event.attempt for event in pool.run([Job("again", tmp_path)], first_attempt=lambda _: 7) if event] == [7, 7]


def test_workers_that_never_start_are_an_error_and_not_a_wait(pool: Fleet[Job], tmp_path: Path) -> None:
    class Broken:
        def __reduce__(self) -> tuple[Any, ...]:
            return (exec, ("raise ImportError('no such library here')",))

        def __call__(self, task: Job, **_: Any) -> dict[str, Any]:
            raise AssertionError

    options = FleetOptions(workers=2)
    with Fleet(Broken(), options, folder=tmp_path / "notes") as fleet, pytest.raises(FleetError, match=r"no worker starts: .*no such library here"):
        events_of(fleet, [Job("never", tmp_path)])


@pytest.mark.parametrize("values", [{"workers": -1}, {"gpu_workers": -1}, {"row_seconds": 0.0}, {"memory_gb": 0.0}])
def test_options_that_no_worker_could_live_with_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must be 0 or more"):
        FleetOptions(**values)
