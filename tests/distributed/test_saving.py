"""Saving beside training on two processes: what one of them meets costs no good checkpoint, and is said once."""

import math
import os
import time
from pathlib import Path

import pytest

from flm_scale.checkpoint import saver, store
from flm_scale.cli import main
from flm_scale.data.shards import Dataset
from flm_scale.engine import deepspeed
from flm_scale.errors import CheckpointError
from tests.distributed.launch import Launch
from tests.test_guard import records
from tests.test_resume import arguments, saved_steps
from tests.test_train import lines_of

pytestmark = pytest.mark.slow


def be_flm(words: list[str], trouble: str) -> int:
    """Be `flm`, with a slow disk and a bad step, or with a disk that one rank cannot write to."""
    rank, write, total_loss = int(os.environ["RANK"]), store.write_rank, deepspeed.total_loss

    def write_slowly(folder: Path, **more: object) -> None:
        if rank == 0:
            time.sleep(2)
        write(folder, **more)

    def write_but_once(folder: Path, **more: object) -> None:
        if rank == 1 and "000002" in folder.name:
            raise CheckpointError("no room")
        write(folder, **more)

    counts_seen = []

    def total_loss_of(sums: object, task: object, counts: object) -> object:
        if not any(counts is one for one in counts_seen):  # a step counts its targets once
            counts_seen.append(counts)
        return total_loss(sums, task, counts) * (math.nan if len(counts_seen) == 3 else 1.0)

    saver.write_rank = write_but_once if trouble == "no room" else write_slowly
    if trouble == "bad step":
        deepspeed.total_loss = total_loss_of
    return main(words)


def run(dataset: Dataset, folder: Path, trouble: str, *more: str) -> tuple[list[int], str]:
    words = arguments(dataset, folder / "run", "--parallel.engine", "deepspeed", "--parallel.zero", "2", "--log.validate-every-steps", "0", *more)
    with Launch(be_flm, words, trouble, processes=2, folder=folder / "said") as launch:
        return launch.wait(200), launch.said()


def test_a_rank_that_cannot_write_costs_one_checkpoint_and_no_time(toy_dataset: Dataset, tmp_path: Path) -> None:
    codes, said = run(toy_dataset, tmp_path, "no room")
    assert codes == [0, 0], said
    assert saved_steps(tmp_path / "run") == [4, 6]
    assert "flm: saving step 2: no room" in said
    assert max(line["save_wait_s"] for line in lines_of(tmp_path / "run") if "save_wait_s" in line) < 60  # of a timeout of 600


def test_a_bad_step_that_ends_a_run_waits_for_the_save_and_is_said_once(toy_dataset: Dataset, tmp_path: Path) -> None:
    codes, said = run(toy_dataset, tmp_path, "bad step")
    assert codes == [2, 2], said
    assert said.count("flm: step 3: loss is nan") == 1
    assert saved_steps(tmp_path / "run") == [2]


def test_rolling_back_waits_for_the_save_and_takes_it(toy_dataset: Dataset, tmp_path: Path) -> None:
    codes, said = run(toy_dataset, tmp_path, "bad step", "--bad-step.policy", "roll_back")
    assert codes == [0, 0], said
    assert said.count("flm: step 3: loss is nan; goes on with the weights of step 2 and passes over the samples of steps 3 to 3") == 1
    assert [record["step"] for record in records(tmp_path / "run")] == [3]
    assert saved_steps(tmp_path / "run") == [2, 4, 6]
