"""What flows through training, and the letters of its axes.

    T packed text tokens of a micro-batch     C captions      L longest caption, BOS and EOS counted
    N images, or clips of F frames            I tokens an image             D width      H heads      V vocabulary
    S streams of the text transformer         Q reconstruction queries         R targets
    M text tokens of the image with the most of them

An objective turns a caption into an `Example`; data/pack.py packs Examples and pictures into a `Batch`; the model's layers
pass its `State` on, one float tensor and integer tensors, so that a pipeline may cut between any two layers; scores of
the targets become `LossSums`, sums and counts that are added up before anything is divided.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

IGNORED = -1
"""Part number of a target row that carries no loss (only the padded layout of the benchmark has such rows)."""


@dataclass(frozen=True)
class Example:
    """One caption as an objective wants it seen. Positions: 0 is BOS, 1..n the content, n+1 EOS.

    A source row is `stream * length + position` for a stream's row and `S * length + j` for the j-th query.
    """

    ids: np.ndarray
    """[length] input tokens, after hiding."""
    first: np.ndarray
    """[S, length] the first position each stream row sees."""
    last: np.ndarray
    """[S, length] the last position each stream row sees, itself included."""
    queries: np.ndarray
    """[q] the position each query stands for."""
    span_first: np.ndarray
    """[q] a query reads forward rows before this position ..."""
    span_last: np.ndarray
    """[q] ... and reverse rows after this one."""
    target_rows: np.ndarray
    """[r] source row whose output predicts the target."""
    target_ids: np.ndarray
    """[r] token to predict."""
    target_parts: np.ndarray
    """[r] which loss part the target belongs to."""
    pooled_row: int = -1
    """Source row that stands for the whole caption, for heads of downstream tasks; -1 when there is none."""

    @property
    def length(self) -> int:
        """Tokens of the caption, BOS and EOS counted."""
        return len(self.ids)


class State(NamedTuple):
    """What one layer hands to the next: one float tensor, then integers. Pixels go in; at the end stand the rows of every stream."""

    rows: Tensor
    """uint8 pixels [N, 3, height, width] at first, of clips [N, F, 3, height, width]; then image rows [N*I, D], inside the tower [N*F*I, D];
    then text rows [S*T] stream after stream, query rows [Q] and image rows [N*I], in that order."""
    ids: Int[Tensor, " T"]
    first: Int[Tensor, "S T"]
    last: Int[Tensor, "S T"]
    lengths: Int[Tensor, " C"]
    slots: Int[Tensor, "C L"]
    """Text row at each place of the padded view; empty places repeat the caption's first row."""
    places: Int[Tensor, " T"]
    """Place c*L + position of each text row in that view."""
    image_slots: Int[Tensor, "N M"]
    """Text rows that look at each image; empty places repeat any row."""
    image_places: Int[Tensor, " T"]
    """Place n*M + m of each text row in that view."""
    queries: Int[Tensor, " Q"]
    """Text row each query stands for."""
    query_slots: Int[Tensor, "C Lq"]
    query_places: Int[Tensor, " Q"]
    span_first: Int[Tensor, " Q"]
    span_last: Int[Tensor, " Q"]
    target_rows: Int[Tensor, " R"]
    target_ids: Int[Tensor, " R"]
    target_parts: Int[Tensor, " R"]
    pooled_rows: Int[Tensor, " pooled"]
    """Row that stands for each caption whose objective names one; none in pretraining."""
    sizes: Int[Tensor, "N I"]
    """Patches that each image row stands for; [N, 0] where rows are not merged."""
    merge_slots: Int[Tensor, "N I_or_0"]
    """Row that each image row becomes in the merge that the next layer begins with; [N, 0] where it begins with none."""

    def packed(self) -> tuple[Tensor, Int[Tensor, " integers"]]:
        """Return the rows, and all integers with their shapes as one tensor: what one pipeline stage sends to the next."""
        integers = self[1:]
        header = torch.tensor([[tensor.ndim, *tensor.shape, 0][:3] for tensor in integers], device=integers[0].device)
        return self.rows, torch.cat([header.flatten(), *(tensor.flatten() for tensor in integers)])

    @staticmethod
    def unpack(rows: Tensor, integers: Int[Tensor, " integers"]) -> "State":
        """Return the state that `packed` made these of."""
        count = len(State._fields) - 1
        header, values = integers.split_with_sizes([3 * count, len(integers) - 3 * count])
        shapes = [shape[:ndim] for ndim, *shape in header.view(count, 3).tolist()]
        pieces = values.split([math.prod(shape) for shape in shapes])
        return State(rows, *(piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)))

    def to(self, device: torch.device) -> "State":
        """Return the same state on another device; copies from pinned memory do not wait."""
        return State(*(tensor.to(device, non_blocking=True) for tensor in self))


@dataclass(frozen=True)
class Batch:
    """A packed micro-batch: the model's input and what the logs need to know about it."""

    state: State
    keys: tuple[str, ...]
    """Sample key of each image."""
    num_captions: int
    """Captions that the batch was made from; one that an objective shows in several views counts once."""
    num_tokens: int
    """Text tokens that are not padding."""
    part_counts: Int[Tensor, " parts"]
    """Targets of each loss part, known before the model runs."""
    bad_keys: tuple[str, ...] = ()
    """Samples whose picture did not decode; they were left out."""

    def to(self, device: torch.device) -> "Batch":
        """Return the same batch on another device."""
        return Batch(self.state.to(device), self.keys, self.num_captions, self.num_tokens, self.part_counts, self.bad_keys)

    def pin_memory(self) -> "Batch":
        """Return the same batch in page-locked memory (torch's loader calls this)."""
        state = State(*(tensor.pin_memory() for tensor in self.state))
        return Batch(state, self.keys, self.num_captions, self.num_tokens, self.part_counts, self.bad_keys)


def without_pixels(batch: Batch) -> dict[str, Any]:
    """Return the fields of a batch as they are sent: a stand-in for pixels, and one tensor of all integers, because pickling costs by the tensor."""
    pixels, integers = batch.state.packed()
    return vars(batch) | {"state": (pixels.new_zeros(()).expand(pixels.shape), integers)}


def restored(fields: dict[str, Any], *, room_for_pixels: bool) -> Batch:
    """Return the batch of such fields: with memory that the pixels [N, 3, height, width] are to be received in, or with their stand-in."""
    pixels, integers = fields["state"]
    if room_for_pixels:
        pixels = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=torch.cuda.is_available())
    return Batch(**fields | {"state": State.unpack(pixels, integers)})


class Term(NamedTuple):
    """One term of an objective's loss: the mean over the targets of its parts, times its weight."""

    weight: float
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Scores:
    """The model's verdict on each target."""

    loss: Float[Tensor, " R"]
    """Cross-entropy in nats, float32."""
    correct: Bool[Tensor, " R"]
    """Whether the most likely token is the target."""


@dataclass(frozen=True)
class LossSums:
    """Sums over targets by part; divide only after everything has been added up."""

    loss: Float[Tensor, " parts"]
    correct: Float[Tensor, " parts"]
    count: Float[Tensor, " parts"]

    def __add__(self, other: "LossSums") -> "LossSums":
        return LossSums(self.loss + other.loss, self.correct + other.correct, self.count + other.count)

    @staticmethod
    def by_part(scores: Scores, parts: Int[Tensor, " R"], *, num_parts: int) -> "LossSums":
        """Add up the scores of each part; rows of part IGNORED are left out."""
        member = parts == torch.arange(num_parts, device=parts.device)[:, None]
        loss = torch.where(member, scores.loss, 0)  # not a product with `member`: 0 times another part's NaN is NaN
        return LossSums(loss.sum(1), (member & scores.correct).sum(1).float(), member.sum(1).float())


def part_weights(terms: tuple[Term, ...], parts: tuple[str, ...], counts: Tensor) -> Float[Tensor, " parts"]:
    """Return the factor of each part's summed loss such that the products add up to the objective's loss.

    The loss is the weighted mean of the terms, and a term is sum / count over all its parts, so `counts` must be those of the whole
    global batch: the loss then does not depend on how the batch is split. Terms without a target count as zero.
    """
    weights = torch.zeros_like(counts, dtype=torch.float32)
    total = sum(term.weight for term in terms)
    for term in terms:
        members = [parts.index(part) for part in term.parts]
        weights[members] = term.weight / total / counts[members].sum().clamp(min=1).float()
    return weights
