"""A checkpoint of every layout, resumed there to the bit and from another one to rounding. One launch a number of processes.

ZeRO 1 in float32, between any two layouts, is test_pairs.py's.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch

from flm_scale.checkpoint.store import Checkpoint, open_checkpoint
from flm_scale.cli import main
from flm_scale.data.shards import Dataset
from tests.distributed.launch import Launch, run_worker
from tests.distributed.resume_worker import CUTS, STEPS, Cut
from tests.language import write_language_model
from tests.test_resume import arguments, saved_steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ALL = [pytest.param(cut, cut.name(size), id=cut.name(size)) for size, cuts in CUTS.items() for cut in cuts]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("resume")
    write_language_model(out / "language_model")
    for size in CUTS:
        run_worker("resume_worker", out, processes=size, timeout=600)
    return out


def checkpoint_of(outcomes: Path, name: str) -> Checkpoint:
    return open_checkpoint(outcomes / name / "checkpoints" / f"step-{STEPS:06d}", full=True)


@pytest.mark.parametrize(("cut", "name"), ALL)
def test_a_resumed_run_goes_on_to_the_bit(outcomes: Path, cut: Cut, name: str) -> None:
    found = torch.load(outcomes / f"{name}.pt")
    (unbroken, weights), (resumed, weights_again) = found["unbroken"], found["resumed"]
    assert resumed == unbroken
    assert weights.keys() == weights_again.keys()
    assert all(torch.equal(weights_again[weight], value) for weight, value in weights.items())


@pytest.mark.parametrize(("cut", "name"), [case for case in ALL if case.values[0].precision == "fp32"])
def test_a_run_resumed_on_another_layout_has_the_same_losses(outcomes: Path, cut: Cut, name: str) -> None:
    resharded = torch.load(outcomes / f"{name}.pt")["resharded"]
    unbroken, _ = torch.load(outcomes / f"{cut.source}.pt")["unbroken"]
    torch.testing.assert_close(torch.tensor(resharded), torch.tensor(unbroken), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("cut", "name"), ALL)
def test_weights_and_moments_come_back_from_another_layout_to_the_bit(outcomes: Path, cut: Cut, name: str) -> None:
    there, back = checkpoint_of(outcomes, cut.source), checkpoint_of(outcomes, f"{name}-again")
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        assert bool(there.names(kind)) == (kind == "weight" or cut.special != "sgd")
        assert there.names(kind) == back.names(kind)
        for weight in there.names(kind):
            assert torch.equal(there.weight(weight, kind)[:], back.weight(weight, kind)[:]), f"{kind} of {weight}"


def run_in(folders: list[Path], words: list[str]) -> int:
    """Be `flm` in a folder of this rank's own."""
    os.chdir(folders[int(os.environ["RANK"])])
    return main(words)


@pytest.mark.parametrize(("behind", "trouble"), [(0, "not seen"), (1, "not seen"), (0, "not readable")])
def test_ranks_that_see_different_checkpoints_end_with_one_line_and_leave_them(toy_dataset: Dataset, tmp_path: Path, behind: int,
                                                                               trouble: str) -> None:
    """As on a disk that is not quite shared: each has a disk of its own, and on one of them the newest is not seen or not readable."""
    folders = [tmp_path / "0", tmp_path / "1"]
    assert main(arguments(toy_dataset, folders[0] / "run", steps=4)) == 0
    shutil.copytree(*folders)
    newest = folders[behind] / "run/checkpoints/step-000004"
    if trouble == "not seen":
        newest.rename(tmp_path / "unseen")
    else:
        os.truncate(newest / "rank-00000.safetensors", 1000)
    there = [saved_steps(folder / "run") for folder in folders]
    words = arguments(toy_dataset, Path("run"), "--resume", "--parallel.engine", "deepspeed")
    with Launch(run_in, folders, words, processes=2, folder=tmp_path / "said") as launch:
        assert launch.wait(120, patience=60) == [2, 2]
        said = launch.said()
    assert said.count(f"flm: rank {behind} does not see what others see: run/checkpoints/step-000004") == 1
    assert "is the run directory on a disk that all nodes share?" in said
    assert [saved_steps(folder / "run") for folder in folders] == there
