"""The local engine: schedule, groups, clipping, precision, what it refuses; and golden losses of every objective."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from flm_scale.config import OptimConfig
from flm_scale.config_vision import SmallVisionConfig
from flm_scale.engine.base import lr_factor, parameter_groups
from flm_scale.engine.local import LocalEngine
from flm_scale.model.assemble import build_model
from flm_scale.model.frozen_lm import content_hash
from tests.language import write_language_model
from tests.synthetic import OBJECTIVES, objective_of, random_batch, tiny_language_run, tiny_run, weights_of

GOLDEN = Path(__file__).parents[1] / "golden"


def engine_of(run):
    objective = objective_of(run)
    return LocalEngine(run, build_model(run, objective), objective)


def curve(run, *, steps: int) -> list[float]:
    engine = engine_of(run)
    return [engine.train_step([random_batch(run, seed=100 * step + i) for i in range(2)], step=step).loss for step in range(steps)]


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_first_ten_losses_are_the_golden_ones(kind: str) -> None:
    """tools/golden.py writes them anew after a change of mathematics, which the commit then explains."""
    golden = json.loads((GOLDEN / "losses.json").read_text())[kind]
    assert curve(tiny_run(kind), steps=10) == pytest.approx(golden, rel=1e-5)


def test_two_runs_are_bit_identical() -> None:
    assert curve(tiny_run("flm"), steps=5) == curve(tiny_run("flm"), steps=5)


@pytest.mark.slow
def test_bf16_follows_fp32() -> None:
    exact, rounded = curve(tiny_run("flm"), steps=10), curve(tiny_run("flm", precision="bf16"), steps=10)
    assert rounded == pytest.approx(exact, rel=0.02)
    assert rounded != exact


def test_bf16_keeps_float32_masters() -> None:
    """A change too small for bf16 must not be lost."""
    run = tiny_run("flm", precision="bf16", optim=OptimConfig(kind="sgd", lr=1e-3, warmup_steps=0, schedule="constant"))
    engine = engine_of(run)
    before = weights_of(engine)
    for step in range(3):
        engine.train_step([random_batch(run, seed=step)], step=step)
    name = "fusion_0.streams.mlp.up.weight"
    assert engine.model.layers["fusion_0"].streams.mlp.up.weight.dtype == torch.bfloat16
    assert (weights_of(engine)[name] != before[name]).float().mean() > 0.9


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_frozen_language_model_has_no_gradient_and_no_moment_and_stays_as_it_is(tmp_path: Path, precision: str) -> None:
    run = tiny_language_run(write_language_model(tmp_path / "model"), precision=precision)
    engine = engine_of(run.replace(vision=run.vision.replace(trainable=False)))
    head, with_gradients = engine.layers["head"], []
    before = content_hash(head)
    engine.optimizer.register_step_pre_hook(lambda *_: with_gradients.append({id(one) for one in engine.masters if one.grad is not None}))
    for step in range(2):
        engine.train_step([random_batch(run, seed=step)], step=step)
    assert with_gradients == [{id(one) for one in engine.masters}] * 2, "all that learns has a gradient"
    assert not any(weight.grad is not None for name, weight in engine.layers.named_parameters() if not name.startswith("bridge_"))
    bridge = sum(weight.numel() for name, weight in engine.layers.named_parameters() if name.startswith("bridge_"))
    state = [value for of_one in engine.optimizer.state.values() for value in of_one.values() if value.ndim]
    assert sum(one.numel() for one in engine.masters) == bridge
    assert sum(value.numel() for value in state) == 2 * bridge
    assert content_hash(head) == before


def test_clipping_bounds_the_step_and_reports_the_norm_before() -> None:
    run = tiny_run("flm", optim=OptimConfig(kind="sgd", lr=1.0, warmup_steps=0, schedule="constant", clip_norm=0.1, weight_decay=0))
    engine = engine_of(run)
    before = weights_of(engine)
    result = engine.train_step([random_batch(run, seed=0)], step=0)
    moved = math.sqrt(sum(float((after - before[name]).square().sum()) for name, after in weights_of(engine).items()))
    assert result.grad_norm > 0.2
    assert moved == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_learning_rate_warms_up_and_decays_as_a_function_of_the_step(schedule: str) -> None:
    config = OptimConfig(schedule=schedule, warmup_steps=10)
    factors = [lr_factor(config, step=step, total_steps=110) for step in range(110)]
    assert factors[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert factors[10] == 1
    half, end = {"linear": (0.5, 0.01), "cosine": (0.5, 0.000247), "constant": (1, 1)}[schedule]
    assert factors[60] == pytest.approx(half)
    assert factors[-1] == pytest.approx(end, rel=0.01)


def test_a_schedule_may_end_above_zero() -> None:
    config = OptimConfig(schedule="cosine", warmup_steps=10, final_lr_share=0.1)
    assert [lr_factor(config, step=step, total_steps=110) for step in (9, 10, 60, 110)] == pytest.approx([1, 1, 0.55, 0.1])


def test_norms_biases_and_tables_are_not_decayed_and_pretrained_weights_learn_slower() -> None:
    run = tiny_run("flm")
    model = build_model(run, objective_of(run))
    model.pretrained = frozenset(name for name, _ in model.layers.named_parameters() if name.startswith("vision_0."))
    config = OptimConfig(lr=1.0, pretrained_lr_scale=0.2, weight_decay=0.1)
    place = {id(parameter): group for group in parameter_groups(model, config) for parameter in group["params"]}
    expected = {
        "fusion_0.streams.mlp.up.weight": (0.1, 1.0), "fusion_0.streams.mlp.up.bias": (0.0, 1.0), "fusion_0.streams.mlp_norm.weight": (0.0, 1.0),
        "text_entry.tokens.weight": (0.0, 1.0), "text_entry.positions.weight": (0.0, 1.0), "fusion_entry.kinds.weight": (0.0, 1.0),
        "vision_entry.class_embedding": (0.0, 1.0), "vision_entry.positional_embedding": (0.0, 1.0), "vision_exit.kind.weight": (0.0, 1.0),
        "vision_0.block.mlp.c_fc.weight": (0.1, 0.2), "vision_0.block.ln_1.weight": (0.0, 0.2), "head.decoder.weight": (0.1, 1.0),
        "fusion_0.streams.image_attention.query.weight": (0.1, 1.0)}
    parameters = dict(model.layers.named_parameters())
    assert len(place) == len(parameters)
    for name, (decay, lr) in expected.items():
        assert (place[id(parameters[name])]["weight_decay"], place[id(parameters[name])]["peak_lr"]) == (decay, lr), name


def test_a_frozen_tower_is_not_touched_and_its_projection_is() -> None:
    run = tiny_run("flm", vision=SmallVisionConfig(image_size=16, patch_size=8, width=32, layers=2, heads=2, output="final", trainable=False))
    engine = engine_of(run)
    before = weights_of(engine)
    engine.train_step([random_batch(run, seed=0)], step=0)
    changed = {name for name, after in weights_of(engine).items() if not torch.equal(after, before[name])}
    assert not {name for name in changed if name.startswith(("vision_entry", "vision_0", "vision_1", "vision_exit.norm"))}
    assert "vision_exit.projection.weight" in changed


def test_a_step_whose_loss_is_not_a_number_leaves_no_trace() -> None:
    run = tiny_run("flm")
    engine = engine_of(run)
    engine.train_step([random_batch(run, seed=0)], step=0)
    with torch.no_grad():
        engine.model.layers["head"].linear.bias.fill_(float("inf"))
    before = weights_of(engine)
    result = engine.train_step([random_batch(run, seed=1)], step=1)
    assert math.isnan(result.loss)
    assert not result.is_taken
    assert all(torch.equal(after, before[name]) for name, after in weights_of(engine).items())
    assert all(parameter.grad is None for parameter in engine.masters)


def test_a_step_whose_loss_is_not_wanted_leaves_no_trace() -> None:
    run = tiny_run("flm")
    twice, once = engine_of(run), engine_of(run)
    assert not twice.train_step([random_batch(run, seed=1)], step=0, takes=lambda loss: loss < 0).is_taken
    results = [engine.train_step([random_batch(run, seed=0)], step=1) for engine in (twice, once)]
    assert results[0].loss == results[1].loss
    assert all(torch.equal(left, right) for left, right in zip(weights_of(twice).values(), weights_of(once).values(), strict=True))


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    """Another depth or another objective leaves the weights that both models have as they were."""
    run = tiny_run("flm")
    deeper = tiny_run("ar", text=run.text.replace(fusion_layers=4, reconstructor_fusion_layers=0))
    left, right = (dict(build_model(r, objective_of(r)).layers.named_parameters()) for r in (run, deeper))
    common = [name for name in left.keys() & right.keys() if left[name].shape == right[name].shape]
    assert len(common) > 40
    assert all(torch.equal(left[name], right[name]) for name in common)
    other = dict(build_model(run.replace(seed=1), objective_of(run)).layers.named_parameters())
    assert not torch.equal(left["fusion_0.streams.mlp.up.weight"], other["fusion_0.streams.mlp.up.weight"])
