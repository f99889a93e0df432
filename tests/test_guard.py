"""Bad steps: which they are, and what each policy makes of them."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flm_scale.batch import LossSums
from flm_scale.cli import main
from flm_scale.data.shards import Dataset
from flm_scale.engine import local
from flm_scale.engine.base import StepResult
from flm_scale.guard import SPIKE_HISTORY, Guard
from tests.test_resume import arguments, course, saved_steps, state_at
from tests.test_train import lines_of

NO_SUMS = LossSums(torch.zeros(1), torch.zeros(1), torch.zeros(1))


def result(loss: float, *, norm: float = 1.0, is_taken: bool = True) -> StepResult:
    return StepResult(NO_SUMS, loss, norm, 0.1, is_taken)


def test_a_spike_is_told_by_the_usual_loss_and_only_where_it_is_looked_for() -> None:
    watchful, blind = Guard(spike_factor=3.0), Guard(spike_factor=0.0)
    for step in range(SPIKE_HISTORY):
        assert watchful.takes(100.0)
        for guard in (watchful, blind):
            assert guard.problem(result(2.0 + step / 100)) == ""
    assert watchful.takes(6.0)
    assert not watchful.takes(7.0)
    assert watchful.problem(result(7.0, is_taken=False)) == "loss 7 is a spike, above 6.285 (bad_step.spike_factor 3 times the usual)"
    assert blind.takes(1e9)
    assert not blind.takes(math.nan)
    assert not Guard(spike_factor=3.0, losses=watchful.losses).takes(7.0)
    watchful.go_back([4.0] * SPIKE_HISTORY)
    assert watchful.takes(7.0)


def test_bad_steps_in_a_row_are_counted_until_a_good_one() -> None:
    guard = Guard(spike_factor=0.0)
    for count in (1, 2):
        assert guard.problem(result(math.nan, is_taken=False)) == "loss is nan"
        assert guard.in_a_row == count
    assert guard.problem(result(1.0, norm=math.inf, is_taken=False)) == "gradient norm is inf"
    guard.problem(result(1.0))
    assert guard.in_a_row == 0


@pytest.fixture
def nan_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the loss of one step, counted from 1 in this process, not a number."""
    def poison(step: int) -> None:
        real, seen = local.total_loss, []

        def total_loss(sums: LossSums, task: object, counts: Tensor) -> Tensor:
            if not any(counts is one for one in seen):  # a step counts its targets once
                seen.append(counts)
            return real(sums, task, counts) * (math.nan if len(seen) == step else 1.0)

        monkeypatch.setattr(local, "total_loss", total_loss)

    return poison


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "bad_steps.jsonl").read_text().splitlines()]


def keys_of(run_dir: Path, step: int, capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    capsys.readouterr()
    assert main(["data", "order", str(run_dir), "--step", str(step)]) == 0
    return [line.split(": ")[1].split() for line in capsys.readouterr().out.splitlines()]


def test_a_bad_step_ends_the_run_by_default_and_the_next_attempt_goes_on_behind_the_checkpoint(
        toy_dataset: Dataset, tmp_path: Path, nan_at: Callable[[int], None], capsys: pytest.CaptureFixture[str]) -> None:
    nan_at(4)
    assert main(arguments(toy_dataset, tmp_path / "run")) == 2
    assert "flm: step 4: loss is nan; weights are as they were before it" in capsys.readouterr().err
    assert saved_steps(tmp_path / "run") == [2]
    assert [(record["step"], record["problem"], record["policy"]) for record in records(tmp_path / "run")] == [(4, "loss is nan", "stop")]
    assert records(tmp_path / "run")[0]["keys"] == keys_of(tmp_path / "run", 4, capsys)
    assert main(arguments(toy_dataset, tmp_path / "run", "--resume")) == 0


def test_a_skipped_step_changes_nothing_and_a_resumed_run_knows_of_it(
        toy_dataset: Dataset, tmp_path: Path, nan_at: Callable[[int], None], capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, skip = tmp_path / "run", ("--bad-step.policy", "skip")
    nan_at(3)
    assert main(arguments(toy_dataset, run_dir, *skip)) == 0
    assert "flm: step 3: loss is nan; the update is skipped; sample keys are in" in capsys.readouterr().err
    assert [line["step"] for line in lines_of(run_dir) if "skipped" in line] == [3]
    whole, at_the_end = course(run_dir), state_at(run_dir, 6)
    assert main(arguments(toy_dataset, run_dir, *skip, "--resume", "4")) == 0
    assert course(run_dir) == whole
    assert state_at(run_dir, 6) == at_the_end


def test_rolling_back_takes_the_last_checkpoint_and_passes_over_the_samples_since(
        toy_dataset: Dataset, tmp_path: Path, nan_at: Callable[[int], None], capsys: pytest.CaptureFixture[str]) -> None:
    """Steps 3 and 4 are as if they had been skipped."""
    back, skipped = tmp_path / "back", tmp_path / "skipped"
    nan_at(4)
    assert main(arguments(toy_dataset, back, "--bad-step.policy", "roll_back")) == 0
    said = capsys.readouterr().err
    assert "flm: step 4: loss is nan; goes on with the weights of step 2 and passes over the samples of steps 3 to 4" in said
    assert [record["step"] for record in records(back)] == [3, 4]
    assert [record["keys"] for record in records(back)] == [keys_of(back, step, capsys) for step in (3, 4)]
    real = local.LocalEngine.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local.LocalEngine, "train_step", lambda engine, batches, *, step, takes: real(
            engine, batches, step=step, takes=lambda _loss: step not in {2, 3}))
        assert main(arguments(toy_dataset, skipped, "--bad-step.policy", "skip")) == 0
    assert state_at(back, 6) == state_at(skipped, 6)


def test_rolling_back_without_a_checkpoint_ends_the_run(toy_dataset: Dataset, tmp_path: Path, nan_at: Callable[[int], None],
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    nan_at(2)
    assert main(arguments(toy_dataset, tmp_path / "run", "--bad-step.policy", "roll_back")) == 2
    assert "flm: step 2: loss is nan, and there is no checkpoint yet to roll back to; weights are as they were" in capsys.readouterr().err
    assert [record["step"] for record in records(tmp_path / "run")] == [2]


def test_a_run_that_only_meets_bad_steps_ends_whatever_the_policy(toy_dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rate of a million does it without help."""
    wild = ("--optim.kind", "sgd", "--optim.lr", "1e6", "--optim.clip-norm", "0", "--optim.warmup-steps", "0", "--log.validate-every-steps", "0")
    assert main(arguments(toy_dataset, tmp_path / "run", "--bad-step.policy", "skip", *wild, steps=40)) == 2
    assert "(11 bad steps in a row)" in capsys.readouterr().err
