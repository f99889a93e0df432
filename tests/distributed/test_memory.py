"""`flm plan`'s bytes of weights, gradients and optimizer state against what DeepSpeed's engines hold, rank by rank."""

import json
from pathlib import Path
from typing import Any

import pytest

from flm_scale.plan import Machine, estimate, open_model
from tests.distributed.launch import run_worker
from tests.distributed.memory_worker import LANGUAGE_SIZES, LAYOUTS, small_run
from tests.language import write_language_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch a number of processes."""
    out = tmp_path_factory.mktemp("memory")
    write_language_model(out / "language_model", **LANGUAGE_SIZES)
    for size in LAYOUTS:
        run_worker("memory_worker", out, processes=size, timeout=900)
    return out


@pytest.mark.parametrize(("size", "cut"), [(size, cut) for size, cuts in LAYOUTS.items() for cut in cuts], ids=str)
def test_planned_bytes_are_those_that_deepspeed_holds(measured: Path, size: int, cut: tuple[Any, ...]) -> None:
    """Also around a frozen language model, which has weights, shared by ZeRO 3, and neither gradients nor moments."""
    run = small_run(measured, *cut)
    planned = estimate(run, Machine(nodes=1, gpus_per_node=size), open_model(run))
    for rank in range(size):
        found = json.loads((measured / f"{'-'.join(map(str, cut))}-rank{rank}.json").read_text())
        expected = planned.memory[planned.layout.stage(rank)]
        for part in ("weights", "gradients", "optimizer"):
            assert getattr(expected, part) == pytest.approx(found[part], rel=0.15), f"{part} of rank {rank}"
        assert sum(expected[:3]) == pytest.approx(sum(found.values()), rel=0.05), f"rank {rank}"
