"""What a checkpoint holds of an engine: runs of float32 weights and of AdamW's moments, as views of the live state."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from flm_scale.model.parts import Piece, shard_of

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's, by the names that torch and DeepSpeed give them."""


class Share(NamedTuple):
    """Which values of a weight a process holds in float32, and where."""

    master: Tensor
    """What the optimizer knows: the weight itself, a copy, or a flat buffer of many weights."""
    shape: Sequence[int]
    """Of this process's shard of the weight."""
    start: int
    """Place of the first value in the flattened shard."""
    offset: int
    """Place of the first value in the flattened master."""
    size: int


def whole_share(master: Tensor) -> Share:
    """Return the share of a process that holds all of its shard."""
    return Share(master, master.shape, 0, 0, master.numel())


def zero_share(parameter: Any, wrapper: Any, *, zero: int, data_index: int) -> Share | None:  # noqa: ANN401 - a weight with DeepSpeed's notes
    """Return the share that ZeRO leaves to this process, by DeepSpeed's book of where in its flat buffers it lies; None for none.

    wrapper: DeepSpeed's optimizer.
    """
    if zero == 0:
        return whole_share(parameter)
    if zero == 3:
        group, offset, size = wrapper.grad_position[wrapper.get_param_id(parameter)]
        start = data_index * size
        size = min(size, parameter.ds_numel - start)  # the last share is filled up, or empty
        return Share(wrapper.fp32_partitioned_groups_flat[group], parameter.ds_shape, start, offset, size) if size > 0 else None
    share = parameter._hp_mapping  # noqa: SLF001
    if share is None:
        return None
    master = wrapper.optimizer.param_groups[share.param_group_index]["params"][0]
    return Share(master, parameter.shape, share.lp_fragment_address.start, share.hp_fragment_address.start, share.hp_fragment_address.numel)


def pieces_of(name: str, parameter: Tensor, share: Share, moments: Mapping[str, Tensor]) -> Iterator[Piece]:
    """Yield the pieces of one weight: of itself, and of each moment. moments: float32, of the master's shape."""
    for kind, held in {"weight": share.master, **moments}.items():
        values = held.detach().view(-1)[share.offset : share.offset + share.size]
        yield Piece(name, kind, tuple(share.shape), shard_of(parameter), share.start, values)


def moments_of(optimizer: Optimizer, master: Tensor) -> dict[str, Tensor]:
    """Return the optimizer's moments of a weight, made if it has taken no step yet; SGD has none."""
    if isinstance(optimizer, SGD):
        return {}
    state = optimizer.state[master]
    if not state:
        # DeepSpeed's counts steps in an int, torch's in a tensor, which the fused kernel wants on the weight's device.
        state["step"] = torch.zeros((), device=master.device if optimizer.defaults.get("fused") else None) if isinstance(optimizer, AdamW) else 0
        state |= {moment: torch.zeros_like(master, memory_format=torch.preserve_format) for moment in MOMENTS}
    return {moment: state[moment] for moment in MOMENTS}


def set_steps_taken(optimizer: Optimizer, updates: int) -> None:
    """Let the optimizer's bias correction go on behind so many updates."""
    for state in optimizer.state.values():
        state["step"] = torch.full_like(state["step"], updates) if isinstance(state["step"], Tensor) else updates


def publish_masters(wrapper: Any, *, zero: int) -> None:  # noqa: ANN401 - DeepSpeed's optimizer
    """Give the model's weights the values of their float32 masters; collective. At ZeRO 0 they are the same tensors."""
    if zero in {1, 2}:
        wrapper.update_lp_params()
    elif zero == 3:
        wrapper._partition_all_parameters()  # noqa: SLF001
        for group in range(len(wrapper.fp16_groups)):
            wrapper._reassign_or_swap_out_partitioned_parameters(group)  # noqa: SLF001
        if wrapper.persistent_parameters:  # small weights, which are whole between steps too
            wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)
