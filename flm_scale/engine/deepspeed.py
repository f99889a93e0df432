"""Training over many processes: the one door to DeepSpeed. gloo on CPU, NCCL on NVIDIA GPUs.

Pipelines, and ZeRO 1 at one stage too, run on DeepSpeed's pipeline engine; ZeRO 0, 2 and 3 on its plain one. Either takes tensor-parallel layers.
Losses, gradients and weights are those of engine/local.py for the same global batch, however it is split over processes.
"""

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from flm_scale.batch import Batch, LossSums, Scores, State
from flm_scale.config import OptimConfig, Run, micro_steps
from flm_scale.engine.base import (
    StepResult,
    Task,
    build_optimizer,
    count_weights,
    keep_freed_memory,
    lr_factor,
    parameter_groups,
    score,
    set_lr,
    total_loss,
)
from flm_scale.engine.deepspeed_config import merge_deepspeed, read_template
from flm_scale.engine.pieces import drifted, moments_of, pieces_of, set_steps_taken, tell_drift, whole_share
from flm_scale.engine.zero import ModelParallelUnit, multiply_betas, publish_masters, sum_norms_once, zero_share
from flm_scale.errors import ConfigError
from flm_scale.model.assemble import TIED_WITH, assemble, is_tied, pretrained_names, run_layers, tie
from flm_scale.model.parts import Parts, Piece, PlainParts, shard_of
from flm_scale.parallel.mesh import Layout, find_layout, find_ranks
from flm_scale.parallel.processes import meet

if not torch.cuda.is_available():  # read when DeepSpeed is imported
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.pipe import LayerSpec, PipelineModule
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from deepspeed.runtime.pipe.schedule import OptimizerStep
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

MICRO_BATCHES_PER_EVALUATION = 8
"""Micro-batches of an evaluation that a pipeline takes at once; their pictures are in memory together."""


class _Processes:
    """What both engines share: this process's place, sums over replicas, and what a checkpoint holds."""

    def __init__(self, run: Run, task: Task) -> None:
        ranks, self.device = meet()
        os.environ.update(find_ranks(os.environ)[1])  # of a process that is alone, too: DeepSpeed wants a group of one
        # DeepSpeed 0.19 calls two collectives by names that torch 2.13 wants to rename.
        warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.run, self.task, self.rank = run, task, ranks.rank
        self.layout = find_layout(run.parallel, world_size=ranks.size)
        self.data_index, self.data_size = self.layout.data_index(ranks.rank), self.layout.data
        if self.device.type == "cpu":
            keep_freed_memory()
            # An all-reduce for inference, which every first start would compile with g++.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.config = merge_deepspeed(read_template(run.parallel), run, data_parallel_size=self.data_size)
        self.averaged_away = micro_steps(run.batch, data_parallel_size=self.data_size) * self.data_size
        """DeepSpeed averages over micro-steps and ranks; our loss is already a share of the global one, so that is multiplied back."""
        deepspeed.init_distributed(dist_backend="gloo" if self.device.type == "cpu" else "nccl", verbose=False)
        self.parts: Parts = PlainParts()
        self.tensor_group: dist.ProcessGroup | None = None
        if self.layout.tensor > 1:
            from flm_scale.parallel import tensor

            tensor.start_groups(self.layout)
            self.tensor_group = tensor.tensor_group()
            self.parts = tensor.TensorParts(self.tensor_group, shares_images=run.parallel.vision == "shard_batch")
        self.data_group: dist.ProcessGroup | None = None
        self.pipe_group: dist.ProcessGroup | None = None
        self.layers, self.num_weights = nn.ModuleDict(), 0
        self.engine: Any
        self._takes_update = True

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        """Return each value added up over all data-parallel replicas."""
        return self._sum_over_replicas(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def pieces(self) -> list[Piece]:
        """Return views of this process's share of float32 masters and moments, as ZeRO cuts them."""
        return [piece for name, parameter in self.layers.named_parameters() if parameter.requires_grad
                for piece in self._pieces_of(getattr(parameter, "tied_to", name), parameter)]

    def saved_pieces(self) -> list[Piece]:
        """Return those pieces that no process before this one has as well, and the frozen weights.

        Says on standard error which copies have drifted apart; one of them is saved.
        """
        self._check_copies()
        first_replica, first_shard = self.data_index == 0, self.rank % self.layout.tensor == 0
        saved = list[Piece]()
        for name, parameter in self.layers.named_parameters():
            if hasattr(parameter, "tied_to") or not (first_shard or shard_of(parameter)):
                continue
            if parameter.requires_grad and (first_replica or self.run.parallel.zero):
                saved += self._pieces_of(name, parameter)
            elif not parameter.requires_grad and not hasattr(parameter, "is_elsewhere"):
                with deepspeed.zero.GatheredParameters([parameter]):  # collective where ZeRO 3 has cut it
                    whole = parameter.detach().float().clone()
                saved += pieces_of(name, parameter, whole_share(whole), {}) if first_replica else ()
        return saved

    def _check_copies(self) -> None:
        """Compare what the shards of a stage hold whole, what the replicas hold at ZeRO 0, and a tied table's copies. Frozen weights do not move."""
        held = {(f"{piece.kind} of {piece.name}", piece.shard): piece.values for piece in self.pieces()}
        found = []
        if self.tensor_group is not None:
            found += drifted({name: values for (name, shard), values in held.items() if shard is None}, self.tensor_group, self.device)
        if self.run.parallel.zero == 0:
            found += drifted({name: values for (name, _), values in held.items()}, self.data_group, self.device)
        for copy, group in getattr(self.engine.module, "ties", ()):
            found += drifted({f"weight of {TIED_WITH['head.decoder.weight']}": copy}, group, self.device)
        tell_drift(found)

    def resume(self, fill: Callable[[list[Piece]], None], *, updates: int) -> None:
        """Fill, publish, go on."""
        fill(self.pieces())
        set_steps_taken(self.torch_optimizer, updates)
        if isinstance(self.torch_optimizer, DeepSpeedCPUAdam):
            multiply_betas(self.torch_optimizer, updates)
        publish_masters(self.engine.optimizer, zero=self.run.parallel.zero)

    @property
    def torch_optimizer(self) -> Optimizer:
        """The optimizer that DeepSpeed wraps; at ZeRO 0 it wraps none."""
        optimizer: Optimizer = getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)
        return optimizer

    def _pieces_of(self, name: str, parameter: nn.Parameter) -> Iterator[Piece]:
        share = zero_share(parameter, self.engine.optimizer, zero=self.run.parallel.zero, data_index=self.data_index)
        if share is not None:
            yield from pieces_of(name, parameter, share, moments_of(self.torch_optimizer, share.master))

    def _counts(self, batches: Sequence[Batch]) -> Tensor:
        """Return the targets of each part in the whole global batch."""
        return self._sum_over_replicas(torch.stack([batch.part_counts for batch in batches]).sum(0).to(self.device))

    def _add_up(self, sums: list[LossSums]) -> LossSums:
        table = torch.stack([torch.stack([s.loss, s.correct, s.count]) for s in sums]).sum(0)
        return LossSums(*self._sum_over_replicas(table))

    def _sum_over_replicas(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, group=self.data_group)
        return tensor

    def _clip(self) -> float:
        """Return the gradients' norm over all shards and stages, and clip by it: at ZeRO 0 DeepSpeed would clip each stage by its own."""
        whole_here = self.tensor_group is None or dist.get_rank(self.tensor_group) == 0
        counted = [parameter.grad for parameter in self.layers.parameters() if parameter.grad is not None
                   and not hasattr(parameter, "tied_to") and (whole_here or shard_of(parameter))]
        squares = torch.nn.utils.get_total_norm(counted).square().to(self.device)
        for group in (self.tensor_group, self.pipe_group):
            if group is not None:
                dist.all_reduce(squares, group=group)
        norm = squares.sqrt()
        if self.run.optim.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.layers.parameters(), self.run.optim.clip_norm, norm)
        return float(norm)

    def _initialize(self, module: nn.Module, groups: list[dict[str, Any]], **more: Any) -> Any:  # noqa: ANN401 - DeepSpeed's classes
        offloads = "offload_optimizer" in self.config["zero_optimization"]
        optimizer = (_cpu_adam if offloads else build_optimizer)(groups, self.run.optim)
        engine = deepspeed.initialize(model=module, model_parameters=groups, optimizer=optimizer, config=self.config, **more)[0]
        update = optimizer.step
        # DeepSpeed clears what a step has left behind its update, so a step that is not to be taken goes through all but that.
        optimizer.step = lambda: update() if self._takes_update else None  # type: ignore[assignment]
        return engine

    def _is_taken(self, norm: float) -> bool:
        """Return whether the step has updated the weights: DeepSpeed itself does not where the norm is no number."""
        return self._takes_update and math.isfinite(norm)


def _cpu_adam(groups: list[dict[str, Any]], config: OptimConfig) -> Optimizer:
    """Return DeepSpeed's AdamW for state in the host's memory. Raises ConfigError where it cannot be compiled."""
    try:
        adam: Optimizer = DeepSpeedCPUAdam(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)
    except RuntimeError as error:
        raise ConfigError("offloading the optimizer needs DeepSpeed's CPU Adam, which is compiled at its first use: "
                          f"{error.__cause__ or error}; install g++ and Python's headers, or choose another --parallel.template") from error
    return adam


class PlainDeepSpeedEngine(_Processes):
    """DeepSpeed's plain engine around the whole layer list."""

    def __init__(self, run: Run, task: Task, *, builders: Callable[[Parts], dict[str, Callable[[], nn.Module]]]) -> None:
        """builders: what builds the layer list of these parts (model.assemble.layer_builders)."""
        super().__init__(run, task)
        model = assemble(run, builders(self.parts))
        self.layers, self.num_weights = model.layers, count_weights(model.layers)
        more = {}
        if self.tensor_group is not None:
            from flm_scale.parallel.tensor import data_group

            self.data_group = data_group()
            more["mpu"] = ModelParallelUnit(self.tensor_group, self.data_group)
        self.engine = self._initialize(model, parameter_groups(model, run.optim), **more)

    def train_step(self, batches: Sequence[Batch], *, step: int, takes: Callable[[float], bool] = math.isfinite) -> StepResult:
        """Accumulate, clip, judge, update."""
        counts = self._counts(batches)
        lr = set_lr(self.engine.optimizer, lr_factor(self.run.optim, step=step, total_steps=self.run.steps))
        sums = []
        for batch in batches:
            micro = score(self.engine, batch.state.to(self.device), self.task)
            sums.append(LossSums(micro.loss.detach(), micro.correct, micro.count))
            self.engine.backward(total_loss(micro, self.task, counts) * self.averaged_away)
            if batch is batches[-1]:
                whole = self._add_up(sums)
                loss = float(total_loss(whole, self.task, counts))
                self._takes_update = takes(loss)
                if self.run.parallel.zero == 0:
                    norm = self._clip()
                    self._takes_update = self._is_taken(norm)
            self.engine.step()
        if self.run.parallel.zero:
            norm = float(self.engine.get_global_grad_norm())
        return StepResult(whole, loss, norm, lr, self._is_taken(norm))

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> LossSums:
        """Score this replica's share; sum over replicas."""
        self.engine.eval()
        sums = [score(self.engine, batch.state.to(self.device), self.task) for batch in batches]
        self.engine.train()
        return self._add_up(sums)

class PipelineDeepSpeedEngine(_Processes):
    """DeepSpeed's pipeline engine over the layer list, cut into stages."""

    def __init__(self, run: Run, task: Task, *, bounds: Sequence[int], builders: Callable[[Parts], dict[str, Callable[[], nn.Module]]]) -> None:
        """bounds: the stages' first layers by their place in the list, and the list's length behind them.

        builders: what builds the layer list of these parts (model.assemble.layer_builders); only those of this process's stage are called.
        """
        super().__init__(run, task)
        self.sums: list[LossSums] = []
        """Of the micro-batches that this rank, on the last stage, has scored."""
        stage = _Stage(run, builders(self.parts), bounds, self.layout, self._score_labelled)
        self.layers, grid = stage.layers, stage.mpu()
        self.data_group, self.pipe_group = grid.get_data_parallel_group(), grid.get_pipe_parallel_group()
        if self.tensor_group is not None:
            from flm_scale.parallel.tensor import data_group

            for theirs, ours in ((self.tensor_group, grid.get_slice_parallel_group()), (data_group(), self.data_group)):
                assert dist.get_process_group_ranks(theirs) == dist.get_process_group_ranks(ours), "megatron-core and DeepSpeed order ranks alike"
        counts = torch.tensor([count_weights(self.layers)], device=self.device)
        dist.all_reduce(counts, group=self.pipe_group)
        self.num_weights = int(counts)
        self.last_stage_rank = grid.stage_to_global(self.layout.pipe - 1)
        with contextlib.redirect_stdout(io.StringIO()):
            self.engine = self._initialize(stage, parameter_groups(stage, run.optim))
        if self.layout.pipe > 1 and hasattr(self.engine.optimizer, "scaled_global_norm"):  # bf16's optimizer has one norm for all groups
            sum_norms_once(self.engine.optimizer)
        # Between the gradients and the update; DeepSpeed looks the instruction's method up here.
        take_step = self.engine._INSTRUCTION_MAP[OptimizerStep]  # noqa: SLF001

        def judge_and_step(engine: PipelineEngine) -> None:
            self._judge()
            take_step(engine)

        self.engine._INSTRUCTION_MAP = {**self.engine._INSTRUCTION_MAP, OptimizerStep: judge_and_step}  # noqa: SLF001

    def train_step(self, batches: Sequence[Batch], *, step: int, takes: Callable[[float], bool] = math.isfinite) -> StepResult:
        """Run the pipeline over the micro-batches, judge, clip, update."""
        counts = self._counts(batches)
        lr = set_lr(self.engine.optimizer, lr_factor(self.run.optim, step=step, total_steps=self.run.steps))
        seen: list[tuple[LossSums, float]] = []
        norms: list[float] = []

        def judge() -> None:
            whole = self._add_up_everywhere()
            loss = float(total_loss(whole, self.task, counts))
            seen.append((whole, loss))
            # On every rank the same, because the sums are.
            self._takes_update = takes(loss)
            if self.run.parallel.zero == 0:
                norms.append(self._clip())
                self._takes_update = self._is_taken(norms[0])

        self._judge, self.sums = judge, []
        self.engine.train_batch(self._labelled(batches, counts))
        norm = norms[0] if norms else float(self.engine.get_global_grad_norm())
        return StepResult(*seen[0], norm, lr, self._is_taken(norm))

    def evaluate(self, batches: Iterable[Batch]) -> LossSums:
        """Score this replica's share; sum over replicas."""
        self.sums, remaining = [], iter(batches)
        while some := list(islice(remaining, MICRO_BATCHES_PER_EVALUATION)):
            self.engine.eval_batch(self._labelled(some, self._counts(some)), reduce_output=None, bcast_loss=False, num_micro_batches=len(some))
        return self._add_up_everywhere()

    @staticmethod
    def _labelled(batches: Sequence[Batch], counts: Tensor) -> Iterator[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
        """Yield what the first stage reads and what the last one needs to score it."""
        for batch in batches:
            yield batch.state.packed(), (batch.state.target_parts, counts)

    def _score_labelled(self, outputs: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor]) -> Tensor:
        target_parts, counts = labels
        micro = LossSums.by_part(Scores(*outputs), target_parts, num_parts=len(self.task.parts))
        self.sums.append(LossSums(micro.loss.detach(), micro.correct, micro.count))
        return total_loss(micro, self.task, counts) * self.averaged_away

    def _add_up_everywhere(self) -> LossSums:
        """Return the last stage's sums over all replicas, on every stage."""
        nothing = torch.zeros(len(self.task.parts), device=self.device)
        whole = self._add_up(self.sums or [LossSums(nothing, nothing, nothing)])
        table = torch.stack([whole.loss, whole.correct, whole.count])
        dist.broadcast(table, self.last_stage_rank, group=self.pipe_group)
        return LossSums(*table)


class _BuiltLayer(LayerSpec):  # type: ignore[misc]
    """A layer that is built on the ranks of its own stage only."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__(nn.Module)
        self.build_layer = build

    def build(self, log: bool = False) -> nn.Module:  # noqa: ARG002 - DeepSpeed's signature
        return self.build_layer()


class _Stage(PipelineModule):  # type: ignore[misc]
    """The run of the layer list that this rank holds. One float tensor and one of integers go from stage to stage."""

    def __init__(self, run: Run, builders: dict[str, Callable[[], nn.Module]], bounds: Sequence[int], layout: Layout,
                 score_labelled: Callable[[tuple[Tensor, Tensor], tuple[Tensor, Tensor]], Tensor]) -> None:
        self.bounds, self.names, self.recompute = list(bounds), list(builders), run.recompute
        with contextlib.redirect_stdout(io.StringIO()):
            super().__init__([_BuiltLayer(build) for build in builders.values()], loss_fn=score_labelled, dynamic_shape=True,
                             topology=PipeModelDataParallelTopology(num_pp=layout.pipe, num_mp=layout.tensor, num_dp=layout.data))
        first, last = self.bounds[self.stage_id], self.bounds[self.stage_id + 1]
        self.layers = nn.ModuleDict(dict(zip(self.names[first:last], self.forward_funcs, strict=True)))
        self.pretrained = pretrained_names(run, dict(self.layers.items()))
        self.ties: list[tuple[nn.Parameter, dist.ProcessGroup]] = []
        if is_tied(run):
            self._tie(layout)

    def forward(self, packed: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Run this stage's layers; the last stage gives (loss, correct), others what the next stage reads."""
        head = dict(self.layers.items()).get("head")
        state = run_layers((layer for layer in self.layers.values() if layer is not head), State.unpack(*packed), recompute=self.recompute)
        scores: tuple[Tensor, Tensor] = state.packed() if head is None else head(state)
        return scores

    def _partition_layers(self, method: str = "") -> None:  # noqa: ARG002 - the stages are cut by cost, outside
        self.parts = self.bounds
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, dist.ProcessGroup]]:
        """Return the weights whose gradients DeepSpeed sums over stages."""
        return self.ties

    def _tie(self, layout: Layout) -> None:
        """Share the embedding table with the decoder; where two stages hold a copy each, let their gradients be summed."""
        tie(dict(self.layers.items()))
        copy, table = next(iter(TIED_WITH.items()))
        owners = [next(stage for stage in range(layout.pipe) if place < self.bounds[stage + 1])
                  for place in (self.names.index(name.split(".", 1)[0]) for name in (table, copy))]
        if owners[0] == owners[1]:
            return
        for data_index in range(layout.data):
            for tensor_index in range(layout.tensor):
                ranks = [layout.rank(stage=stage, data_index=data_index, tensor_index=tensor_index) for stage in owners]
                group = dist.new_group(ranks)
                if self.global_rank in ranks:
                    weight = self.layers.get_parameter(table if self.stage_id == owners[0] else copy)
                    self.ties.append((weight, group))
        if self.stage_id == owners[1]:
            # The gradient norm treats it as what it is: the table, counted once.
            weight.ds_pipe_replicated = True  # type: ignore[attr-defined]
