"""Trains a tiny run on every layout of this launch, saves it on the way and resumes it, there and on other layouts; started by a launcher.

usage: python -m tests.distributed.resume_worker OUT_FOLDER
"""

import gc
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from flm_scale.checkpoint.store import begin, commit, open_checkpoint, partial_folder, write_rank
from flm_scale.config import ParallelConfig, Run
from flm_scale.engine.base import Engine
from tests.distributed.worker import Case, case_run, close_groups, engine_of, weights_of
from tests.synthetic import random_batch

CASE = Case("flm", "adamw", 0.5, 0, tied=True, shard_images=True)
STEPS = 3
"""Before the save, and again behind it."""
# By number of processes: (tensor, pipe, ZeRO stage, precision).
LAYOUTS = {
    1: [(1, 1, 0, "fp32"), (1, 1, 1, "fp32"), (1, 1, 2, "fp32"), (1, 1, 3, "fp32"), (1, 1, 1, "bf16")],
    2: [(1, 1, 1, "fp32"), (1, 1, 2, "fp32"), (1, 1, 3, "fp32"), (2, 1, 1, "fp32"), (2, 1, 2, "fp32"), (2, 1, 3, "fp32"),
        (1, 2, 0, "fp32"), (1, 2, 1, "fp32"), (1, 1, 1, "bf16"), (1, 1, 3, "bf16")],
    4: [(2, 1, 1, "fp32"), (1, 2, 1, "fp32"), (2, 2, 1, "fp32"), (2, 1, 3, "fp32"), (2, 2, 1, "bf16")]}
FIRST = "1-110-fp32"
"""The checkpoint that every layout resumes from too."""


def folder_name(size: int, tensor: int, pipe: int, zero: int, precision: str) -> str:
    return f"{size}-{tensor}{pipe}{zero}-{precision}"


def train(engine: Engine, run: Run, *, first: int) -> list[tuple[float, float]]:
    curve = []
    for step in range(first, first + STEPS):
        batches = [random_batch(run, seed=1000 * step + i) for i in range(run.batch.micro_batches)]
        result = engine.train_step(batches[engine.data_index :: engine.layout.data], step=step)
        curve.append((result.loss, result.grad_norm))
    return curve


def save(engine: Engine, run_dir: Path) -> None:
    folder = partial_folder(run_dir, step=STEPS)
    if engine.rank == 0:
        begin(run_dir, step=STEPS)
    dist.barrier()
    write_rank(folder, rank=engine.rank, pieces=engine.saved_pieces(), state={})
    if engine.rank == 0:
        commit(folder, num_ranks=engine.layout.size, run_json="{}", state={}, timeout_seconds=60)
    dist.barrier()


def main(out: Path) -> None:
    size = int(os.environ["WORLD_SIZE"])
    gc.freeze()
    for tensor, pipe, zero, precision in LAYOUTS[size]:
        name = folder_name(size, tensor, pipe, zero, precision)
        run = case_run(CASE, data=1, parallel=ParallelConfig(engine="deepspeed", zero=zero, tensor=tensor, pipe=pipe, vision="shard_batch"))
        run = run.replace(precision=precision, steps=2 * STEPS)
        engine = engine_of(run)
        train(engine, run, first=0)
        save(engine, out / name)
        unbroken = train(engine, run, first=STEPS), weights_of(engine)
        del engine
        close_groups()
        found = {"unbroken": unbroken}
        for way, source in (("resumed", name), ("resharded", FIRST)):
            checkpoint = open_checkpoint(out / source / "checkpoints" / f"step-{STEPS:06d}", full=True)
            engine = engine_of(run, checkpoint.weight)
            engine.resume(checkpoint.fill, updates=STEPS)
            if way == "resharded":
                save(engine, out / f"{name}-again")
            found[way] = train(engine, run, first=STEPS), weights_of(engine)
            rank = engine.rank
            del engine
            close_groups()
        if rank == 0:
            torch.save(found, out / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
