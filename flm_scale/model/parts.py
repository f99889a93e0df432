"""The blocks that tensor parallelism replaces: linears, the token embedding, and the decoder with its loss.

Model code asks a `Parts` object for them. `PlainParts` gives torch's own, the single-process reference; a sharded kind gives blocks
that hold 1/num_shards of the weights and whose results are the same.
"""

from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F  # noqa: N812 - the name everyone knows

TARGETS_PER_CHUNK = 1024
"""Rows whose logits exist at once: at a vocabulary of 50,000 in float32, 200 MB."""


class Parts(Protocol):
    """Maker of the blocks that may be sharded."""

    num_shards: int
    """Pieces that attention heads and hidden units are cut into; this process holds one."""

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


class Decoder(nn.Module):
    """Linear to the vocabulary with a chunked cross-entropy."""

    def __init__(self, size: int, num_rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, size))
        self.bias = nn.Parameter(torch.empty(num_rows))

    def forward(self, rows: Float[Tensor, "R D"], target_ids: Int[Tensor, " R"]) -> tuple[Float[Tensor, " R"], Bool[Tensor, " R"]]:
        """Return each target's cross-entropy in nats (float32) and whether it is the most likely token."""
        loss, correct = _ChunkedCrossEntropy.apply(rows, self.weight, self.bias, target_ids)
        return loss, correct

    def logits(self, rows: Float[Tensor, "R D"]) -> Float[Tensor, "R V"]:
        """Return all logits in float32, for generation and pictures of what the model thinks."""
        return F.linear(rows, self.weight, self.bias).float()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """softmax cross-entropy of a linear layer, a chunk of rows at a time.

    The backward pass computes the logits again, but for the last chunk's, which it needs first: a small batch has no other.
    Logits are large and read from memory once or twice for each line below, so they are worked on in place.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, weight: Tensor, bias: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor]:
        loss = torch.empty(len(rows), device=rows.device)
        correct = torch.empty(len(rows), dtype=torch.bool, device=rows.device)
        top, total = torch.empty_like(loss), torch.empty_like(loss)
        exponentials = None
        for chunk in _chunks(len(rows)):
            logits, targets = F.linear(rows[chunk], weight, bias).float(), target_ids[chunk]
            top[chunk], likeliest = logits.max(-1)
            correct[chunk] = likeliest == targets
            picked = logits.gather(-1, targets[:, None])[:, 0]
            exponentials = _exponentials(logits, top[chunk])
            total[chunk] = exponentials.sum(-1)
            loss[chunk] = total[chunk].log() + top[chunk] - picked
        ctx.save_for_backward(rows, weight, bias, target_ids, top, total)
        ctx.last_exponentials = exponentials  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: FunctionCtx, grad_loss: Tensor, _grad_correct: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        rows, weight, bias, target_ids, top, total = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_rows = torch.empty_like(rows)
        grad_weight, grad_bias = None, None
        kept, ctx.last_exponentials = ctx.last_exponentials, None  # type: ignore[attr-defined]
        for chunk in reversed(_chunks(len(rows))):
            # None again after the first chunk, and when this backward pass is not the first over its graph.
            exponentials = _exponentials(F.linear(rows[chunk], weight, bias).float(), top[chunk]) if kept is None else kept
            kept = None
            grad_logits = exponentials.mul_((grad_loss[chunk] / total[chunk])[:, None])
            grad_logits[torch.arange(len(grad_logits), device=rows.device), target_ids[chunk]] -= grad_loss[chunk]
            chunk_bias = grad_logits.sum(0)
            grad_logits = grad_logits.to(rows.dtype)
            grad_rows[chunk] = grad_logits @ weight
            chunk_weight = (grad_logits.T @ rows[chunk]).float()
            # The first chunk's gradients become the sums: a table of zeros as large as the vocabulary's is not made first.
            grad_weight = chunk_weight if grad_weight is None else grad_weight.add_(chunk_weight)
            grad_bias = chunk_bias if grad_bias is None else grad_bias.add_(chunk_bias)
        if grad_weight is None or grad_bias is None:
            return grad_rows, torch.zeros_like(weight), torch.zeros_like(bias), None
        return grad_rows, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), None


def _exponentials(logits: Float[Tensor, "R V"], top: Float[Tensor, " R"]) -> Float[Tensor, "R V"]:
    return logits.sub_(top[:, None]).exp_()


def _chunks(num_rows: int) -> list[slice]:
    return [slice(start, start + TARGETS_PER_CHUNK) for start in range(0, num_rows, TARGETS_PER_CHUNK)]
