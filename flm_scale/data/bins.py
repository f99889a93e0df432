"""How many micro-batches some samples need, told from sums over them, and the packing of the samples into exactly so many.

The sums are what random access rests on: they are taken once for every chunk of a dataset, added up for any set of chunks, and say how
many micro-batches come before a window that nobody has packed. So the number must be one that packing never fails to keep. A sample takes
tokens, views (captions as the objective shows them) and one image, each from a budget of its own; there are two ways to pack, each with
a proof, and Bins chooses once for a dataset which samples go which way.

Deal, for `common` samples, those of at most t tokens and v views. With T, C and I the budgets of tokens, captions and images, R =
min(I, C // v) of them fit by views and images. Sort by tokens, cut into rows of m, give each of the m micro-batches one sample of each row
at random. Then all have the same mix of lengths, and none breaks a budget if

    m >= n / R                so that there are at most R rows, and
    m >= S / (T - t)          S: the sum of tokens. A micro-batch holds at most the longest of every row. The longest of the first row
                              has at most t tokens; that of any other row at most the mean of the row before, which add up to S / m at most.

Level, for the others. The size of a sample is the largest share that it takes of a budget, in units of which Q make a whole, so a total
of at most Q keeps all budgets. From the largest to the smallest, a sample goes to a micro-batch that has room, the emptier first. When one of
size a has no room, each of the m totals, all of samples of at least a, is more than Q - a; so, with x = Q - a + 1, the sum over these samples
of min(size, x) is at least m * x. It never comes to that if for every a

    m >= sum of min(size, x) over samples of at least a / x     (the sample of size a itself is not among those placed: hence >= suffices)

Neither needs more micro-batches than there are samples, and both put a sample in each.
"""

import math
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from flm_scale.config import BatchConfig

UNITS = 1024
"""Needs are whole numbers of 1/1024 micro-batch, rounded up, so that every machine adds them up alike in any order."""
TYPICAL_SAMPLES = 16384
"""So many, evenly spread, decide which samples are common. Only how full micro-batches are depends on it, not whether they fit."""


class Common(NamedTuple):
    """The longest sample, and the one of the most views, that are dealt."""

    tokens: int
    views: int


class Bins:
    """The two ways to pack for one dataset and one BatchConfig."""

    def __init__(self, batch: BatchConfig, tokens: np.ndarray, views: np.ndarray) -> None:
        """tokens, views: what each of some typical samples takes."""
        tokens, views = tokens.astype(np.int64), views.astype(np.int64)
        self.batch = batch
        self.whole = math.lcm(batch.text_tokens, batch.captions, batch.images)
        # Between two edges all sizes count as the upper one where room is counted.
        self.edges = sorted({0, *_quantiles(self.sizes(tokens, views), np.linspace(0, 1, 33)), self.whole // 2, self.whole})
        self.common = Common(0, 0)
        self.common = min(self._choices(tokens, views), key=lambda choice: self._total(choice, tokens, views))

    def sizes(self, tokens: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Return the largest share of a budget that each sample takes, in units of which `whole` make one."""
        batch = self.batch
        share = np.maximum(tokens * (self.whole // batch.text_tokens), views * (self.whole // batch.captions))
        sizes: np.ndarray = np.maximum(share, self.whole // batch.images)
        return sizes

    def needs(self, tokens: np.ndarray, views: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Return [2, chunks] what the dealt and the levelled samples of each chunk need, in 1/UNITS micro-batch.

        tokens, views: of every sample, 0 for one to leave out.   starts: the first sample of each chunk. The needs of a set of chunks are the sums.
        """
        tokens, views = tokens.astype(np.int64), views.astype(np.int64)
        dealt = self._is_common(tokens, views)
        num_dealt = np.add.reduceat(dealt, starts, dtype=np.int64)
        needs = np.zeros((2, len(starts)), np.int64)
        if self.common.tokens:
            sums = np.add.reduceat(tokens * dealt, starts)
            needs[0] = np.maximum(_units(num_dealt, self._rows), _units(sums, self.batch.text_tokens - self.common.tokens))
        if dealt.sum() < np.count_nonzero(tokens):
            sizes = np.where(dealt | (tokens == 0), 0, self.sizes(tokens, views))
            for lower, upper in zip(self.edges, self.edges[1:], strict=False):
                room = self.whole - upper + 1
                sums = np.add.reduceat(np.where(sizes > lower, np.minimum(sizes, room), 0), starts)
                needs[1] = np.maximum(needs[1], _units(sums, room))
        return needs

    def pack(self, tokens: np.ndarray, views: np.ndarray, counts: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """Return the number of the micro-batch of each sample, below sum(counts): the dealt ones come first.

        tokens, views: of samples in random order; those of one size keep it.   counts: the needs of the samples' chunks, rounded up.
        """
        tokens, views = tokens.astype(np.int64), views.astype(np.int64)
        dealt = self._is_common(tokens, views)
        bins = np.empty(len(tokens), np.int64)
        bins[dealt] = _deal(tokens[dealt], counts[0], rng)
        bins[~dealt] = counts[0] + _level(self.sizes(tokens[~dealt], views[~dealt]), counts[1], self.whole)
        return bins

    @property
    def _rows(self) -> int:
        return min(self.batch.images, self.batch.captions // self.common.views)

    def _is_common(self, tokens: np.ndarray, views: np.ndarray) -> np.ndarray:
        is_common: np.ndarray = (tokens > 0) & (tokens <= self.common.tokens) & (views <= self.common.views)
        return is_common

    def _choices(self, tokens: np.ndarray, views: np.ndarray) -> list[Common]:
        """Return what makes a share of the samples common, and what makes none. Longer than half the budget would not keep to the count."""
        longest, most = (_quantiles(values, [0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 1.0]) for values in (tokens, views))
        return [*(Common(t, v) for t, v in product(longest, most) if 2 * t <= self.batch.text_tokens), Common(0, 0)]

    def _total(self, choice: Common, tokens: np.ndarray, views: np.ndarray) -> int:
        """Return how many micro-batches the samples would need."""
        self.common = choice
        needs = self.needs(tokens, views, np.zeros(1, np.int64)) if len(tokens) else np.zeros((2, 1), np.int64)
        return int((-(-needs // UNITS)).sum())


def permutation(count: int, rng: np.random.Generator) -> np.ndarray:
    """Return the numbers below `count` in random order: sorted by random bits that carry them, which is also twice as quick as shuffling them."""
    carried = np.uint64(2 ** count.bit_length() - 1)
    bits = _random_bits(count, rng)  # in place from here on: new arrays would take half as long as the sort
    bits &= ~carried
    bits |= np.arange(count, dtype=np.uint64)
    bits.sort()
    bits &= carried
    return bits.view(np.int64)


def in_order(values: np.ndarray) -> np.ndarray:
    """Return the places of the values, none negative, from the least to the greatest; those that are equal keep their sequence."""
    # numpy sorts numbers of one or two bytes by their digits, ten times as quick as greater ones.
    return np.argsort(values.astype(np.min_scalar_type(values.max(initial=0))), kind="stable")


def _random_bits(count: int, rng: np.random.Generator) -> np.ndarray:
    """Return raw 64 bits each: numpy promises never to change them, while its own shuffles may change with a version."""
    bits: np.ndarray = rng.bit_generator.random_raw(count)
    return bits


def _units(amount: np.ndarray, whole: int) -> np.ndarray:
    return -(-amount * UNITS // whole)


def _deal(tokens: np.ndarray, num_bins: int, rng: np.random.Generator) -> np.ndarray:
    """Return the bin of each sample. 5 samples and 2 bins: rows of the two longest, the next two, the last one."""
    num_rows = -(-len(tokens) // max(num_bins, 1))
    columns = np.argsort(_random_bits(num_rows * num_bins, rng).reshape(num_rows, num_bins), axis=1, kind="stable")
    bins = np.empty(len(tokens), np.int64)
    bins[_descending(tokens)] = columns.ravel()[:len(tokens)]
    return bins


def _level(sizes: np.ndarray, num_bins: int, whole: int) -> np.ndarray:
    """Return the bin of each sample. A round serves all bins that would come next one by one: those no fuller than the emptiest will be."""
    bins, totals = np.empty(len(sizes), np.int64), np.zeros(num_bins, np.int64)
    waiting = _descending(sizes)
    while len(waiting):
        size = sizes[waiting[0]]
        by_total = in_order(totals)
        sorted_totals = totals[by_total]
        served = by_total[:np.searchsorted(sorted_totals, min(whole - size, sorted_totals[0] + size), side="right")]
        assert len(served), "a sample has no room: the count was not that of `needs`"
        now, waiting = waiting[:len(served)], waiting[len(served):]
        served = served[:len(now)]
        bins[now] = served
        totals[served] += sizes[now]
    return bins


def _quantiles(values: np.ndarray, at: Sequence[float] | np.ndarray) -> list[int]:
    """Return the values, all that occur, that so great shares of all do not exceed."""
    return np.unique(np.quantile(values, at, method="higher")).tolist() if len(values) else []


def _descending(values: np.ndarray) -> np.ndarray:
    return in_order(values.max(initial=0) - values)
