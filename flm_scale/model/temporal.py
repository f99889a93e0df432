"""Clips in a vision tower: the frames of a clip look at each other, patch by patch, in every block. SimVLG's temporal attentive soft contextualising.

Source: arXiv 2310.03291, in the form of its published code: values are the rows themselves, the scale is that of the whole width of queries and
keys, and a weight that begins at 0 lets a tower that was trained on pictures go on as it was.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flm_scale.batch import State
from flm_scale.config_vision import TemporalConfig
from flm_scale.errors import ConfigError

Steps = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
"""The residual steps of a block: attention, MLP."""


class TemporalAttention(nn.Module):
    """x + alpha * softmax(q k^T / sqrt(width)) x over the F rows at each place of a clip, in heads; q and k are linear in x, which has no norm."""

    def __init__(self, config: TemporalConfig, *, width: int, frames: int) -> None:
        """width: of the tower.   frames: F. Raises ConfigError where the tower's width cannot be cut into the heads."""
        super().__init__()
        if width % config.heads:
            raise ConfigError(f"vision.temporal.heads ({config.heads}) must divide the tower's width ({width}); choose another number of heads")
        self.frames, self.heads, self.scale = frames, config.heads, config.width ** -0.5
        self.query, self.key = nn.Linear(width, config.width), nn.Linear(width, config.width)
        self.alpha = nn.Parameter(torch.empty(1))
        self.position_embedding = nn.Parameter(torch.empty(frames, width)) if config.position else None
        """Starts at 0, as alpha does (model.assemble.initial_values)."""

    def forward(self, x: Float[Tensor, "NF I D"]) -> Float[Tensor, "NF I D"]:
        """Return the N*F frames of the clips, each with something of all frames of its clip."""
        places = x.unflatten(0, (-1, self.frames)).transpose(1, 2)  # [N, I, F, D]
        placed = places if self.position_embedding is None else places + self.position_embedding
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for part in (self.query(placed), self.key(placed), places))
        # Frames are few: their weights are small, and fused kernels do not take so many places.
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)  # [N, I, H, F, F]
        mixed = (weights @ v).transpose(-3, -2).flatten(-2)
        more: Tensor = self.alpha * mixed.transpose(1, 2).flatten(0, 1)
        return x + more


class ClipBlock(nn.Module):
    """One of a tower's blocks over the frames of clips, opened between its attention and its MLP for the attention over frames."""

    def __init__(self, block: nn.Module, temporal: TemporalAttention, *, halves_of: Callable[[nn.Module], Steps], image_tokens: int,
                 is_last: bool) -> None:
        """halves_of: opens the block.   image_tokens: I.   is_last: of the tower, whose frames become their mean."""
        super().__init__()
        self.block, self.temporal, self.halves_of, self.image_tokens, self.is_last = block, temporal, halves_of, image_tokens, is_last

    def forward(self, state: State) -> State:
        """Image rows [N*F*I, width] in and out; out of the last block [N*I, width]."""
        attend, transform = self.halves_of(self.block)
        frames = transform(self.temporal(attend(state.rows.unflatten(0, (-1, self.image_tokens)))))
        if self.is_last:
            frames = frames.unflatten(0, (-1, self.temporal.frames)).mean(1)
        return state._replace(rows=frames.flatten(0, 1))
