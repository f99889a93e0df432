"""Free Language Modeling: spans, targets, what a query may read."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_scale.config import FlmConfig
from flm_scale.objectives.flm import Flm, draw_spans
from tests.synthetic import caption_ids


@given(n=st.integers(1, 19), rate=st.floats(0, 1), seed=st.integers(0, 10_000))
@settings(max_examples=300)
def test_every_span_lies_in_the_caption_and_holds_its_target(n: int, rate: float, seed: int) -> None:
    lo, hi = draw_spans(n, rate=rate, rng=np.random.default_rng(seed))
    target = np.arange(1, n + 1)
    assert (lo >= 1).all()
    assert (lo <= target).all()
    assert (target <= hi).all()
    assert (hi <= n).all()


@pytest.mark.parametrize("rate", [0.15, 0.3, 0.4, 0.6, 0.8])
def test_the_realised_rate_is_the_requested_one_at_every_position(rate: float) -> None:
    """Also at the edges, where a span that is cut instead of shifted hides less."""
    n, draws = 13, 20_000
    rng = np.random.default_rng(0)
    spans = [draw_spans(n, rate=rate, rng=rng) for _ in range(draws)]
    hidden = np.mean([hi - lo + 1 for lo, hi in spans], axis=0) / n
    # Four standard errors of a binomial share, and 2e-3 for whole-caption spans that cannot grow further.
    assert np.abs(hidden - rate).max() < 4 * np.sqrt(rate * (1 - rate) / n / draws) + 2e-3


def test_a_drawn_rate_hides_half_its_maximum_on_average() -> None:
    objective, ids = Flm(FlmConfig(corruption_rate=0.8, draw_rate=True)), caption_ids(13, np.random.default_rng(0))
    rng = np.random.default_rng(1)
    examples = [objective.corrupt(ids, rng)[0] for _ in range(8000)]
    mean = np.mean([(example.span_last - example.span_first + 1).mean() / 13 for example in examples])
    assert mean == pytest.approx(0.8 / 2 + 1 / (2 * 13**2 * 0.8), abs=0.005)


def test_rate_zero_hides_the_target_alone() -> None:
    lo, hi = draw_spans(9, rate=0.0, rng=np.random.default_rng(0))
    assert (lo == hi).all()


@given(n=st.integers(1, 19), seed=st.integers(0, 1000))
@settings(max_examples=100)
def test_every_content_token_is_predicted_by_each_kind_of_row_and_eos_by_the_forward_stream_alone(n: int, seed: int) -> None:
    """n reconstruction, n + 1 forward (EOS too), n reverse targets; BOS is never one."""
    rng = np.random.default_rng(seed)
    ids, objective = caption_ids(n, rng), Flm(FlmConfig(corruption_rate=0.5))
    (example,) = objective.corrupt(ids, rng)
    for name, part in zip(objective.parts, range(4), strict=True):
        targets = example.target_ids[example.target_parts == part]
        expected = ids[-1:] if name == "eos" else ids[1:-1]
        assert sorted(targets) == sorted(expected)


def test_the_pooled_query_reads_both_streams_whole() -> None:
    ids = caption_ids(5, np.random.default_rng(0))
    example = Flm(FlmConfig()).whole(ids)
    assert (example.span_first, example.span_last) == (len(ids), -1)
    assert example.pooled_row == 2 * len(ids)
