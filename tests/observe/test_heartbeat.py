"""Who is named when a job gets nowhere: real processes, without torch, each at a place where it waits for ever."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from flm_scale.observe.heartbeat import Heartbeat, blame

TIMEOUT = 12
WORKER = """
import sys, time
from pathlib import Path
from flm_scale.observe.heartbeat import Heartbeat
from flm_scale.observe.rank_log import rank_log

def waits_for_the_others():
    time.sleep(600)

rank, size, step, timeout = map(int, sys.argv[1:5])
with rank_log(Path(), rank=rank) as log, Heartbeat(Path(), rank=rank, size=size, timeout_seconds=timeout, log=log) as heartbeat:
    heartbeat.beat(step, sys.argv[5])
    waits_for_the_others()
"""


class Job(NamedTuple):
    folder: Path
    consoles: list[str]
    """What each rank said."""
    seconds: float


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """Jobs of three ranks by name, run side by side. The last rank of `stopped` gets SIGSTOP, like one whose node is lost."""
    places = {"least far": ["3 train", "3 load", "3 train"], "same place": ["3 train"] * 3, "stopped": ["3 train", "3 train", "3 save"]}
    started = time.monotonic()
    folders = {name: tmp_path_factory.mktemp(name.replace(" ", "-")) for name in places}
    processes = {name: [subprocess.Popen([sys.executable, "-c", WORKER, str(rank), "3", step, str(TIMEOUT), phase], cwd=folders[name],
                                         stderr=subprocess.PIPE, text=True)
                        for rank, (step, phase) in enumerate(map(str.split, ranks))] for name, ranks in places.items()}
    beat = folders["stopped"] / "heartbeats/rank_2.json"
    while not (beat.exists() and json.loads(beat.read_text())["step"] == 3):
        assert processes["stopped"][2].poll() is None
        time.sleep(0.1)
    processes["stopped"][2].send_signal(signal.SIGSTOP)
    found = {name: Job(folders[name], [process.communicate(timeout=60)[1] for process in ranks if name != "stopped" or process is not ranks[2]],
                       time.monotonic() - started) for name, ranks in processes.items()}
    processes["stopped"][2].kill()
    processes["stopped"][2].communicate()
    assert {process.returncode for ranks in processes.values() for process in ranks} == {1, -signal.SIGKILL}
    return found


def test_the_rank_that_is_least_far_is_named_on_the_console_once(jobs: dict[str, Job]) -> None:
    folder, consoles, seconds = jobs["least far"]
    assert consoles[0].startswith("flm: rank 1 (")
    assert "load of step 3) is stuck: nothing has moved for 10 s" in consoles[0]
    assert [console.count("\n") for console in consoles] == [1, 0, 0]
    assert seconds < 2 * TIMEOUT
    assert all("in waits_for_the_others" in (folder / f"logs/rank_{rank}.log").read_text() for rank in range(3))


def test_a_stopped_rank_is_named_though_it_was_the_furthest(jobs: dict[str, Job]) -> None:
    assert jobs["stopped"].consoles[0].startswith("flm: rank 2 (")
    assert "save of step 3) is stopped or lost" in jobs["stopped"].consoles[0]
    assert jobs["stopped"].consoles[1] == ""


def test_ranks_at_the_same_place_are_all_named(jobs: dict[str, Job]) -> None:
    assert all(f"rank {rank} (" in jobs["same place"].consoles[0] for rank in range(3))
    assert "are stuck" in jobs["same place"].consoles[0]


def test_of_two_that_wait_for_a_batch_the_one_that_reads_it_is_named() -> None:
    beats = [{"rank": rank, "host": "h", "step": 3, "phase": phase} for rank, phase in enumerate(("receive", "load", "train"))]
    assert blame([], beats) == "rank 1 (h, load of step 3) is stuck"


def test_progress_keeps_a_run_alive_and_its_end_is_told(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log, Heartbeat(tmp_path, rank=0, size=1, timeout_seconds=1.2, log=log) as heartbeat:
        for _ in heartbeat.along(7, "validate", range(10)):
            time.sleep(0.2)
    beat = json.loads((tmp_path / "heartbeats/rank_0.json").read_text())
    assert (beat["step"], beat["phase"]) == (7, "done")
