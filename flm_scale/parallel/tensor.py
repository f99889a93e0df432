"""Tensor parallelism: the text side's blocks, cut over the processes of a tensor group. The one door to megatron-core.

megatron-core 0.16's reductions return their input unreduced when it is not contiguous, and some of its mappings allocate on the
GPU only, so the two mappings here are our own; its layers are used where they reduce in their own, safe, backward pass.
"""

import os
import warnings
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F  # noqa: N812

from flm_scale.model.parts import Decoder, Shard
from flm_scale.parallel.mesh import Layout

with warnings.catch_warnings():  # of extensions that are optional
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

# megatron-core asks for one hardware queue, on which the reduction of a gradient overlaps with the next product.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

REDUCTIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


def start_groups(layout: Layout) -> None:
    """Make megatron-core's process groups; collective over all processes."""
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(layout.tensor, layout.pipe, create_gloo_process_groups=False)


def tensor_group() -> dist.ProcessGroup:
    """Return the group of processes that hold the pieces of one model replica's stage."""
    group: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
    return group


def data_group() -> dist.ProcessGroup:
    """Return the group of processes that hold the same piece of the model and see different data."""
    group: dist.ProcessGroup = parallel_state.get_data_parallel_group()
    return group


class TensorParts:
    """megatron-core's blocks; this process holds 1/num_shards of each."""

    def __init__(self, group: dist.ProcessGroup, *, shares_images: bool) -> None:
        """shares_images: each process encodes its share of the images (parallel.vision 'shard_batch')."""
        self.group, self.num_shards, self.shares_images = group, dist.get_world_size(group), shares_images
        # Weights are filled by name afterwards (model/assemble.py), so the initialisers only leave them as they are.
        self.common: dict[str, Any] = {"config": ModelParallelConfig(tensor_model_parallel_size=self.num_shards, use_cpu_initialization=True,
                                                                     perform_initialization=False, params_dtype=torch.get_default_dtype()),
                                       "init_method": None, "tp_group": group}

    def column_linear(self, size_in: int, size_out: int) -> nn.Module:
        """Return a linear that gives this process's share of the output features."""
        linear = _ColumnLinear(size_in, size_out, bias=True, gather_output=False, **self.common)
        self._mark(linear.weight, dim=0, size=size_out)
        self._mark(linear.bias, dim=0, size=size_out)
        return linear

    def row_linear(self, size_in: int, size_out: int) -> nn.Module:
        """Return a linear that takes this process's share of the input features and gives the sum over all; its bias is whole."""
        linear = _RowLinear(size_in, size_out, bias=True, input_is_parallel=True, skip_bias_add=False, **self.common)
        self._mark(linear.weight, dim=1, size=size_in)
        return linear

    def embedding(self, num_rows: int, size: int) -> nn.Module:
        """Return a table of which this process holds some rows."""
        table = _Embedding(self._padded(num_rows), size, **self.common)
        self._mark(table.weight, dim=0, size=num_rows)
        return table

    def decoder(self, size: int, num_rows: int) -> nn.Module:
        """Return a decoder of which this process holds some rows of the vocabulary."""
        decoder = _Decoder(size, num_rows, self._padded(num_rows) // self.num_shards, self.group)
        self._mark(decoder.weight, dim=0, size=num_rows)
        self._mark(decoder.bias, dim=0, size=num_rows)
        return decoder

    def share_of_images(self, pixels: UInt8[Tensor, "N *F 3 height width"]) -> UInt8[Tensor, "n *F 3 height width"]:
        """Return this process's images, as many on each; black ones fill up the last share."""
        if not self.shares_images:
            return pixels
        share = -(-len(pixels) // self.num_shards)
        filled = torch.cat([pixels, pixels.new_zeros(share * self.num_shards - len(pixels), *pixels.shape[1:])])
        return filled.narrow(0, dist.get_rank(self.group) * share, share)

    def join_images(self, rows: Float[Tensor, "rows D"], num_rows: int) -> Float[Tensor, "N*I D"]:
        """Return the rows of all images."""
        return gather_rows(rows, self.group)[:num_rows] if self.shares_images else rows

    def sum_image_gradients(self, layer: nn.Module) -> None:
        """Sum each gradient over the processes when it is made, so that every engine finds it whole."""
        if self.shares_images:
            for parameter in layer.parameters():
                parameter.register_hook(partial(_all_reduced, group=self.group))

    def _padded(self, num_rows: int) -> int:
        return -(-num_rows // self.num_shards) * self.num_shards

    def _mark(self, parameter: nn.Parameter, *, dim: int, size: int) -> None:
        parameter.shard = Shard(dim, dist.get_rank(self.group), self.num_shards, size)  # type: ignore[attr-defined]
        # DeepSpeed's gradient norm reads this name: pieces are added up over the tensor group, whole weights are counted once.
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def _all_reduced(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    # A gradient may be a transposed or an expanded view; a reduction needs memory of its own.
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _Sum(torch.autograd.Function):
    """Sum over the group forward; the gradient, the same on every process, as it is backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:  # noqa: ARG004
        return _all_reduced(tensor, group)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grad, None


class _Share(torch.autograd.Function):
    """The tensor as it is forward; the sum of the processes' gradients backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduced(grad, ctx.group), None  # type: ignore[attr-defined]


def sum_over_shards(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of the processes' partial results."""
    total: Tensor = _Sum.apply(tensor, group)
    return total


def share_with_shards(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the tensor; its gradient is summed over the processes, each of which computes with a piece of the weights."""
    shared: Tensor = _Share.apply(tensor, group)
    return shared


class _ColumnLinear(ColumnParallelLinear):  # type: ignore[misc]
    def forward(self, rows: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows E"]:
        out: Tensor = super().forward(rows)[0]
        return out


class _RowLinear(RowParallelLinear):  # type: ignore[misc]
    def forward(self, rows: Float[Tensor, "*rows E"]) -> Float[Tensor, "*rows D"]:
        out: Tensor = sum_over_shards(F.linear(rows, self.weight), self.tp_group) + self.bias
        return out


class _Embedding(VocabParallelEmbedding):  # type: ignore[misc]
    def forward(self, ids: Int[Tensor, " T"]) -> Float[Tensor, "T D"]:
        row = ids - self.vocab_start_index
        held = (row >= 0) & (row < len(self.weight))
        vectors = F.embedding(row.clamp(0, len(self.weight) - 1), self.weight)
        return sum_over_shards(vectors * held[:, None].to(vectors.dtype), self.tp_group)


class _Decoder(Decoder):
    """Holds `rows_here` rows of the vocabulary; the last shard's may be padding."""

    def __init__(self, size: int, num_rows: int, rows_here: int, group: dist.ProcessGroup) -> None:
        super().__init__(size, rows_here)
        self.group, self.size = group, num_rows
        self.first_id = dist.get_rank(group) * rows_here
        self.num_ids = max(0, min(rows_here, num_rows - self.first_id))

    def combine(self, tensor: Tensor, how: Literal["sum", "max", "min"]) -> Tensor:
        """Return the tensor combined over the shards, in place."""
        dist.all_reduce(tensor, REDUCTIONS[how], group=self.group)
        return tensor

    def logits(self, rows: Float[Tensor, "R D"]) -> Float[Tensor, "R V"]:
        """Return all logits, gathered from the shards."""
        local = super().logits(rows).contiguous()
        pieces = [torch.empty_like(local) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(pieces, local, group=self.group)
        return torch.cat(pieces, dim=1)[:, :self.size]


class _GatherRows(torch.autograd.Function):
    """All processes' rows one after another forward; backward each takes the gradient of its own, which is the same on every process."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.rank, ctx.count = dist.get_rank(group), len(rows)  # type: ignore[attr-defined]
        pieces = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
        dist.all_gather(pieces, rows.contiguous(), group=group)
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.narrow(0, ctx.rank * ctx.count, ctx.count), None  # type: ignore[attr-defined]


def gather_rows(rows: Float[Tensor, "rows D"], group: dist.ProcessGroup) -> Float[Tensor, "all D"]:
    """Return the rows of every process, in the order of their ranks."""
    gathered: Tensor = _GatherRows.apply(rows, group)
    return gathered
