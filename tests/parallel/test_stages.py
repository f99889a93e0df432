"""Stages are cut as evenly as brute force can."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flm_scale.errors import ConfigError
from flm_scale.parallel.stages import cut


def largest(costs: list[float], boundaries: list[int]) -> float:
    return max(sum(costs[first:last]) for first, last in pairwise(boundaries))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.data())
def test_no_cut_has_a_cheaper_dearest_stage_and_none_is_empty(costs: list[float], data: st.DataObject) -> None:
    num_stages = data.draw(st.integers(1, len(costs)))
    boundaries = cut(costs, num_stages)
    assert len(boundaries) == num_stages + 1
    assert (boundaries[0], boundaries[-1]) == (0, len(costs))
    assert all(first < last for first, last in pairwise(boundaries))
    every = [[0, *inner, len(costs)] for inner in combinations(range(1, len(costs)), num_stages - 1)]
    best = min(largest(costs, other) for other in every)
    assert largest(costs, boundaries) == best
    assert boundaries == min(other for other in every if largest(costs, other) == best), "of equal cuts the shortest first stages"


def test_fractions_are_cut_without_a_rounding_error_that_leaves_no_way() -> None:
    costs = [0.1] * 30 + [1 / 3] * 11
    assert largest(costs, cut(costs, 7)) == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("num_stages", [0, 4])
def test_more_stages_than_layers_are_refused(num_stages: int) -> None:
    with pytest.raises(ConfigError, match=rf"parallel.pipe \({num_stages}\) must be from 1 to the model's number of layers \(3\)"):
        cut([1, 2, 3], num_stages)
