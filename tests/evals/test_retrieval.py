"""Recall counts any hit, wrong candidates stand first among equals, and chance is that of a random order."""

import numpy as np
import pytest

from flm_scale.evals.retrieval import chance, recall

HITS = np.repeat(np.eye(12, dtype=bool), 2, axis=0)  # 24 pictures, 12 texts, two pictures a text


def test_recall_is_the_share_of_queries_whose_best_hit_ranks_high_enough() -> None:
    scores = np.zeros((2, 12))
    scores[0, :6], scores[1, :3] = np.arange(6, 0, -1), np.arange(3, 0, -1)
    hits = np.zeros((2, 12), bool)
    hits[0, 5] = hits[1, 0] = True
    assert recall(scores, hits) == {"R@1": 0.5, "R@5": 0.5, "R@10": 1.0}


def test_every_picture_with_the_same_caption_is_a_hit() -> None:
    scores = np.where(HITS, 1.0, 0.0)
    scores[1::2] = np.where(HITS[1::2], -5.0, 0.0)  # of each two pictures one is found, the other stands last
    assert recall(scores.T, HITS.T)["R@1"] == 1.0
    assert recall(scores, HITS)["R@1"] == 0.5


def test_a_scorer_that_gives_every_pair_the_same_score_finds_nothing() -> None:
    assert recall(np.zeros(HITS.shape), HITS)["R@1"] == 0.0


def test_chance_is_what_random_scores_reach() -> None:
    rng = np.random.default_rng(0)
    several = rng.random((40, 30)) < 0.2
    several[:, 0] = True
    drawn = np.mean([list(recall(rng.random(several.shape), several).values()) for _ in range(500)], axis=0)
    np.testing.assert_allclose(list(chance(several).values()), drawn, atol=0.01)
    assert chance(HITS)["R@1"] == pytest.approx(1 / 12)
