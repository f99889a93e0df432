"""A checkpoint of every layout, resumed there to the bit and on every other one to rounding. One launch a number of processes."""

from pathlib import Path

import pytest
import torch

from flm_scale.checkpoint.store import Checkpoint, open_checkpoint
from tests.distributed.launch import run_worker
from tests.distributed.resume_worker import FIRST, LAYOUTS, STEPS, folder_name

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NAMES = [folder_name(size, *layout) for size, layouts in LAYOUTS.items() for layout in layouts]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("resume")
    for size in LAYOUTS:
        run_worker("resume_worker", out, processes=size, timeout=600)
    return out


def checkpoint_of(outcomes: Path, name: str) -> Checkpoint:
    return open_checkpoint(outcomes / name / "checkpoints" / f"step-{STEPS:06d}", full=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_goes_on_to_the_bit(outcomes: Path, name: str) -> None:
    found = torch.load(outcomes / f"{name}.pt")
    (unbroken, weights), (resumed, weights_again) = found["unbroken"], found["resumed"]
    assert resumed == unbroken
    assert weights.keys() == weights_again.keys()
    assert all(torch.equal(weights_again[weight], value) for weight, value in weights.items())


@pytest.mark.parametrize("name", [name for name in NAMES if "fp32" in name])
def test_a_run_resumed_on_another_layout_has_the_same_losses(outcomes: Path, name: str) -> None:
    resharded, _ = torch.load(outcomes / f"{name}.pt")["resharded"]
    unbroken, _ = torch.load(outcomes / f"{FIRST}.pt")["unbroken"]
    torch.testing.assert_close(torch.tensor(resharded), torch.tensor(unbroken), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_weights_and_moments_come_back_from_another_layout_to_the_bit(outcomes: Path, name: str) -> None:
    there, back = checkpoint_of(outcomes, FIRST), checkpoint_of(outcomes, f"{name}-again")
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        assert there.names(kind)
        assert there.names(kind) == back.names(kind)
        for weight in there.names(kind):
            assert torch.equal(there.weight(weight, kind)[:], back.weight(weight, kind)[:]), f"{kind} of {weight}"
