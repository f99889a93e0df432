"""Fewer image rows: in front of a transformer (pool, unshuffle, drop) or layer by layer inside it (merge). Pure functions.

Prefix tokens (class token, registers) are protected: they stay what they are and stand first, at any depth. How many rows there are
behind each layer is known before any picture is.

Merging takes two steps. `match` decides, and its integers travel in the state; `merge` applies them in the next layer. So what is
recomputed in a backward pass, or on another pipeline stage, never decides anew: of two pairs that are nearly as alike, a second
look may choose the other, and gradients would go to the wrong rows without a word.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from flm_scale.batch import State
from flm_scale.config_lm import DropConfig, MergeConfig, NoReducerConfig, PoolConfig, UnshuffleConfig
from flm_scale.errors import ConfigError
from flm_scale.model.parts import generator_of


@torch.no_grad()
def match(metric: Float[Tensor, "N I c"], sizes: Int[Tensor, "N I"], *, merged: int, protected: int) -> Int[Tensor, "N I"]:
    """Return the row that each row becomes, in a result of I - merged rows: [protected; even places that stay; odd places].

    Of the even places the `merged` ones that resemble an odd place most (cosine, in float32) go into it. Equal ones go in the order of
    their places. Rows of size 0 are padding; they go last, and weigh nothing in `merge`.
    One protected of 6, place 4 goes into place 1: slots [0, 2, 1, 3, 2, 4].
    Source: ToMe, arXiv 2210.09461, Sec. 3.
    """
    places = torch.arange(metric.shape[1], device=metric.device)
    even, odd = slice(protected + protected % 2, None, 2), slice(protected | 1, None, 2)
    first_odd = protected + len(places[even]) - merged
    assert merged <= most_merged(len(places), protected=protected), "a schedule merges no more than half"
    unit = F.normalize(metric.float(), dim=-1)
    similarity = unit[:, even] @ unit[:, odd].transpose(1, 2)
    is_padding = sizes == 0
    similarity.masked_fill_(is_padding[:, even, None] | is_padding[:, None, odd], -torch.inf)
    best, partner = similarity.max(-1)
    goes = best.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) < merged
    slots = places.repeat(len(metric), 1)
    slots[:, even] = torch.where(goes, first_odd + partner, protected - 1 + (~goes).cumsum(-1))
    slots[:, odd] = first_odd + torch.arange(len(places[odd]), device=metric.device)
    return slots


def merge(rows: Float[Tensor, "N I D"], sizes: Int[Tensor, "N I"], slots: Int[Tensor, "N I"], *, num_tokens: int,
          weighted: bool) -> tuple[Float[Tensor, "N num_tokens D"], Int[Tensor, "N num_tokens"]]:
    """Return the mean of the rows that share a slot, and the patches that it stands for.

    weighted: each row counts as often as the patches that it stands for; else each once. Rows of size 0 never count.
    One dense product: adding rows up in place is not deterministic on a GPU. A row that is alone in its slot stays the same to the bit.
    """
    is_member = slots[:, None] == torch.arange(num_tokens, device=slots.device)[:, None]
    member_sizes = sizes[:, None].where(is_member, 0)
    shares = (member_sizes if weighted else member_sizes.clamp(max=1)).to(torch.promote_types(rows.dtype, torch.float32))
    weights = shares / shares.sum(-1, keepdim=True).clamp(min=1)
    return weights.to(rows.dtype) @ rows, member_sizes.sum(-1)


def count_patches(state: State, *, num_tokens: int) -> State:
    """Return the state in front of any merge: each of its `num_tokens` rows an image stands for one patch."""
    sizes = torch.ones(len(state.rows) // num_tokens, num_tokens, dtype=torch.long, device=state.rows.device)
    return state._replace(sizes=sizes, merge_slots=sizes[:, :0])


def merge_decided(state: State, *, num_tokens: int, merged_tokens: int, weighted: bool = True) -> State:
    """Return the state of image rows [N*num_tokens, D] with `merged_tokens` an image, merged as the entry before has decided."""
    if merged_tokens == num_tokens:
        return state
    images, sizes = merge(state.rows.unflatten(0, (-1, num_tokens)), state.sizes, state.merge_slots, num_tokens=merged_tokens, weighted=weighted)
    return state._replace(rows=images.flatten(0, 1), sizes=sizes, merge_slots=state.merge_slots[:, :0])


def log_sizes(sizes: Int[Tensor, "N I"]) -> Float[Tensor, "N 1 1 I"]:
    """Return what is added to the logits of keys so that a row is attended to as all its patches would be; padding is not seen at all."""
    return sizes.float().log()[:, None, None]


def most_merged(num_tokens: int, *, protected: int) -> int:
    """Return how many of so many rows can go in one layer: half of those that are not protected."""
    return (num_tokens - protected) // 2


def merge_schedule(merged: Sequence[int], num_tokens: int, num_layers: int, *, protected: int, option: str) -> tuple[int, ...]:
    """Return the rows of an image in front of the first layer, and behind each: 257, 238, ..., 48, 29 for 257 rows, 12 layers and 19 a layer.

    merged: rows that go in each layer, or one number for all of them; no more go than can.   option: where the user wrote it.
    Raises ConfigError when there are other layers than numbers.
    """
    if len(merged) not in {1, num_layers}:
        raise ConfigError(f"{option} ({len(merged)} numbers) must be one number, or one for each of {num_layers} layers")
    tokens = [num_tokens]
    for some in [*merged] * (num_layers if len(merged) == 1 else 1):
        tokens.append(tokens[-1] - min(some, most_merged(tokens[-1], protected=protected)))
    return tuple(tokens)


@runtime_checkable
class Reducer(Protocol):
    """One way to make image rows fewer."""

    @property
    def width_factor(self) -> int:
        """Width of the rows behind `enter`, over that in front of it."""
        ...

    def schedule(self, num_tokens: int, num_layers: int) -> tuple[int, ...]:
        """Rows of an image in front of the first layer, and behind each. Raises ConfigError for a number of rows that it cannot reduce."""
        ...

    def enter(self, rows: Float[Tensor, "N I D"]) -> Float[Tensor, "N first width"]:
        """The rows that the first layer gets."""
        ...


@dataclass(frozen=True)
class Merge:
    """Leaves merging to the layers; `merged` of every layer, or one number for all."""

    merged: tuple[int, ...]
    protected: int
    width_factor = 1

    def schedule(self, num_tokens: int, num_layers: int) -> tuple[int, ...]:
        """Return fewer with each layer."""
        return merge_schedule(self.merged, num_tokens, num_layers, protected=self.protected, option="reducer.merged")

    def enter(self, rows: Float[Tensor, "N I D"]) -> Float[Tensor, "N I D"]:
        """Return all rows."""
        return rows


@dataclass(frozen=True)
class Pool:
    """Means of `rows` x `columns` pieces of the grid, which overlap where it does not divide, as adaptive pooling has them."""

    rows: int
    columns: int
    protected: int
    width_factor = 1

    def schedule(self, num_tokens: int, num_layers: int) -> tuple[int, ...]:
        """Return the same number throughout."""
        side = grid_side(num_tokens, protected=self.protected, kind="pool")
        if max(self.rows, self.columns) > side:
            raise ConfigError(f"reducer.rows x reducer.columns ({self.rows} x {self.columns}) must not exceed the grid of patches "
                              f"({side} x {side}); lower them")
        return (self.protected + self.rows * self.columns,) * (num_layers + 1)

    def enter(self, rows: Float[Tensor, "N I D"]) -> Float[Tensor, "N first D"]:
        """Return the prefix and the means, row by row from the top left."""
        prefix, grid = split_grid(rows, protected=self.protected)
        # Two small products: torch's adaptive pooling has no deterministic gradient on a GPU.
        down, across = (piece_means(grid.shape[1], pieces).to(rows) for pieces in (self.rows, self.columns))
        means = torch.einsum("ru,cv,nuvd->nrcd", down, across, grid)
        return torch.cat([prefix, means.flatten(1, 2)], dim=1)


@dataclass(frozen=True)
class Unshuffle:
    """Squares of `factor` x `factor` patches end to end as one row; a prefix token is repeated to that width."""

    factor: int
    protected: int

    @property
    def width_factor(self) -> int:
        """Patches of a square."""
        return self.factor ** 2

    def schedule(self, num_tokens: int, num_layers: int) -> tuple[int, ...]:
        """Return the same number throughout."""
        side = grid_side(num_tokens, protected=self.protected, kind="unshuffle")
        if side % self.factor:
            raise ConfigError(f"reducer.factor ({self.factor}) must divide the patches on a side of the grid ({side}); choose another, or another "
                              "vision.image_size")
        return (self.protected + (side // self.factor) ** 2,) * (num_layers + 1)

    def enter(self, rows: Float[Tensor, "N I D"]) -> Float[Tensor, "N first width"]:
        """Return the prefix and the squares, row by row from the top left; so are the patches of a square."""
        prefix, grid = split_grid(rows, protected=self.protected)
        squares = grid.unflatten(2, (-1, self.factor)).unflatten(1, (-1, self.factor)).transpose(2, 3)
        return torch.cat([prefix.repeat(1, 1, self.width_factor), squares.flatten(3).flatten(1, 2)], dim=1)


@dataclass(frozen=True)
class Drop:
    """Patches at places that the seed decides, in their order: the control that any other reducer must beat."""

    kept: int
    seed: int
    protected: int
    width_factor = 1

    def schedule(self, num_tokens: int, num_layers: int) -> tuple[int, ...]:
        """Return the same number throughout."""
        patches = num_tokens - self.protected
        if self.kept > patches:
            raise ConfigError(f"reducer.kept ({self.kept}) must not exceed the patches of a picture ({patches}); lower it")
        return (self.protected + self.kept,) * (num_layers + 1)

    def enter(self, rows: Float[Tensor, "N I D"]) -> Float[Tensor, "N first D"]:
        """Return the prefix and the patches that stay."""
        patches = kept_patches(rows.shape[1] - self.protected, num_kept=self.kept, seed=self.seed)
        places = [*range(self.protected), *(self.protected + patch for patch in patches)]
        return rows.index_select(1, torch.tensor(places, device=rows.device))


@dataclass(frozen=True)
class Keep:
    """Leaves every row."""

    width_factor = 1

    def schedule(self, num_tokens: int, num_layers: int) -> tuple[int, ...]:
        """Return the same number throughout."""
        return (num_tokens,) * (num_layers + 1)

    def enter(self, rows: Float[Tensor, "N I D"]) -> Float[Tensor, "N I D"]:
        """Return all rows."""
        return rows


def build_reducer(config: MergeConfig | PoolConfig | UnshuffleConfig | DropConfig | NoReducerConfig, *, prefix_tokens: int, seed: int) -> Reducer:
    """Return the reducer of a config. prefix_tokens: tokens in front of the patches.   seed: of the run."""
    match config:
        case MergeConfig():
            return Merge(config.merged, prefix_tokens)
        case PoolConfig():
            return Pool(config.rows, config.columns, prefix_tokens)
        case UnshuffleConfig():
            return Unshuffle(config.factor, prefix_tokens)
        case DropConfig():
            return Drop(config.kept, seed, prefix_tokens)
        case NoReducerConfig():
            return Keep()


def grid_side(num_tokens: int, *, protected: int, kind: str) -> int:
    """Return the patches on a side of the grid. Raises ConfigError where they are no square."""
    patches = num_tokens - protected
    if math.isqrt(patches) ** 2 != patches:
        raise ConfigError(f"reducer.kind ('{kind}') wants a square grid, and the tower gives {patches} patches; use merge, drop or none")
    return math.isqrt(patches)


def split_grid(rows: Float[Tensor, "N I D"], *, protected: int) -> tuple[Float[Tensor, "N protected D"], Float[Tensor, "N side side D"]]:
    """Return the prefix, and the patches in their places."""
    prefix, patches = rows[:, :protected], rows[:, protected:]
    return prefix, patches.unflatten(1, (math.isqrt(patches.shape[1]), -1))


def piece_means(size: int, pieces: int) -> Float[Tensor, "pieces size"]:
    """Return the weights of `size` places in the mean of each piece. Three places, two pieces: [[.5, .5, 0], [0, .5, .5]]."""
    place, piece = torch.arange(size), torch.arange(pieces)[:, None]
    inside = (place >= piece * size // pieces) & (place < -(-(piece + 1) * size // pieces))
    return inside.double() / inside.sum(1, keepdim=True)


@cache
def kept_patches(num_patches: int, *, num_kept: int, seed: int) -> tuple[int, ...]:
    """Return which patches stay, ascending; drawn as initial weights are, from the seed and a name."""
    return tuple(sorted(torch.randperm(num_patches, generator=generator_of("reducer.kept", seed=seed), device="cpu")[:num_kept].tolist()))
