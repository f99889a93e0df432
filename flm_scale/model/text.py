"""The text side of the layer list: embedding, the transformer layer with its reconstructor beside it, entry into fusion, head.

Each class here is one entry of the flat list: State in, State out. Text rows come first in the state, then queries, then images.
"""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from flm_scale.batch import State
from flm_scale.config import TextConfig
from flm_scale.masks import query_visible, stream_visible
from flm_scale.model.layers import ImageAttention, Mlp, SelfAttention, add_residual
from flm_scale.model.parts import Decoder, Parts
from flm_scale.model.reconstructor import ReconstructorLayer


def split_rows(state: State) -> tuple[Float[Tensor, "S T D"], Float[Tensor, "Q D"], Float[Tensor, "N I D"]]:
    """Return text rows by stream, query rows, and image rows by image."""
    num_streams, num_tokens = state.first.shape
    text, queries, images = state.rows.split_with_sizes(
        [num_streams * num_tokens, len(state.queries), len(state.rows) - num_streams * num_tokens - len(state.queries)])
    return text.unflatten(0, (num_streams, num_tokens)), queries, images.unflatten(0, (len(state.image_slots), -1))


def join_rows(state: State, text: Tensor, queries: Tensor, images: Tensor) -> State:
    """Return the state with these rows."""
    return state._replace(rows=torch.cat([text.flatten(0, 1), queries, images.flatten(0, 1)]))


class TextEntry(nn.Module):
    """Opens the streams: token and position vectors, the same for every stream; queries are a mask vector and a position."""

    def __init__(self, config: TextConfig, parts: Parts, *, has_queries: bool) -> None:
        super().__init__()
        self.tokens = parts.embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.max_length, config.width)
        self.query = nn.Embedding(1, config.width) if has_queries else None
        self.norm = nn.LayerNorm(config.width) if config.norm == "post" else nn.Identity()

    def forward(self, state: State) -> State:
        """Image rows [N*I, D] in; text, query and image rows out."""
        positions = self.positions(state.places % state.slots.shape[1])
        text = self.norm(self.tokens(state.ids) + positions).repeat(len(state.first), 1)
        rows = [text, state.rows]
        if self.query is not None:
            blank = self.query(torch.zeros_like(state.queries))
            rows.insert(1, self.norm(blank + positions.index_select(0, state.queries)))
        return state._replace(rows=torch.cat(rows))


class StreamLayer(nn.Module):
    """A transformer layer of the streams: self-attention, attention to the image (in fusion layers), MLP."""

    def __init__(self, config: TextConfig, parts: Parts, *, fuses: bool) -> None:
        super().__init__()
        self.order = config.norm
        self.self_norm, self.self_attention = nn.LayerNorm(config.width), SelfAttention(config.width, config.heads, parts)
        self.image_norm = nn.LayerNorm(config.width) if fuses else None
        self.image_attention = ImageAttention(config.width, config.heads, parts) if fuses else None
        self.mlp_norm, self.mlp = nn.LayerNorm(config.width), Mlp(config.width, parts)

    def forward(self, rows: Float[Tensor, "S T D"], images: Float[Tensor, "N I D"], state: State) -> Float[Tensor, "S T D"]:
        """Every stream at once."""
        visible = stream_visible(state.first[:, state.slots], state.last[:, state.slots]).flatten(0, 1)
        rows = add_residual(rows, self.self_norm, lambda x: self.self_attention(x, state.slots, state.places, visible), order=self.order)
        if self.image_attention is not None and self.image_norm is not None:
            look, views = self.image_attention, (state.image_slots, state.image_places, state.sizes)
            rows = add_residual(rows, self.image_norm, lambda x: look(x, images, *views), order=self.order)
        return add_residual(rows, self.mlp_norm, self.mlp, order=self.order)


class TextLayer(nn.Module):
    """One entry of the list: a stream layer and, where there is one, the reconstructor layer that reads its output."""

    def __init__(self, config: TextConfig, parts: Parts, *, fuses: bool, reconstructs: bool) -> None:
        super().__init__()
        self.streams = StreamLayer(config, parts, fuses=fuses)
        self.reconstructor = ReconstructorLayer(config, parts) if reconstructs else None

    def forward(self, state: State) -> State:
        """State in, state out."""
        text, queries, images = split_rows(state)
        text = self.streams(text, images, state)
        return join_rows(state, text, self.reconstruct(queries, text, state), images)

    def reconstruct(self, queries: Float[Tensor, "Q D"], text: Float[Tensor, "S T D"], state: State) -> Float[Tensor, "Q D"]:
        """Let the queries read what the streams' layer gave out; they stay as they are where there is no reconstructor, or no query."""
        if self.reconstructor is None or not len(queries):
            return queries
        visible = query_visible(state.span_first[state.query_slots], state.span_last[state.query_slots], state.lengths,
                                num_positions=state.slots.shape[1])
        read: Tensor = self.reconstructor(queries, text, state, visible)
        return read


class FusionEntry(nn.Module):
    """Between the stages: one linear for all rows, and a vector that tells the streams and the queries apart."""

    def __init__(self, config: TextConfig, *, num_streams: int, has_queries: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(config.width, config.width)
        self.kinds = nn.Embedding(num_streams + has_queries, config.width)

    def forward(self, state: State) -> State:
        """Text and query rows change, image rows stay."""
        text, queries, images = split_rows(state)
        kinds = torch.arange(len(text), device=text.device).repeat_interleave(text.shape[1])
        kinds = torch.cat([kinds, torch.full_like(state.queries, self.kinds.num_embeddings - 1, dtype=kinds.dtype)])
        rows = self.linear(torch.cat([text.flatten(0, 1), queries])) + self.kinds(kinds)
        return state._replace(rows=torch.cat([rows, images.flatten(0, 1)]))


class Head(nn.Module):
    """Scores every target: linear, GELU, norm, decoder, on the rows that have a target and on no other."""

    def __init__(self, config: TextConfig, parts: Parts) -> None:
        super().__init__()
        self.entry_norm = nn.LayerNorm(config.width) if config.norm == "pre" else nn.Identity()
        self.linear, self.norm = nn.Linear(config.width, config.width), nn.LayerNorm(config.width)
        self.decoder = parts.decoder(config.width, config.vocab_size)

    def features(self, rows: Float[Tensor, "R D"]) -> Float[Tensor, "R D"]:
        """Return what the decoder reads."""
        out: Tensor = self.norm(F.gelu(self.linear(self.entry_norm(rows))))
        return out

    def logits(self, rows: Float[Tensor, "R D"]) -> Float[Tensor, "R V"]:
        """Return all logits."""
        out: Tensor = cast("Decoder", self.decoder).logits(self.features(rows))
        return out

    def forward(self, state: State) -> tuple[Tensor, Tensor]:
        """Return (loss [R], correct [R]), the fields of batch.Scores."""
        scores: tuple[Tensor, Tensor] = self.decoder(self.features(state.rows.index_select(0, state.target_rows)), state.target_ids)
        return scores
