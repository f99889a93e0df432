"""The order is a pure function of dataset, seed and epoch, and the budgets hold."""

import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st

from flm_scale.config import BatchConfig
from flm_scale.data.order import keyed_rng, plan_epoch, plan_in_order

COSTS = st.lists(st.lists(st.tuples(st.integers(3, 16), st.integers(1, 3)), max_size=6), min_size=1, max_size=40)
BATCHES = st.builds(BatchConfig, text_tokens=st.integers(16, 60), captions=st.integers(3, 9), images=st.integers(1, 6), micro_batches=st.just(1))


@given(costs=COSTS, batch=BATCHES, seed=st.integers(0, 99), epoch=st.integers(0, 9), cap=st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_an_epoch_visits_every_captioned_image_once_within_the_budgets(costs, batch, seed, epoch, cap) -> None:
    plan = plan_epoch(costs, batch, seed=seed, epoch=epoch, captions_per_image=cap)
    visited = [entry.image for entries in plan for entry in entries]
    assert sorted(visited) == [image for image, captions in enumerate(costs) if captions]
    for entries in plan:
        spent = [costs[entry.image][caption] for entry in entries for caption in entry.captions]
        assert sum(tokens for tokens, _ in spent) <= batch.text_tokens
        assert sum(views for _, views in spent) <= batch.captions
        assert len(entries) <= batch.images
        assert all(1 <= len(entry.captions) <= cap for entry in entries)


@given(costs=COSTS, batch=BATCHES)
@settings(max_examples=100, deadline=None)
def test_an_evaluation_visits_every_caption_once_in_order(costs, batch) -> None:
    plan = plan_in_order(costs, batch)
    visited = [(entry.image, caption) for entries in plan for entry in entries for caption in entry.captions]
    assert visited == [(image, caption) for image, captions in enumerate(costs) for caption in range(len(captions))]


def test_another_epoch_or_seed_is_another_order() -> None:
    costs = [[(5, 1)]] * 50
    batch = BatchConfig(text_tokens=50, captions=10, images=10)
    plans = [plan_epoch(costs, batch, seed=seed, epoch=epoch, captions_per_image=1) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert plans[0] != plans[1] != plans[2] != plans[0]


def test_keyed_numbers_do_not_depend_on_the_process() -> None:
    """Python's own hash() would: it is salted anew in every process."""
    code = "from flm_scale.data.order import keyed_rng; print(keyed_rng('corrupt', 3, 1, 'key', 0).integers(2**60))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(out) == keyed_rng("corrupt", 3, 1, "key", 0).integers(2**60) == 645331740659683403
