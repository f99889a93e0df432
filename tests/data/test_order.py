"""The order is a pure function of dataset, seed and epoch, at any size; the budgets hold; any micro-batch is reached at once."""

import subprocess
import sys
from itertools import pairwise
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_scale.config import BatchConfig
from flm_scale.data import order
from flm_scale.data.order import CHUNK, WINDOW, Costs, MicroBatch, Shuffle, keyed_rng, plan_in_order

COSTS = st.lists(st.lists(st.tuples(st.integers(3, 16), st.integers(1, 3)), max_size=6), min_size=1, max_size=40)
BATCHES = st.builds(BatchConfig, text_tokens=st.integers(16, 60), captions=st.integers(3, 9), images=st.integers(1, 6), micro_batches=st.just(1))


def costs_of(images: list[list[tuple[int, int]]]) -> Costs:
    captions = np.array([caption for captions in images for caption in captions], int).reshape(-1, 2)
    return Costs(captions[:, 0], captions[:, 1], np.cumsum([0, *map(len, images)]))


def one_caption_each(lengths: np.ndarray) -> Costs:
    return Costs(lengths, np.broadcast_to(np.uint8(1), len(lengths)))


def shuffle_of(costs: Costs, batch: BatchConfig, *, num_shards: int = 4, seed: int = 0, captions_per_image: int = 8) -> Shuffle:
    cuts = np.linspace(0, costs.num_images, num_shards + 1).astype(int)
    return Shuffle(costs, np.diff(cuts).tolist(), batch, seed=seed, captions_per_image=captions_per_image)


def images_of(plan: list[MicroBatch]) -> list[int]:
    return [entry.image for entries in plan for entry in entries]


@given(images=COSTS, batch=BATCHES, seed=st.integers(0, 99), epoch=st.integers(0, 3), cap=st.integers(1, 6), num_shards=st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_an_epoch_visits_every_captioned_image_once_within_the_budgets(images, batch, seed, epoch, cap, num_shards) -> None:
    """In chunks of three and windows of two chunks, so that there are several."""
    with patch.object(order, "CHUNK", 3), patch.object(order, "WINDOW", 2):
        shuffle = shuffle_of(costs_of(images), batch, num_shards=num_shards, seed=seed, captions_per_image=cap)
        plan = shuffle.plan(epoch)
        ends = np.cumsum([shuffle.length(number) for number in range(epoch + 1)])
        assert len(plan) == shuffle.length(epoch)
        if plan:
            assert shuffle.find(int(ends[-1]) - 1) == (epoch, len(plan) - 1)
            assert shuffle.find(int(ends[-1])) == (epoch + 1, 0)
    assert sorted(images_of(plan)) == [image for image, captions in enumerate(images) if captions]
    for entries in plan:
        assert entries
        spent = [images[entry.image][caption] for entry in entries for caption in entry.captions]
        assert sum(tokens for tokens, _ in spent) <= batch.text_tokens
        assert sum(views for _, views in spent) <= batch.captions
        assert len(entries) <= batch.images
    for entry in (entry for entries in plan for entry in entries):
        captions = images[entry.image]
        assert len(set(entry.captions)) == len(entry.captions) <= cap
        together = np.sum([captions[caption] for caption in entry.captions], axis=0)
        longest = np.max(captions, axis=0)
        if len(entry.captions) < min(cap, len(captions)):
            assert (together + longest > (batch.text_tokens, batch.captions)).any(), "one more would have fitted, whichever comes next"


@given(images=COSTS, batch=BATCHES)
@settings(max_examples=100, deadline=None)
def test_an_evaluation_visits_every_caption_once_in_order(images, batch) -> None:
    plan = plan_in_order(costs_of(images), batch)
    visited = [(entry.image, caption) for entries in plan for entry in entries for caption in entry.captions]
    assert visited == [(image, caption) for image, captions in enumerate(images) for caption in range(len(captions))]
    for entries in plan:
        spent = np.sum([images[entry.image][caption] for entry in entries for caption in entry.captions], axis=0)
        assert (spent <= (batch.text_tokens, batch.captions)).all()
        assert 1 <= len(entries) <= batch.images
    for entries, following in pairwise(plan):
        spent = np.sum([images[entry.image][caption] for entry in (*entries, following[0]) for caption in entry.captions], axis=0)
        assert (spent > (batch.text_tokens, batch.captions)).any() or len(entries) == batch.images, "the next image would have fitted"


def test_another_epoch_or_seed_is_another_order() -> None:
    batch = BatchConfig(text_tokens=50, captions=10, images=10)
    plans = [shuffle_of(one_caption_each(np.full(50, 5)), batch, seed=seed).plan(epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert plans[0] != plans[1] != plans[2] != plans[0]


def test_captions_beyond_the_cap_take_their_turns() -> None:
    """60 epochs with two of five captions: each comes in some 24 of them, and all that go along are of one stretch."""
    shuffle = shuffle_of(costs_of([[(5, 1)] * 5] * 40), BatchConfig(text_tokens=50, captions=10, images=10), captions_per_image=2)
    times = np.zeros((40, 5), int)
    for epoch in range(60):
        for entries in shuffle.plan(epoch):
            for entry in entries:
                times[entry.image, list(entry.captions)] += 1
    assert (times.sum(1) == 120).all()
    assert times.min() > 8
    assert times.sum(0) == pytest.approx(np.full(5, 960), rel=0.1)


def test_one_caption_an_image_needs_no_starts() -> None:
    lengths = keyed_rng("lengths").integers(3, 30, 3000)
    batch = BatchConfig(text_tokens=200, captions=16, images=16)
    stated = Costs(lengths, np.ones(3000, int), np.arange(3001))
    assert shuffle_of(one_caption_each(lengths), batch).plan(1) == shuffle_of(stated, batch).plan(1)


@pytest.fixture(scope="module")
def large() -> Shuffle:
    """Two million images in 200 shards, their lengths never stored."""
    lengths = np.broadcast_to(np.uint8(12), 2_000_000)
    return shuffle_of(one_caption_each(lengths), BatchConfig(text_tokens=704, captions=64, images=64), num_shards=200)


def test_any_micro_batch_is_reached_by_packing_its_window_alone(large: Shuffle) -> None:
    """40 chunks a shard, 32 windows. Places are visited in random order; a fresh order that comes to one of them directly agrees."""
    fresh = Shuffle(large.costs, np.full(200, 10_000), large.batch, seed=0, captions_per_image=1)
    for number in (2 * large.length(0) - 1, large.length(0) // 2, 3 * large.length(0)):
        with patch.object(fresh, "choose", wraps=fresh.choose) as choose:
            assert fresh.micro_batch(*fresh.find(number)) == large.micro_batch(*large.find(number))
        assert sum(len(call.args[0]) for call in choose.call_args_list) <= CHUNK * WINDOW


def test_what_an_order_holds_grows_with_chunks_and_not_with_samples(large: Shuffle) -> None:
    """Some bytes a chunk of 256 samples."""
    opened = large._epoch(0)
    held = [value for value in (*vars(large).values(), *opened) if isinstance(value, np.ndarray)]
    assert large.num_chunks == 200 * 40
    assert sum(array.nbytes for array in held) < 16 * large.num_chunks


def test_every_sample_of_a_large_split_comes_once_an_epoch(large: Shuffle) -> None:
    seen = np.zeros(large.costs.num_images, int)
    for window in range(len(large._epoch(3).ends)):
        seen[large._pack(3, window)[0]] += 1
    assert (seen == 1).all()


def test_a_micro_batch_mixes_shards(large: Shuffle) -> None:
    """Two samples of one are of one shard in 1 of 200 cases, as in a perfect shuffle of 200 shards, and of one chunk in 1 of 250 more."""
    shards = [np.array([entry.image // 10_000 for entry in large.micro_batch(0, place)]) for place in range(0, large.length(0), 97)]
    same = np.mean([((of[:, None] == of).sum() - len(of)) / (len(of) * (len(of) - 1)) for of in shards])
    assert same == pytest.approx(1 / 200 + 1 / 250, rel=0.1)


@pytest.mark.parametrize(("mean", "deviation", "captions", "batch", "fill"), [
    (9.2, 4.0, 1, BatchConfig(text_tokens=704, captions=64, images=64), 0.98),
    (13.8, 2.8, 5, BatchConfig(text_tokens=1536, captions=128, images=64), 0.95),
    (13.8, 2.8, 5, BatchConfig(text_tokens=704, captions=64, images=64), 0.92),
])
def test_micro_batches_are_full(mean: float, deviation: float, captions: int, batch: BatchConfig, fill: float) -> None:
    """By the budget that binds: captions in the first case, tokens in the others."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.normal(mean, deviation, 20_000 * captions).round(), 3, 50).astype(int)
    shuffle = shuffle_of(Costs(lengths, np.ones_like(lengths), np.arange(0, len(lengths) + 1, captions)), batch)
    shares = (lengths.sum() / batch.text_tokens, len(lengths) / batch.captions, 20_000 / batch.images)
    assert max(shares) / shuffle.length(0) > fill


def test_keyed_numbers_do_not_depend_on_the_process() -> None:
    """Python's own hash() would: it is salted anew in every process."""
    code = "from flm_scale.data.order import keyed_rng; print(keyed_rng('corrupt', 3, 1, 'key', 0).integers(2**60))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(out) == keyed_rng("corrupt", 3, 1, "key", 0).integers(2**60) == 645331740659683403


def test_the_order_of_today_is_that_of_tomorrow() -> None:
    """A resumed run and `flm data order` rest on it: whoever changes it refuses the checkpoints of before."""
    lengths = np.arange(3, 3003) * 7 % 40 + 3
    shuffle = shuffle_of(Costs(lengths, np.ones_like(lengths), np.arange(0, 3001, 3)), BatchConfig(text_tokens=300, captions=16, images=8),
                         captions_per_image=2)
    assert shuffle.find(1000) == (5, 114)
    assert shuffle.micro_batch(5, 114) == ((730, (1, 2)), (176, (0, 2)), (469, (1, 2)), (124, (0, 1)), (968, (0, 1)))
