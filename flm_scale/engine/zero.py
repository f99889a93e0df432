"""What our engines ask of DeepSpeed's optimizers beyond their interface: where weights lie, how masters reach the model, norms, powers of betas.

By the names that DeepSpeed 0.19 gives things. Nothing here imports it.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flm_scale.engine.pieces import Share, whole_share


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


def sum_norms_once(wrapper: Any) -> None:  # noqa: ANN401 - DeepSpeed's optimizer
    """Let the norm be added up over stages and shards once for all of the optimizer's groups.

    DeepSpeed adds up each group's by itself, and waits for ever where one stage has more groups than another: those of pretrained weights.
    """
    norm_of_groups, group = wrapper.scaled_global_norm, wrapper.model_parallel_group

    def norm_over_stages(norm_type: float = 2) -> Tensor:
        wrapper.model_parallel_group = None
        here = norm_of_groups(norm_type)
        wrapper.model_parallel_group = group
        squares = torch.where(here < 0, torch.inf, here.square())  # DeepSpeed's -1 stands for no number
        dist.all_reduce(squares, group=group)
        return squares.sqrt()

    wrapper.scaled_global_norm = norm_over_stages


def multiply_betas(adam: Any, updates: int) -> None:  # noqa: ANN401 - DeepSpeed's CPU Adam
    """Bring the powers of the betas, which its C++ part keeps, to where so many updates bring them: taken at once they would be rounded otherwise.

    2 microseconds an update.
    """
    beta1, beta2 = adam.param_groups[0]["betas"]
    nothing = [torch.zeros(1) for _ in range(4)]
    for step in range(1, updates + 1):
        adam.ds_opt_adam.adam_update(adam.opt_id, step, 0.0, beta1, beta2, 1.0, 0.0, True, *nothing)


class ModelParallelUnit:
    """What DeepSpeed's plain engine asks of a model-parallel unit; for it model parallel is tensor parallel."""

    def __init__(self, tensor_group: dist.ProcessGroup, data_group: dist.ProcessGroup) -> None:
        for name, group in (("model", tensor_group), ("tensor_model", tensor_group), ("data", data_group)):
            setattr(self, f"get_{name}_parallel_group", lambda group=group: group)
            setattr(self, f"get_{name}_parallel_rank", lambda group=group: dist.get_rank(group))
            setattr(self, f"get_{name}_parallel_world_size", lambda group=group: dist.get_world_size(group))
