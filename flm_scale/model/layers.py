"""Attention and MLP over packed rows. Linears run on rows without padding; attention runs on a padded view of them.

A view is reached by one gather (`slots`: which row stands at each place) and left by another (`places`: where each row stands).
Empty places repeat some row of the batch, so that every place sees something finite, and no row is ever read back from them.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from flm_scale.model.parts import Parts
from flm_scale.model.reducers import log_sizes


def gather_view(rows: Float[Tensor, "S T F"], slots: Int[Tensor, "A B"]) -> Float[Tensor, "S A B F"]:
    """Return the rows of each stream at the places of a padded view."""
    view: Tensor = rows.index_select(1, slots.flatten()).unflatten(1, slots.shape)
    return view


def leave_view(view: Float[Tensor, "S A B F"], places: Int[Tensor, " T"]) -> Float[Tensor, "S T F"]:
    """Return the packed rows from their places in a padded view."""
    return view.flatten(1, 2).index_select(1, places)


def attend(q: Float[Tensor, "B Lq H d"], k: Float[Tensor, "B Lk H d"], v: Float[Tensor, "B Lk H d"],
           visible: Bool[Tensor, "B Lq Lk"] | None = None, *, bias: Float[Tensor, "B 1 1 Lk"] | None = None) -> Float[Tensor, "B Lq H*d"]:
    """Scaled dot-product attention; what `visible` does not name is as if it were not there. bias: instead of it, added to the logits of keys."""
    mask = bias if visible is None else visible[:, None]
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def add_residual(rows: Tensor, norm: nn.Module, sublayer: Callable[[Tensor], Tensor], *, order: Literal["pre", "post"]) -> Tensor:
    """Return rows + sublayer(rows), normalised before the sublayer ('pre') or after the sum ('post', BERT's order)."""
    if order == "pre":
        return rows + sublayer(norm(rows))
    normed: Tensor = norm(rows + sublayer(rows))
    return normed


class Mlp(nn.Module):
    """Linear to four times the width, GELU, linear back."""

    def __init__(self, width: int, parts: Parts) -> None:
        super().__init__()
        self.up = parts.column_linear(width, 4 * width)
        self.down = parts.row_linear(4 * width, width)

    def forward(self, rows: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        """Each row by itself."""
        out: Tensor = self.down(F.gelu(self.up(rows)))
        return out


class SelfAttention(nn.Module):
    """Attention among the rows of one caption in one stream; all streams in one call."""

    def __init__(self, width: int, heads: int, parts: Parts) -> None:
        super().__init__()
        self.head_size, self.local_heads = width // heads, heads // parts.num_shards
        # Features are ordered head by head (q, k, v of head 0, then of head 1 ...), so that a cut between heads is a shard.
        self.qkv = parts.column_linear(width, 3 * width)
        self.out = parts.row_linear(width, width)

    def split_heads(self, rows: Tensor) -> Tensor:
        """Return q, k and v of rows [..., D] as [..., H, 3, d]."""
        qkv: Tensor = self.qkv(rows).unflatten(-1, (self.local_heads, 3, self.head_size))
        return qkv

    def forward(self, rows: Float[Tensor, "S T D"], slots: Int[Tensor, "C L"], places: Int[Tensor, " T"],
                visible: Bool[Tensor, "S*C L L"]) -> Float[Tensor, "S T D"]:
        """visible: who sees whom in the padded view, stream after stream."""
        streams = len(rows)
        view = gather_view(self.split_heads(rows).flatten(2), slots).flatten(0, 1)
        q, k, v = view.unflatten(-1, (self.local_heads, 3, self.head_size)).unbind(-2)
        mixed = leave_view(attend(q, k, v, visible).unflatten(0, (streams, -1)), places)
        out: Tensor = self.out(mixed)
        return out


class ImageAttention(nn.Module):
    """Attention from text rows to their image. Keys and values are made once an image, for all streams and captions of it."""

    def __init__(self, width: int, heads: int, parts: Parts) -> None:
        super().__init__()
        self.head_size, self.local_heads = width // heads, heads // parts.num_shards
        self.query = parts.column_linear(width, width)
        self.key_value = parts.column_linear(width, 2 * width)
        self.out = parts.row_linear(width, width)

    def keys_values(self, images: Float[Tensor, "N I D"]) -> tuple[Tensor, Tensor]:
        """Return keys and values [N, I, H, d] of the images."""
        keys, values = self.key_value(images).unflatten(-1, (self.local_heads, 2, self.head_size)).unbind(-2)
        return keys, values

    def attend(self, q: Float[Tensor, "N Lq H d"], keys: Float[Tensor, "N I H d"], values: Float[Tensor, "N I H d"],
               sizes: Int[Tensor, "N I_or_0"]) -> Float[Tensor, "N Lq H*d"]:
        """Return what the queries of each image see of it. sizes: of State; a row is seen as often as it stands for patches."""
        return attend(q, keys, values, bias=log_sizes(sizes).to(q.dtype) if sizes.shape[1] else None)

    def forward(self, rows: Float[Tensor, "S T D"], images: Float[Tensor, "N I D"], slots: Int[Tensor, "N M"], places: Int[Tensor, " T"],
                sizes: Int[Tensor, "N I_or_0"]) -> Float[Tensor, "S T D"]:
        """Text rows do not see each other here, so all rows of an image form one block of queries and need no mask."""
        streams = len(rows)
        q = gather_view(self.query(rows), slots).transpose(0, 1).flatten(1, 2)
        keys, values = self.keys_values(images)
        mixed = self.attend(q.unflatten(-1, (self.local_heads, self.head_size)), keys, values, sizes)
        out: Tensor = self.out(leave_view(mixed.unflatten(1, (streams, -1)).transpose(0, 1), places))
        return out


class SpanAttention(nn.Module):
    """Attention from reconstruction queries to what both streams know outside the hidden span."""

    def __init__(self, width: int, heads: int, parts: Parts) -> None:
        super().__init__()
        self.head_size, self.local_heads = width // heads, heads // parts.num_shards
        self.query = parts.column_linear(width, width)
        self.key_value = parts.column_linear(width, 2 * width)
        self.out = parts.row_linear(width, width)

    def forward(self, queries: Float[Tensor, "Q D"], rows: Float[Tensor, "S T D"], *, query_slots: Int[Tensor, "C Lq"],
                query_places: Int[Tensor, " Q"], slots: Int[Tensor, "C L"], visible: Bool[Tensor, "C Lq 2*L"]) -> Float[Tensor, "Q D"]:
        """visible: forward positions, then reverse positions, of the query's own caption."""
        heads = (self.local_heads, self.head_size)
        q = gather_view(self.query(queries)[None], query_slots)[0].unflatten(-1, heads)
        view = gather_view(self.key_value(rows), slots)
        keys, values = torch.cat(view.unbind(0), dim=1).unflatten(-1, (self.local_heads, 2, self.head_size)).unbind(-2)
        mixed = leave_view(attend(q, keys, values, visible)[None], query_places)[0]
        out: Tensor = self.out(mixed)
        return out
