"""Clips in the tower: frames see each other as published, begin as if they did not, and the rest of the model sees one image."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flm_scale.batch import State
from flm_scale.checkpoint.store import last_good
from flm_scale.checkpoint.weights import StartingWeights
from flm_scale.config import OpenClipVisionConfig, Run, SmallVisionConfig
from flm_scale.config_vision import TemporalConfig
from flm_scale.errors import CheckpointError, ConfigError
from flm_scale.model.assemble import VisionLanguageModel, assemble, build_model, layer_builders
from flm_scale.model.outline import outline
from flm_scale.model.parts import PlainParts
from flm_scale.model.temporal import TemporalAttention
from flm_scale.model.vision import build_vision, halves_of
from flm_scale.observe.cost import BatchShapes, forward_flops, temporal_flops, training_flops, vision_flops, vision_shape
from flm_scale.observe.footprint import footprints
from flm_scale.plan import open_model
from tests.language import write_language_model
from tests.observe.test_footprint import bytes_kept
from tests.synthetic import objective_of, random_batch, tiny_language_run, tiny_run, write_weights

FRAMES = 3


def clip_run(*, trainable: bool = True, position: bool = False, width: int = 32, **changes: Any) -> Run:
    vision = SmallVisionConfig(image_size=16, patch_size=8, width=width, layers=2, heads=2, output="final", frames=FRAMES, trainable=trainable,
                               temporal=TemporalConfig(width=16, heads=4, position=position))
    return tiny_run("ar", vision=vision, **changes)


def clip_state(run: Run) -> State:
    state = random_batch(run, seed=1).state
    side = run.vision.image_size
    return state._replace(rows=torch.randint(256, (len(state.rows), FRAMES, 3, side, side), dtype=torch.uint8))


def features(model: VisionLanguageModel, state: State) -> Tensor:
    """Rows [N*I, width] as they come out of the tower's last block."""
    for name, layer in model.layers.items():
        if name.startswith("vision_") and name != "vision_exit":
            state = layer(state)
    return state.rows


def temporal_modules(model: VisionLanguageModel) -> Iterator[TemporalAttention]:
    return (module for module in model.modules() if isinstance(module, TemporalAttention))


def wake(model: VisionLanguageModel) -> VisionLanguageModel:
    """Let frames see each other, and their positions differ."""
    with torch.no_grad():
        for module in temporal_modules(model):
            module.alpha.fill_(0.7)
            if module.position_embedding is not None:
                module.position_embedding.normal_(generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("position", [False, True])
def test_a_clips_rows_begin_as_the_mean_of_its_frames_of_a_tower_of_pictures(position: bool) -> None:
    run = clip_run(position=position)
    state = clip_state(run)
    pictures = run.replace(vision=run.vision.replace(frames=1))
    tower = build_model(pictures, objective_of(run))  # initial weights go by name
    single = torch.stack([features(tower, state._replace(rows=state.rows[:, frame])) for frame in range(FRAMES)])
    torch.testing.assert_close(features(build_model(run, objective_of(run)), state), single.mean(0), rtol=1e-5, atol=1e-6)
    assert len(single[0]) == len(state.image_slots) * 5


def test_attention_over_frames_is_the_published_one_place_by_place() -> None:
    """Against a loop, in float64: no norm, values the rows themselves, the scale of the whole width, heads."""
    clips, tokens, width, config = 2, 5, 24, TemporalConfig(width=12, heads=3, position=True)
    torch.manual_seed(0)
    attention = TemporalAttention(config, width=width, frames=FRAMES).double()
    nn.init.normal_(attention.position_embedding)
    nn.init.constant_(attention.alpha, 0.3)
    x = torch.randn(clips * FRAMES, tokens, width, dtype=torch.float64)
    expected = x.clone()
    for clip, token, head in product(range(clips), range(tokens), range(config.heads)):
        rows = x[clip * FRAMES:(clip + 1) * FRAMES, token]
        q, k = (linear(rows + attention.position_embedding)[:, 4 * head:4 * head + 4] for linear in (attention.query, attention.key))
        own = slice(8 * head, 8 * head + 8)
        for frame in range(FRAMES):
            weights = torch.softmax(torch.stack([q[frame] @ k[other] for other in range(FRAMES)]) / 12 ** 0.5, 0)
            expected[clip * FRAMES + frame, token, own] += 0.3 * sum(weights[other] * rows[other, own] for other in range(FRAMES))
    torch.testing.assert_close(attention(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("position", [False, True])
def test_the_order_of_frames_matters_only_where_they_have_positions(position: bool) -> None:
    run = clip_run(position=position)
    model, state = wake(build_model(run, objective_of(run))).double(), clip_state(run)
    forward, backward = (features(model, state._replace(rows=state.rows.flip(1) if turned else state.rows)) for turned in (False, True))
    assert torch.allclose(forward, backward, rtol=1e-10, atol=1e-10) != position


@pytest.mark.parametrize("trainable", [True, False])
def test_gradients_reach_what_sees_frames_in_a_frozen_tower_too(trainable: bool) -> None:
    """alpha moves first: while it is 0, queries, keys and positions make no difference."""
    run = clip_run(trainable=trainable, position=True)
    model, state = build_model(run, objective_of(run)), clip_state(run)

    def reached() -> set[str]:
        model.zero_grad()
        model(state)[0].sum().backward()
        return {name for name, weight in model.layers.named_parameters() if weight.grad is not None and weight.grad.any()}

    temporal = {name for name, _ in model.layers.named_parameters() if ".temporal." in name}
    assert len(temporal) == 12
    assert {name for name in reached() if ".temporal." in name} == {"vision_0.temporal.alpha", "vision_1.temporal.alpha"}
    wake(model)
    # A key's bias adds the same to all frames.
    expected = {name for name in temporal if not name.endswith("key.bias")}
    tower = {name for name in reached() if name.startswith("vision_") and not name.startswith("vision_exit.")}
    assert {name for name in tower if ".temporal." in name} - {"vision_0.temporal.key.bias", "vision_1.temporal.key.bias"} == expected
    assert any(".block." in name for name in tower) == trainable


@pytest.mark.parametrize("trainable", [True, False])
def test_recomputation_changes_no_gradient(trainable: bool) -> None:
    run = clip_run(trainable=trainable)
    state, gradients = clip_state(run), []
    for recompute in (False, True):
        model = wake(build_model(run.replace(recompute=recompute), objective_of(run)))
        model(state)[0].sum().backward()
        gradients.append({name: weight.grad for name, weight in model.layers.named_parameters() if weight.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


def test_every_kind_of_block_is_opened_without_a_change_and_others_are_refused() -> None:
    from open_clip.transformer import ResidualAttentionBlock
    from timm.models.eva import EvaBlock
    from timm.models.vision_transformer import Block

    x = torch.randn(2, 5, 32)
    for block in (ResidualAttentionBlock(32, 2), ResidualAttentionBlock(32, 2, ls_init_value=0.1), Block(32, 2), Block(32, 2, init_values=0.1)):
        attend, transform = halves_of(block.eval())
        assert torch.equal(transform(attend(x)), block(x))
    with pytest.raises(ConfigError, match=r"^vision.frames: a tower of blocks of the kind EvaBlock cannot be opened"):
        halves_of(EvaBlock(32, 2))


def test_a_tower_that_cannot_see_clips_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="EvaBlock"), torch.device("meta"):
        build_vision(OpenClipVisionConfig(name="EVA02-B-16", frames=2), text_width=8)
    run = clip_run()
    with pytest.raises(ConfigError, match=r"vision.temporal.heads \(8\) must divide the tower's width \(36\)"):
        build_model(run.replace(vision=run.vision.replace(width=36, temporal=TemporalConfig(width=16, heads=8))), objective_of(run))
    with pytest.raises(ConfigError, match=r"vision.temporal.width \(20\) must be a multiple of vision.temporal.heads \(8\)"):
        TemporalConfig(width=20)


def test_flops_of_frames_match_torchs_counter_and_the_language_models_do_not_grow(tmp_path: Path) -> None:
    run = tiny_language_run(write_language_model(tmp_path / "model"), vision=clip_run().vision)
    state = clip_state(run)
    model = build_model(run, objective_of(run))
    with torch.no_grad(), FlopCounterMode(display=False, depth=10) as counter, sdpa_kernel(SDPBackend.MATH):
        model(state)
    counts = {name.split("layers.", 1)[-1]: sum(flops.values()) for name, flops in counter.get_flop_counts().items() if name.startswith("Vision")}
    vision = vision_shape(run.vision)
    assert sum(flops for name, flops in counts.items() if name.startswith("vision_") and "." not in name) == len(state.rows) * (
        vision_flops(vision) + temporal_flops(vision))
    assert sum(flops for name, flops in counts.items() if name.endswith(".temporal")) == len(state.rows) * temporal_flops(vision)
    forward = forward_flops(run, BatchShapes.of(state), vision, executed=True)
    pictures = run.replace(vision=run.vision.replace(frames=1))
    of_pictures = forward_flops(pictures, BatchShapes.of(state), vision_shape(pictures.vision), executed=True)
    assert {part for part in forward if forward[part] != of_pictures.get(part)} == {"vision", "temporal"}
    frozen = run.replace(vision=run.vision.replace(trainable=False))
    assert training_flops(run, forward) - training_flops(frozen, forward) == forward["vision"], "gradients pass through, none to its weights"


@pytest.mark.parametrize("trainable", [True, False])
def test_kept_bytes_of_clips_are_autograds(trainable: bool) -> None:
    run = clip_run(trainable=trainable, width=192)
    run = run.replace(vision=run.vision.replace(image_size=32))
    state = clip_state(run)
    layers = build_model(run, objective_of(run)).layers
    kept = bytes_kept(layers, state)
    expected = footprints(run, BatchShapes.of(state), vision_shape(run.vision), longest=state.slots.shape[1])
    for name in ("vision_entry", "vision_1", "vision_exit", *(["vision_0"] if trainable else [])):
        assert expected[name].saved == pytest.approx(kept[name], rel=0.06, abs=3000), name


def test_a_plan_knows_the_weights_and_sizes_of_clips() -> None:
    run = clip_run(position=True)
    objective = objective_of(run)
    real, planned = build_model(run, objective).layers, outline(run, objective)
    assert sum(weight.numel() for weight in planned.parameters()) == sum(weight.numel() for weight in real.parameters())
    assert open_model(run).vision == vision_shape(run.vision)


def test_a_run_on_clips_starts_from_one_on_pictures_and_says_what_it_took(tmp_path: Path) -> None:
    """Frames are new, and so is a tower's projection of another width; all the rest is the other run's."""
    run = clip_run()
    objective = objective_of(run)
    pictures = build_model(run.replace(vision=run.vision.replace(frames=1), text=run.text.replace(vocab_size=70)), objective)
    trained = {name: weight.detach() + 0.1 for name, weight in pictures.layers.named_parameters()}
    write_weights(tmp_path, trained, run)
    start = StartingWeights(last_good(tmp_path, full=True))
    layers = assemble(run, layer_builders(run, objective, PlainParts(), start=start)).layers
    fresh = dict(build_model(run, objective).layers.named_parameters())
    for name, weight in layers.named_parameters():
        taken = name in trained and trained[name].shape == weight.shape
        assert torch.equal(weight, trained[name] if taken else fresh[name]), name
    account = start.account(start.asked)
    assert {name for name, tensors in account.weights.items() if not tensors} == {
        "text_entry.tokens.weight", "head.decoder.weight", "head.decoder.bias", *(name for name in fresh if ".temporal." in name)}
    assert account.tensors["head.decoder.weight"].why == "another shape"
    with pytest.raises(CheckpointError, match="no weight of it has a name and shape"):
        start.account({"other": False})


def test_another_number_of_frames_than_the_run_states_is_noticed() -> None:
    run = clip_run()
    state = clip_state(run)
    with pytest.raises(AssertionError, match="as many frames"):
        features(build_model(run, objective_of(run)), state._replace(rows=state.rows[:, :2]))
