"""What a training step costs on each layout: seconds, share spent in collectives, and the pipeline's bubble against its formula.

One model and one global batch of synthetic pairs, the demo's sizes by default with more micro-batches. On a computer with fewer cores than processes
the layouts share cores: compare layouts of one number of processes with each other, not with other numbers.

    torchrun --nproc-per-node 4 -m tools.bench_layouts [--steps 5] [--micro-batches 8]
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from flm_scale.engine.deepspeed import PipelineDeepSpeedEngine, PlainDeepSpeedEngine
from flm_scale.objectives.objective import Objective, build_objective
from flm_scale.observe.cost import vision_shape
from flm_scale.observe.layer_cost import stage_bounds
from flm_scale.recipes import demo

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "reduce", "send", "recv", "barrier")


class Clock:
    """Seconds of this rank by what it did."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("collectives", "computing"), 0.0)
        self.inside = ""

    @contextmanager
    def count(self, what: str) -> Iterator[None]:
        """Count the time under a name; the innermost name alone counts it."""
        outer, self.inside = self.inside, what
        started, before = time.perf_counter(), sum(self.seconds.values())
        yield
        self.seconds[what] += time.perf_counter() - started - (sum(self.seconds.values()) - before)
        self.inside = outer

    def wrap(self, owner: Any, name: str, what: str) -> None:  # noqa: ANN401 - a module or an object
        """Let every call of a function be counted."""
        function: Callable[..., Any] = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            with self.count(what):
                return function(*args, **kwargs)

        setattr(owner, name, counted)


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


def main(*, steps: int = 5, micro_batches: int = 8) -> None:
    """Print the table. steps: timed ones, after one that is not.   micro_batches: of a step, over all replicas."""
    size, clock = int(os.environ["WORLD_SIZE"]), Clock()
    for name in COLLECTIVES:
        clock.wrap(dist, name, "collectives")
    base = demo()
    objective = build_objective(base.objective, mask_id=4)
    table = Table("tensor", "pipe", "data", "ZeRO", "seconds a step", "in collectives", "bubble", "by the formula",
                  title=f"{size} processes, {os.cpu_count()} cores, {torch.get_num_threads()} threads each, {micro_batches} micro-batches, float32")
    for tensor, pipe, zero in layouts(size):
        run = base.replace(batch=base.batch.replace(micro_batches=micro_batches),
                           parallel=ParallelConfig(engine="deepspeed", tensor=tensor, pipe=pipe, zero=zero))
        engine = (PipelineDeepSpeedEngine(run, objective, bounds=stage_bounds(run, vision_shape(run.vision))) if run.parallel.in_stages
                  else PlainDeepSpeedEngine(run, objective))
        if run.parallel.in_stages:
            for name in ("_exec_forward_pass", "_exec_backward_pass"):
                instructions = {call: method for call, method in engine.engine._INSTRUCTION_MAP.items()  # noqa: SLF001
                                if method.__name__ == name}
                for call, method in instructions.items():
                    def counted(self: Any, *args: Any, method: Callable[..., Any] = method, **kwargs: Any) -> None:  # noqa: ANN401
                        with clock.count("computing"):
                            method(self, *args, **kwargs)
                    engine.engine._INSTRUCTION_MAP[call] = counted  # noqa: SLF001
        data = engine.layout.data
        batches = [batch_of(run, objective, seed=i) for i in range(micro_batches)][engine.data_index :: data]
        engine.train_step(batches, step=0)
        clock.seconds = dict.fromkeys(clock.seconds, 0.0)
        seconds = []
        for step in range(1, steps + 1):
            started = time.perf_counter()
            engine.train_step(batches, step=step)
            seconds.append(time.perf_counter() - started)
        # The mean stage idles for the bubble, and for what the cut leaves uneven.
        busy, talking = engine.sum_over_ranks([clock.seconds["computing"], clock.seconds["collectives"]])
        row = torch.tensor([busy / data, talking / data], dtype=torch.float64)
        dist.all_reduce(row)
        busy, talking = (row / size / sum(seconds)).tolist()
        bubble = (f"{1 - busy:.0%}", f"{(pipe - 1) / (micro_batches // data + pipe - 1):.0%}") if pipe > 1 else ("", "")
        table.add_row(str(tensor), str(pipe), str(data), str(zero), f"{statistics.median(seconds):.3f}", f"{talking:.0%}", *bubble)
    if dist.get_rank() == 0:
        Console(width=130).print(table)


if __name__ == "__main__":
    tyro.cli(main)
