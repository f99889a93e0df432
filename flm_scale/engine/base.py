"""What every engine offers, and what engines share: the loss of a micro-batch, the optimizer, the learning rate."""

import contextlib
import ctypes
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from flm_scale.batch import Batch, LossSums, Scores, State, Term, part_weights
from flm_scale.config import OptimConfig
from flm_scale.model.assemble import LayerList, is_table
from flm_scale.model.parts import Piece, whole_size
from flm_scale.parallel.mesh import Layout


class Task(Protocol):
    """The side of an objective that an engine sees: how the parts of the loss are named and weighed."""

    @property
    def parts(self) -> tuple[str, ...]: ...  # noqa: D102 - see objectives.objective.Objective

    @property
    def terms(self) -> tuple[Term, ...]: ...  # noqa: D102


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step saw, over all ranks."""

    sums: LossSums
    loss: float
    grad_norm: float
    """Global norm before clipping; DeepSpeed gives inf for one that is not a number."""
    lr: float
    is_taken: bool
    """Whether the weights were updated."""


class Engine(Protocol):
    """Trains one model on one task. Every method but the properties is collective: all ranks call it."""

    rank: int
    """This process among all; rank 0 writes."""
    layout: Layout
    data_index: int
    """Which data-parallel replica this process belongs to."""
    device: torch.device
    layers: nn.ModuleDict
    """Those that this process holds."""
    num_weights: int
    """Of the whole model, however it is cut."""
    def train_step(self, batches: Sequence[Batch], *, step: int, takes: Callable[[float], bool] = math.isfinite) -> StepResult:
        """Accumulate over this rank's micro-batches of the step (counted from 0) and update the weights.

        No update is taken, and nothing of the step stays, when the gradient norm is not a number or `takes` says no to the global loss.
        """
        ...

    def evaluate(self, batches: Iterable[Batch]) -> LossSums:
        """Return the sums over all ranks' batches, without a gradient."""
        ...

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        """Return each value added up over all data-parallel replicas."""
        ...

    def saved_pieces(self) -> list[Piece]:
        """Return what this process saves: frozen weights too, and of what several processes hold alike each piece on one of them.

        Weights that lie elsewhere (`is_elsewhere`: a frozen language model's) are not saved.
        """
        ...

    def resume(self, fill: Callable[[list[Piece]], None], *, updates: int) -> None:
        """Let `fill` copy into the pieces what they were after so many updates, and go on behind them. Frozen weights are left as they are."""
        ...


def keep_freed_memory() -> None:
    """Let the C library keep what a step frees: taking large buffers from the system anew costs a CPU step up to a fifth of its time."""
    trim_threshold, mmap_max = -1, -4  # glibc's names for the two: never give memory back, map no file for large blocks
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_max, 0)


def count_weights(layers: nn.Module) -> int:
    """Return the number of weights that these layers stand for: pieces count as the whole, a second copy of a tied table as nothing."""
    return sum(whole_size(parameter) for parameter in layers.parameters() if not hasattr(parameter, "tied_to"))


def score(model: nn.Module, state: State, task: Task) -> LossSums:
    """Run the model and add up its scores by part."""
    return LossSums.by_part(Scores(*model(state)), state.target_parts, num_parts=len(task.parts))


def total_loss(sums: LossSums, task: Task, counts: Tensor) -> Tensor:
    """Return the share of the global loss that these sums make up. counts: targets of the whole global batch by part."""
    return (part_weights(task.terms, task.parts, counts) * sums.loss).sum()


def parameter_groups(model: LayerList, config: OptimConfig) -> list[dict[str, Any]]:
    """Return the optimizer's groups: no decay on norms, biases and tables; pretrained weights at a share of the rate."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.layers.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name in model.pretrained, is_table(getattr(parameter, "tied_to", name), parameter)), []).append(parameter)
    return [{"params": parameters, "weight_decay": 0.0 if table else config.weight_decay, "lr": 0.0,
             "peak_lr": config.lr * (config.pretrained_lr_scale if pretrained else 1.0)}
            for (pretrained, table), parameters in sorted(groups.items(), key=lambda item: item[0])]


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> Optimizer:
    """Return AdamW, or plain SGD, over the groups."""
    if config.kind == "sgd":
        return SGD(groups, lr=config.lr)
    return AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=torch.cuda.is_available())


def lr_factor(config: OptimConfig, *, step: int, total_steps: int) -> float:
    """Return the learning rate's factor, in [0, 1], at a step counted from 0: linear warm-up, then decay to config.final_lr_share."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    match config.schedule:
        case "constant":
            return 1.0
        case "linear":
            left = 1.0 - done
        case "cosine":
            left = 0.5 * (1.0 + math.cos(math.pi * done))
    return config.final_lr_share + (1.0 - config.final_lr_share) * left


def set_lr(optimizer: Optimizer, factor: float) -> float:
    """Set every group's rate to its peak times the factor; return the largest."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return max(float(group["lr"]) for group in optimizer.param_groups)
