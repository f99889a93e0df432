"""Who sees whom, as boolean tensors: True may be seen. Pure functions of small integers, rebuilt wherever a layer needs them.

Every stream row sees one interval of positions of its caption, and a reconstruction query sees the forward rows before its
hidden span and the reverse rows after it. So integers describe all objectives, and no dense mask is ever sent or stored.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def stream_visible(first: Int[Tensor, "*rows L"], last: Int[Tensor, "*rows L"]) -> Bool[Tensor, "*rows L L"]:
    """Return which positions (last axis) each stream row (the axis before) sees: those in [first, last]."""
    positions = torch.arange(first.shape[-1], device=first.device)
    return (positions >= first[..., None]) & (positions <= last[..., None])


def query_visible(
    span_first: Int[Tensor, "C Lq"], span_last: Int[Tensor, "C Lq"], length: Int[Tensor, " C"], *, num_positions: int
) -> Bool[Tensor, "C Lq 2*{num_positions}"]:
    """Return which rows a query reads: forward positions on the first half of the last axis, reverse positions on the second.

    Five tokens, n = 3, a query that hides [2, 2] reads forward rows 1 1 0 0 0 and reverse rows 0 0 0 1 1.
    length: tokens of each caption, so that rows past its EOS stay unseen.
    """
    positions = torch.arange(num_positions, device=span_first.device)
    inside = positions < length[:, None, None]
    forward = inside & (positions < span_first[..., None])
    reverse = inside & (positions > span_last[..., None])
    return torch.cat([forward, reverse], dim=-1)
