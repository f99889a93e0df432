"""The blocks that tensor parallelism replaces: linears, the token embedding, and the decoder with its loss.

Model code asks a `Parts` object for them. `PlainParts` gives torch's own, the single-process reference; a sharded kind gives blocks
that hold 1/num_shards of the weights and whose results are the same.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F  # noqa: N812 - the name everyone knows

TARGETS_PER_CHUNK = 1024
"""Rows whose logits exist at once: at a vocabulary of 50,000 in float32, 200 MB."""


@dataclass(frozen=True)
class Shard:
    """Which piece of a whole weight a parameter is. A parameter without the attribute `shard` is whole."""

    dim: int
    index: int
    count: int
    size: int
    """Length of the whole weight along `dim`; the pieces are equal, so the last may end with rows that stand for nothing."""

    @property
    def start(self) -> int:
        """First index of the whole weight that is in this piece."""
        return self.index * -(-self.size // self.count)

    @property
    def held(self) -> tuple[slice, ...]:
        """Index into the whole weight that gives what is in this piece. Piece 1 of 2 of 5 rows: [3:5]."""
        start = min(self.start, self.size)
        return (*[slice(None)] * self.dim, slice(start, min(start + -(-self.size // self.count), self.size)))


def shard_of(parameter: Tensor) -> Shard | None:
    """Return which piece of a weight this is; None for a whole one."""
    return getattr(parameter, "shard", None)


def whole_shape(shape: Sequence[int], shard: Shard | None) -> tuple[int, ...]:
    """Return the shape of the weight of which a shard has this shape."""
    return tuple(shape) if shard is None else (*shape[: shard.dim], shard.size, *shape[shard.dim + 1 :])


def whole_size(parameter: Tensor) -> int:
    """Return the number of values of the weight that this is a piece of."""
    return math.prod(whole_shape(parameter.shape, shard_of(parameter)))


def generator_of(name: str, *, seed: int) -> torch.Generator:
    """Return the generator of one name: what is drawn from it depends on the seed and the name alone."""
    key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "big") >> 1)


@torch.no_grad()
def fill(parameter: Tensor, whole: Any) -> None:  # noqa: ANN401 - safetensors' slices have no type of their own
    """Copy a whole weight into a parameter, or the piece of it that the parameter is; rows that stand for nothing become zero.

    whole: a tensor, or anything that gives one when it is indexed, such as a weight that is still on disk.
    """
    shard = shard_of(parameter)
    if shard is None:
        parameter.copy_(whole[:])
        return
    piece = whole[shard.held]
    parameter.zero_().narrow(shard.dim, 0, piece.shape[shard.dim]).copy_(piece)


@dataclass(frozen=True)
class Piece:
    """What one process holds of one tensor of the training state: a run of values of a weight, or of one of its moments."""

    name: str
    """The weight's canonical name."""
    kind: str
    """`weight` (float32), or the optimizer's name of a moment: `exp_avg`, `exp_avg_sq`."""
    shape: tuple[int, ...]
    """Of this process's shard of it, filled-up rows included."""
    shard: Shard | None
    start: int
    """Place of the first value within the flattened shard."""
    values: Float[Tensor, " values"]
    """A view of the live state: what is copied into it is what training goes on with."""


@runtime_checkable
class Parts(Protocol):
    """Maker of the blocks that may be sharded."""

    num_shards: int
    """Pieces that attention heads, hidden units and the vocabulary are cut into; this process holds one."""

    def column_linear(self, size_in: int, size_out: int) -> nn.Module:
        """Linear whose output features are split over the shards."""
        ...

    def row_linear(self, size_in: int, size_out: int) -> nn.Module:
        """Linear whose input features are split over the shards, with the sum as its result."""
        ...

    def embedding(self, num_rows: int, size: int) -> nn.Module:
        """Table of token vectors."""
        ...

    def decoder(self, size: int, num_rows: int) -> nn.Module:
        """From vectors to tokens: `forward(rows, target_ids)` scores targets, `logits(rows)` gives all logits."""
        ...

    def share_of_images(self, pixels: UInt8[Tensor, "N *F 3 height width"]) -> UInt8[Tensor, "n *F 3 height width"]:
        """The images that this process encodes: all, or its share."""
        ...

    def join_images(self, rows: Float[Tensor, "rows D"], num_rows: int) -> Float[Tensor, "N*I D"]:
        """The rows of all images, `num_rows` of them, from every process's share."""
        ...

    def sum_image_gradients(self, layer: nn.Module) -> None:
        """Make the gradients of a vision layer whole where each process encodes a share."""
        ...


class PlainParts:
    """torch's own blocks, whole."""

    num_shards = 1

    def column_linear(self, size_in: int, size_out: int) -> nn.Module:
        """Return a plain linear."""
        return nn.Linear(size_in, size_out)

    def row_linear(self, size_in: int, size_out: int) -> nn.Module:
        """Return a plain linear."""
        return nn.Linear(size_in, size_out)

    def embedding(self, num_rows: int, size: int) -> nn.Module:
        """Return a plain embedding."""
        return nn.Embedding(num_rows, size)

    def decoder(self, size: int, num_rows: int) -> nn.Module:
        """Return a decoder with the whole vocabulary."""
        return Decoder(size, num_rows)

    def share_of_images(self, pixels: UInt8[Tensor, "N *F 3 height width"]) -> UInt8[Tensor, "N *F 3 height width"]:
        """Return all images."""
        return pixels

    def join_images(self, rows: Float[Tensor, "rows D"], num_rows: int) -> Float[Tensor, "rows D"]:  # noqa: ARG002 - they are all here
        """Return the rows."""
        return rows

    def sum_image_gradients(self, layer: nn.Module) -> None:
        """Do nothing: the gradients are whole."""


class Decoder(nn.Module):
    """Linear to the vocabulary with a chunked cross-entropy. Sharded kinds hold some of the vocabulary and combine over the shards."""

    first_id = 0
    """The vocabulary's row that the first row held here stands for."""

    def __init__(self, size: int, num_rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, size))
        self.bias = nn.Parameter(torch.empty(num_rows))
        self.num_ids = num_rows
        """Rows that stand for a token; those behind them never win probability."""

    def forward(self, rows: Float[Tensor, "R D"], target_ids: Int[Tensor, " R"]) -> tuple[Float[Tensor, " R"], Bool[Tensor, " R"]]:
        """Return each target's cross-entropy in nats (float32) and whether it is the most likely token."""
        loss, correct = _ChunkedCrossEntropy.apply(rows, self.weight, self.bias, target_ids, self)
        return loss, correct

    def logits(self, rows: Float[Tensor, "R D"]) -> Float[Tensor, "R V"]:
        """Return all logits in float32, for generation and pictures of what the model thinks."""
        return F.linear(rows, self.weight, self.bias).float()

    def local_logits(self, rows: Float[Tensor, "R D"]) -> Float[Tensor, "R v"]:
        """Return the logits in float32 of the rows held here."""
        logits = F.linear(rows, self.weight, self.bias).float()
        if self.num_ids < len(self.weight):
            logits[:, self.num_ids:] = -torch.inf
        return logits

    def combine(self, tensor: Tensor, how: Literal["sum", "max", "min"]) -> Tensor:  # noqa: ARG002 - sharded kinds need it
        """Return the tensor combined over the shards of the vocabulary; here there is one."""
        return tensor


class _ChunkedCrossEntropy(torch.autograd.Function):
    """softmax cross-entropy of a linear layer, a chunk of rows at a time.

    The backward pass computes the logits again, but for the last chunk's, which it needs first: a small batch has no other.
    Logits are large and read from memory once or twice for each line below, so they are worked on in place.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, weight: Tensor, bias: Tensor, target_ids: Tensor, decoder: Decoder) -> tuple[Tensor, Tensor]:
        loss = torch.empty(len(rows), device=rows.device)
        correct = torch.empty(len(rows), dtype=torch.bool, device=rows.device)
        top, total = torch.empty_like(loss), torch.empty_like(loss)
        held, column = _held_here(target_ids, decoder)
        exponentials = None
        for chunk in _chunks(len(rows)):
            logits = decoder.local_logits(rows[chunk])
            largest, likeliest = logits.max(-1)
            top[chunk] = decoder.combine(largest.clone(), "max")
            # Of equally likely tokens the first one counts, in every layout.
            likeliest = torch.where(largest == top[chunk], likeliest + decoder.first_id, torch.iinfo(torch.long).max)
            correct[chunk] = decoder.combine(likeliest, "min") == target_ids[chunk]
            picked = logits.gather(-1, column[chunk])[:, 0].where(held[chunk], 0)
            exponentials = logits.sub_(top[chunk, None]).exp_()
            total[chunk], picked = decoder.combine(torch.stack([exponentials.sum(-1), picked]), "sum")
            loss[chunk] = total[chunk].log() + top[chunk] - picked
        ctx.save_for_backward(rows, weight, bias, target_ids, top, total)
        ctx.decoder, ctx.last_exponentials = decoder, exponentials  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: FunctionCtx, grad_loss: Tensor, _grad_correct: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        rows, weight, bias, target_ids, top, total = ctx.saved_tensors  # type: ignore[attr-defined]
        decoder = ctx.decoder  # type: ignore[attr-defined]
        exponentials, ctx.last_exponentials = ctx.last_exponentials, None  # type: ignore[attr-defined]
        held, column = _held_here(target_ids, decoder)
        grad_rows = torch.empty_like(rows)
        grad_weight = grad_bias = None
        for chunk in reversed(_chunks(len(rows))):
            # None again after the first chunk, and when this backward pass is not the first over its graph.
            if exponentials is None:
                exponentials = decoder.local_logits(rows[chunk]).sub_(top[chunk, None]).exp_()
            grad_logits = exponentials.mul_((grad_loss[chunk] / total[chunk])[:, None])
            exponentials = None
            grad_logits.scatter_add_(1, column[chunk], torch.where(held[chunk], -grad_loss[chunk], 0)[:, None])
            chunk_bias = grad_logits.sum(0)
            grad_logits = grad_logits.to(rows.dtype)
            grad_rows[chunk] = grad_logits @ weight
            chunk_weight = (grad_logits.T @ rows[chunk]).float()
            # The first chunk's gradients become the sums: a table of zeros as large as the vocabulary's is not made first.
            grad_weight = chunk_weight if grad_weight is None else grad_weight.add_(chunk_weight)
            grad_bias = chunk_bias if grad_bias is None else grad_bias.add_(chunk_bias)
        if grad_weight is None or grad_bias is None:
            return grad_rows, torch.zeros_like(weight), torch.zeros_like(bias), None, None
        return decoder.combine(grad_rows, "sum"), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), None, None


def _held_here(target_ids: Int[Tensor, " R"], decoder: Decoder) -> tuple[Bool[Tensor, " R"], Int[Tensor, "R 1"]]:
    """Return whether each target's row is held here, and its column among the local logits (any column where it is not)."""
    column = target_ids - decoder.first_id
    return (column >= 0) & (column < decoder.num_ids), column.clamp(0, len(decoder.weight) - 1)[:, None]


def _chunks(num_rows: int) -> list[slice]:
    return [slice(start, start + TARGETS_PER_CHUNK) for start in range(0, num_rows, TARGETS_PER_CHUNK)]
