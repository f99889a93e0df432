"""The bridge: image rows of a tower become a short prefix in the language model's width. BERT's encoder, two entries of the layer list a layer.

A layer's attention ends with the decision which rows merge (State.merge_slots), its MLP begins with merging them: SimVLG's order
(arXiv 2310.03291), cut where recomputation and pipelines may cut. Every entry knows how many rows an image has, whatever the picture.
No dropout, and every process of a tensor group computes the whole bridge.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from flm_scale.batch import State
from flm_scale.config_lm import BridgeConfig, MergeConfig
from flm_scale.model.layers import Mlp, SelfAttention
from flm_scale.model.parts import PlainParts
from flm_scale.model.reducers import Reducer, build_reducer, count_patches, log_sizes, match, merge_decided


class BridgeEntry(nn.Module):
    """A norm of its own for the tower's rows, the reducer, the linear into the bridge, positions: BERT's embedding, of rows for words."""

    def __init__(self, reducer: Reducer, *, tower_width: int, width: int, image_tokens: int, num_tokens: int, merges: bool) -> None:
        """image_tokens: I of the tower.   num_tokens: that the reducer leaves for the first layer.   merges: whether layers merge."""
        super().__init__()
        self.reducer, self.image_tokens, self.merges = reducer, image_tokens, merges
        self.tower_norm = nn.LayerNorm(tower_width)
        self.projection = nn.Linear(reducer.width_factor * tower_width, width)
        # The only place where a row says where in the picture it is.
        self.positional_embedding = nn.Parameter(torch.empty(num_tokens, width))
        self.kind_embedding = nn.Parameter(torch.empty(width))
        self.norm = nn.LayerNorm(width)

    def forward(self, state: State) -> State:
        """Image rows [N*I, tower width] in, [N*num_tokens, width] out; each then stands for one patch."""
        images = self.reducer.enter(self.tower_norm(state.rows).unflatten(0, (-1, self.image_tokens)))
        rows = self.norm(self.projection(images) + self.positional_embedding + self.kind_embedding)
        state = state._replace(rows=rows.flatten(0, 1))
        return count_patches(state, num_tokens=rows.shape[1]) if self.merges else state


class BridgeAttention(nn.Module):
    """The first half of a layer: attention among an image's rows, then which of them merge."""

    def __init__(self, *, width: int, heads: int, num_tokens: int, merged: int, protected: int, proportional: bool) -> None:
        """num_tokens: rows of an image here.   merged: how many of them go in this layer.   protected: how many never merge."""
        super().__init__()
        self.num_tokens, self.merged, self.protected, self.proportional = num_tokens, merged, protected, proportional
        self.self_attention, self.self_norm = SelfAttention(width, heads, PlainParts()), nn.LayerNorm(width)

    def forward(self, state: State) -> State:
        """Image rows [N*num_tokens, D] in and out."""
        rows = state.rows.unflatten(0, (-1, self.num_tokens))
        q, k, v = self.self_attention.split_heads(rows).unbind(-2)
        bias = log_sizes(state.sizes).to(q.dtype) if self.proportional else None
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias)
        rows = self.self_norm(rows + self.self_attention.out(mixed.transpose(1, 2).flatten(2)))
        state = state._replace(rows=rows.flatten(0, 1))
        if not self.merged:
            return state
        # Keys already sum up what a row is about, and are short.
        return state._replace(merge_slots=match(k.mean(2), state.sizes, merged=self.merged, protected=self.protected))


class BridgeMlp(nn.Module):
    """The second half of a layer: rows merge as its attention decided, then the MLP, on those that are left."""

    def __init__(self, *, width: int, num_tokens: int, merged: int, weighted: bool) -> None:
        """num_tokens: rows of an image that come in.   merged: how many of them go."""
        super().__init__()
        self.num_tokens, self.merged, self.weighted = num_tokens, merged, weighted
        self.mlp, self.mlp_norm = Mlp(width, PlainParts()), nn.LayerNorm(width)

    def forward(self, state: State) -> State:
        """Image rows [N*num_tokens, D] in, [N*(num_tokens - merged), D] out."""
        state = merge_decided(state, num_tokens=self.num_tokens, merged_tokens=self.num_tokens - self.merged, weighted=self.weighted)
        return state._replace(rows=self.mlp_norm(state.rows + self.mlp(state.rows)))


class BridgeExit(nn.Module):
    """The linear to the language model's width."""

    def __init__(self, *, width: int, lm_width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, lm_width)

    def forward(self, state: State) -> State:
        """Image rows [N*num_tokens, width] in, [N*num_tokens, lm_width] out."""
        return state._replace(rows=self.projection(state.rows))


def tokens_along(config: BridgeConfig, *, image_tokens: int, prefix_tokens: int) -> tuple[int, ...]:
    """Return the rows of an image in front of the first layer and behind each; the last number is K, what the language model sees.

    image_tokens, prefix_tokens: as of bridge_layers.
    """
    return build_reducer(config.reducer, prefix_tokens=prefix_tokens, seed=0).schedule(image_tokens, config.layers)


def bridge_layers(config: BridgeConfig, *, tower_width: int, image_tokens: int, prefix_tokens: int, lm_width: int,
                  seed: int) -> dict[str, Callable[[], nn.Module]]:
    """Return what builds the bridge's entries of the list, in their order.

    image_tokens: rows of an image that the tower gives, `prefix_tokens` of them in front of the patches.   seed: of the run.
    Raises ConfigError where the reducer cannot reduce so many.
    """
    width = config.width
    reducer = build_reducer(config.reducer, prefix_tokens=prefix_tokens, seed=seed)
    merging = config.reducer if isinstance(config.reducer, MergeConfig) else None
    tokens = reducer.schedule(image_tokens, config.layers)
    builders: dict[str, Callable[[], nn.Module]] = {"bridge_entry": partial(
        BridgeEntry, reducer, tower_width=tower_width, width=width, image_tokens=image_tokens, num_tokens=tokens[0], merges=merging is not None)}
    for i, (before, after) in enumerate(pairwise(tokens)):
        builders[f"bridge_{i}_attention"] = partial(
            BridgeAttention, width=width, heads=config.heads, num_tokens=before, merged=before - after, protected=prefix_tokens,
            proportional=merging is not None and merging.proportional)
        builders[f"bridge_{i}_mlp"] = partial(
            BridgeMlp, width=width, num_tokens=before, merged=before - after, weighted=merging is not None and merging.weighted)
    builders["bridge_exit"] = partial(BridgeExit, width=width, lm_width=lm_width)
    return builders
