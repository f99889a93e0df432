"""What the formula says is kept for the backward pass, against what autograd keeps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flm_scale.batch import State
from flm_scale.config import Run, TextConfig
from flm_scale.config_lm import BridgeConfig, DropConfig, LanguageModelConfig, MergeConfig, NoReducerConfig, PoolConfig, Reducer, UnshuffleConfig
from flm_scale.config_vision import SmallVisionConfig
from flm_scale.model.assemble import build_model
from flm_scale.model.parts import TARGETS_PER_CHUNK
from flm_scale.observe.cost import BatchShapes, vision_shape
from flm_scale.observe.footprint import footprints
from tests.synthetic import OBJECTIVES, objective_of, random_batch, tiny_language_run, tiny_run


def small_run(objective: str = "flm", *, trainable: bool = True, merged: tuple[int, ...] = (), **changes: object) -> Run:
    """Wide enough that what the formula leaves out is little: two numbers a norm's row, one an attention row, and integers."""
    vision = SmallVisionConfig(image_size=32, patch_size=8, width=192, layers=3, heads=4, trainable=trainable, merged=merged)
    return tiny_run(objective, vision=vision,
                    text=TextConfig(width=256, heads=4, bottom_layers=2, fusion_layers=2, reconstructor_bottom_layers=1,
                                    reconstructor_fusion_layers=1, vocab_size=60, max_length=16)).replace(**changes)


def bytes_kept(layers: nn.ModuleDict, state: State) -> dict[str, int]:
    """Run the layers and return the bytes of memory that autograd begins to keep in each, integers left out."""
    seen = {weight.untyped_storage().data_ptr() for weight in layers.parameters()}
    kept = dict.fromkeys(layers, 0)
    graph = []
    for name, layer in layers.items():
        def keep(tensor: torch.Tensor, name: str = name) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen and tensor.is_floating_point():
                seen.add(storage.data_ptr())
                kept[name] += storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            state = layer(state)
        graph.append(state)  # or memory would be used again under the same address
    return kept


@pytest.mark.parametrize("changes", [{}, {"norm": "post"}, {"precision": "bf16"}, {"trainable": False}, {"merged": (5,)}],
                         ids=["fp32", "post", "bf16", "frozen", "merged"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_kept_bytes_are_autograds_layer_by_layer(objective: str, changes: dict) -> None:
    norm, changes = changes.get("norm", "pre"), {key: value for key, value in changes.items() if key != "norm"}
    run = small_run(objective, **changes)
    run = run.replace(text=run.text.replace(norm=norm))
    layers = build_model(run, objective_of(run)).layers.to(torch.bfloat16 if run.precision == "bf16" else torch.float32)
    state = random_batch(run.replace(vision=run.vision), seed=3).state
    state = state._replace(rows=torch.randint(256, (len(state.rows), 3, 32, 32), dtype=torch.uint8))
    kept = bytes_kept(layers, state)
    expected = footprints(run, BatchShapes.of(state), vision_shape(run.vision), longest=state.slots.shape[1])
    assert list(expected) == list(kept)
    # The decoder keeps its last chunk by itself, out of autograd's sight.
    kept["head"] += 4 * min(len(state.target_rows), TARGETS_PER_CHUNK) * 60
    for name, found in kept.items():
        assert expected[name].saved == pytest.approx(found, rel=0.06, abs=3000), name
    assert sum(layer.saved for layer in expected.values()) == pytest.approx(sum(kept.values()), rel=0.03)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bytes_summed_over_the_tensor_group_come_out_of_row_linears_and_back_into_column_linears(objective: str) -> None:
    run = small_run(objective)
    state = random_batch(run, seed=3).state
    state = state._replace(rows=torch.randint(256, (len(state.rows), 3, 32, 32), dtype=torch.uint8))
    layers = build_model(run, objective_of(run)).layers
    summed = dict.fromkeys(layers, 0)
    for name, module in layers.named_modules():
        layer, kind = name.split(".")[0], name.split(".")[-1]
        if layer.startswith("vision_"):
            continue
        if kind in {"out", "down", "tokens"}:
            module.register_forward_hook(lambda _, __, out, layer=layer: summed.update({layer: summed[layer] + out.nbytes}))
        elif kind in {"qkv", "up", "query", "key_value", "decoder"} and name != "text_entry.query":
            module.register_forward_pre_hook(lambda _, rows, layer=layer: summed.update({layer: summed[layer] + rows[0].nbytes}))
    bytes_kept(layers, state)
    expected = footprints(run, BatchShapes.of(state), vision_shape(run.vision), longest=state.slots.shape[1])
    assert {name: layer.reduced for name, layer in expected.items()} == summed


@pytest.mark.parametrize("merged", [(), (5,)])
def test_rows_handed_on_are_those_of_the_model(merged: tuple[int, ...]) -> None:
    run = small_run(merged=merged)
    state = random_batch(run, seed=3).state
    state = state._replace(rows=torch.randint(256, (len(state.rows), 3, 32, 32), dtype=torch.uint8))
    expected = footprints(run, BatchShapes.of(state), vision_shape(run.vision), longest=state.slots.shape[1])
    for name, layer in build_model(run, objective_of(run)).layers.items():
        if name != "head":
            state = layer(state)
            assert expected[name].leaving == state.rows.nbytes, name


WIDE = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 192,
        "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 80}
GATED = {"intermediate_size": 512, "num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {}, "opt": {"ffn_dim": 768, "word_embed_proj_dim": 192}, "llama": GATED, "qwen2": GATED, "qwen3": GATED | {"head_dim": 64}}


def write_model(family: str, folder: Path) -> Path:
    """Save a language model wide enough that what the formula leaves out is little."""
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **WIDE | MODELS[family])).save_pretrained(folder)
    return folder


MERGE = MergeConfig(merged=(3,))


def language_run(folder: Path, *, reducer: Reducer = MERGE, **changes: Any) -> Run:
    return tiny_language_run(folder).replace(
        vision=SmallVisionConfig(image_size=32, patch_size=8, width=192, layers=3, heads=4, trainable=False),
        text=LanguageModelConfig(name=str(folder), max_length=16, bridge=BridgeConfig(width=256, heads=4, layers=2, reducer=reducer)), **changes)


def kept_by_language_run(run: Run, layers: nn.ModuleDict) -> tuple[dict[str, int], State]:
    """Train mode and state of the run, then bytes_kept."""
    state = random_batch(run, seed=3).state
    state = state._replace(rows=torch.randint(256, (len(state.rows), 3, 32, 32), dtype=torch.uint8))
    return bytes_kept(layers.to(torch.bfloat16 if run.precision == "bf16" else torch.float32), state), state


@pytest.mark.parametrize(("family", "precision", "reducer"), [
    *((family, "fp32", MERGE) for family in MODELS), ("llama", "bf16", MERGE), ("opt", "bf16", DropConfig(kept=3)),
    ("opt", "fp32", PoolConfig(rows=2, columns=2)), ("opt", "fp32", UnshuffleConfig()), ("opt", "fp32", NoReducerConfig())])
def test_kept_bytes_around_a_frozen_language_model_are_autograds(tmp_path: Path, family: str, precision: Any, reducer: Reducer) -> None:
    """Of the frozen tower nothing, of the frozen linears nothing."""
    run = language_run(write_model(family, tmp_path / "model"), reducer=reducer, precision=precision)
    kept, state = kept_by_language_run(run, build_model(run, objective_of(run)).layers)
    expected = footprints(run, BatchShapes.of(state), vision_shape(run.vision), longest=state.slots.shape[1])
    assert list(expected) == list(kept)
    assert not any(kept[name] for name in kept if name.startswith("vision_"))
    for name, found in kept.items():
        assert expected[name].saved == pytest.approx(found, rel=0.06, abs=3000), name


def test_a_language_model_that_does_not_learn_keeps_no_input_of_a_linear(tmp_path: Path) -> None:
    """What it would keep beside that, if it learned: the inputs of seven linears a layer, less those that attention keeps anyway."""
    run = language_run(write_model("llama", tmp_path / "model"))
    layers = build_model(run, objective_of(run)).layers
    frozen, state = kept_by_language_run(run, layers)
    layers["head"].lm.requires_grad_(True)
    learning, _ = kept_by_language_run(run, layers)
    rows = state.slots.numel() + len(state.slots) * 11  # 17 image rows, 14, 11
    inputs_of_linears = 4 * 3 * rows * (2 * 192 + 512)  # behind both norms, and in front of the MLP's last
    assert learning["head"] - frozen["head"] >= inputs_of_linears
    assert {name: size for name, size in learning.items() if name != "head"} == {name: size for name, size in frozen.items() if name != "head"}


def test_recomputing_leaves_what_comes_into_each_layer_of_the_language_model(tmp_path: Path) -> None:
    run = language_run(write_model("llama", tmp_path / "model"), recompute=True)
    kept, state = kept_by_language_run(run, build_model(run, objective_of(run)).layers)
    expected = footprints(run, BatchShapes.of(state), vision_shape(run.vision), longest=state.slots.shape[1])
    assert expected["head"].saved == pytest.approx(kept["head"], rel=0.06)
