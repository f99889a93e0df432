"""Data-parallel training over many processes with ZeRO 0-3: the one door to DeepSpeed. gloo on CPU, NCCL on NVIDIA GPUs.

Losses, gradients and weights are those of engine/local.py for the same global batch, however it is split over processes.
"""

import logging
import os
import warnings
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from flm_scale.batch import Batch, LossSums
from flm_scale.config import Run, micro_steps
from flm_scale.engine.base import (
    StepResult,
    Task,
    build_optimizer,
    check_finite,
    lr_factor,
    parameter_groups,
    score,
    set_lr,
    total_loss,
)
from flm_scale.engine.deepspeed_config import merge_deepspeed, read_template
from flm_scale.model.assemble import VisionLanguageModel
from flm_scale.parallel.mesh import find_ranks


class DeepSpeedEngine:
    """DeepSpeed's plain engine around the model."""

    def __init__(self, run: Run, model: VisionLanguageModel, task: Task) -> None:
        ranks, missing = find_ranks(os.environ)
        os.environ.update(missing)
        on_gpu = torch.cuda.is_available()
        if not on_gpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # DeepSpeed 0.19 calls two collectives by names that torch 2.13 wants to rename.
        warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.run, self.task, self.rank, self.size = run, task, ranks.rank, ranks.size
        self.device = torch.device("cuda", ranks.local_rank) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(self.device)
        config = merge_deepspeed(read_template(run.parallel.zero), run, data_parallel_size=self.size)
        deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False)
        groups = parameter_groups(model, run.optim)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, model_parameters=groups, optimizer=build_optimizer(groups, run.optim), config=config)
        self.model = model

    def train_step(self, batches: Sequence[Batch], *, step: int) -> StepResult:
        """Accumulate, check, clip, update."""
        counts = self._all_reduce(torch.stack([batch.part_counts for batch in batches]).sum(0).to(self.device))
        lr = set_lr(self.optimizer, lr_factor(self.run.optim, step=step, total_steps=self.run.steps))
        # DeepSpeed averages over micro-steps and ranks; our loss is already a share of the global one, so that is multiplied back.
        averaged_away = micro_steps(self.run.batch, data_parallel_size=self.size) * self.size
        sums = []
        for batch in batches:
            micro = score(self.engine, batch.state.to(self.device), self.task)
            sums.append(LossSums(micro.loss.detach(), micro.correct, micro.count))
            if batch is batches[-1]:
                # Before the last backward pass, because DeepSpeed's step follows it and must not be taken on a bad loss.
                whole = self._add_up(sums)
                loss = float(total_loss(whole, self.task, counts))
                check_finite(loss, step=step, batches=batches)
            self.engine.backward(total_loss(micro, self.task, counts) * averaged_away)
            # ZeRO 0 keeps no norm, but there every rank has the summed gradients until the step.
            norm = self._gradient_norm() if batch is batches[-1] and self.run.parallel.zero == 0 else 0.0
            self.engine.step()
        norm = norm or float(self.engine.get_global_grad_norm())
        return StepResult(whole, loss, norm, lr)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> LossSums:
        """Score this rank's share; sum over ranks."""
        self.engine.eval()
        sums = [score(self.engine, batch.state.to(self.device), self.task) for batch in batches]
        self.engine.train()
        return self._add_up(sums)

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        """Return each value added up over all ranks."""
        return self._all_reduce(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def weights(self) -> dict[str, Tensor]:
        """Return float32 weights by name on rank 0, gathered from every rank's shard."""
        from deepspeed.utils import safe_get_full_fp32_param

        weights = {}
        for name, parameter in self.model.layers.named_parameters():
            # Collective where the parameter is sharded. Frozen ones have no float32 master.
            full = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            if full is None:
                full = self._gathered(parameter)
            if self.rank == 0:
                weights[name] = full.detach().float().cpu().clone()
        return weights

    def _gradient_norm(self) -> float:
        return float(torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]))

    def _gathered(self, parameter: Tensor) -> Tensor:
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def _add_up(self, sums: list[LossSums]) -> LossSums:
        table = torch.stack([torch.stack([s.loss, s.correct, s.count]) for s in sums]).sum(0)
        return LossSums(*self._all_reduce(table))

    def _all_reduce(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor
