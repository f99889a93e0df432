"""One process of each model replica reads for all: four processes train real shards, on three layouts, and with a reader that fails."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.conftest import write_toy
from tests.distributed.launch import run_worker
from tests.distributed.replica_worker import CANNOT_READ, FAILURES, LAYOUTS, arguments, trained
from tests.test_train import lines_of

pytestmark = pytest.mark.slow

BAD = "000003"
READERS = {"two by two": [0], "two tensor ranks, two replicas": [0, 2], "two stages, two replicas": [0, 1]}
FIRST_STAGE = {"two by two": [0, 1], "two tensor ranks, two replicas": [0, 1, 2, 3], "two stages, two replicas": [0, 1]}


class Launch(NamedTuple):
    out: Path
    alone: dict[str, Any]
    """What one process of plain PyTorch did, in OUT/alone."""

    def ranks(self, name: str) -> list[dict[str, Any]]:
        return [json.loads((self.out / f"{name}-{rank}.json").read_text()) for rank in range(4)]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """One picture of the dataset is none."""
    out = tmp_path_factory.mktemp("replicas")
    data = write_toy(out / "data", bad=frozenset({int(BAD)})).folder
    # A process that waits for one that has ended would wait for half an hour.
    run_worker("replica_worker", data, out, processes=4, timeout=400)
    return Launch(out, trained(arguments(data, out / "alone")))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_replica_that_reads_once_trains_and_validates_like_one_process(launch: Launch, layout: str) -> None:
    """And stands at the same place in the data."""
    found, expected = lines_of(launch.out / layout), lines_of(launch.out / "alone")
    for name, number in (("loss", 6), ("validation/loss", 2), ("bad_images", 6)):
        values = [line[name] for line in found if name in line]
        assert len(values) == number
        assert values == pytest.approx([line[name] for line in expected if name in line], rel=1e-5)
    assert state_of(launch.out / layout) == state_of(launch.out / "alone")


def state_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "checkpoints/step-000006/state.json").read_text())["loader"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_reading_process_of_a_replica_opens_pictures(launch: Launch, layout: str) -> None:
    decoded = [outcome["decoded"] for outcome in launch.ranks(layout)]
    assert [rank for rank, number in enumerate(decoded) if number] == READERS[layout]
    if len(READERS[layout]) == 1:  # several replicas validate on some pictures twice, to stay in step
        assert sum(decoded) == launch.alone["decoded"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pixels_are_held_on_the_first_stage_alone(launch: Launch, layout: str) -> None:
    held = [outcome["pixel_bytes"] for outcome in launch.ranks(layout)]
    assert [rank for rank, number in enumerate(held) if number > 1] == FIRST_STAGE[layout]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_picture_left_out_is_named_by_the_reading_process_as_often_as_by_one_process(launch: Launch, layout: str) -> None:
    named = [len(re.findall(rf"left out, not readable: .*{BAD}", outcome["console"])) for outcome in launch.ranks(layout)]
    assert sum(named) == len(re.findall(rf"left out, not readable: .*{BAD}", launch.alone["console"])) > 0
    assert {rank for rank, number in enumerate(named) if number} <= set(READERS[layout])


@pytest.mark.parametrize("failure", FAILURES)
def test_an_error_of_the_reading_process_ends_all_with_one_line(launch: Launch, failure: str) -> None:
    """Every process exits with 2; the log of each says why."""
    outcomes = launch.ranks(failure)
    assert [outcome["code"] for outcome in outcomes] == [2, 2, 2, 2]
    said = [line for outcome in outcomes for line in outcome["console"].splitlines() if not re.match(r"step |flm: debug: |.* left out", line)]
    assert said == [f"flm: {CANNOT_READ}"]
    if failure != "while it is built":  # logs begin with the first step
        assert all(f"DataError: {CANNOT_READ}" in (launch.out / failure / f"logs/rank_{rank}.log").read_text() for rank in range(4))
