"""Merging inside the tower: declared lengths, nothing lost, the same wherever it is cut or recomputed, and a text that knows what rows stand for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from flm_scale.batch import State
from flm_scale.checkpoint.publish import export
from flm_scale.config import OpenClipVisionConfig, ParallelConfig, Run, SmallVisionConfig
from flm_scale.data.pack import pack
from flm_scale.errors import ConfigError
from flm_scale.model import layers, vision
from flm_scale.model.assemble import VisionLanguageModel, build_model
from flm_scale.model.generate import CachedDecoder, encode_images
from flm_scale.model.reducers import match, merge_decided
from flm_scale.model.vision import build_vision, named_sizes
from flm_scale.objectives.ar import causal_example
from flm_scale.observe.cost import BatchShapes, VisionShape, forward_flops, vision_flops, vision_shape
from tests.synthetic import (
    OBJECTIVES,
    caption_ids,
    objective_of,
    random_batch,
    random_examples,
    random_pixels,
    tiny_language_run,
    tiny_run,
    write_weights,
)

TOWER = SmallVisionConfig(image_size=16, patch_size=4, width=32, layers=3, heads=2, output="final")
"""4 x 4 patches behind a class token, three blocks."""
DEEPSPEED = ParallelConfig(engine="deepspeed")


def merging_run(kind: str = "flm", merged: tuple[int, ...] = (3,), **changes: Any) -> Run:
    """17 rows of an image become 14, 11 and 8."""
    return tiny_run(kind, vision=TOWER.replace(merged=merged)).replace(**changes)


def sharp_model(run: Run) -> VisionLanguageModel:
    """A random model in float64, but for its losses, whose text looks at images with opinions."""
    model = build_model(run, objective_of(run)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "image_attention" in name:
                parameter.mul_(4)
    return model


def run_tower(model: VisionLanguageModel, state: State) -> list[State]:
    """The state behind each of the tower's entries."""
    states = []
    for name, layer in model.layers.items():
        if name.startswith("vision_"):
            states.append(state := layer(state))
    return states


def loss_and_gradients(run: Run, batch_seed: int = 0) -> dict[str, Tensor]:
    model = build_model(run, objective_of(run))
    loss = model(random_batch(run, seed=batch_seed).state)[0]
    loss.sum().backward()
    return {"loss": loss.detach()} | {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def test_every_entry_has_the_rows_that_the_schedule_declares_and_no_patch_is_lost() -> None:
    """Behind the last block too, where the exit merges. Class token: row 0, never merged."""
    run = merging_run()
    state = random_batch(run, seed=0).state
    num_images = len(state.image_slots)
    states = run_tower(sharp_model(run), state)
    assert [len(one.rows) // num_images for one in states] == [17, 17, 14, 11, 8]
    assert vision_shape(run.vision).tokens == (17, 14, 11, 8)
    for one in states:
        assert one.sizes.sum(1).tolist() == [17] * num_images
        assert one.sizes[:, 0].tolist() == [1] * num_images
    assert states[-1].sizes.shape == (num_images, 8)
    assert int(states[-1].sizes.max()) > 2
    assert [one.merge_slots.shape[1] for one in states] == [0, 17, 14, 11, 0]


def test_size_weighted_sums_of_rows_are_conserved_and_the_class_token_stays_to_the_bit() -> None:
    run = merging_run()
    for before, num_tokens in zip(run_tower(sharp_model(run), random_batch(run, seed=0).state)[1:-1], (17, 14, 11), strict=True):
        after = merge_decided(before, num_tokens=num_tokens, merged_tokens=num_tokens - 3)
        rows, merged = before.rows.unflatten(0, (-1, num_tokens)), after.rows.unflatten(0, (-1, num_tokens - 3))
        torch.testing.assert_close((merged * after.sizes[..., None]).sum(1), (rows * before.sizes[..., None]).sum(1), rtol=1e-12, atol=1e-12)
        assert torch.equal(merged[:, 0], rows[:, 0])


@pytest.mark.parametrize("merged", [(0,), (0, 0, 0)])
def test_merging_nothing_is_no_merging_to_the_bit(merged: tuple[int, ...]) -> None:
    assert_same_bits(loss_and_gradients(merging_run(merged=merged)), loss_and_gradients(merging_run(merged=())))


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_batch_equals_its_images_one_by_one(kind: str) -> None:
    run, rng = merging_run(kind), np.random.default_rng(0)
    model, pixels = sharp_model(run), random_pixels(3, rng)
    examples = random_examples(objective_of(run), rng, captions_per_image=[1, 3, 2])
    with torch.no_grad():
        together = model(pack(examples, pixels))[0]
        alone = [model(pack([views], picture[None]))[0] for views, picture in zip(examples, pixels, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-6, atol=1e-6)


def test_a_recomputation_that_would_decide_otherwise_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU may at a near tie: every second look at a block's rows chooses other ones. torch alone would stop in front of it."""
    plain, looks = loss_and_gradients(merging_run()), []

    def fickle(metric: Tensor, sizes: Tensor, *, merged: int, protected: int) -> Tensor:
        looks.append(merged)
        return match(metric if len(looks) <= 3 else -metric.roll(1, dims=1), sizes, merged=merged, protected=protected)

    monkeypatch.setattr(vision, "match", fickle)
    with set_checkpoint_early_stop(False):
        again = loss_and_gradients(merging_run(recompute=True))
    assert len(looks) == 6
    assert_same_bits(plain, again)
    assert all(plain[name].count_nonzero() for name in plain if name.startswith("layers.vision_"))


def test_a_frozen_tower_merges_as_one_that_trains_and_gets_no_gradient() -> None:
    run = merging_run()
    frozen = loss_and_gradients(run.replace(vision=run.vision.replace(trainable=False)))
    assert torch.equal(frozen["loss"], loss_and_gradients(run)["loss"])
    assert {name.split(".")[1] for name in frozen if ".vision_" in name} == {"vision_exit"}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_an_image_of_equal_patches_says_the_same_to_the_text_merged_or_not(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the last block, where nothing but the text looks: sixteen equal rows beside the class token, or eleven that stand for sixteen."""
    state = random_batch(merging_run(kind), seed=0).state
    state = state._replace(rows=torch.full_like(state.rows, 200))

    def losses(merged: tuple[int, ...]) -> Tensor:
        model = sharp_model(merging_run(kind, merged))
        with torch.no_grad():
            model.layers["vision_entry"].positional_embedding.zero_()
            return model(state)[0]

    whole = losses(())
    torch.testing.assert_close(losses((0, 0, 5)), whole, rtol=1e-6, atol=1e-6)
    monkeypatch.setattr(layers, "log_sizes", lambda sizes: torch.zeros(len(sizes), 1, 1, sizes.shape[1]))
    assert (losses((0, 0, 5)) - whole).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["flm", "ar", "prefix_lm"])
def test_cached_steps_of_generation_equal_the_forward_stream_over_the_whole_prefix(kind: str) -> None:
    run, rng = merging_run(kind), np.random.default_rng(0)
    model, pixels = sharp_model(run), random_pixels(2, rng)
    captions = [caption_ids(6, rng) for _ in range(4)]
    images = encode_images(model, torch.from_numpy(pixels))
    assert images.rows.shape[:2] == images.sizes.shape == (2, 8)
    decoder = CachedDecoder(model, images, beams=2)
    with torch.no_grad():
        steps = torch.stack([decoder.step(torch.tensor([int(ids[t]) for ids in captions])) for t in range(7)], dim=1)
        for row, ids in enumerate(captions):
            whole = model.logits(pack([[causal_example(ids, ("forward", "eos"))]], pixels[row // 2][None]))
            torch.testing.assert_close(steps[row], whole, rtol=1e-9, atol=1e-9)


def test_flops_match_torchs_counter() -> None:
    """Matching and merging, which a block does around open_clip's own, do not count; they are little."""
    run = merging_run(merged=(5, 1, 2))
    run = run.replace(text=run.text.replace(width=48, reconstructor_bottom_layers=0, reconstructor_fusion_layers=0))
    state, model = random_batch(run, seed=0).state, build_model(run, objective_of(run))
    with torch.no_grad(), FlopCounterMode(display=False, depth=10) as counter, sdpa_kernel(SDPBackend.MATH):
        model(state)
    counted = {name.split("layers.", 1)[-1]: sum(flops.values()) for name, flops in counter.get_flop_counts().items()}
    formula = forward_flops(run, BatchShapes.of(state), vision_shape(run.vision), executed=True)
    assert vision_shape(run.vision).tokens == (17, 12, 11, 9)
    assert counted["vision_entry"] + sum(counted[f"vision_{i}.block"] for i in range(3)) == formula["vision"]
    assert counted["fusion_0.streams"] + counted["fusion_1.streams"] == formula["fusion"]
    assert counted["vision_exit.projection"] + counted["fusion_entry"] == formula["projections"]
    assert sum(formula.values()) == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize(("merged", "tokens", "gflop"), [(0, 325, 54.6), (8, 237, 46.7), (16, 149, 39.0), (24, 61, 31.4)])
def test_costs_are_those_calculated_for_a_vit_b_16_at_288_px(merged: int, tokens: int, gflop: float) -> None:
    """That calculation merges as the paper does, between attention and MLP, so in each of the 11 MLPs rows that go here go too late."""
    shape = VisionShape(width=768, layers_run=11, patch_size=16, image_size=288, block_weights=12 * 768 ** 2, merged=(merged,))
    assert shape.tokens[-1] == tokens
    assert (vision_flops(shape) - 11 * merged * 16 * 768 ** 2) / 1e9 == pytest.approx(gflop, abs=0.06)


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16-SigLIP", "EVA01-g-14"])
def test_open_clips_and_timms_towers_merge_down_to_what_can_no_longer_be_paired(name: str) -> None:
    """Nine patches, some of them behind a class token; on the meta device, where nothing is computed. A pair becomes one row, which stays."""
    sizes = named_sizes(name)
    config = OpenClipVisionConfig(name=name, image_size=3 * sizes["patch_size"], merged=(2,))
    with torch.device("meta"):
        nothing = torch.zeros(2, 0, dtype=torch.long)
        state = State(*(nothing for _ in State._fields))._replace(rows=torch.zeros(2, 3, config.image_size, config.image_size, dtype=torch.uint8))
        for layer in build_vision(config, text_width=32):
            state = layer(state)
    assert vision_shape(config, sizes).tokens[:5] == tuple(sizes["prefix_tokens"] + patches for patches in (9, 7, 5, 3, 2))
    assert state.rows.shape == (2 * (sizes["prefix_tokens"] + 1), 32)


@pytest.mark.parametrize(("refused", "message"), [
    (lambda _: build_vision(OpenClipVisionConfig(name="EVA02-B-16", merged=(8,)), text_width=32), r"vision.merged \(\(8,\)\) .* rotary positions"),
    (lambda _: build_vision(TOWER.replace(merged=(1, 2)), text_width=32), r"vision.merged \(2 numbers\) must be one number, or one for each of 3"),
    (lambda _: merging_run(merged=(-1,)), r"merged.0 \(-1\)"),
    (lambda _: merging_run(parallel=DEEPSPEED.replace(pipe=2)), "needs parallel.pipe 1"),
    (lambda _: merging_run(parallel=DEEPSPEED.replace(tensor=2, vision="shard_batch")), "parallel.vision 'replicated'"),
    (lambda folder: tiny_language_run(folder, vision=TOWER.replace(merged=(1,))), "merge in the bridge"),
    (lambda folder: export(folder, folder / "out"), "the exported code merges no rows"),
], ids=["rotary", "length", "negative", "pipe", "shard_batch", "language_model", "export"])
def test_what_it_does_not_go_with_is_refused_in_one_line(refused: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    write_weights(tmp_path, {}, merging_run())
    with torch.device("meta"), pytest.raises(ConfigError, match=message) as error:
        refused(tmp_path)
    assert "\n" not in str(error.value)


def test_the_layouts_that_remain_are_not_refused() -> None:
    for parallel in (DEEPSPEED.replace(zero=3), DEEPSPEED.replace(tensor=2)):
        assert merging_run(parallel=parallel).vision.merged == (3,)
