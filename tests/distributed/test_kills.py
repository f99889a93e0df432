"""A run killed at each place of a save goes on to the bit. tests/distributed/soak.py does it on all layouts, and at any moment."""

from pathlib import Path
from random import Random

import pytest

from flm_scale.data.shards import Dataset
from tests.distributed.kills import BY_ANY_RANK, PLACES, Kill, Layout, Reference, trial, whole_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LAYOUTS = {Layout(1, 1, 2, zero=1): PLACES, Layout(2, 1, 1, zero=3): ("between shard files",)}


@pytest.fixture(scope="module")
def references(toy_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Reference]:
    return {layout: whole_run(toy_dataset.folder, tmp_path_factory.mktemp("whole") / "run", layout) for layout in LAYOUTS}


@pytest.mark.parametrize(("layout", "place"), [(layout, place) for layout, places in LAYOUTS.items() for place in places], ids=str)
def test_a_run_that_is_killed_goes_on_to_the_bit(references: dict[Layout, Reference], toy_dataset: Dataset, tmp_path: Path, layout: Layout,
                                                 place: str) -> None:
    """One rank here; at every second place all at once."""
    number = PLACES.index(place)
    kill = Kill(place, step=6, rank=1 if place in BY_ANY_RANK else 0, everybody=number % 4 < 2)
    outcome = trial(toy_dataset.folder, tmp_path, layout, references[layout], kills=[kill], chance=Random(number))
    assert outcome.problem == ""
    assert outcome.places == [place]
