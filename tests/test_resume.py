"""`flm train --resume`: to the bit where nothing changed, refused where what must not change did, never from random."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flm_scale import train
from flm_scale.checkpoint.store import write_rank
from flm_scale.cli import main
from flm_scale.data.shards import Dataset
from flm_scale.errors import CheckpointError
from tests.test_train import ROOT, lines_of

CHANGING = ("seconds", "per_s", "mfu", "wait", "time")
SAVES = ["--log.save-every-steps", "2", "--log.keep-last", "9"]


def arguments(dataset: Dataset, run_dir: Path, *more: str, steps: int = 6) -> list[str]:
    return ["train", "debug", "--data.path", str(dataset.folder), "--run-dir", str(run_dir), "--text.vocab-size", "200",
            "--log.validate-every-steps", "3", "--steps", str(steps), *SAVES, *more]


def course(run_dir: Path) -> list[dict]:
    """All that a run recorded, but for what a clock says."""
    return [{name: value for name, value in line.items() if not any(part in name for part in CHANGING)} for line in lines_of(run_dir)
            if "save_wait_s" not in line]


def state_at(run_dir: Path, step: int) -> bytes:
    """Weights and moments."""
    return (run_dir / f"checkpoints/step-{step:06d}/rank-00000.safetensors").read_bytes()


def saved_steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*"))


@pytest.fixture(scope="module")
def unbroken(toy_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "unbroken"
    assert main(arguments(toy_dataset, run_dir)) == 0
    return run_dir


@pytest.fixture
def broken(unbroken: Path, tmp_path: Path) -> Path:
    """As a kill after step 5 would leave it: two checkpoints, and lines of a step that was not saved."""
    run_dir = shutil.copytree(unbroken, tmp_path / "broken")
    shutil.rmtree(run_dir / "checkpoints/step-000006")
    (run_dir / "metrics.jsonl").write_text("".join(line for line in (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
                                                   if '"step": 6' not in line))
    return run_dir


@pytest.mark.parametrize(("resume", "first"), [(["--resume"], 4), (["--resume", "2"], 2), (["--resume", "{}/checkpoints/step-000002"], 2)], ids=str)
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(unbroken: Path, broken: Path, toy_dataset: Dataset, resume: list[str], first: int,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(toy_dataset, broken, *(word.format(broken) for word in resume))) == 0
    assert f"goes on behind {broken}/checkpoints/step-{first:06d}" in capsys.readouterr().err
    assert course(broken) == course(unbroken)
    assert state_at(broken, 6) == state_at(unbroken, 6)


def test_damaged_checkpoints_are_passed_over_by_name(unbroken: Path, broken: Path, toy_dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    file = broken / "checkpoints/step-000004/rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert main(arguments(toy_dataset, broken, "--resume")) == 0
    said = capsys.readouterr().err
    assert "passed over" in said
    assert "step-000004" in said
    assert "goes on behind" in said
    assert state_at(broken, 6) == state_at(unbroken, 6)


def test_without_a_good_checkpoint_nothing_starts_from_random(broken: Path, toy_dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    before = course(broken)
    for manifest in (broken / "checkpoints").glob("*/manifest.json"):
        manifest.unlink()
    assert main(arguments(toy_dataset, broken, "--resume")) == 2
    assert "none of the 2 checkpoints is good" in capsys.readouterr().err
    assert main(arguments(toy_dataset, broken.with_name("nowhere"), "--resume")) == 2
    assert "no checkpoint" in capsys.readouterr().err
    assert course(broken) == before


@pytest.mark.parametrize(("change", "message"), [
    (["--seed", "1"], "seed 0 there and 1 here"),
    (["--text.width", "64"], "text.width 32 there and 64 here"),
    (["--objective.corruption-rate", "0.5"], "objective.corruption_rate"),
    (["--batch.captions", "7"], "batch.captions"),
    (["--optim.kind", "sgd"], "optim.kind 'adamw' there and 'sgd' here"),
])
def test_what_must_not_change_is_refused_with_the_difference(broken: Path, toy_dataset: Dataset, change: list[str], message: str,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(toy_dataset, broken, "--resume", *change)) == 2
    assert message in capsys.readouterr().err


def test_another_objective_is_refused_with_the_difference(unbroken: Path, toy_dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    words = arguments(toy_dataset, unbroken, "--resume")
    assert main(["train", "demo_mlm", *words[2:], "--optim.warmup-steps", "2"]) == 2
    said = capsys.readouterr().err
    assert "objective.kind 'flm' there and 'mlm' here" in said
    assert "objective.mask_rate None there" in said


@pytest.mark.parametrize(("words", "message"), [
    (["--resume", "lastest"], "--resume lastest: no such checkpoint; give latest, a step of {} (there is: 4, 2) or"),
    (["--resume", "3"], "--resume 3: no such checkpoint"),
    (["--resume", "{}"], "is a run, not a checkpoint; to go on with it use --run-dir {} --resume"),
    (["--resume", "--overwrite"], "--resume goes on with a run and --overwrite replaces it; give one of them"),
])
def test_a_word_that_names_no_checkpoint_is_explained(broken: Path, toy_dataset: Dataset, words: list[str], message: str,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    before = course(broken)
    assert main(arguments(toy_dataset, broken, *(word.format(broken) for word in words))) == 2
    assert message.format(broken) in capsys.readouterr().err
    assert course(broken) == before


def test_a_folder_that_was_renamed_knows_its_step_and_another_run_is_not_overwritten(unbroken: Path, broken: Path, toy_dataset: Dataset,
                                                                                     capsys: pytest.CaptureFixture[str]) -> None:
    best = (broken / "checkpoints/step-000004").rename(broken.with_name("best"))
    before = course(broken)
    assert main(arguments(toy_dataset, broken, "--resume", str(best))) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert course(broken) == before
    assert main(arguments(toy_dataset, broken.with_name("new"), "--resume", str(best))) == 0
    assert [line["step"] for line in lines_of(broken.with_name("new")) if "loss" in line] == [5, 6]
    assert state_at(broken.with_name("new"), 6) == state_at(unbroken, 6)


def test_going_on_behind_an_older_step_sets_later_checkpoints_aside(unbroken: Path, broken: Path, toy_dataset: Dataset) -> None:
    assert main(arguments(toy_dataset, broken, "--resume", "2", "--log.keep-last", "1")) == 0
    assert saved_steps(broken) == [6]
    assert (broken / "checkpoints/superseded-step-000004").is_dir()
    assert state_at(broken, 6) == state_at(unbroken, 6)


def test_a_job_that_is_queued_again_goes_on_with_what_it_left(unbroken: Path, broken: Path, toy_dataset: Dataset, tmp_path: Path) -> None:
    assert main(arguments(toy_dataset, broken, "--requeued")) == 0
    assert state_at(broken, 6) == state_at(unbroken, 6)
    left = tmp_path / "left"
    left.mkdir()
    shutil.copy(unbroken / "run.json", left)
    assert main(arguments(toy_dataset, left, "--requeued")) == 0
    shutil.rmtree(left / "checkpoints")
    assert main(arguments(toy_dataset, left, "--resume", str(unbroken / "checkpoints/step-000004"), "--requeued")) == 0
    assert [line["step"] for line in lines_of(left) if "loss" in line] == [5, 6]


def test_each_process_gets_its_generator_back(broken: Path, toy_dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(torch, "set_rng_state", lambda state: seen.append(bytes(state).hex()))
    assert main(arguments(toy_dataset, broken, "--resume")) == 0
    assert seen == [json.loads((broken / "checkpoints/step-000004/rank-00000.json").read_text())["torch"]]


def test_rate_length_and_engine_may_change(broken: Path, toy_dataset: Dataset) -> None:
    assert main(arguments(toy_dataset, broken, "--resume", "--optim.lr", "1e-4", steps=8)) == 0
    assert json.loads((broken / "changes.jsonl").read_text()) == {"step": 4, "changes": {"steps": [6, 8], "optim.lr": [0.01, 0.0001]}}
    assert [line["step"] for line in lines_of(broken) if "loss" in line] == list(range(1, 9))


def test_a_job_that_is_queued_again_behind_its_last_step_has_nothing_to_do(unbroken: Path, toy_dataset: Dataset,
                                                                           capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(toy_dataset, unbroken, "--requeued")) == 0
    assert "has all its 6 steps; nothing is left to do" in capsys.readouterr().err


def test_a_job_leaves_what_another_job_wrote(broken: Path, toy_dataset: Dataset, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    """Its first start ended before it had a run of its own: then the command means what it says."""
    before = course(broken)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert main(arguments(toy_dataset, broken, "--requeued")) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert course(broken) == before


def test_a_finished_run_has_nothing_to_go_on_with(unbroken: Path, toy_dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(toy_dataset, unbroken, "--resume")) == 2
    assert "has 6 steps already and --steps is 6; ask for more" in capsys.readouterr().err


def test_old_checkpoints_go_when_a_newer_one_is_whole(toy_dataset: Dataset, tmp_path: Path) -> None:
    assert main([*arguments(toy_dataset, tmp_path / "run", steps=8), "--log.keep-last", "1", "--log.keep-every-steps", "4"]) == 0
    assert saved_steps(tmp_path / "run") == [4, 8]


@pytest.mark.parametrize(("full_at", "code"), [(4, 0), (6, 2)])
def test_a_save_that_fails_is_said_and_only_the_last_one_ends_the_run(toy_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                      capsys: pytest.CaptureFixture[str], full_at: int, code: int) -> None:
    def write_unless_full(folder: Path, **more: object) -> None:
        if f"{full_at:06d}" in folder.name:
            raise CheckpointError("No space left on device")
        write_rank(folder, **more)

    monkeypatch.setattr("flm_scale.checkpoint.saver.write_rank", write_unless_full)
    assert main(arguments(toy_dataset, tmp_path / "run")) == code
    assert f"flm: saving step {full_at}: No space left on device" in capsys.readouterr().err
    assert saved_steps(tmp_path / "run") == sorted({2, 4, 6} - {full_at})
    assert not list((tmp_path / "run/checkpoints").glob("*.partial"))
    assert len([line for line in lines_of(tmp_path / "run") if "loss" in line]) == 6


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that has room for two checkpoints and what else a run writes. Skipped where this user may not mount, but not in CI."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        assert not os.environ.get("CI")
        pytest.skip("mounting a file system needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3500k", "flm", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.slow
def test_a_disk_that_is_full_costs_no_step_and_no_good_checkpoint_and_with_room_the_run_goes_on(toy_dataset: Dataset, tmp_path: Path,
                                                                                                small_disk: Path,
                                                                                                capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = small_disk / "run"
    assert main(arguments(toy_dataset, run_dir, steps=8)) == 2
    said = capsys.readouterr().err
    for step in (6, 8):
        assert re.search(rf"^flm: saving step {step}: .*step-00000{step}.partial.*cannot be written \(No space left on device\)", said, re.MULTILINE)
    assert f"flm: {run_dir}: the last step, 8, could not be saved; make room and add --resume" in said
    assert "Traceback" not in said
    assert saved_steps(run_dir) == [2, 4]
    assert main(["checkpoint", "verify", str(run_dir)]) == 0
    assert [line["step"] for line in lines_of(run_dir) if "loss" in line] == list(range(1, 9))
    shutil.rmtree(run_dir / "checkpoints/step-000002")
    assert main([*arguments(toy_dataset, run_dir, "--resume", steps=8), "--log.save-every-steps", "0"]) == 0
    assert main(arguments(toy_dataset, tmp_path / "unbroken", steps=8)) == 0
    assert course(run_dir) == course(tmp_path / "unbroken")
    assert state_at(run_dir, 8) == state_at(tmp_path / "unbroken", 8)


def after_each_step(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> None:
    record = train.Recorder.step

    def record_and_act(self: train.Recorder, step: int, *args: Any, **more: Any) -> None:
        record(self, step, *args, **more)
        act(step)

    monkeypatch.setattr(train.Recorder, "step", record_and_act)


@pytest.mark.slow
@pytest.mark.parametrize(("trouble", "said"), [("full", "No space left on device"), ("read-only", "Read-only file system")])
def test_a_disk_that_refuses_for_a_while_costs_no_step_and_no_good_checkpoint(toy_dataset: Dataset, tmp_path: Path, small_disk: Path,
                                                                              monkeypatch: pytest.MonkeyPatch,
                                                                              trouble: str, said: str) -> None:
    """The checkpoints' alone. It comes when step 2 is saved and goes when a save has failed."""
    run_dir, log, filling = tmp_path / "run", tmp_path / "run/logs/rank_0.log", small_disk / "filling"
    seen = []

    def act(step: int) -> None:
        if step == 1:
            (run_dir / "checkpoints").symlink_to(small_disk)
        elif not seen and saved_steps(run_dir) and step > 3:
            seen.append("trouble")
            if trouble == "read-only":
                subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
            else:
                with contextlib.suppress(OSError), filling.open("wb", buffering=0) as file:
                    while True:
                        file.write(bytes(2**16))
        elif seen == ["trouble"] and "saving step" in log.read_text():
            seen.append("none")
            subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
            filling.unlink(missing_ok=True)

    after_each_step(monkeypatch, act)
    assert main([*arguments(toy_dataset, run_dir, steps=20), "--log.keep-last", "1"]) == 0
    assert seen == ["trouble", "none"]
    assert re.search(rf"^flm: saving step \d+: .* cannot be written \({said}\)", log.read_text(), re.MULTILINE)
    assert "Traceback" not in log.read_text()
    assert [line["step"] for line in lines_of(run_dir) if "loss" in line] == list(range(1, 21))
    assert saved_steps(run_dir) == [20]
    assert main(["checkpoint", "verify", str(run_dir)]) == 0


@pytest.mark.slow
def test_checkpoints_that_vanish_cost_no_step_and_the_next_save_makes_their_folder_anew(toy_dataset: Dataset, tmp_path: Path,
                                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = tmp_path / "run"
    after_each_step(monkeypatch, lambda step: shutil.rmtree(run_dir / "checkpoints", ignore_errors=True) if step == 9 else None)
    assert main(arguments(toy_dataset, run_dir, steps=20)) == 0
    assert [line["step"] for line in lines_of(run_dir) if "loss" in line] == list(range(1, 21))
    assert saved_steps(run_dir)[-4:] == [14, 16, 18, 20]
    assert main(["checkpoint", "verify", str(run_dir)]) == 0


def test_checkpoints_are_listed_and_verified(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "list", str(broken)]) == 0
    table = capsys.readouterr().out
    assert re.findall(r"^│ (\d+) ", table, re.MULTILINE) == ["4", "2"]
    assert "tensor 1, pipe 1, data 1" in " ".join(table.split())
    assert main(["checkpoint", "verify", str(broken)]) == 0
    file = broken / "checkpoints/step-000004/state.json"
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    assert main(["checkpoint", "verify", str(broken)]) == 2
    said = capsys.readouterr()
    assert "step-000002: every file is as the manifest says" in said.out
    assert "state.json is damaged" in said.err
    assert main(["checkpoint", "list", str(broken.with_name("nowhere"))]) == 2


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_like_the_unbroken_one(toy_dataset: Dataset, tmp_path: Path) -> None:
    steps = 30
    assert main(arguments(toy_dataset, tmp_path / "unbroken", steps=steps)) == 0
    command = [sys.executable, "-m", "flm_scale", *arguments(toy_dataset, tmp_path / "killed", steps=steps)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    for kill in range(3):
        process = subprocess.Popen(command + ["--resume"] * bool(kill), cwd=ROOT, env=one_thread, stderr=subprocess.DEVNULL)
        while max(saved_steps(tmp_path / "killed"), default=0) < 8 * kill + 4:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.013 * kill)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert main([*arguments(toy_dataset, tmp_path / "killed", steps=steps), "--resume"]) == 0
    assert course(tmp_path / "killed") == course(tmp_path / "unbroken")
    assert state_at(tmp_path / "killed", steps) == state_at(tmp_path / "unbroken", steps)
