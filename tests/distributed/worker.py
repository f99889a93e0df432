"""Trains tiny runs on every layout of this launch's processes and saves what rank 0 saw; started by a launcher.

usage: python -m tests.distributed.worker OUT_FOLDER
"""

import gc
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed.utils.groups
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import Tensor, nn

from flm_scale.config import BatchConfig, OptimConfig, ParallelConfig, Run
from flm_scale.engine.deepspeed import PipelineDeepSpeedEngine, PlainDeepSpeedEngine
from flm_scale.model.assemble import layer_builders
from flm_scale.model.parts import PlainParts, shard_of
from tests.synthetic import objective_of, random_batch, tiny_run

DeepSpeedEngine = PipelineDeepSpeedEngine | PlainDeepSpeedEngine
HAS_COMPILER = bool(os.environ.get("CI")) or shutil.which("g++") is not None
"""DeepSpeed compiles its CPU Adam, for offloaded optimizer state, at the first use."""


class Case(NamedTuple):
    """What is trained, whatever the layout."""

    objective: str
    kind: str
    clip_norm: float
    accumulation: int
    """Micro-batches a replica; 0 stands for 4 in all, however many replicas share them."""
    tied: bool = False
    shard_images: bool = False
    steps: int = 3
    template: str = ""
    precision: str = "fp32"


# Every pair of settings is in one of these.
CASES = (
    Case("flm", "sgd", 0.5, 4, tied=True), Case("flm", "adamw", 0.0, 1, shard_images=True), Case("mlm", "sgd", 0.0, 4, shard_images=True),
    Case("mlm", "adamw", 0.5, 1, tied=True), Case("flm", "sgd", 0.5, 1, tied=True, shard_images=True))
OFFLOAD = Case("flm", "adamw", 0.5, 4, template="zero3-offload")
BF16 = Case("flm", "adamw", 0.5, 1, steps=1, precision="bf16")
SPLITS = (Case("flm", "sgd", 0.5, 0, steps=20), Case("flm", "adamw", 0.5, 0, steps=20))
# By number of processes: (tensor, pipe, ZeRO stage), and what is trained there.
LAYOUTS = {
    1: [((1, 1, 1), CASES)] + [((1, 1, zero), SPLITS) for zero in range(4)],
    2: [((1, 1, zero), SPLITS) for zero in range(4)] + [(layout, CASES) for layout in ((1, 1, 1), (2, 1, 1), (1, 2, 1))]
    + [((2, 1, zero), CASES[:3]) for zero in (2, 3)] + [(layout, CASES[:2]) for layout in ((2, 1, 0), (1, 2, 0))]
    + [((1, 1, 3), [OFFLOAD])] + [((1, 1, zero), [BF16]) for zero in (1, 2)],
    4: [((1, 1, zero), SPLITS) for zero in range(4)] + [(layout, CASES) for layout in ((2, 1, 1), (1, 2, 1), (2, 2, 1))] + [((2, 1, 3), CASES[:2])],
    8: [((2, 2, 1), CASES), ((2, 2, 0), CASES[:2])]}
# By number of processes: (tensor, pipe), precision and steps of the long runs.
LONG_RUNS = {1: [((1, 1), "fp32", 100), ((1, 1), "bf16", 100)], 4: [((2, 2), "fp32", 20), ((2, 2), "bf16", 100)]}


def case_run(case: Case, *, data: int, parallel: ParallelConfig | None = None) -> Run:
    """The tiny run of a case. 61 tokens cannot be halved, so tensor parallelism pads. Adam's large eps keeps gradients that are zero but for
    rounding, such as those of key biases, from moving weights."""
    text = tiny_run().text.replace(tied=case.tied, vocab_size=61)
    optim = OptimConfig(kind=case.kind, lr=0.3 if case.kind == "sgd" else 3e-3, warmup_steps=2, clip_norm=case.clip_norm, eps=1e-3)
    batch = BatchConfig(micro_batches=case.accumulation * data or 4, text_tokens=200, captions=16, images=16)
    return tiny_run(case.objective, precision=case.precision, text=text, optim=optim, batch=batch, parallel=parallel or ParallelConfig())


def file_name(case: Case, *, tensor: int, pipe: int, data: int, zero: int) -> str:
    return f"{tensor}{pipe}{data}-zero{zero}-{'-'.join(map(str, case))}.pt"


def engine_of(run: Run, weight_of: Callable[[str], Any] | None = None) -> DeepSpeedEngine:
    objective = objective_of(run)
    builders = partial(layer_builders, run, objective, weight_of=weight_of)
    if not run.parallel.in_stages:
        return PlainDeepSpeedEngine(run, objective, builders=builders)
    layers = len(builders(PlainParts()))
    bounds = [layers * stage // run.parallel.pipe for stage in range(run.parallel.pipe + 1)]
    return PipelineDeepSpeedEngine(run, objective, bounds=bounds, builders=builders)


def gathered(engine: DeepSpeedEngine, value_of: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
    """Something of every weight (itself, its gradient) by name on rank 0, whole, in float32. Collective."""
    whole = {}
    for name, parameter in engine.layers.named_parameters():
        value, shard = value_of(parameter), shard_of(parameter)
        if shard is not None:
            pieces = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(shard.count)]
            dist.all_gather(pieces, value.contiguous(), group=engine.tensor_group)
            value = torch.cat(pieces, dim=shard.dim).narrow(shard.dim, 0, shard.size)
        if engine.data_index == 0 and not hasattr(parameter, "tied_to"):
            whole[name] = value.detach().float().clone()
    stages: list[dict[str, Tensor] | None] = [None] * engine.layout.size
    dist.gather_object(whole if engine.rank % engine.layout.tensor == 0 else {}, stages if engine.rank == 0 else None)
    return {name: tensor for stage in stages if stage for name, tensor in stage.items()}


def weights_of(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """Float32 weights by name on rank 0, not by way of what a checkpoint holds."""
    def master(parameter: nn.Parameter) -> Tensor:
        full = safe_get_full_fp32_param(parameter)
        return parameter if full is None else full  # ZeRO 0 keeps none beside the weight

    return gathered(engine, master)


def train_case(case: Case, parallel: ParallelConfig, out: Path) -> None:
    size = int(os.environ["WORLD_SIZE"])
    data = size // (parallel.tensor * parallel.pipe)
    run = case_run(case, data=data, parallel=parallel)
    engine = engine_of(run)
    first, gradients, curve = weights_of(engine), {}, []
    # What clips: ours at ZeRO 0, else DeepSpeed's step.
    owner, name = (engine, "_clip") if parallel.zero == 0 else (engine.engine, "_take_model_step")
    go_on = getattr(owner, name)

    def look_and_go_on(*args: object, **kwargs: object) -> object:
        if len(curve) == case.steps - 1:  # the last step's; each weight's is a collective
            gradients.update(gathered(engine, safe_get_full_grad))
        return go_on(*args, **kwargs)

    setattr(owner, name, look_and_go_on)
    for step in range(case.steps):
        batches = [random_batch(run, seed=1000 * step + i) for i in range(run.batch.micro_batches)]
        result = engine.train_step(batches[engine.data_index :: data], step=step)
        curve.append((result.loss, result.grad_norm))
    evaluation = engine.evaluate([random_batch(run, seed=7 + engine.data_index)])
    weights = weights_of(engine)
    if engine.rank == 0:
        torch.save({"first": first, "gradients": gradients, "curve": curve, "weights": weights, "evaluation": vars(evaluation)},
                   out / file_name(case, tensor=parallel.tensor, pipe=parallel.pipe, data=data, zero=parallel.zero))


def close_groups() -> None:
    """Take down what the last engine left: each gloo group has threads of its own, and this process makes dozens of engines."""
    gc.collect()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    for name, value in vars(deepspeed.utils.groups).items():
        if isinstance(value, dist.ProcessGroup):
            setattr(deepspeed.utils.groups, name, None)
    deepspeed.utils.groups.mpu = None
    gc.collect()


def long_run(tensor: int, pipe: int, precision: str, steps: int, out: Path) -> None:
    """The losses of many steps; and whether weights that several processes hold are still the same on all of them."""
    case = Case("flm", "adamw", 0.5, 2, tied=True, shard_images=True)
    run = case_run(case, data=1, parallel=ParallelConfig(engine="deepspeed", tensor=tensor, pipe=pipe, vision="shard_batch"))
    run = run.replace(precision=precision, steps=steps, optim=run.optim.replace(eps=1e-8))
    engine = engine_of(run)
    losses = [engine.train_step([random_batch(run, seed=1000 * (step % 10) + i) for i in range(2)], step=step).loss for step in range(steps)]
    differ = []
    if tensor > 1:
        for name, parameter in engine.layers.named_parameters():
            if shard_of(parameter) is None:
                copies = [torch.empty_like(parameter) for _ in range(tensor)]
                dist.all_gather(copies, parameter.detach().contiguous(), group=engine.tensor_group)
                differ += [] if all(torch.equal(copy, copies[0]) for copy in copies) else [name]
    tables = [None] * dist.get_world_size()
    own = [engine.layers.get_parameter(name).detach() for name in ("text_entry.tokens.weight", "head.decoder.weight")
           if name.split(".")[0] in engine.layers]
    dist.all_gather_object(tables, (engine.rank % tensor, own))
    if engine.rank == 0:
        copies = [[weight for place, weights in tables for weight in weights if place == index] for index in range(tensor)]
        torch.save({"losses": losses, "differ": differ, "tables": copies}, out / f"{precision}-{tensor}{pipe}.pt")


def look_at_parts(out: Path) -> None:
    """Gradients that are views, through both regions; and a decoder whose padding row is likelier than anything."""
    from flm_scale.parallel.mesh import Layout
    from flm_scale.parallel.tensor import TensorParts, share_with_shards, start_groups, sum_over_shards, tensor_group

    start_groups(Layout(tensor=2, pipe=1, data=1))
    group, found = tensor_group(), {}
    ones = torch.ones(3, 4, requires_grad=True)
    found["transposed"] = torch.autograd.grad(share_with_shards(ones, group).t(), ones, torch.ones(4, 3))[0]
    found["expanded"] = torch.autograd.grad(share_with_shards(ones, group).sum(), ones)[0]
    found["transposed sum"] = sum_over_shards(ones.detach().t(), group)
    decoder = TensorParts(group, shares_images=False).decoder(4, 5)
    generator = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(6, 4, generator=generator), torch.randn(7, 4, generator=generator)
    with torch.no_grad():
        decoder.weight.copy_(weight[3 * dist.get_rank() :][:3])
        decoder.bias.copy_(torch.tensor([0.0, 0, 0, 0, 0, 1000])[3 * dist.get_rank() :][:3])
    loss, correct = decoder(rows, torch.arange(7) % 5)
    logits = decoder.logits(rows)
    if dist.get_rank() == 0:
        torch.save(found | {"weight": weight, "rows": rows, "loss": loss.detach(), "correct": correct, "logits": logits.detach()}, out / "parts.pt")


def main(out: Path) -> None:
    size = int(os.environ["WORLD_SIZE"])
    gc.freeze()  # what is imported stays; each case's garbage is found at once
    for (tensor, pipe, zero), cases in LAYOUTS[size]:
        for case in cases:
            if case == OFFLOAD and not HAS_COMPILER:
                continue
            parallel = ParallelConfig(engine="deepspeed", zero=zero, tensor=tensor, pipe=pipe, template=case.template,
                                      vision="shard_batch" if case.shard_images else "replicated")
            train_case(case, parallel, out)
            close_groups()
    if size == 2:
        look_at_parts(out)
    for (tensor, pipe), precision, steps in LONG_RUNS.get(size, []):
        long_run(tensor, pipe, precision, steps, out)
        close_groups()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
