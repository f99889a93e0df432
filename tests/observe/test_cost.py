"""The FLOP count against torch's own counter on the real model, and against the published table."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flm_scale.batch import State
from flm_scale.config import ArConfig, FlmConfig, MlmConfig, Run, TextConfig
from flm_scale.config_lm import MergeConfig, NoReducerConfig, PoolConfig, UnshuffleConfig
from flm_scale.config_vision import OpenClipVisionConfig, SmallVisionConfig
from flm_scale.data.pack import pack
from flm_scale.model.assemble import build_model
from flm_scale.model.vision import build_vision, named_sizes
from flm_scale.objectives.objective import build_objective
from flm_scale.observe.cost import BatchShapes, VisionShape, forward_flops, training_flops, vision_flops, vision_shape
from tests.language import write_language_model
from tests.synthetic import objective_of, random_batch, tiny_language_run

SMALL_VISION = SmallVisionConfig(image_size=32, patch_size=8, width=48, layers=3, heads=4)
SMALL_TEXT = TextConfig(width=64, heads=4, bottom_layers=2, fusion_layers=2, reconstructor_bottom_layers=1, reconstructor_fusion_layers=2,
                        vocab_size=300, max_length=16)


def small_run(objective: FlmConfig | ArConfig | MlmConfig, vision: SmallVisionConfig = SMALL_VISION) -> Run:
    """Return a run whose part widths all differ."""
    return Run(name="small", objective=objective, vision=vision, text=SMALL_TEXT)


def counted_and_formula(run: Run, lengths: list[list[int]], *, executed: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Return FLOPs by part of one forward pass, by torch's counter and by the formula. lengths: of the captions of each image."""
    objective, rng = build_objective(run.objective, mask_id=4), np.random.default_rng(0)
    images = [[view for length in captions for view in objective.corrupt(rng.integers(5, 300, length), rng)] for captions in lengths]
    state = pack(images, rng.integers(0, 255, (len(images), 3, run.vision.image_size, run.vision.image_size), dtype=np.uint8))
    model = build_model(run, objective)
    with FlopCounterMode(display=False, depth=10) as counter, sdpa_kernel(SDPBackend.MATH):
        model(state)
    modules = {name.split("layers.", 1)[-1]: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}

    def total(prefix: str, suffix: str = "") -> float:
        return sum(float(flops) for name, flops in modules.items()
                   if name.startswith(prefix) and name.endswith(suffix) and name.count(".") == suffix.count("."))

    counted = {
        "vision": total("vision_") - total("vision_exit"), "bottom": total("bottom_", ".streams"), "fusion": total("fusion_", ".streams"),
        "reconstructor": total("bottom_", ".reconstructor") + total("fusion_", ".reconstructor"), "head": total("head"),
        "projections": total("vision_exit") + total("fusion_entry")}
    assert sum(counted.values()) == counter.get_total_flops(), "some part of the model is in no bucket of this test"
    return counted, forward_flops(run, BatchShapes.of(state), vision_shape(SMALL_VISION), executed=executed)


@pytest.mark.parametrize("objective", [FlmConfig(), ArConfig(), MlmConfig()], ids=["flm", "ar", "mlm"])
def test_model_flops_match_torchs_counter_part_by_part_when_no_place_is_empty(objective: FlmConfig | ArConfig | MlmConfig) -> None:
    """Captions of one length, equally many an image: the padded views hold nothing but real rows, so both counts must agree."""
    counted, formula = counted_and_formula(small_run(objective), [[9, 9], [9, 9], [9, 9]], executed=False)
    assert formula == pytest.approx(counted, rel=1e-9)
    assert (counted["reconstructor"] > 0) == isinstance(objective, FlmConfig)


def test_executed_flops_match_torchs_counter_on_uneven_captions() -> None:
    """The padded views compute empty places; counted as executed they agree, as model FLOPs they are fewer."""
    counted, executed = counted_and_formula(small_run(FlmConfig()), [[12, 4], [3], [7, 5, 6]], executed=True)
    _, useful = counted_and_formula(small_run(FlmConfig()), [[12, 4], [3], [7, 5, 6]], executed=False)
    assert executed == pytest.approx(counted, rel=1e-9)
    assert {part for part in useful if useful[part] < executed[part]} == {"bottom", "fusion", "reconstructor"}


# ViT, bottom, top, reconstructor, heads, total in GFLOP a pair: docs/flm.md, Cost.
PUBLISHED = {
    ("ar", 32): (13.4, 4.3, 6.2, 0.0, 3.9, 28.0), ("flm", 32): (13.4, 8.6, 12.5, 10.1, 11.8, 56.6),
    ("ar", 16): (54.6, 4.3, 9.9, 0.0, 3.9, 73.1), ("flm", 16): (54.6, 8.6, 19.8, 10.1, 11.8, 105.4),
}


@pytest.mark.parametrize(("kind", "patch_size"), PUBLISHED)
def test_formula_gives_the_published_table_at_padding_50(kind: str, patch_size: int) -> None:
    """The published code makes image keys and values once a stream; we make them once, so the second time is added here."""
    run = Run(name=kind, objective=FlmConfig() if kind == "flm" else ArConfig(), vision=OpenClipVisionConfig(image_size=288))
    vision = vision_shape(run.vision, {"width": 768, "layers": 12, "patch_size": patch_size})
    streams, queries = (2, 50) if kind == "flm" else (1, 0)
    flops = forward_flops(run, BatchShapes(
        num_images=1, num_captions=1, num_streams=streams, text_tokens=50, num_queries=queries, num_targets=50 * streams + queries, self_pairs=2500,
        query_pairs=50 * queries, view_self_pairs=2500, view_query_pairs=50 * queries, view_image_rows=50), vision)
    flops["fusion"] += (streams - 1) * run.text.fusion_layers * 4 * 768 ** 2 * vision.image_tokens
    parts = [flops["vision"], flops["bottom"], flops["fusion"], flops["reconstructor"], flops["head"], sum(flops.values())]
    assert [part / 1e9 for part in parts] == pytest.approx(PUBLISHED[kind, patch_size], abs=0.051)


@pytest.mark.parametrize(("name", "image_size", "published"), [("ViT-B-32", 224, 17.3), ("ViT-B-32", 288, 23.1), ("ViT-B-16", 288, 68.1)])
def test_formula_gives_the_published_cost_of_our_packed_layout(name: str, image_size: int, published: float) -> None:
    """Ten images with a caption of 11.3 tokens each, nothing computed on padding, image keys and values once: docs/flm.md, Cost."""
    run = Run(name="packed", vision=OpenClipVisionConfig(name=name, image_size=image_size))
    shapes = BatchShapes(num_images=10, num_captions=10, num_streams=2, text_tokens=113, num_queries=93, num_targets=10 * 29, self_pairs=1277,
                         query_pairs=1051, view_self_pairs=1440, view_query_pairs=1200, view_image_rows=120)
    flops = forward_flops(run, shapes, vision_shape(run.vision, named_sizes(name)))
    assert sum(flops.values()) / 10 / 1e9 == pytest.approx(published, abs=0.06)


def test_training_costs_three_forwards_but_a_frozen_tower_only_one() -> None:
    """A frozen tower has no backward pass; its projection still trains."""
    frozen = SmallVisionConfig(image_size=32, patch_size=8, width=48, layers=3, heads=4, trainable=False)
    _, forward = counted_and_formula(small_run(FlmConfig()), [[9]], executed=False)
    total = sum(forward.values())
    assert training_flops(small_run(FlmConfig()), forward) == pytest.approx(3 * total)
    assert training_flops(small_run(FlmConfig(), frozen), forward) == pytest.approx(3 * total - 2 * forward["vision"])


def test_penultimate_output_leaves_the_last_block_out() -> None:
    """The sizes say what is executed, not what the tower has."""
    named = {"width": 1664, "layers": 48, "patch_size": 14, "block_weights": 38338560, "prefix_tokens": 0}
    assert vision_shape(OpenClipVisionConfig(output="penultimate"), named) == VisionShape(1664, 47, 14, 224, 38338560, 0)
    assert vision_shape(SmallVisionConfig(output="final")) == VisionShape(128, 4, 8, 224, 12 * 128 ** 2)


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-bigG-14", "ViT-SO400M-14-SigLIP", "EVA01-g-14", "EVA02-B-16", "PE-Core-T-16-384"])
def test_flops_of_a_named_tower_match_torchs_counter(name: str) -> None:
    """Wider MLPs whose ratio is rounded, gated ones with three matrices, no class token: counted on the meta device, nothing is computed."""
    sizes = named_sizes(name)
    config = OpenClipVisionConfig(name=name, image_size=3 * sizes["patch_size"])
    with torch.device("meta"), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        layers = build_vision(config, text_width=32)
        nothing = torch.zeros(2, 0, dtype=torch.long)
        state = State(*(nothing for _ in State._fields))._replace(rows=torch.zeros(2, 3, config.image_size, config.image_size, dtype=torch.uint8))
        for layer in layers[:-1]:
            state = layer(state)
    shape = vision_shape(config, sizes)
    assert len(state.rows) == 2 * shape.image_tokens
    assert counter.get_total_flops() == 2 * vision_flops(shape)


@pytest.mark.parametrize("reducer", [MergeConfig(merged=(1,)), PoolConfig(rows=1, columns=2), UnshuffleConfig(), NoReducerConfig()],
                         ids=lambda one: one.kind)
def test_flops_of_a_bridge_and_a_language_model_match_torchs_counter(tmp_path: Path, reducer: Any) -> None:
    """As executed; matching and merging are left out of both."""
    run = tiny_language_run(write_language_model(tmp_path / "model"))
    run = run.replace(text=run.text.replace(bridge=run.text.bridge.replace(width=48, reducer=reducer)))
    batch = random_batch(run, seed=0)
    model = build_model(run, objective_of(run))
    with torch.no_grad(), FlopCounterMode(display=False, depth=10) as counter, sdpa_kernel(SDPBackend.MATH):
        model(batch.state)
    modules = {name.split("layers.", 1)[-1]: sum(counts.values()) for name, counts in counter.get_flop_counts().items() if name.startswith("Vision")}

    def total(*prefixes: str) -> float:
        return sum(float(flops) for name, flops in modules.items() if name.startswith(prefixes) and "." not in name)

    expected = forward_flops(run, BatchShapes.of(batch.state), vision_shape(run.vision), executed=True)
    assert total("vision_") == pytest.approx(expected["vision"])
    assert total("head") == pytest.approx(expected["language_model"] + expected["head"], rel=0.01), "rotary tables are left out"
    assert total("bridge_") == pytest.approx(expected["bridge"], rel=0.02 if reducer.kind in ("merge", "pool") else 1e-9)
    trained = training_flops(run, expected)
    assert trained == 3 * (expected["vision"] + expected["bridge"]) + 2 * (expected["language_model"] + expected["head"])
