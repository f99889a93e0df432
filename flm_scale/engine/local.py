"""One process of plain PyTorch: the reference that every other engine is held against."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from flm_scale.batch import Batch, LossSums
from flm_scale.config import Run
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
from flm_scale.engine.pieces import moments_of, pieces_of, set_steps_taken, whole_share
from flm_scale.model.assemble import VisionLanguageModel
from flm_scale.model.parts import Piece
from flm_scale.parallel.mesh import Layout


class LocalEngine:
    """Trains on one device. In bf16 the model computes in bf16 while the optimizer keeps float32 masters and sums of gradients."""

    rank, data_index, layout = 0, 0, Layout(1, 1, 1)

    def __init__(self, run: Run, model: VisionLanguageModel, task: Task) -> None:
        self.run, self.task = run, task
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            keep_freed_memory()
        self.model = model.to(self.device)
        self.layers, self.num_weights = model.layers, count_weights(model.layers)
        groups = parameter_groups(self.model, run.optim)
        self.weights_in_model: list[nn.Parameter] = [parameter for group in groups for parameter in group["params"]]
        if run.precision == "bf16":
            for group in groups:
                group["params"] = [nn.Parameter(parameter.detach().clone()) for parameter in group["params"]]
            self.model.to(torch.bfloat16)
        self.masters: list[nn.Parameter] = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = build_optimizer(groups, run.optim)

    def train_step(self, batches: Sequence[Batch], *, step: int, takes: Callable[[float], bool] = math.isfinite) -> StepResult:
        """Accumulate, clip, judge, update."""
        counts = torch.stack([batch.part_counts for batch in batches]).sum(0).to(self.device)
        sums = []
        for batch in batches:
            micro = score(self.model, batch.state.to(self.device), self.task)
            total_loss(micro, self.task, counts).backward()
            sums.append(LossSums(micro.loss.detach(), micro.correct, micro.count))
            self._collect_gradients()
        whole = sum(sums[1:], sums[0])
        loss = float(total_loss(whole, self.task, counts))
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, self.run.optim.clip_norm or float("inf")))
        lr = set_lr(self.optimizer, lr_factor(self.run.optim, step=step, total_steps=self.run.steps))
        is_taken = takes(loss) and math.isfinite(norm)
        if is_taken:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self._publish_masters()
        return StepResult(whole, loss, norm, lr, is_taken)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> LossSums:
        """Score every batch."""
        sums = [score(self.model, batch.state.to(self.device), self.task) for batch in batches]
        return sum(sums[1:], sums[0])

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        """Return the values: there is one rank."""
        return values

    def pieces(self) -> list[Piece]:
        """Return views of all masters and their moments."""
        masters = dict(zip(self.weights_in_model, self.masters, strict=True))
        return [piece for name, parameter in self.layers.named_parameters() if parameter in masters
                for piece in pieces_of(name, parameter, whole_share(masters[parameter]), moments_of(self.optimizer, masters[parameter]))]

    def saved_pieces(self) -> list[Piece]:
        """Return all pieces and the frozen weights."""
        frozen = [piece for name, parameter in self.layers.named_parameters() if not (parameter.requires_grad or hasattr(parameter, "is_elsewhere"))
                  for piece in pieces_of(name, parameter, whole_share(parameter.float()), {})]
        return self.pieces() + frozen

    def resume(self, fill: Callable[[list[Piece]], None], *, updates: int) -> None:
        """Fill, publish, go on."""
        fill(self.pieces())
        set_steps_taken(self.optimizer, updates)
        self._publish_masters()

    @torch.no_grad()
    def _collect_gradients(self) -> None:
        if self.run.precision == "bf16":
            for master, parameter in zip(self.masters, self.weights_in_model, strict=True):
                if parameter.grad is not None:
                    grad = parameter.grad.float()
                    master.grad = grad if master.grad is None else master.grad.add_(grad)
                    parameter.grad = None

    @torch.no_grad()
    def _publish_masters(self) -> None:
        if self.run.precision == "bf16":
            for master, parameter in zip(self.masters, self.weights_in_model, strict=True):
                parameter.copy_(master)
