"""What is counted of a preparation, and what people and monitors are shown."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from flm_scale.data.prepare.fleet import Event
from flm_scale.data.prepare.ledger import FOLDER
from flm_scale.data.prepare.status import Meter, State, as_json, as_prometheus, as_text, read_status, write_status
from flm_scale.errors import DataError


class Shard(NamedTuple):
    """As much of a task as is counted."""

    name: str


def done(number: int, **fates: int) -> Event[Shard]:
    report = {"name": f"train/{number:05d}.tar", "count": fates["success"], "rows": sum(fates.values()), "bytes_in": 10**6, "bytes_out": 10**5,
              "fates": fates, "seconds": {"fetch": 1.0}}
    return Event("done", Shard(report["name"]), attempt=0, node="here", seconds=1.0, result=report)


def meter_of(shards: int) -> Meter:
    return Meter({f"train/{number:05d}.tar": 500 for number in range(shards)}, done={})


def test_shards_of_this_and_of_earlier_drivers_count_once_each() -> None:
    before = done(0, success=400, dns=100).result
    meter = Meter({f"train/{number:05d}.tar": 500 for number in range(3)}, done={"train/00000.tar": before})
    meter.take(Event("failed", Shard("train/00001.tar"), attempt=0, node="here", reason="so it goes"))
    meter.take(done(1, success=300, http_404=200))
    meter.take(Event("given_up", Shard("train/00002.tar"), attempt=2, node="here", reason="disk full"))
    status = meter.status("failed")
    assert (status.shards_done, status.rows_done, status.kept, status.retries) == (2, 1000, 700, 1)
    assert status.fates == {"success": 700, "http_404": 200, "dns": 100}
    assert status.quarantined == {"train/00002.tar": "disk full"}
    assert "quarantined: train/00002.tar: disk full" in as_text(status)


def test_masses_of_one_network_failure_raise_an_alarm_that_says_what_to_do_and_ends_with_them() -> None:
    meter = meter_of(20)
    meter.take(done(0, success=450, dns=50))
    assert not meter.status("running").alarm
    for number in range(1, 4):
        meter.take(done(number, success=100, dns=350, http_404=50))
    alarm = meter.status("running").alarm
    assert alarm.startswith("70% of the last 1,000 rows are lost to dns: look at")
    assert "flm data retry OUTPUT --failed --reason dns" in alarm
    for number in range(4, 7):
        meter.take(done(number, success=450, dns=50))
    assert not meter.status("running").alarm


def test_a_table_of_dead_links_is_no_alarm() -> None:
    meter = meter_of(4)
    for number in range(4):
        meter.take(done(number, success=50, http_404=450))
    assert not meter.status("running").alarm


def test_scoring_is_work_like_any_other_and_raises_no_alarm_for_what_was_fetched_before() -> None:
    meter = meter_of(4)
    for number in range(3):
        meter.take(done(number, success=100, dns=400))
    assert meter.status("running").alarm
    status = meter.status("scoring")
    assert not status.alarm
    assert as_text(status).startswith("scoring  shards 3/4  rows 1,500/2,000  kept 20.0%  retries 0  quarantined 0  ")
    assert " rows/s " in as_text(status)
    assert "\nflm_prepare_running 1" in as_prometheus(status)


def test_prometheus_gets_lines_of_its_format_and_json_what_it_was_made_of() -> None:
    meter = meter_of(2)
    meter.take(done(0, success=400, dns=100))
    status = meter.status("running")
    for line in as_prometheus(status).splitlines():
        assert re.fullmatch(r'# TYPE [a-z_]+ gauge|[a-z_]+(\{[a-z]+="[a-z0-9_]+"\})? -?\d+(\.\d+)?', line), line
    assert 'flm_prepare_fate_rows{fate="dns"} 100' in as_prometheus(status)
    assert type(status)(**json.loads(as_json(status))) == status


@pytest.mark.parametrize("state", ["running", "scoring"])
def test_a_driver_that_was_killed_is_told_from_one_at_work(tmp_path: Path, state: State) -> None:
    (tmp_path / FOLDER).mkdir()
    status = meter_of(2).status(state)
    write_status(tmp_path, status)
    assert read_status(tmp_path) == status
    write_status(tmp_path, replace(status, time=time.time() - 90))
    found = read_status(tmp_path)
    assert found.state == "stopped"
    assert "ALARM: its driver has been silent for 0:01:30: start the same command again" in as_text(found)


def test_a_folder_without_a_preparation_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"tells of no preparation .*; begin: flm data prepare --input X --output {tmp_path}"):
        read_status(tmp_path)
