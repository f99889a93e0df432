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
    """

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, weight: Tensor, bias: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor]:
        loss = torch.empty(len(rows), device=rows.device)
        correct = torch.empty(len(rows), dtype=torch.bool, device=rows.device)
        normalizer = torch.empty_like(loss)
        for chunk in _chunks(len(rows)):
            logits, targets = F.linear(rows[chunk], weight, bias).float(), target_ids[chunk]
            normalizer[chunk] = logits.logsumexp(-1)
            loss[chunk] = normalizer[chunk] - logits.gather(-1, targets[:, None])[:, 0]
            correct[chunk] = logits.argmax(-1) == targets
        ctx.save_for_backward(rows, weight, bias, target_ids, normalizer)
        ctx.last_logits = logits if len(rows) else None  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: FunctionCtx, grad_loss: Tensor, _grad_correct: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        rows, weight, bias, target_ids, normalizer = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_rows = torch.empty_like(rows)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = torch.zeros_like(bias, dtype=torch.float32)
        logits, ctx.last_logits = ctx.last_logits, None  # type: ignore[attr-defined]
        for chunk in reversed(_chunks(len(rows))):
            # None again after the first chunk, and when this backward pass is not the first over its graph.
            logits = F.linear(rows[chunk], weight, bias).float() if logits is None else logits
            grad_logits = torch.exp_(logits.sub_(normalizer[chunk, None]))
            logits = None
            grad_logits[torch.arange(len(grad_logits), device=rows.device), target_ids[chunk]] -= 1
            grad_logits *= grad_loss[chunk, None]
            grad_bias += grad_logits.sum(0)
            grad_logits = grad_logits.to(rows.dtype)
            grad_rows[chunk] = grad_logits @ weight
            grad_weight += grad_logits.T @ rows[chunk]
        return grad_rows, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), None


def _chunks(num_rows: int) -> list[slice]:
    return [slice(start, start + TARGETS_PER_CHUNK) for start in range(0, num_rows, TARGETS_PER_CHUNK)]
