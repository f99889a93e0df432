"""What flows through training: the shapes that are stated are checked, and sums keep the parts of a loss apart."""

from dataclasses import make_dataclass

import pytest
import torch
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from flm_scale.batch import IGNORED, LossSums, Scores, State
from flm_scale.model.layers import gather_view
from tests.synthetic import OBJECTIVES, random_batch, tiny_run


def test_a_wrong_shape_is_refused() -> None:
    """torch would take these slots; that the suite does not shows that it runs with the annotations checked (pyproject.toml, addopts)."""
    rows, slots = torch.zeros(1, 3, 2), torch.zeros(4, dtype=torch.long)
    assert gather_view(rows, slots[None]).shape == (1, 1, 4, 2)
    with pytest.raises(TypeCheckError, match="slots"):
        gather_view(rows, slots)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_packed_state_has_the_shapes_that_its_fields_state(kind: str) -> None:
    """jaxtyping checks functions and dataclasses, and State is a named tuple."""
    stated = jaxtyped(make_dataclass("Stated", State.__annotations__.items()), typechecker=beartype)
    state = random_batch(tiny_run(kind), seed=0).state
    stated(*state)
    with pytest.raises(TypeCheckError, match="places"):
        stated(*state._replace(places=state.places[1:]))


def test_a_part_whose_loss_is_not_a_number_leaves_the_other_parts_alone() -> None:
    loss = torch.tensor([1.0, torch.nan, 2.0, 4.0, torch.nan], requires_grad=True)
    scores = Scores(loss, torch.tensor([True, True, False, True, True]))
    sums = LossSums.by_part(scores, torch.tensor([0, 1, 0, 2, IGNORED]), num_parts=4)
    assert sums.loss.tolist() == pytest.approx([3, torch.nan, 4, 0], nan_ok=True)
    assert sums.correct.tolist() == [1, 1, 1, 0]
    assert sums.count.tolist() == [2, 1, 1, 0]
    sums.loss[[0, 2]].sum().backward()
    assert loss.grad is not None
    assert loss.grad.tolist() == [1, 0, 1, 1, 0]
