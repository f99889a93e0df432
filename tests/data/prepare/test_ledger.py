"""What drivers write down, and how they keep out of each other's way."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flm_scale.data.prepare.ledger import FOLDER, Ledger, locked, read_ledger
from flm_scale.errors import DataError


def test_lines_of_all_drivers_come_back_in_order_but_for_those_that_a_kill_has_torn(tmp_path: Path) -> None:
    for attempt in range(3):
        ledger = Ledger(tmp_path)
        ledger.write("started", shard="train/00000.tar", attempt=attempt, node="here")
        ledger.write("failed", shard="train/00000.tar", attempt=attempt, node="here", reason="of a reason\nin two lines", seconds=0.5)
        ledger.close()
        with (tmp_path / FOLDER / f"{attempt:05d}.jsonl").open("ab") as file:
            file.write(b'{"event": "started", "shard": "train/00001.t\xff')
    lines = list(read_ledger(tmp_path))
    assert [(line["event"], line["attempt"]) for line in lines] == [(event, attempt) for attempt in range(3) for event in ("started", "failed")]
    assert lines[1]["reason"] == "of a reason\nin two lines"


def test_a_line_is_on_disk_when_its_writer_is_killed(tmp_path: Path) -> None:
    code = ("import os, sys; from pathlib import Path; from flm_scale.data.prepare.ledger import Ledger; ledger = Ledger(Path(sys.argv[1])); "
            "[ledger.write('started', shard='s', attempt=i, node='n') for i in range(100)]; os.kill(os.getpid(), 9)")
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    assert [line["attempt"] for line in read_ledger(tmp_path)] == list(range(100))


def test_a_second_driver_is_refused_and_told_who_is_at_work(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(DataError, match=f"is being prepared by process {os.getpid()} on "), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_the_lock_of_a_killed_driver_is_taken_over_at_once(tmp_path: Path) -> None:
    code = ("import os, sys; from pathlib import Path; from flm_scale.data.prepare.ledger import locked; held = locked(Path(sys.argv[1])); "
            "held.__enter__(); os.kill(os.getpid(), 9)")
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    assert (tmp_path / FOLDER / "lock").read_text()
    with locked(tmp_path):
        pass


def test_a_lock_that_another_host_holds_unseen_is_respected_as_long_as_it_gives_signs_of_life(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked(tmp_path):
        pass
    lock = tmp_path / FOLDER / "lock"
    lock.write_text("elsewhere 17")
    with pytest.raises(DataError, match="by process 17 on elsewhere"), locked(tmp_path):
        pass
    os.utime(lock, (time.time() - 61, time.time() - 61))
    monkeypatch.setattr("flm_scale.data.prepare.ledger.FOREIGN_LOCK_SECONDS", 0.1)
    with locked(tmp_path):
        before, deadline = lock.stat().st_mtime, time.monotonic() + 30
        while lock.stat().st_mtime == before:  # whatever the driver does meanwhile
            assert time.monotonic() < deadline
            time.sleep(0.01)
