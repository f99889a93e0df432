"""Takes bad steps on every layout of this launch: skipped ones, one whose gradient is not a number, and a way back; started by a launcher.

usage: python -m tests.distributed.bad_step_worker OUT_FOLDER
"""

import gc
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from flm_scale.batch import Term
from flm_scale.config import ParallelConfig, Run
from flm_scale.engine.base import StepResult
from flm_scale.model.parts import Piece
from tests.distributed.worker import HAS_COMPILER, Case, DeepSpeedEngine, case_run, close_groups, engine_of, weights_of
from tests.synthetic import random_batch

STEPS = 3
# By number of processes: (tensor, pipe, ZeRO stage, precision, template).
LAYOUTS = {2: [(1, 1, zero, "fp32", "") for zero in range(4)] + [(1, 1, zero, "bf16", "") for zero in (1, 3)]
           + [(1, 2, 0, "fp32", ""), (1, 2, 1, "fp32", ""), (2, 1, 3, "fp32", "")]
           + [(1, 1, 3, "fp32", "zero3-offload")] * HAS_COMPILER}


class WithoutANumber(NamedTuple):
    """A task whose loss is not a number."""

    parts: tuple[str, ...]

    @property
    def terms(self) -> tuple[Term, ...]:
        return (Term(1.0, self.parts), Term(math.nan, self.parts))


def train(engine: DeepSpeedEngine, run: Run, *, first: int, steps: int = STEPS) -> list[tuple[float, float]]:
    return [(result.loss, result.grad_norm) for result in (take_step(engine, run, step) for step in range(first, first + steps))]


def take_step(engine: DeepSpeedEngine, run: Run, step: int, **more: object) -> StepResult:
    batches = [random_batch(run, seed=1000 * step + i) for i in range(run.batch.micro_batches)]
    return engine.train_step(batches[engine.data_index :: engine.layout.data], step=step, **more)


def train_case(tensor: int, pipe: int, zero: int, precision: str, template: str) -> dict[str, object]:
    data = int(os.environ["WORLD_SIZE"]) // (tensor * pipe)
    run = case_run(Case("flm", "adamw", 0.5, 2, tied=True), data=data,
                   parallel=ParallelConfig(engine="deepspeed", zero=zero, tensor=tensor, pipe=pipe, template=template))
    run = run.replace(precision=precision, steps=2 * STEPS)
    engine = engine_of(run)
    smooth = train(engine, run, first=0, steps=2 * STEPS), weights_of(engine)
    del engine
    close_groups()

    engine = engine_of(run)
    skipped = [take_step(engine, run, 50, takes=lambda _loss: False)]
    before = train(engine, run, first=0)
    then = {(piece.kind, piece.name): piece.values.clone() for piece in engine.pieces()}
    skipped += [take_step(engine, run, 51, takes=lambda _loss: False)]
    task, engine.task = engine.task, WithoutANumber(engine.task.parts)
    skipped += [take_step(engine, run, 52, takes=lambda _loss: True)]  # its gradients alone are left to tell
    engine.task = task
    rough = before + train(engine, run, first=STEPS), weights_of(engine)

    def fill(pieces: list[Piece]) -> None:
        for piece in pieces:
            piece.values.copy_(then[piece.kind, piece.name])

    engine.resume(fill, updates=STEPS)
    again = before + train(engine, run, first=STEPS), weights_of(engine)
    del engine
    close_groups()
    return {"smooth": smooth, "rough": rough, "again": again, "taken": [result.is_taken for result in skipped],
            "losses": [result.loss for result in skipped]}


def main(out: Path) -> None:
    gc.freeze()
    for layout in LAYOUTS[int(os.environ["WORLD_SIZE"])]:
        found = train_case(*layout)
        if os.environ["RANK"] == "0":
            torch.save(found, out / f"{'-'.join(map(str, layout))}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
