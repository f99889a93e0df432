"""Bytes of a model's state in one process under DeepSpeed 0.19, by ZeRO stage. Arithmetic; tests/distributed/test_memory.py measures the same."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor

from flm_scale.config import Run


class StateBytes(NamedTuple):
    """What stays in memory over a step, in bytes."""

    weights: float
    """As the model computes with them: see weight_bytes."""
    gradients: float
    """After the last backward pass of a step."""
    optimizer: float
    """float32 masters and AdamW's two moments."""


def element_bytes(precision: Literal["fp32", "bf16"]) -> int:
    """Return the bytes of a number."""
    return 2 if precision == "bf16" else 4


def weight_bytes(weights: Iterable[Tensor], run: Run) -> float:
    """Return the bytes of weights as the model computes with them: in the run's precision, but for a frozen language model, which has its own."""
    element = element_bytes(run.precision)
    return float(sum(weight.numel() * (weight.element_size() if hasattr(weight, "is_elsewhere") else element) for weight in weights))


def state_bytes(weights: Iterable[Tensor], run: Run, config: Mapping[str, Any], *, data_size: int) -> StateBytes:
    """Return the bytes of a process that holds these weights (its pieces, its stage) and shares their state with data_size - 1 others.

    config: DeepSpeed's (engine.deepspeed_config).
    """
    weights, zero, zero_config = list(weights), run.parallel.zero, config["zero_optimization"]
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    share = trained / data_size
    held = weight_bytes(weights, run)
    if zero == 3:
        # Small weights stay whole beside their pieces.
        threshold = zero_config.get("stage3_param_persistence_threshold", 10 ** 5)
        held = held / data_size + weight_bytes([weight for weight in weights if weight.numel() <= threshold], run)
    # With bf16, ZeRO 1 keeps the micro-step's bf16 gradients beside the float32 sums of all; ZeRO 2 and 3 keep a share of the sums alone.
    gradients = 4 * share if zero >= 2 else (6 if run.precision == "bf16" else 4) * trained
    # A second copy of the share, in float32, even where the weights themselves are.
    masters = 0 if zero == 0 else 4 * share
    moments = 8 * (trained if zero == 0 else share) if run.optim.kind == "adamw" else 0
    if zero_config.get("offload_optimizer", {}).get("device") == "cpu":
        gradients = masters = moments = 0.0
    return StateBytes(held, gradients, masters + moments)


def buffer_bytes(weights: Iterable[Tensor], run: Run, config: Mapping[str, Any]) -> float:
    """Return the bytes of DeepSpeed's largest working buffers: gradients on their way, and under ZeRO 3 the weights gathered at once."""
    weights, element, zero_config = list(weights), element_bytes(run.precision), config["zero_optimization"]
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    sent_as = element_bytes(config.get("communication_data_type", run.precision))
    # What is sent in another precision than it has is copied.
    bucket: float = (element + (sent_as if sent_as != element else 0)) * zero_config.get("reduce_bucket_size", 5 * 10 ** 8)
    match run.parallel.zero:
        case 0:
            return min(bucket, element * trained)
        case 1 if run.precision == "bf16":
            # It sends the float32 sums at once.
            return 0.0 if sent_as == 4 else sent_as * trained
        case 3:
            at_once: float = min(sum(weight.numel() for weight in weights), zero_config.get("stage3_max_live_parameters", 10 ** 9))
            return bucket + element * at_once
        case _:
            return bucket
