"""A bridge that starts from a BERT or RoBERTa made by transformers computes what that computes; the account tells what became of everything."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flm_scale.config_lm import BridgeConfig, MergeConfig, NoReducerConfig
from flm_scale.errors import ConfigError
from flm_scale.model.assemble import initial_values, run_layers
from flm_scale.model.bridge import bridge_layers
from flm_scale.model.parts import fill
from flm_scale.model.pretrained import PretrainedBridge
from tests.model.test_bridge import tower_state
from tests.model.test_pretrained import KINDS, sources  # noqa: F401 - a fixture


def config_of(folder: Path, **changes: Any) -> BridgeConfig:
    return BridgeConfig(**{"width": 32, "heads": 4, "layers": 2, "reducer": NoReducerConfig(), "pretrained": str(folder)} | changes)


def layers_of(config: BridgeConfig) -> tuple[nn.ModuleDict, PretrainedBridge]:
    builders = bridge_layers(config, tower_width=10, image_tokens=17, prefix_tokens=1, lm_width=14, seed=0)
    layers, bert = nn.ModuleDict({name: build() for name, build in builders.items()}), PretrainedBridge(config, num_tokens=17)
    for name, weight in layers.named_parameters():
        fill(weight, bert.over(name, initial_values(weight, name=name, seed=0)))
    return layers, bert


@pytest.mark.parametrize("kind", KINDS)
def test_a_bridge_that_starts_from_a_file_computes_what_transformers_computes(kind: str, sources: dict) -> None:  # noqa: F811
    """Its projected rows in the place of word vectors."""
    folder, theirs = sources[kind]
    layers, _ = layers_of(config_of(folder))
    state = tower_state(3)
    state = state._replace(rows=state.rows.float())
    entry = layers["bridge_entry"]
    with torch.no_grad():
        words = entry.projection(entry.tower_norm(state.rows)).unflatten(0, (3, -1))
        expected = getattr(theirs, kind)(inputs_embeds=words, output_hidden_states=True).hidden_states[2]
        rows = run_layers([layer for name, layer in layers.items() if name != "bridge_exit"], state, recompute=False).rows
    torch.testing.assert_close(rows.unflatten(0, (3, -1)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_account_of_a_bridge_names_every_tensor_and_every_weight(kind: str, sources: dict) -> None:  # noqa: F811
    layers, bert = layers_of(config_of(sources[kind][0], reducer=MergeConfig(merged=(3,))))
    account = bert.account([name for name, _ in layers.named_parameters()])
    assert account.tensors.keys() == bert.tensors.keys()
    assert {name for name, tensors in account.weights.items() if not tensors} == {
        f"{module}.{of}" for module in ("bridge_entry.tower_norm", "bridge_entry.projection", "bridge_exit.projection") for of in ("weight", "bias")}
    assert {fate.why for fate in account.tensors.values() if fate.fate == "left out"} <= {
        "layers from 2 on", "pooler", "next-sentence head", "head", "token table"}
    assert {name.split(".")[-2] for name, fate in account.tensors.items() if fate.fate == "resized"} == {
        "position_embeddings", "token_type_embeddings"}
    assert sum(fate.fate == "used" for fate in account.tensors.values()) == 2 * 16 + 2


def test_a_bridge_of_other_sizes_is_refused_with_all_of_them(sources: dict) -> None:  # noqa: F811
    config = config_of(sources["bert"][0], width=48, heads=6, layers=4)
    with pytest.raises(ConfigError, match=r"text.bridge.width \(48\) must be 32, text.bridge.heads \(6\) must be 4, text.bridge.layers \(4\) must be "
                                          r"at most 3, rows in front of the bridge's first layer \(257\) must be at most 30$"):
        PretrainedBridge(config, num_tokens=257)
