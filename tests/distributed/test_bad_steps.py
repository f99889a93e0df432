"""A step that is not taken leaves no trace on any layout, and every engine finds its way back to an earlier state."""

import math
from pathlib import Path

import pytest
import torch

from tests.distributed.bad_step_worker import LAYOUTS
from tests.distributed.launch import run_worker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NAMES = ["-".join(map(str, layout)) for layout in LAYOUTS[2]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bad-steps")
    run_worker("bad_step_worker", out, processes=2, timeout=500)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_bad_steps_leave_no_trace(outcomes: Path, name: str) -> None:
    """Not before the first good one, not between, and not when the gradients are not numbers."""
    found = torch.load(outcomes / f"{name}.pt")
    assert found["taken"] == [False] * 3
    assert [math.isnan(loss) for loss in found["losses"]] == [False, False, True]
    assert_same(found["rough"], found["smooth"])


@pytest.mark.parametrize("name", NAMES)
def test_an_engine_goes_back_to_an_earlier_state_to_the_bit(outcomes: Path, name: str) -> None:
    found = torch.load(outcomes / f"{name}.pt")
    assert_same(found["again"], found["smooth"])


def assert_same(found: tuple, expected: tuple) -> None:
    (curve, weights), (expected_curve, expected_weights) = found, expected
    assert curve == expected_curve
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], weight) for name, weight in expected_weights.items())
