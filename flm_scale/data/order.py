"""Which samples make which micro-batch: a pure function of (dataset, seed, epoch), known before a picture is read, at any size.

    chunks    runs of at most 256 consecutive samples of one shard, permuted anew each epoch
    windows   256 chunks one after another; their samples are permuted, packed into micro-batches, and these permuted

How many micro-batches a window holds follows from sums kept for each chunk (bins.py), so micro-batch k is found without packing those before
its window. No rank, worker or process count enters: any layout and any resume sees the same micro-batches.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np

from flm_scale.config import BatchConfig
from flm_scale.data.bins import TYPICAL_SAMPLES, UNITS, Bins, in_order, permutation

CHUNK, WINDOW = 256, 256
"""Samples of a chunk, at most; chunks of a window, at most."""
BLOCK = 2**18
"""Samples that are looked at together when a whole split is gone through."""
HALF = 32
"""Bits of the smaller of two numbers in one; the needs of a window, at most a micro-batch a sample, take 26."""


class Entry(NamedTuple):
    """One image of a micro-batch."""

    image: int
    """Position in the split."""
    captions: tuple[int, ...]
    """Which of its captions go along."""


MicroBatch = tuple[Entry, ...]


class Numbers(Protocol):
    """An array of one dimension that can be sliced: one in memory, a mapped one, or one that is worked out as it is asked for."""

    def __len__(self) -> int: ...
    def __getitem__(self, places: slice | np.ndarray, /) -> np.ndarray: ...


class Costs(NamedTuple):
    """What each caption of a split takes in a batch, captions of one image together."""

    tokens: Numbers
    """[captions] text tokens, over all views."""
    views: Numbers
    """[captions] how often the objective shows it."""
    starts: np.ndarray | None = None
    """[images + 1] where each image's captions begin; None for one caption an image."""

    @property
    def num_images(self) -> int:
        """Images, those without a caption too."""
        return len(self.tokens) if self.starts is None else len(self.starts) - 1


class Chosen(NamedTuple):
    """What some images take part with, an item an image."""

    first: np.ndarray
    """The first of its captions that goes along; the others follow it, the image's first caption behind its last."""
    taken: np.ndarray
    """How many go along; 0 for an image without a caption."""
    tokens: np.ndarray
    views: np.ndarray


class Epoch(NamedTuple):
    """The shuffled chunks of an epoch."""

    chunks: np.ndarray
    """[chunks] in the order of this epoch."""
    window_chunks: np.ndarray
    """[windows + 1] where each window begins in `chunks`."""
    counts: np.ndarray
    """[2, windows] micro-batches of dealt and of levelled samples."""
    ends: np.ndarray
    """[windows] micro-batches of the epoch up to the end of each window."""


def keyed_rng(*key: object) -> np.random.Generator:
    """Return a generator that depends on the key alone, on any machine: counter-based, seeded by BLAKE2 of the key."""
    return np.random.Generator(np.random.Philox(key=keyed_number(*key)))


def keyed_number(*key: object) -> int:
    """Return 128 bits that depend on the key alone."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest(), "big")


class Shuffle:
    """The endless micro-batches of one split, epoch after epoch.

    An epoch visits every image with a caption once, with at most `captions_per_image` of its captions. An image with more than that, or than
    fit into a batch, takes part with as many as fit, beginning with one that is drawn anew each epoch.
    """

    def __init__(self, costs: Costs, shard_sizes: Sequence[int] | np.ndarray, batch: BatchConfig, *, seed: int, captions_per_image: int) -> None:
        """shard_sizes: images of each shard, in the order of the split."""
        self.costs, self.batch, self.seed, self.captions_per_image = costs, batch, seed, captions_per_image
        assert sum(shard_sizes) == costs.num_images, "the shards are those of the split"
        sizes = np.asarray(shard_sizes, np.int64)
        self._shard_ends = np.cumsum(sizes)
        self._chunk_ends = np.cumsum(-(-sizes // CHUNK))
        self.num_chunks = int(self._chunk_ends[-1]) if len(sizes) else 0
        typical = self.choose(np.arange(0, costs.num_images, max(1, costs.num_images // TYPICAL_SAMPLES)), 0)
        kept = typical.taken > 0
        self._bins = Bins(batch, typical.tokens[kept], typical.views[kept])
        self._needs, self._is_fixed = self._needs_of(0)
        self._epoch_ends: list[int] = []
        self._epoch = lru_cache(maxsize=2)(self._open)
        self._window = lru_cache(maxsize=2)(self._pack)

    def length(self, epoch: int) -> int:
        """Return the number of micro-batches of an epoch."""
        ends = self._epoch(epoch).ends
        return int(ends[-1]) if len(ends) else 0

    def find(self, number: int) -> tuple[int, int]:
        """Return the epoch, and the place in it, of a micro-batch of the endless row."""
        if self._is_fixed and self.num_chunks <= WINDOW:
            return divmod(number, self.length(0))  # one window holds everything, so all epochs are of one length
        while not self._epoch_ends or self._epoch_ends[-1] <= number:
            self._epoch_ends.append((self._epoch_ends or [0])[-1] + self.length(len(self._epoch_ends)))
        epoch = bisect_right(self._epoch_ends, number)
        return epoch, number - (self._epoch_ends[epoch - 1] if epoch else 0)

    def micro_batch(self, epoch: int, place: int) -> MicroBatch:
        """Return a micro-batch of an epoch."""
        ends = self._epoch(epoch).ends
        window = int(np.searchsorted(ends, place, side="right"))
        images, first, taken, bounds = self._window(epoch, window)
        place -= int(ends[window - 1]) if window else 0
        return self._entries(*(values[bounds[place]:bounds[place + 1]] for values in (images, first, taken)))

    def plan(self, epoch: int) -> list[MicroBatch]:
        """Return all micro-batches of an epoch."""
        return [self.micro_batch(epoch, place) for place in range(self.length(epoch))]

    def choose(self, images: np.ndarray, epoch: int) -> Chosen:
        """Return which captions of each image go along in an epoch."""
        starts, batch = self.costs.starts, self.batch
        if starts is None:
            ones = np.ones(len(images), np.int64)
            return Chosen(ones - 1, ones, self.costs.tokens[images], self.costs.views[images])
        begin = np.asarray(starts[images], np.int64)
        num_captions = np.asarray(starts[images + 1], np.int64) - begin
        first = keyed_integers(images, num_captions, key=keyed_number("captions", self.seed, epoch))
        taken, tokens, views = (np.zeros(len(images), np.int64) for _ in range(3))
        waiting = np.flatnonzero(num_captions)
        for number in range(self.captions_per_image):
            caption = begin[waiting] + (first[waiting] + number) % num_captions[waiting]
            more_tokens, more_views = tokens[waiting] + self.costs.tokens[caption], views[waiting] + self.costs.views[caption]
            fits = (more_tokens <= batch.text_tokens) & (more_views <= batch.captions)
            waiting = waiting[fits]
            taken[waiting], tokens[waiting], views[waiting] = number + 1, more_tokens[fits], more_views[fits]
            waiting = waiting[num_captions[waiting] > number + 1]
            if not len(waiting):
                break
        return Chosen(first, taken, tokens, views)

    def _needs_of(self, epoch: int) -> tuple[np.ndarray, bool]:
        """Return what each chunk needs in an epoch [chunks], and whether it is the same in all: whether every caption always goes along.

        Both needs of `Bins.needs` in a number, the dealt above the levelled: an epoch then looks up, and adds up, one number a chunk.
        """
        needs, is_fixed = np.zeros(self.num_chunks, np.int64), True
        for begin in range(0, self.num_chunks, BLOCK // CHUNK):
            images, starts = self._images_of(np.arange(begin, min(begin + BLOCK // CHUNK, self.num_chunks)))
            block = slice(int(images[0]), int(images[-1]) + 1)
            if self.costs.starts is None:
                tokens, views = self.costs.tokens[block], self.costs.views[block]
            else:
                _, taken, tokens, views = self.choose(images, epoch)
                is_fixed = is_fixed and bool((taken == np.diff(self.costs.starts[block.start:block.stop + 1])).all())
            dealt, levelled = self._bins.needs(tokens, views, starts)
            needs[begin:begin + len(starts)] = dealt << HALF | levelled
        return needs, is_fixed

    def _images_of(self, chunks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the images of some chunks, one chunk after another, and where each chunk begins among them."""
        shard = np.searchsorted(self._chunk_ends, chunks, side="right")
        shard_begin = np.where(shard > 0, self._shard_ends[shard - 1], 0)
        begin = shard_begin + (chunks - np.where(shard > 0, self._chunk_ends[shard - 1], 0)) * CHUNK
        sizes = np.minimum(self._shard_ends[shard] - begin, CHUNK)
        starts = np.cumsum(sizes) - sizes
        return np.repeat(begin - starts, sizes) + np.arange(sizes.sum()), starts

    def _open(self, epoch: int) -> Epoch:
        needs = self._needs if self._is_fixed else self._needs_of(epoch)[0]
        chunks = permutation(self.num_chunks, keyed_rng("chunks", self.seed, epoch))
        num_windows = -(-self.num_chunks // WINDOW)
        window_chunks = np.arange(num_windows + 1) * self.num_chunks // max(num_windows, 1)
        sums = np.add.reduceat(needs.take(chunks, mode="clip"), window_chunks[:-1])  # a check of the places would double it
        counts = -(-np.stack([sums >> HALF, sums & (1 << HALF) - 1]) // UNITS)
        return Epoch(chunks.astype(np.int32), window_chunks, counts, np.cumsum(counts.sum(0)))

    def _pack(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return (images, first caption, number of captions) of a window, micro-batch after micro-batch, and the bounds of these."""
        opened = self._epoch(epoch)
        rng = keyed_rng("window", self.seed, epoch, window)
        images, _ = self._images_of(opened.chunks[opened.window_chunks[window]:opened.window_chunks[window + 1]])
        images = images[permutation(len(images), rng)]
        chosen = self.choose(images, epoch)
        kept = chosen.taken > 0
        images, first, taken, tokens, views = (values[kept] for values in (images, *chosen))
        dealt, levelled = opened.counts[:, window].tolist()
        bins = self._bins.pack(tokens, views, (dealt, levelled), rng)
        places = permutation(dealt + levelled, rng)[bins]
        by_place = in_order(places)
        bounds = np.concatenate([[0], np.cumsum(np.bincount(places, minlength=dealt + levelled))])
        return images[by_place], first[by_place], taken[by_place], bounds

    def _entries(self, images: np.ndarray, first: np.ndarray, taken: np.ndarray) -> MicroBatch:
        starts = self.costs.starts
        captions = np.ones(len(images), np.int64) if starts is None else starts[images + 1] - starts[images]
        columns = (column.tolist() for column in (images, first, taken, captions))
        return tuple(Entry(image, tuple(sorted((begin + i) % of for i in range(number)))) for image, begin, number, of in zip(*columns, strict=True))


def plan_in_order(costs: Costs, batch: BatchConfig) -> list[MicroBatch]:
    """Return micro-batches that visit every caption of every image once, in the order of the split, for evaluation.

    One is closed when the next image does not fit. Only an image that does not fit an empty one is cut in several.
    """
    starts = np.arange(costs.num_images + 1) if costs.starts is None else costs.starts
    token_sums, view_sums = ([0, *np.cumsum(values[:]).tolist()] for values in (costs.tokens, costs.views))
    plan: list[MicroBatch] = []
    entries: list[Entry] = []
    opened = 0  # the first caption of the open micro-batch
    for image, (start, end) in enumerate(pairwise(starts.tolist())):
        begin = start
        while begin < end:
            fitting = _end_of_fitting(token_sums, view_sums, begin, end, batch)
            if entries and (len(entries) == batch.images or _end_of_fitting(token_sums, view_sums, opened, fitting, batch) < fitting):
                plan.append(tuple(entries))
                entries, opened = [], begin
            entries.append(Entry(image, tuple(range(begin - start, fitting - start))))
            begin = fitting
    return [*plan, tuple(entries)] if entries else plan


def _end_of_fitting(token_sums: list[int], view_sums: list[int], begin: int, end: int, batch: BatchConfig) -> int:
    """Return the end, at most `end`, of the captions from `begin` on that fit into a micro-batch."""
    return min(bisect_right(token_sums, token_sums[begin] + batch.text_tokens, begin, end + 1),
               bisect_right(view_sums, view_sums[begin] + batch.captions, begin, end + 1)) - 1


def keyed_integers(numbers: np.ndarray, below: np.ndarray, *, key: int) -> np.ndarray:
    """Return for each number an integer in [0, below) that depends on it and the key alone; 0 where `below` is 0.

    Its 64 bits, and the key's, are mixed by SplitMix64's finaliser (Steele, Lea and Flood, 2014).
    """
    bits = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key % 2**64)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    drawn: np.ndarray = (bits % np.maximum(below, 1).astype(np.uint64)).astype(np.int64)
    return drawn
