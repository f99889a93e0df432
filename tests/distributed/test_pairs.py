"""From every layout to every other one and back: weights and moments to the bit, the next losses to rounding. ZeRO 1, up to eight processes."""

import json
from pathlib import Path

import pytest

from tests.distributed.launch import run_worker
from tests.distributed.pairs_worker import LAYOUTS, PAIRS, SAVED_AT, STEPS, size_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pairs")
    for act in ("first", "there", "back"):
        for size in sorted({size_of(layout) for layout in LAYOUTS}):
            run_worker("pairs_worker", act, out, processes=size, timeout=600)
    return out


def losses(outcomes: Path, name: str) -> list[float]:
    """Behind the checkpoint."""
    return json.loads((outcomes / f"{name}.json").read_text())


def written(outcomes: Path, name: str) -> dict[str, dict]:
    """Sizes and hashes of all that the ranks wrote."""
    manifest = json.loads((outcomes / name / f"checkpoints/step-{SAVED_AT:06d}/manifest.json").read_text())
    return {file: entry for file, entry in manifest["files"].items() if file.endswith(".safetensors")}


@pytest.mark.parametrize(("layout", "other"), PAIRS)
def test_a_checkpoint_goes_to_another_layout_and_comes_back_to_the_bit(outcomes: Path, layout: str, other: str) -> None:
    """File by file; the way is a whole engine of the other layout, which trains on like the first."""
    assert len(written(outcomes, layout)) == size_of(layout)
    assert len(written(outcomes, f"{layout}-{other}")) == size_of(other)
    assert written(outcomes, f"{layout}-{other}-{layout}") == written(outcomes, layout)
    expected, found = losses(outcomes, layout), losses(outcomes, f"{layout}-{other}")
    assert len(found) == STEPS - SAVED_AT
    assert found == expected if layout == other else found == pytest.approx(expected, rel=1e-5)
