"""MLM, AR, PrefixLM and captioning: what is hidden, what is predicted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_scale.config import MlmConfig, PrefixLmConfig
from flm_scale.objectives.ar import Ar
from flm_scale.objectives.captioning import Answering, Captioning
from flm_scale.objectives.mlm import Mlm
from flm_scale.objectives.prefix_lm import PrefixLm
from tests.synthetic import MASK_ID, caption_ids


@given(n=st.integers(1, 30), rate=st.sampled_from([0.15, 0.4, 1.0]), seed=st.integers(0, 1000))
@settings(max_examples=100)
def test_mlm_hides_exactly_the_rounded_share_and_predicts_just_that(n: int, rate: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = caption_ids(n, rng)
    (example,) = Mlm(MlmConfig(mask_rate=rate), mask_id=MASK_ID).corrupt(ids, rng)
    hidden = np.flatnonzero(example.ids == MASK_ID)
    assert len(hidden) == max(1, round(rate * n))
    assert (example.target_rows == hidden).all()
    assert (example.target_ids == ids[hidden]).all()
    assert (example.ids[[0, -1]] == ids[[0, -1]]).all()


@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_mlm_hides_every_position_equally_often(rate: float) -> None:
    n, draws = 12, 8000
    rng = np.random.default_rng(0)
    ids, objective = caption_ids(n, rng), Mlm(MlmConfig(mask_rate=rate), mask_id=MASK_ID)
    share = np.mean([objective.corrupt(ids, rng)[0].ids[1:-1] == MASK_ID for _ in range(draws)], axis=0)
    expected = round(rate * n) / n
    assert np.abs(share - expected).max() < 4 * np.sqrt(expected * (1 - expected) / draws)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_a_lower_prediction_rate_keeps_the_corruption(share: float) -> None:
    """Fig. 1a of the FLM paper turns one knob and holds the other."""
    rng = np.random.default_rng(0)
    ids, objective = caption_ids(15, rng), Mlm(MlmConfig(mask_rate=0.4, predicted_share=share), mask_id=MASK_ID)
    examples = [objective.corrupt(ids, rng)[0] for _ in range(4000)]
    assert {int((example.ids == MASK_ID).sum()) for example in examples} == {6}
    assert np.mean([len(example.target_ids) for example in examples]) == pytest.approx(share * 6, abs=0.05)


@given(n=st.integers(1, 20), passes=st.integers(1, 6), seed=st.integers(0, 1000))
@settings(max_examples=100)
def test_passes_share_out_the_hidden_tokens_and_each_hides_only_its_own(n: int, passes: int, seed: int) -> None:
    ids = caption_ids(n, np.random.default_rng(seed))
    whole = Mlm(MlmConfig(mask_rate=0.6), mask_id=MASK_ID).corrupt(ids, np.random.default_rng(seed))[0]
    objective = Mlm(MlmConfig(mask_rate=0.6, passes=passes), mask_id=MASK_ID)
    views = objective.corrupt(ids, np.random.default_rng(seed))
    assert len(views) == objective.num_views(len(ids))
    for view in views:
        assert (np.flatnonzero(view.ids == MASK_ID) == view.target_rows).all()
    assert sorted(np.concatenate([view.target_rows for view in views])) == sorted(whole.target_rows)


@given(n=st.integers(1, 20), rate=st.floats(0.01, 1))
@settings(max_examples=100)
def test_prefix_lm_predicts_the_last_tokens_and_eos_from_a_prefix_that_sees_itself(n: int, rate: float) -> None:
    rng = np.random.default_rng(0)
    ids = caption_ids(n, rng)
    (example,) = PrefixLm(PrefixLmConfig(target_rate=rate)).corrupt(ids, rng)
    num_targets = max(1, round(rate * n))
    prefix = 1 + n - num_targets
    assert (example.target_ids == ids[prefix:]).all()
    assert (example.last[0][:prefix] == prefix - 1).all()
    assert (example.last[0][prefix:] == np.arange(prefix, n + 2)).all()


def test_ar_predicts_every_token_and_eos_from_its_left() -> None:
    ids = caption_ids(7, np.random.default_rng(0))
    (example,) = Ar().corrupt(ids, np.random.default_rng(0))
    assert (example.target_ids == ids[1:]).all()
    assert (example.last[0] == np.arange(9)).all()


@given(n=st.integers(1, 20), prompt=st.lists(st.integers(5, 50), max_size=6))
@settings(max_examples=50)
def test_captioning_reads_the_prompt_behind_the_first_token_and_predicts_the_caption_alone(n: int, prompt: list[int]) -> None:
    rng = np.random.default_rng(0)
    ids, objective = caption_ids(n, rng), Captioning(np.array(prompt, np.int32))
    (example,) = objective.corrupt(ids, rng)
    assert example.ids.tolist() == [ids[0], *prompt, *ids[1:]]
    assert example.length == len(ids) + objective.num_added
    assert (example.target_ids == ids[1:]).all()
    assert (example.ids[example.target_rows + 1] == example.target_ids).all()
    assert (example.last[0] == np.arange(example.length)).all()
    assert objective.whole(ids).pooled_row == example.length - 1


@given(n=st.integers(1, 20), num_read=st.integers(1, 20))
@settings(max_examples=50)
def test_answering_reads_the_question_and_predicts_the_answer_alone(n: int, num_read: int) -> None:
    rng = np.random.default_rng(0)
    ids = caption_ids(n, rng)
    num_read = min(num_read, n + 1)
    (example,) = Answering().corrupt(np.append(ids, num_read), rng)
    assert (example.ids == ids).all()
    assert (example.target_ids == ids[num_read:]).all()
    assert (example.ids[example.target_rows + 1] == example.target_ids).all()
    assert [Answering.parts[part] for part in example.target_parts] == ["forward"] * (n + 1 - num_read) + ["eos"]
    assert Answering().whole(np.append(ids, num_read)).pooled_row == example.length - 1


def test_likelihood_views_score_every_content_token_once() -> None:
    ids = caption_ids(6, np.random.default_rng(0))
    masked = Mlm(MlmConfig(), mask_id=MASK_ID).likelihood(ids)
    assert sorted(np.concatenate([view.target_ids for view in masked])) == sorted(ids[1:-1])
    for objective in (Ar(), PrefixLm(PrefixLmConfig())):
        (view,) = objective.likelihood(ids)
        assert (view.target_ids == ids[1:]).all()
