"""`flm plan`: what a run will need and how long a step will take, before a job is queued. No weight is made and no data is read.

Exact: weights, FLOPs, bytes of weights, gradients and optimizer state. Counted from sizes: activations, bytes on the network.
Assumed: the micro-batch is a typical one (observe/layer_cost.py), a GPU reaches the stated share of its peak while it computes, and what goes
over NVLink or the network takes the times below, with nothing overlapped.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from torch import Tensor, nn

from flm_scale.config import Run, TextConfig, micro_steps
from flm_scale.config_lm import LanguageModelConfig
from flm_scale.engine.deepspeed_config import merge_deepspeed, read_template
from flm_scale.errors import ConfigError
from flm_scale.model.outline import outline
from flm_scale.objectives.objective import build_objective
from flm_scale.observe.cost import VisionShape, forward_flops, training_flops
from flm_scale.observe.footprint import Footprint, footprints
from flm_scale.observe.layer_cost import expected_shapes, is_recomputed, layer_flops, stage_bounds, stage_costs, typical_pairs
from flm_scale.observe.memory import buffer_bytes, element_bytes, state_bytes, weight_bytes
from flm_scale.parallel.mesh import Layout, find_layout

if TYPE_CHECKING:
    from rich.table import Table

    from flm_scale.model.vision import VisionBlock, VisionEntry

NODE_BYTES_PER_SECOND = 300e9
"""Between the GPUs of a node, each way: two thirds of NVLink 4's 450 GB/s."""
NETWORK_BYTES_PER_SECOND = 40e9
"""Between nodes, each way and GPU: four fifths of a port of 400 Gbit/s a GPU."""
FITS_BELOW = 0.9
"""Share of a GPU's memory that a layout may take; the rest is for CUDA, NCCL and fragments."""
LAYOUTS_SHOWN = 6
NARROWEST = 150
"""Columns of the tables; a narrower terminal wraps them."""


class Machine(NamedTuple):
    """The GPUs to plan for."""

    nodes: int = 1
    gpus_per_node: int = 8
    gpu_gb: float = 80.0
    """Memory of a GPU in 10**9 bytes."""
    peak_tflops: float = 989.0
    """Dense peak in the run's precision."""
    mfu: float = 0.35
    """Share of the peak that is reached while a GPU computes."""

    @property
    def size(self) -> int:
        """GPUs."""
        return self.nodes * self.gpus_per_node


class Memory(NamedTuple):
    """Bytes of one GPU."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float

    @property
    def total(self) -> float:
        """All of them together."""
        return sum(self)


@dataclass(frozen=True)
class Estimate:
    """A run on a machine, cut in one way."""

    run: Run
    machine: Machine
    layout: Layout
    bounds: list[int]
    """Places in the list of each stage's first layer, and the list's length."""
    memory: list[Memory]
    """By stage."""
    stage_flops: list[float]
    """Of one process in a micro-batch, what is recomputed counted again."""
    stage_bytes: list[float]
    """Handed from each stage but the last to the next, in a micro-batch; as many come back."""
    tensor_bytes: list[float]
    """Summed over the tensor group in a micro-batch, by stage."""
    data_bytes: list[float]
    """Sent by a process to the other replicas in a step, by stage."""
    pairs: int
    """In a step, over all replicas."""
    model_flops: float
    """Of a step, without what is computed twice."""

    @property
    def largest(self) -> Memory:
        """Memory of the fullest stage."""
        return max(self.memory, key=lambda memory: memory.total)

    @property
    def fits(self) -> bool:
        """Whether every stage leaves some memory free."""
        return self.largest.total <= FITS_BELOW * 1e9 * self.machine.gpu_gb

    @property
    def micro_steps(self) -> int:
        """Micro-batches of a replica."""
        return self.run.batch.micro_batches // self.layout.data

    @property
    def bubble(self) -> float:
        """Share of the time in which a stage waits for the pipeline to fill and to drain."""
        return (self.layout.pipe - 1) / (self.micro_steps + self.layout.pipe - 1)

    @property
    def balance(self) -> float:
        """Mean over dearest stage."""
        return sum(self.stage_flops) / len(self.stage_flops) / max(self.stage_flops)

    @cached_property
    def seconds(self) -> float:
        """Of a step."""
        machine, (tensor, pipe, data) = self.machine, self.layout
        inside = NODE_BYTES_PER_SECOND
        tensor_speed = inside if machine.gpus_per_node % tensor == 0 else NETWORK_BYTES_PER_SECOND
        stage_speed = inside if machine.nodes == 1 else NETWORK_BYTES_PER_SECOND
        # The replicas of a node share its ports.
        data_speed = inside if machine.nodes == 1 else min(inside, NETWORK_BYTES_PER_SECOND * max(1, min(data, machine.gpus_per_node // tensor)))
        handed_on = [*self.stage_bytes, 0.0]
        slot = max(flops / (machine.mfu * machine.peak_tflops * 1e12) + 2 * (tensor - 1) / tensor * reduced / tensor_speed + 2 * handed / stage_speed
                   for flops, reduced, handed in zip(self.stage_flops, self.tensor_bytes, handed_on, strict=True))
        return (self.micro_steps + pipe - 1) * slot + max(self.data_bytes) / data_speed

    @property
    def mfu(self) -> float:
        """Useful FLOPs of the whole step over what all GPUs could compute in its time."""
        return self.model_flops / (self.seconds * self.machine.size * self.machine.peak_tflops * 1e12)


class Model(NamedTuple):
    """A run's layers as one process of its tensor group holds them."""

    layers: nn.ModuleDict
    vision: VisionShape


def open_model(run: Run) -> Model:
    """Return the layers' shapes."""
    layers = outline(run, build_objective(run.objective, mask_id=0))
    entry = cast("VisionEntry", layers["vision_entry"])
    return Model(layers, VisionShape(
        width=entry.patches.out_channels, layers_run=len([name for name in layers if re.fullmatch(r"vision_\d+", name)]),
        patch_size=entry.patches.kernel_size[0], image_size=run.vision.image_size, prefix_tokens=int(entry.class_embedding is not None),
        block_weights=sum(weight.numel() for weight in cast("VisionBlock", layers["vision_0"]).block.parameters() if weight.ndim == 2),
        merged=run.vision.merged, frames=run.vision.frames, temporal_width=run.vision.temporal.width if run.vision.frames > 1 else 0))


def estimate(run: Run, machine: Machine, model: Model) -> Estimate:
    """Return what the run takes as it is laid out. Raises ConfigError when it cannot be cut that way."""
    layout = find_layout(run.parallel, world_size=machine.size)
    config = merge_deepspeed(read_template(run.parallel), run, data_parallel_size=layout.data)
    steps, bounds, shapes = micro_steps(run.batch, data_parallel_size=layout.data), stage_bounds(run, model.vision), expected_shapes(run)
    costs = stage_costs(run, model.vision)
    left_behind = footprints(run, shapes, model.vision, longest=run.text.max_length)
    forward = forward_flops(run, shapes, model.vision)
    stages = [list(costs)[first:last] for first, last in pairwise(bounds)]
    weights = [stage_weights(model, names) for names in stages]
    again = 1.5 if run.recompute else 1.0  # half of what is summed over the tensor group is summed in the forward pass
    return Estimate(
        run, machine, layout, bounds,
        memory=[stage_memory(run, config, names, weights[stage], left_behind, data_size=layout.data, in_flight=min(layout.pipe - stage, steps))
                for stage, names in enumerate(stages)],
        stage_flops=[sum(costs[name] for name in names) for names in stages],
        stage_bytes=[left_behind[names[-1]].leaving for names in stages[:-1]],
        tensor_bytes=[again * sum(left_behind[name].reduced for name in names) for names in stages],
        data_bytes=[replica_bytes(run, config, weights_here, data_size=layout.data, steps=steps) for weights_here in weights],
        pairs=typical_pairs(run) * run.batch.micro_batches, model_flops=training_flops(run, forward) * run.batch.micro_batches)


def stage_weights(model: Model, names: Sequence[str]) -> list[Tensor]:
    """Return the weights of some layers; a tied table within them counts once."""
    return list(nn.ModuleDict({name: model.layers[name] for name in names}).parameters())


def stage_memory(run: Run, config: dict[str, Any], names: Sequence[str], weights: list[Tensor], left_behind: dict[str, Footprint], *, data_size: int,
                 in_flight: int) -> Memory:
    """Return the memory of a process of one stage. in_flight: micro-batches whose activations it holds at once, at most."""
    state = state_bytes(weights, run, config, data_size=data_size)
    before = {name: left_behind[previous].leaving for previous, name in pairwise(left_behind)}
    kept = sum(before[name] if is_recomputed(run, name) else left_behind[name].saved for name in names)
    # What a layer kept stands beside its gradients where it is recomputed.
    busiest = max(left_behind[name].working + left_behind[name].saved * is_recomputed(run, name) for name in names)
    return Memory(*state, activations=in_flight * kept, buffers=busiest + buffer_bytes(weights, run, config))


def replica_bytes(run: Run, config: dict[str, Any], weights: list[Tensor], *, data_size: int, steps: int) -> float:
    """Return the bytes that a process sends to other replicas in a step: gradients, and weights where each updates or holds a share."""
    element = element_bytes(run.precision)
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    gradients, gathered = element_bytes(config.get("communication_data_type", run.precision)) * trained, element * trained
    whole = weight_bytes(weights, run)
    # A sum for everyone is a sum of which each gets a share (1) and the gathering of the shares (1). ZeRO 2 too sums for everyone, unless its
    # template says otherwise, and at every micro-step.
    sent = {0: 2 * gradients, 1: 2 * gradients + gathered, 2: 2 * steps * gradients + gathered,
            3: steps * (gradients + 2 * whole)}[run.parallel.zero]
    return sent * (data_size - 1) / data_size


def variants(run: Run, machine: Machine) -> Iterator[Run]:
    """Yield the run under every layout worth a look: tensor groups within a node, up to 16 stages, ZeRO 1 to 3, recomputing or not."""
    powers = [2 ** i for i in range(11)]
    merges, tensors, pipes = any(run.vision.merged), [1], [1]  # each process runs a frozen language model whole
    if isinstance(run.text, TextConfig):
        tensors = [tensor for tensor in powers if machine.gpus_per_node % tensor == 0 and run.text.heads % tensor == 0]
        pipes = powers[: 1 if merges else 5]
    for tensor, pipe, zero, recompute in product(tensors, pipes, (1, 2, 3), (False, True)):
        if machine.size % (tensor * pipe) == 0 and (pipe == 1 or zero == 1):
            vision: Literal["replicated", "shard_batch"] = "shard_batch" if tensor > 1 and not merges else "replicated"
            yield run.replace(recompute=recompute, parallel=run.parallel.replace(
                engine="deepspeed", tensor=tensor, pipe=pipe, zero=zero, vision=vision, template=""))


def cheapest(run: Run, machine: Machine) -> list[Estimate]:
    """Return the best estimate of every layout that the run's micro-batches can be spread over: those that fit first, quick ones first."""
    found, models = list[Estimate](), dict[int, Model]()
    for variant in variants(run, machine):
        tensor = variant.parallel.tensor
        models[tensor] = models.get(tensor) or open_model(variant)
        try:
            found.append(estimate(variant, machine, models[tensor]))
        except ConfigError:  # more replicas than micro-batches, or more stages than layers
            continue
    best: dict[Layout, Estimate] = {}
    for one in sorted(found, key=lambda one: (not one.fits, one.seconds if one.fits else one.largest.total)):
        best.setdefault(one.layout, one)
    return list(best.values())


def warnings(one: Estimate, model: Model) -> list[str]:
    """Return what is unwise about a layout, each with its remedy."""
    machine, (tensor, pipe, _) = one.machine, one.layout
    found = []
    if machine.gpus_per_node % tensor:
        found.append(f"parallel.tensor ({tensor}) does not divide the GPUs of a node ({machine.gpus_per_node}): its groups cross nodes, and the "
                     "network between them is slow; choose a divisor")
    names = list(model.layers)
    for stage, (first, last) in enumerate(pairwise(one.bounds)):
        if not any(weight.requires_grad for weight in stage_weights(model, names[first:last])):
            found.append(f"stage {stage} ({names[first]} to {names[last - 1]}) has no weight to train, and DeepSpeed will wait for ever; "
                         "lower parallel.pipe")
    if one.micro_steps < 4 * pipe and pipe > 1:
        found.append(f"{one.micro_steps} micro-batches a replica leave {one.bubble:.0%} of the time to the pipeline's bubble; "
                     f"{4 * pipe} or more are better: raise batch.micro_batches or lower parallel.pipe")
    if one.balance < 0.8:
        found.append(f"the dearest stage costs {1 / one.balance:.1f} times the mean, because no layer can be cut; lower parallel.pipe")
    if not one.fits:
        found.append(f"{one.largest.total / 1e9:.0f} GB do not fit into {FITS_BELOW:.0%} of {machine.gpu_gb:g} GB; choose a layout above, or smaller "
                     "micro-batches")
    return found


def print_plan(run: Run, machine: Machine) -> None:
    """Print the run's parts, the quickest layouts that fit, the run's own layout stage by stage, and what is unwise about it."""
    from rich.console import Console

    console = Console(highlight=False)
    console = Console(highlight=False, width=max(console.width, NARROWEST))
    whole = open_model(run.replace(parallel=run.parallel.replace(tensor=1)))
    trained = sum(weight.numel() for weight in whole.layers.parameters() if weight.requires_grad)
    pairs = typical_pairs(run)
    work = training_flops(run, forward_flops(run, expected_shapes(run), whole.vision)) / pairs
    console.print(f"{run.name}: {run.objective.kind}, {trained:,} weights to train, {run.precision}; {work / 1e12:.3f} TFLOP a pair in training; "
                  f"{run.batch.micro_batches} micro-batches of {pairs} pairs a step; {machine.nodes} x {machine.gpus_per_node} GPUs of "
                  f"{machine.gpu_gb:g} GB\n")
    console.print(parts_table(run, whole))
    found = cheapest(run, machine)
    shown = [one for one in found if one.fits][:LAYOUTS_SHOWN]
    if not shown:
        least = f"the smallest takes {found[0].largest.total / 1e9:.0f} GB" if found else "batch.micro_batches cannot be spread over so many GPUs"
        console.print(f"\nno layout fits into {FITS_BELOW:.0%} of {machine.gpu_gb:g} GB: {least}; plan for other GPUs, or change the batch")
    own_model = open_model(run)
    try:
        own = estimate(run, machine, own_model)
    except ConfigError as error:
        console.print("", layouts_table(shown), f"\nthe run's own layout: {error}", sep="\n")
    else:
        notes = [f"warning: {warning}" for warning in warnings(own, own_model)]
        console.print("", layouts_table(shown, own), "", stages_table(own, list(own_model.layers)), *notes, sep="\n")
    console.print(f"\nGB: 10**9 bytes, of the fullest stage. Seconds: {machine.mfu:.0%} of {machine.peak_tflops:g} TFLOP/s while a GPU computes; on "
                  f"top comes what is sent, at {NODE_BYTES_PER_SECOND / 1e9:g} GB/s within a node and {NETWORK_BYTES_PER_SECOND / 1e9:g} GB/s a GPU "
                  "between nodes.")


def parts_table(run: Run, model: Model) -> "Table":
    """Return weights and forward FLOPs of each part of the model."""
    table = new_table("part", "weights", "of them trained", "forward GFLOP a pair", "share")
    flops = part_flops(run, model.vision)
    weights, trained = dict.fromkeys(flops, 0), dict.fromkeys(flops, 0)
    for name, weight in model.layers.named_parameters():
        layer = name.split(".", 1)[0]
        part = "reconstructor" if ".reconstructor." in name else layer if layer in flops else layer.split("_")[0]
        part = part if part in flops else "language_model"
        weights[part] += weight.numel()
        trained[part] += weight.numel() * weight.requires_grad
    for part in (*flops, "all"):
        count, learn, work = (sum(column.values()) if part == "all" else column[part] for column in (weights, trained, flops))
        table.add_row(part, f"{count:,}", f"{learn:,}", f"{work / typical_pairs(run) / 1e9:.1f}", f"{work / sum(flops.values()):.0%}")
    return table


def part_flops(run: Run, vision: VisionShape) -> dict[str, float]:
    """Return the forward FLOPs of each row of that table in a typical micro-batch."""
    by_layer, by_part = layer_flops(run, expected_shapes(run), vision), forward_flops(run, expected_shapes(run), vision)
    if isinstance(run.text, LanguageModelConfig):
        return {"vision": by_part["vision"], "bridge": by_part["bridge"], "language_model": by_layer["head"]}
    return {"vision": sum(flops for name, flops in by_layer.items() if name.startswith("vision_")), "text_entry": by_layer["text_entry"],
            "bottom": by_part["bottom"], "fusion": by_part["fusion"] + by_layer["fusion_entry"], "reconstructor": by_part["reconstructor"],
            "head": by_part["head"]}


def layouts_table(shown: Sequence[Estimate], own: Estimate | None = None) -> "Table":
    """Return a row a layout; the run's own has a star, and comes last where it is not among those shown."""
    table = new_table("", "tensor", "pipe", "data", "ZeRO", "recompute", "s a step", "pairs/s", "MFU", "bubble", "GB a GPU", *Memory._fields)

    def settings(one: Estimate) -> tuple[object, ...]:
        return one.layout, one.run.parallel.zero, one.run.recompute, one.run.parallel.vision

    listed = own is None or settings(own) in map(settings, shown)
    for one in shown if listed else [*shown, *filter(None, [own])]:
        table.add_row(
            "*" if own and settings(one) == settings(own) else "", *map(str, one.layout), str(one.run.parallel.zero),
            "yes" if one.run.recompute else "", f"{one.seconds:.2f}", f"{one.pairs / one.seconds:,.0f}", f"{one.mfu:.0%}", f"{one.bubble:.0%}",
            *(f"{size / 1e9:.1f}" for size in (one.largest.total, *one.largest)))
    return table


def stages_table(one: Estimate, names: Sequence[str]) -> "Table":
    """Return a row a stage: what a process of it holds, computes and sends. names: of the layers."""
    table = new_table("stage", "layers", "TFLOP a micro-batch", "GB", "MB to the next stage", "MB summed over tensor", "GB to replicas a step")
    for stage, (first, last) in enumerate(pairwise(one.bounds)):
        handed = f"{one.stage_bytes[stage] / 1e6:.0f}" if stage < one.layout.pipe - 1 else ""
        summed = f"{one.tensor_bytes[stage] / 1e6:.0f}" if one.layout.tensor > 1 else ""
        table.add_row(str(stage), f"{names[first]} .. {names[last - 1]}", f"{one.stage_flops[stage] / 1e12:.2f}",
                      f"{one.memory[stage].total / 1e9:.1f}", handed, summed, f"{one.data_bytes[stage] / 1e9:.1f}")
    return table


def new_table(*columns: str) -> "Table":
    """Return an empty table without frames; all columns but the first hold numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in {columns[0], "layers"} else "right", no_wrap=True)
    return table
