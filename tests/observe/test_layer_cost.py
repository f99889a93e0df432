"""Costs by layer: their names are the model's, their sum is the sum by part, and the typical micro-batch is one that the packer could make."""

from itertools import pairwise

import numpy as np
import pytest

from flm_scale.config import BatchConfig, FlmConfig, MlmConfig, ParallelConfig, Run
from flm_scale.data.pack import pack
from flm_scale.errors import ConfigError
from flm_scale.model.assemble import build_model
from flm_scale.observe.cost import BatchShapes, forward_flops, training_flops, vision_shape
from flm_scale.observe.layer_cost import expected_shapes, layer_flops, rank_flops, stage_bounds, stage_costs, typical_pairs, typical_views
from flm_scale.parallel.stages import cut
from tests.synthetic import OBJECTIVES, objective_of, random_batch, random_pixels, tiny_run

MORE_OBJECTIVES = OBJECTIVES | {"mlm in passes": MlmConfig(mask_rate=0.6, passes=3), "flm drawn": FlmConfig(draw_rate=True)}


def run_with(objective: str, **changes: object) -> Run:
    return tiny_run(**changes).replace(objective=MORE_OBJECTIVES[objective])


@pytest.mark.parametrize("merged", [(), (1,)])
@pytest.mark.parametrize("objective", MORE_OBJECTIVES)
def test_layers_are_those_of_the_model_and_their_flops_add_up(objective: str, merged: tuple[int, ...]) -> None:
    run = run_with(objective)
    run = run.replace(vision=run.vision.replace(merged=merged))
    vision = vision_shape(run.vision)
    for shapes in (expected_shapes(run), BatchShapes.of(random_batch(run, seed=1).state)):
        flops = layer_flops(run, shapes, vision)
        assert list(flops) == list(build_model(run, objective_of(run)).layers)
        assert sum(flops.values()) == sum(forward_flops(run, shapes, vision).values())


@pytest.mark.parametrize("objective", MORE_OBJECTIVES)
def test_expected_shapes_are_those_of_a_packed_batch(objective: str) -> None:
    """Captions of the typical length, packed for real; only the views differ, which leave room for the longest caption."""
    run = run_with(objective, batch=BatchConfig(text_tokens=200, captions=24, images=10))
    expected, views = expected_shapes(run), typical_views(run)
    pairs = typical_pairs(run)
    images = [views * len(some) for some in np.array_split(np.arange(pairs), expected.num_images)]
    state = pack(images, random_pixels(len(images), np.random.default_rng(0)))
    packed = BatchShapes.of(state)
    for name in ("num_images", "num_streams", "text_tokens", "num_queries", "num_targets", "self_pairs", "query_pairs"):
        assert getattr(expected, name) == getattr(packed, name), name
    for name in ("view_self_pairs", "view_query_pairs", "view_image_rows"):
        assert getattr(expected, name) >= getattr(packed, name), name
    assert len(state.ids) <= run.batch.text_tokens
    assert len(state.lengths) <= run.batch.captions


@pytest.mark.parametrize("trainable", [True, False])
def test_costs_are_those_of_training(trainable: bool) -> None:
    run = tiny_run()
    run = run.replace(vision=run.vision.replace(trainable=trainable))
    vision = vision_shape(run.vision)
    assert sum(stage_costs(run, vision).values()) == training_flops(run, forward_flops(run, expected_shapes(run), vision))


def test_recomputing_costs_a_forward_pass_of_all_but_what_has_nothing_to_save() -> None:
    run = tiny_run(recompute=True)
    vision = vision_shape(run.vision)
    flops = layer_flops(run, expected_shapes(run), vision)
    extra = sum(stage_costs(run, vision).values()) - sum(stage_costs(run.replace(recompute=False), vision).values())
    assert extra == pytest.approx(sum(flops.values()) - flops["vision_entry"] - flops["head"])


def test_tensor_parallelism_splits_the_text_side_and_vision_only_when_asked() -> None:
    run = tiny_run(parallel=ParallelConfig(engine="deepspeed", tensor=4))
    shapes, vision = expected_shapes(run), vision_shape(run.vision)
    whole = layer_flops(run, shapes, vision)
    piece = rank_flops(run, shapes, vision)
    assert piece["bottom_0"] == whole["bottom_0"] / 4
    assert all(piece[name] == whole[name] for name in ("vision_0", "vision_exit", "fusion_entry"))
    assert whole["head"] / 4 < piece["head"] < whole["head"]
    shared = rank_flops(run.replace(parallel=run.parallel.replace(vision="shard_batch")), shapes, vision)
    assert shared["vision_0"] == whole["vision_0"] / 4


def test_stages_cut_by_cost_are_as_even_as_layers_allow() -> None:
    run = tiny_run()
    costs = list(stage_costs(run, vision_shape(run.vision)).values())
    boundaries = cut(costs, 3)
    sums = [sum(costs[first:last]) for first, last in pairwise(boundaries)]
    assert max(sums) <= sum(costs) / 3 + max(costs)


def test_a_frozen_tower_is_not_cut_off_from_what_trains() -> None:
    run = tiny_run(parallel=ParallelConfig(engine="deepspeed", pipe=3))
    vision, names = vision_shape(run.vision), list(build_model(run, objective_of(run)).layers)
    assert stage_bounds(run, vision) == cut(list(stage_costs(run, vision).values()), 3)
    frozen = run.replace(vision=run.vision.replace(trainable=False))
    bounds = stage_bounds(frozen, vision)
    assert bounds[1] > names.index("vision_exit")
    assert bounds[-1] == len(names)
    with pytest.raises(ConfigError, match="number of layers"):
        stage_bounds(frozen.replace(parallel=ParallelConfig(engine="deepspeed", pipe=len(names))), vision)
