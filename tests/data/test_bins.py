"""The count that is told from sums over chunks is one that packing keeps: no budget broken, each sample once, no micro-batch empty."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_scale.config import BatchConfig
from flm_scale.data.bins import UNITS, Bins
from flm_scale.data.order import keyed_rng

BATCHES = st.builds(BatchConfig, text_tokens=st.integers(16, 90), captions=st.integers(3, 12), images=st.integers(1, 9), micro_batches=st.just(1))


def check(batch: BatchConfig, tokens: np.ndarray, views: np.ndarray, starts: np.ndarray, typical: np.ndarray) -> int:
    """Pack and return the number of micro-batches. typical: the samples that the rule was made from, any ones."""
    packing = Bins(batch, tokens[typical], views[typical])
    dealt, levelled = (-(-packing.needs(tokens, views, starts).sum(1) // UNITS)).tolist()
    bins = packing.pack(tokens, views, (dealt, levelled), keyed_rng("test"))
    for values, budget in ((tokens, batch.text_tokens), (views, batch.captions), (np.ones_like(tokens), batch.images)):
        taken = np.bincount(bins, weights=values, minlength=dealt + levelled)
        assert len(taken) == dealt + levelled
        assert taken.min() > 0
        assert taken.max() <= budget
    return dealt + levelled


@given(batch=BATCHES, data=st.data())
@settings(max_examples=150, deadline=None)
def test_packing_keeps_the_count_and_every_budget(batch: BatchConfig, data: st.DataObject) -> None:
    sample = st.tuples(st.integers(1, batch.text_tokens), st.integers(1, batch.captions))
    few = st.lists(sample, min_size=1, max_size=4).flatmap(lambda sizes: st.lists(st.sampled_from(sizes), min_size=1, max_size=200))
    tokens, views = np.array(data.draw(st.lists(sample, min_size=1, max_size=60) | few)).T
    starts = np.array(sorted({0} | data.draw(st.sets(st.integers(0, len(tokens) - 1), max_size=5))))
    typical = np.array(data.draw(st.lists(st.integers(0, len(tokens) - 1), max_size=20)), int)
    check(batch, tokens, views, starts, typical)


ADVERSARIES: dict[str, Callable[[int], np.ndarray]] = {
    "all of the greatest length": lambda n: np.full(n, 704),
    "all just above half": lambda n: np.full(n, 353),
    "all just above a third": lambda n: np.full(n, 235),
    "all of the least length": lambda n: np.full(n, 3),
    "one giant": lambda n: np.where(np.arange(n) == n // 2, 704, 5),
    "giants and dwarfs": lambda n: np.where(np.arange(n) % 2, 650, 3),
    "every length": lambda n: np.arange(n) % 704 + 1,
    "powers of two": lambda n: 2 ** (np.arange(n) % 9),
}


@pytest.mark.parametrize("typical", ["all", "the first", "none"])
@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_no_distribution_of_lengths_breaks_the_count(adversary: str, typical: str) -> None:
    tokens = ADVERSARIES[adversary](2000)
    views = 1 + np.arange(2000) * 7 % 13
    check(BatchConfig(text_tokens=704, captions=64, images=64), tokens, views, np.arange(0, 2000, 256),
          np.arange({"all": 2000, "the first": 1, "none": 0}[typical]))


def test_a_dealt_micro_batch_has_its_share_of_long_and_of_short_samples() -> None:
    tokens = keyed_rng("lengths").permutation(np.repeat(np.arange(1, 33), 50))
    packing = Bins(BatchConfig(text_tokens=10_000, captions=32, images=32), tokens, np.ones_like(tokens))
    bins = packing.pack(tokens, np.ones_like(tokens), (50, 0), keyed_rng("test"))
    assert all(sorted(tokens[bins == number]) == list(range(1, 33)) for number in range(50))
