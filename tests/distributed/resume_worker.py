"""Trains a tiny run on every layout of this launch, saves it on the way and resumes it, there and from another layout; started by a launcher.

usage: python -m tests.distributed.resume_worker OUT_FOLDER
"""

import gc
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from flm_scale.checkpoint.store import begin, commit, open_checkpoint, partial_folder, write_rank
from flm_scale.config import ParallelConfig, Run
from flm_scale.config_vision import TemporalConfig
from flm_scale.engine.base import Engine
from tests.distributed.worker import HAS_COMPILER, Case, case_run, close_groups, engine_of, weights_of
from tests.synthetic import random_batch, tiny_language_run

STEPS = 3
"""Before the save, and again behind it."""


class Cut(NamedTuple):
    """A layout, and what is trained on it."""

    tensor: int
    pipe: int
    zero: int
    precision: str = "fp32"
    special: str = ""
    """sgd, frozen (the vision tower), offload (DeepSpeed's CPU Adam, which may have to be compiled), simvlg (into a frozen language model), merged
    (rows of the vision tower), clips (the tower frozen, but for what sees frames)."""

    def name(self, size: int) -> str:
        return f"{size}-{self.tensor}{self.pipe}{self.zero}-{self.precision}{self.special and '-'}{self.special}"

    @property
    def source(self) -> str:
        """The checkpoint, of one process, that this layout goes on behind too."""
        return Cut(1, 1, 0, special=self.special.removeprefix("offload")).name(1)


# By number of processes. ZeRO 1 in float32 is pairs_worker's.
CUTS = {
    1: [Cut(1, 1, 0), Cut(1, 1, 2), Cut(1, 1, 3), Cut(1, 1, 1, "bf16"), Cut(1, 1, 0, special="sgd"), Cut(1, 1, 0, special="frozen"),
        Cut(1, 1, 0, special="simvlg"), Cut(1, 1, 0, special="merged"), Cut(1, 1, 0, special="clips")],
    2: [Cut(1, 1, 0), Cut(1, 1, 2), Cut(1, 1, 3), Cut(2, 1, 2), Cut(2, 1, 3), Cut(1, 2, 0), *(Cut(1, 1, zero, "bf16") for zero in (1, 2, 3)),
        *(Cut(1, 1, zero, special="simvlg") for zero in (1, 2, 3)), Cut(1, 1, 3, "bf16", "simvlg"),
        *(Cut(1, 1, zero, special="merged") for zero in (1, 2, 3)), Cut(2, 1, 2, special="merged"),
        *(Cut(1, 1, zero, special="clips") for zero in (1, 2, 3)), Cut(2, 1, 1, special="clips"), Cut(1, 2, 1, special="clips"),
        Cut(2, 1, 1, special="sgd"), Cut(1, 1, 2, special="sgd"), Cut(1, 1, 3, special="frozen"), Cut(1, 2, 1, special="frozen"),
        *([Cut(1, 1, 3, special="offload")] if HAS_COMPILER else [])],
    4: [Cut(2, 1, 3), Cut(2, 2, 1, "bf16")]}


def run_of(cut: Cut, out: Path) -> Run:
    template = "zero3-offload" if cut.special == "offload" else ""
    vision = "replicated" if cut.special == "merged" else "shard_batch"
    parallel = ParallelConfig(engine="deepspeed", zero=cut.zero, tensor=cut.tensor, pipe=cut.pipe, vision=vision, template=template)
    case = Case("flm", "sgd" if cut.special == "sgd" else "adamw", 0.5, 0, tied=True, shard_images=True)
    if cut.special == "simvlg":
        return tiny_language_run(out / "language_model", precision=cut.precision, parallel=parallel, steps=2 * STEPS)
    run = case_run(case, data=1, parallel=parallel)
    vision = run.vision.replace(trainable=cut.special not in {"frozen", "clips"}, merged=(1,) if cut.special == "merged" else ())
    if cut.special == "clips":
        vision = vision.replace(frames=3, temporal=TemporalConfig(width=16, heads=4, position=True))
    return run.replace(precision=cut.precision, steps=2 * STEPS, vision=vision)


def train(engine: Engine, run: Run, steps: Iterable[int]) -> list[tuple[float, float]]:
    curve = []
    for step in steps:
        batches = [random_batch(run, seed=1000 * step + i) for i in range(run.batch.micro_batches)]
        result = engine.train_step(batches[engine.data_index :: engine.layout.data], step=step)
        curve.append((result.loss, result.grad_norm))
    return curve


def save(engine: Engine, run_dir: Path, *, step: int) -> None:
    folder = partial_folder(run_dir, step=step)
    if engine.rank == 0:
        begin(run_dir, step=step)
    dist.barrier()
    write_rank(folder, rank=engine.rank, pieces=engine.saved_pieces(), state={})
    if engine.rank == 0:
        commit(folder, num_ranks=engine.layout.size, run_json="{}", state={}, timeout_seconds=60)
    dist.barrier()


def resumed(run: Run, run_dir: Path, *, step: int) -> Engine:
    """Return an engine that goes on behind a run's only checkpoint."""
    checkpoint = open_checkpoint(run_dir / "checkpoints" / f"step-{step:06d}", full=True)
    engine = engine_of(run, checkpoint.weight)
    engine.resume(checkpoint.fill, updates=step)
    return engine


def unbroken(cut: Cut, folder: Path) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    run = run_of(cut, folder.parent)
    engine = engine_of(run)
    train(engine, run, range(STEPS))
    save(engine, folder, step=STEPS)
    return train(engine, run, range(STEPS, 2 * STEPS)), weights_of(engine)


def going_on(cut: Cut, source: Path) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    run = run_of(cut, source.parent)
    engine = resumed(run, source, step=STEPS)
    return train(engine, run, range(STEPS, 2 * STEPS)), weights_of(engine)


def resharded(cut: Cut, source: Path, *, again: Path) -> list[tuple[float, float]]:
    """again: where to save at once what was read."""
    run = run_of(cut, source.parent)
    engine = resumed(run, source, step=STEPS)
    save(engine, again, step=STEPS)
    return train(engine, run, range(STEPS, 2 * STEPS))


def main(out: Path) -> None:
    size = int(os.environ["WORLD_SIZE"])
    gc.freeze()
    for cut in CUTS[size]:
        name = cut.name(size)
        found = {}
        for way, work in (("unbroken", lambda: unbroken(cut, out / name)), ("resumed", lambda: going_on(cut, out / name)),  # noqa: B023
                          ("resharded", lambda: resharded(cut, out / cut.source, again=out / f"{name}-again"))):  # noqa: B023
            found[way] = work()
            close_groups()
        if os.environ["RANK"] == "0":
            torch.save(found, out / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
