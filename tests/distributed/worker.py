"""Trains the tiny run with the DeepSpeed engine on this rank's micro-batches and saves what rank 0 saw; started by a launcher.

usage: python -m tests.distributed.worker OUT_FOLDER
"""

import sys
from pathlib import Path

import torch

from flm_scale.config import OptimConfig, ParallelConfig
from flm_scale.engine.deepspeed import DeepSpeedEngine
from flm_scale.model.assemble import build_model
from tests.synthetic import objective_of, random_batch, tiny_run

STEPS = 20
OPTIMIZERS = {"sgd": OptimConfig(kind="sgd", lr=0.3, warmup_steps=2, clip_norm=0.5), "adamw": OptimConfig(lr=3e-3, warmup_steps=2, clip_norm=0.5)}


def main(out: Path) -> None:
    for zero in (0, 1, 2, 3):
        for name, optim in OPTIMIZERS.items():
            run = tiny_run(optim=optim, parallel=ParallelConfig(engine="deepspeed", zero=zero))
            objective = objective_of(run)
            engine = DeepSpeedEngine(run, build_model(run, objective), objective)
            curve = []
            for step in range(STEPS):
                batches = [random_batch(run, seed=1000 * step + i) for i in range(run.batch.micro_batches)]
                result = engine.train_step(batches[engine.rank :: engine.size], step=step)
                curve.append((result.loss, result.grad_norm))
            evaluation = engine.evaluate([random_batch(run, seed=7 + engine.rank)])
            weights = engine.weights()
            if engine.rank == 0:
                torch.save({"curve": curve, "weights": weights, "counts": evaluation.count}, out / f"zero{zero}-{name}-{engine.size}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
