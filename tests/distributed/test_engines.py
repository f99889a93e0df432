"""The DeepSpeed engine against the plain local one: 1 process x 4 micro-batches, 2 x 2 and 4 x 1, ZeRO 0 to 3, SGD and AdamW.

The micro-batches hold different numbers of targets, so an average of averages would show. One launch a world size serves all checks.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flm_scale.engine.local import LocalEngine
from flm_scale.model.assemble import build_model
from tests.distributed.worker import OPTIMIZERS, STEPS
from tests.synthetic import objective_of, random_batch, tiny_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What rank 0 of one, two and four processes saw."""
    out = tmp_path_factory.mktemp("outcomes")
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    for size in (1, 2, 4):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}",
                   "-m", "tests.distributed.worker", str(out)]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def reference() -> dict[str, tuple[list[tuple[float, float]], dict[str, torch.Tensor]]]:
    """Losses and gradient norms of every step, and the last weights, of one process of plain PyTorch."""
    torch.set_num_threads(1)
    found = {}
    for name, optim in OPTIMIZERS.items():
        run = tiny_run(optim=optim)
        objective = objective_of(run)
        engine = LocalEngine(run, build_model(run, objective), objective)
        curve = []
        for step in range(STEPS):
            result = engine.train_step([random_batch(run, seed=1000 * step + i) for i in range(run.batch.micro_batches)], step=step)
            curve.append((result.loss, result.grad_norm))
        found[name] = curve, engine.weights()
    return found


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_deepspeed_engine_matches_the_local_engine(outcomes: Path, reference: dict, size: int, zero: int, optimizer: str) -> None:
    """Losses and gradient norms of 20 steps to 1e-5; after SGD, which hides nothing, every weight too."""
    outcome = torch.load(outcomes / f"zero{zero}-{optimizer}-{size}.pt")
    curve, weights = reference[optimizer]
    torch.testing.assert_close(torch.tensor(outcome["curve"]), torch.tensor(curve), rtol=1e-5, atol=0)
    assert outcome["weights"].keys() == weights.keys()
    if optimizer == "sgd":
        for name, weight in weights.items():
            difference = float((outcome["weights"][name] - weight).norm())
            assert difference <= 1e-5 * max(float(weight.norm()), 0.1), name


@pytest.mark.parametrize("size", [1, 2, 4])
def test_an_evaluation_adds_up_over_ranks(outcomes: Path, size: int) -> None:
    run = tiny_run()
    outcome = torch.load(outcomes / f"zero3-adamw-{size}.pt")
    expected = sum(random_batch(run, seed=7 + rank).part_counts for rank in range(size))
    assert outcome["counts"].tolist() == expected.tolist()
