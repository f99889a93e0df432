"""Which samples make which micro-batch: a pure function of (dataset, seed, epoch), known before a picture is read.

An epoch visits every image once, in an order drawn from seed and epoch, and cuts that order into micro-batches that fit the token,
caption and image budgets. No rank, worker or process count enters, so any layout and any resume sees the same batches.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flm_scale.config import BatchConfig


class Entry(NamedTuple):
    """One image of a micro-batch."""

    image: int
    """Position in the split."""
    captions: tuple[int, ...]
    """Which of its captions go along."""


MicroBatch = tuple[Entry, ...]


def keyed_rng(*key: object) -> np.random.Generator:
    """Return a generator that depends on the key alone, on any machine: counter-based, seeded by BLAKE2 of the key."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "big")))


def plan_epoch(costs: Sequence[Sequence[tuple[int, int]]], batch: BatchConfig, *, seed: int, epoch: int,
               captions_per_image: int) -> list[MicroBatch]:
    """Return the micro-batches of a shuffled epoch.

    costs: for each image, for each caption, (text tokens, views) that it takes in the batch. Images without a caption are left out. An
    image with more captions than `captions_per_image`, or than fit a batch, takes part with as many as fit, others in other epochs.
    """
    rng = keyed_rng("order", seed, epoch)
    chosen = []
    for image in rng.permutation(len(costs)):
        captions = rng.permutation(len(costs[image]))[:captions_per_image] if len(costs[image]) > 1 else range(len(costs[image]))
        chosen.append((int(image), sorted(map(int, captions))))
    return _fill(chosen, costs, batch)


def plan_in_order(costs: Sequence[Sequence[tuple[int, int]]], batch: BatchConfig) -> list[MicroBatch]:
    """Return micro-batches that visit every caption of every image once, in the order of the split, for evaluation."""
    return _fill([(image, list(range(len(captions)))) for image, captions in enumerate(costs)], costs, batch, keep_all=True)


def _fill(chosen: list[tuple[int, list[int]]], costs: Sequence[Sequence[tuple[int, int]]], batch: BatchConfig, *,
          keep_all: bool = False) -> list[MicroBatch]:
    """Fill micro-batches one after the other; an image that does not fit opens the next (and is cut in several if `keep_all`)."""
    plan: list[MicroBatch] = []
    entries: list[Entry] = []
    tokens = views = 0
    for image, captions in chosen:
        waiting = captions
        while waiting:
            fitting, image_tokens, image_views = _prefix_that_fits(waiting, costs[image], batch)
            if entries and (tokens + image_tokens > batch.text_tokens or views + image_views > batch.captions or len(entries) == batch.images):
                plan.append(tuple(entries))
                entries, tokens, views = [], 0, 0
            entries.append(Entry(image, tuple(fitting)))
            tokens, views = tokens + image_tokens, views + image_views
            waiting = waiting[len(fitting):] if keep_all else []
    if entries:
        plan.append(tuple(entries))
    return plan


def _prefix_that_fits(captions: list[int], costs: Sequence[tuple[int, int]], batch: BatchConfig) -> tuple[list[int], int, int]:
    """Return as many of an image's captions as fit an empty micro-batch (the Run guarantees one), their tokens and views."""
    tokens = views = 0
    for count, caption in enumerate(captions):
        more_tokens, more_views = costs[caption]
        if count and (tokens + more_tokens > batch.text_tokens or views + more_views > batch.captions):
            return captions[:count], tokens, views
        tokens, views = tokens + more_tokens, views + more_views
    return captions, tokens, views
