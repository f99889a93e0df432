"""What a training step costs on each layout: seconds, share spent in collectives, and the pipeline's bubble against its formula.

One model and one global batch of synthetic pairs, of the demo's sizes; tensor ranks share the images. On a computer with fewer cores than processes
the layouts share cores: compare layouts of one number of processes with each other, not with other numbers.

    torchrun --nproc-per-node 4 -m tools.bench_layouts [--steps 5] [--micro-batches 8]
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.table import Table

from flm_scale.batch import Batch
from flm_scale.config import ParallelConfig, Run
from flm_scale.data.pack import pack
from flm_scale.objectives.objective import Objective, build_objective
from flm_scale.recipes import demo
from flm_scale.train import build_engine

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "reduce", "send", "recv", "barrier")
# What a pipeline stage does, by DeepSpeed's names of its instructions; the rest of a step it waits.
INSTRUCTIONS = {"ForwardPass": "computing", "BackwardPass": "computing", "ReduceTiedGrads": "updating", "ReduceGrads": "updating",
                "OptimizerStep": "updating"}


class Clock:
    """Seconds of this rank by what it did; what a thing calls is part of it."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("collectives", "computing", "updating"), 0.0)
        self.running: set[str] = set()

    def counted(self, function: Callable[..., Any], what: str) -> Callable[..., Any]:
        """Return a function whose every call is counted."""
        def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            if what in self.running:
                return function(*args, **kwargs)
            self.running.add(what)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[what] += time.perf_counter() - started
                self.running.remove(what)

        return call


def layouts(size: int) -> list[tuple[int, int, int]]:
    """Return every (tensor, pipe, ZeRO) that so many processes can be cut into."""
    sizes = [n for n in range(1, size + 1) if size % n == 0]
    return [(tensor, pipe, zero) for tensor in sizes for pipe in sizes if size % (tensor * pipe) == 0
            for zero in ((1,) if pipe > 1 or size == tensor else (1, 2, 3))]


def batch_of(run: Run, objective: Objective, *, seed: int, pairs: int = 32) -> Batch:
    """Return a micro-batch of random captions and pictures."""
    rng = np.random.default_rng(seed)
    captions = [np.concatenate([[1], rng.integers(5, run.text.vocab_size, rng.integers(3, 12)), [2]]).astype(np.int32) for _ in range(pairs)]
    side = run.vision.image_size
    state = pack([objective.corrupt(ids, rng) for ids in captions], rng.integers(0, 256, (pairs, 3, side, side), dtype=np.uint8))
    counts = torch.tensor([int((state.target_parts == part).sum()) for part in range(len(objective.parts))])
    return Batch(state, ("",), pairs, len(state.ids), counts)


def open_engine(run: Run, objective: Objective, clock: Clock) -> Any:  # noqa: ANN401 - either of DeepSpeed's
    """Return the run's engine; the clock counts what a pipeline does."""
    engine: Any = build_engine(run, objective)
    if run.parallel.in_stages:
        methods = engine.engine._INSTRUCTION_MAP  # noqa: SLF001
        methods |= {kind: clock.counted(method, INSTRUCTIONS[kind.__name__]) for kind, method in methods.items() if kind.__name__ in INSTRUCTIONS}
    return engine


def main(*, steps: int = 5, micro_batches: int = 8) -> None:
    """Print the table. steps: timed ones, after one that is not.   micro_batches: of a step, over all replicas."""
    size, clock = int(os.environ["WORLD_SIZE"]), Clock()
    for name in COLLECTIVES:
        setattr(dist, name, clock.counted(getattr(dist, name), "collectives"))
    base = demo()
    objective = build_objective(base.objective, mask_id=4)
    table = Table("tensor", "pipe", "data", "ZeRO", "seconds a step", "in collectives", "bubble", "by the formula",
                  title=f"{size} processes, {os.cpu_count()} cores, {torch.get_num_threads()} threads each, {micro_batches} micro-batches, float32")
    for tensor, pipe, zero in layouts(size):
        run = base.replace(batch=base.batch.replace(micro_batches=micro_batches),
                           parallel=ParallelConfig(engine="deepspeed", tensor=tensor, pipe=pipe, zero=zero, vision="shard_batch"))
        engine = open_engine(run, objective, clock)
        data, stage = engine.layout.data, engine.layout.stage(engine.rank)
        batches = [batch_of(run, objective, seed=i) for i in range(micro_batches)][engine.data_index :: data]
        engine.train_step(batches, step=0)
        clock.seconds = dict.fromkeys(clock.seconds, 0.0)
        seconds = []
        for step in range(1, steps + 1):
            started = time.perf_counter()
            engine.train_step(batches, step=step)
            seconds.append(time.perf_counter() - started)
        # By stage: seconds in collectives; computing; and all but the update.
        sums = torch.zeros(3, pipe, dtype=torch.float64)
        sums[:, stage] = torch.tensor([clock.seconds["collectives"], clock.seconds["computing"], sum(seconds) - clock.seconds["updating"]])
        dist.all_reduce(sums)
        talking, computing, running = sums * pipe / size
        bubble = ("", "")
        if pipe > 1:
            # Of the busiest stage, because the others also wait where the cut is uneven, and the formula is for an even one.
            bubble = (f"{1 - float((computing / running).max()):.0%}", f"{(pipe - 1) / (micro_batches // data + pipe - 1):.0%}")
        table.add_row(str(tensor), str(pipe), str(data), str(zero), f"{statistics.median(seconds):.3f}",
                      f"{float(talking.mean()) / sum(seconds):.0%}", *bubble)
    if dist.get_rank() == 0:
        Console(width=130).print(table)


if __name__ == "__main__":
    tyro.cli(main)
