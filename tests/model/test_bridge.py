"""The bridge: BERT's layer when nothing merges, its declared lengths when rows do, and the same result wherever it is cut or recomputed."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from flm_scale.batch import State
from flm_scale.config_lm import BridgeConfig, DropConfig, MergeConfig, NoReducerConfig, PoolConfig, UnshuffleConfig
from flm_scale.config_vision import SmallVisionConfig
from flm_scale.data.pack import pack
from flm_scale.errors import ConfigError
from flm_scale.model import bridge
from flm_scale.model.assemble import initialize, is_table, run_layers
from flm_scale.model.bridge import BridgeAttention, bridge_layers
from flm_scale.model.reducers import match
from flm_scale.model.vision import build_vision
from tests.synthetic import objective_of, random_examples, random_pixels, tiny_run

TOWER_WIDTH, LM_WIDTH, IMAGE_TOKENS = 10, 14, 17
KINDS = {"merge": MergeConfig(merged=(3,)), "mean": MergeConfig(merged=(3,), weighted=False),
         "proportional": MergeConfig(merged=(3,), proportional=True), "pool": PoolConfig(rows=2, columns=3), "unshuffle": UnshuffleConfig(),
         "drop": DropConfig(kept=7), "none": NoReducerConfig()}


def tiny_bridge(reducer: object, *, layers: int = 4, image_tokens: int = IMAGE_TOKENS) -> dict[str, nn.Module]:
    """Pictures of 4 x 4 patches behind a class token; weights, norms and biases too, random by their names."""
    config = BridgeConfig(width=16, heads=2, layers=layers, reducer=reducer)
    builders = bridge_layers(config, tower_width=TOWER_WIDTH, image_tokens=image_tokens, prefix_tokens=1, lm_width=LM_WIDTH, seed=0)
    entries = {name: build().double() for name, build in builders.items()}
    generator = torch.Generator().manual_seed(0)
    for name, parameter in nn.ModuleDict(entries).named_parameters():
        initialize(parameter, name=name, seed=0)
        parameter.data += 0.1 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    return entries


def tower_state(num_images: int = 3, *, image_tokens: int = IMAGE_TOKENS) -> State:
    """A packed micro-batch as the tower leaves it."""
    rng, run = np.random.default_rng(0), tiny_run("ar")
    state = pack(random_examples(objective_of(run), rng, captions_per_image=[1] * num_images), random_pixels(num_images, rng))
    return state._replace(rows=torch.from_numpy(rng.standard_normal((num_images * image_tokens, TOWER_WIDTH))))


def assert_same_states(left: State, right: State) -> None:
    for name, one, other in zip(State._fields, left, right, strict=True):
        assert torch.equal(one, other), name


def loss_and_gradients(entries: dict[str, nn.Module], *, recompute: bool) -> dict[str, Tensor]:
    parameters = dict(nn.ModuleDict(entries).named_parameters())
    rows = run_layers(entries.values(), tower_state(), recompute=recompute).rows
    loss = (rows * torch.linspace(-1, 1, rows.numel()).view(rows.shape)).sum()
    return {"loss": loss.detach()} | dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def test_twelve_layers_turn_257_rows_into_29_two_entries_a_layer() -> None:
    entries = tiny_bridge(MergeConfig(), layers=12, image_tokens=257)
    assert list(entries) == ["bridge_entry", *(f"bridge_{i}_{half}" for i in range(12) for half in ("attention", "mlp")), "bridge_exit"]
    schedule = [257, 238, 219, 200, 181, 162, 143, 124, 105, 86, 67, 48, 29]
    state, lengths = tower_state(2, image_tokens=257), []
    for name, entry in entries.items():
        state = entry(state)
        lengths.append(len(state.rows) // 2)
        assert state.sizes.shape == (2, lengths[-1])
        assert state.sizes.sum(1).tolist() == [257, 257]
        assert state.merge_slots.shape == (2, lengths[-1] if name.endswith("_attention") else 0)
    assert lengths == [257, *(length for pair in pairwise(schedule) for length in pair), 29]
    assert state.rows.shape == (2 * 29, LM_WIDTH)


@pytest.mark.parametrize("kind", KINDS)
def test_every_reducer_gives_the_language_model_the_rows_that_it_declares(kind: str) -> None:
    state = run_layers(tiny_bridge(KINDS[kind]).values(), tower_state(), recompute=False)
    length = {"pool": 7, "unshuffle": 5, "drop": 8, "none": 17}.get(kind, 5)
    assert state.rows.shape == (3 * length, LM_WIDTH)
    assert state.sizes.shape == (3, 5 if isinstance(KINDS[kind], MergeConfig) else 0)


def test_a_layer_in_which_nothing_merges_is_berts() -> None:
    """torch's encoder layer, norms behind the sums, with the same weights."""
    entries = tiny_bridge(NoReducerConfig(), layers=1)
    attention, mlp = entries["bridge_0_attention"], entries["bridge_0_mlp"]
    theirs = nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, activation="gelu", batch_first=True, dtype=torch.float64)
    apart = {kind: getattr(attention.self_attention.qkv, kind).unflatten(0, (2, 3, 8)).transpose(0, 1).flatten(0, 2) for kind in ("weight", "bias")}
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(apart["weight"])
        theirs.self_attn.in_proj_bias.copy_(apart["bias"])
    for ours, own in ((attention.self_attention.out, theirs.self_attn.out_proj), (attention.self_norm, theirs.norm1), (mlp.mlp.up, theirs.linear1),
                      (mlp.mlp.down, theirs.linear2), (mlp.mlp_norm, theirs.norm2)):
        own.load_state_dict(ours.state_dict())
    state = entries["bridge_entry"](tower_state())
    torch.testing.assert_close(mlp(attention(state)).rows.unflatten(0, (3, -1)), theirs(state.rows.unflatten(0, (3, -1))), rtol=1e-12, atol=1e-12)


def test_with_proportional_attention_a_row_of_size_three_is_seen_as_three_rows() -> None:
    sizes = torch.tensor([[1, 3, 1, 2]])
    rows = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))

    def attended(rows: Tensor, sizes: Tensor, *, proportional: bool) -> Tensor:
        attention = BridgeAttention(width=16, heads=2, num_tokens=len(rows), merged=0, protected=1, proportional=proportional)
        for name, parameter in attention.named_parameters():
            initialize(parameter, name=name, seed=0)
            parameter.data *= 4
        result: Tensor = attention(tower_state(1)._replace(rows=rows, sizes=sizes)).rows
        return result

    apart = attended(rows[[0, 1, 1, 1, 2, 3, 3]], torch.ones(1, 7, dtype=torch.long), proportional=False)
    torch.testing.assert_close(attended(rows, sizes, proportional=True), apart[[0, 1, 4, 5]])
    assert not torch.allclose(attended(rows, sizes, proportional=False), apart[[0, 1, 4, 5]], atol=1e-3)


def test_protected_and_weighted_reach_the_layers() -> None:
    """The class token is never merged: it stays row 0 of size 1. The plain mean differs from the weighted one."""
    for kind in ("merge", "mean"):
        state = run_layers(tiny_bridge(KINDS[kind]).values(), tower_state(), recompute=False)
        assert state.sizes[:, 0].tolist() == [1, 1, 1]
        assert int(state.sizes.max()) > 2
    rows = [run_layers(tiny_bridge(KINDS[kind]).values(), tower_state(), recompute=False).rows for kind in ("merge", "mean", "proportional")]
    assert not torch.allclose(rows[0], rows[1], atol=1e-4)
    assert not torch.allclose(rows[0], rows[2], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_packed_between_any_two_entries_goes_on_the_same(kind: str) -> None:
    entries = tiny_bridge(KINDS[kind])
    whole = run_layers(entries.values(), tower_state(), recompute=False)
    cut = tower_state()
    for entry in entries.values():
        cut = State.unpack(*entry(cut).packed())
    assert_same_states(whole, cut)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_activations_change_no_bit_of_loss_and_gradients(kind: str) -> None:
    entries = tiny_bridge(KINDS[kind])
    plain, again = (loss_and_gradients(entries, recompute=recompute) for recompute in (False, True))
    assert plain.keys() == again.keys()
    for name, value in plain.items():
        assert torch.equal(value, again[name]), name
        assert value.count_nonzero() > 0, name


def test_a_recomputation_that_would_decide_otherwise_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU may at a near tie: every second look at a layer's keys chooses other rows. torch alone would stop in front of it."""
    entries = tiny_bridge(KINDS["merge"])
    plain = loss_and_gradients(entries, recompute=False)
    looks = []

    def fickle(metric: Tensor, sizes: Tensor, *, merged: int, protected: int) -> Tensor:
        looks.append(merged)
        return match(metric if len(looks) <= 4 else -metric.roll(1, dims=1), sizes, merged=merged, protected=protected)

    monkeypatch.setattr(bridge, "match", fickle)
    with set_checkpoint_early_stop(False):
        again = loss_and_gradients(entries, recompute=True)
    assert len(looks) == 8
    for name, value in plain.items():
        assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_its_images_one_by_one(kind: str) -> None:
    entries, state = tiny_bridge(KINDS[kind]), tower_state()
    together = run_layers(entries.values(), state, recompute=False).rows.unflatten(0, (3, -1))
    for image, rows in enumerate(state.rows.unflatten(0, (3, -1))):
        alone = run_layers(entries.values(), state._replace(rows=rows), recompute=False).rows
        torch.testing.assert_close(alone, together[image], rtol=1e-12, atol=1e-12)


def test_a_frozen_tower_gets_no_gradient_and_every_weight_of_the_bridge_does() -> None:
    """A real tower's entries, pixels in; its own exit, which is the text's, is left out."""
    config = SmallVisionConfig(image_size=32, patch_size=8, width=TOWER_WIDTH, layers=2, heads=2, trainable=False)
    tower = build_vision(config, text_width=1)[:-1]
    entries = tiny_bridge(KINDS["merge"])
    state = tower_state()._replace(rows=torch.from_numpy(random_pixels(3, np.random.default_rng(0), size=32)))
    state = run_layers([*tower, *(entry.float() for entry in entries.values())], state, recompute=True)
    assert state.rows.shape == (3 * 5, LM_WIDTH)
    state.rows.square().sum().backward()
    assert all(weight.grad is None for layer in tower for weight in layer.parameters())
    assert all(weight.grad.count_nonzero() for weight in nn.ModuleDict(entries).parameters())


def test_gradients_through_merging_layers_are_finite_differences() -> None:
    entries, state = tiny_bridge(MergeConfig(merged=(3,), proportional=True), layers=2), tower_state(1)
    assert torch.autograd.gradcheck(lambda rows: run_layers(entries.values(), state._replace(rows=rows), recompute=False).rows,
                                    state.rows.requires_grad_())


def test_positions_and_the_kind_are_tables_and_every_weight_has_random_or_neutral_initial_values() -> None:
    builders = bridge_layers(BridgeConfig(width=384, layers=1), tower_width=8, image_tokens=17, prefix_tokens=1, lm_width=12, seed=0)
    weights = dict(nn.ModuleDict({name: build() for name, build in builders.items()}).named_parameters())
    for name, weight in weights.items():
        initialize(weight, name=name, seed=0)
        assert is_table(name, weight) == (weight.ndim < 2 or name == "bridge_entry.positional_embedding"), name
    for name in ("bridge_entry.positional_embedding", "bridge_entry.kind_embedding"):
        assert float(weights[name].detach().std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(("reducer", "message"), [
    (UnshuffleConfig(factor=3), r"reducer.factor \(3\) must divide the patches on a side of the grid \(16\)"),
    (MergeConfig(merged=(19, 19)), r"reducer.merged \(2 numbers\) must be one number, or one for each of 12 layers")])
def test_a_reducer_that_does_not_fit_the_tower_is_refused_before_anything_is_built(reducer: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bridge_layers(BridgeConfig(reducer=reducer), tower_width=1408, image_tokens=257, prefix_tokens=1, lm_width=2560, seed=0)


def test_a_width_that_the_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"bridge.width \(100\) must be a multiple of bridge.heads \(12\)"):
        BridgeConfig(width=100)


def test_linear_layers_cost_what_is_published_and_merging_two_per_cent_of_it() -> None:
    """SimVLG quotes 11.9 billion multiply-adds a picture; in full size, and counted without computing."""
    builders = bridge_layers(BridgeConfig(), tower_width=1408, image_tokens=257, prefix_tokens=1, lm_width=2560, seed=0)
    integers = torch.empty(1, 0, dtype=torch.long, device="meta")
    with torch.device("meta"):
        state = State(torch.empty(257, 1408), *[integers] * (len(State._fields) - 1))
        layers = nn.ModuleDict({name: build() for name, build in builders.items()})
    with FlopCounterMode(display=False, depth=3) as counter:
        for layer in layers.values():
            state = layer(state)
    linears = {name: flops[torch.ops.aten.addmm] / 2e9 for name, flops in counter.get_flop_counts().items() if torch.ops.aten.addmm in flops}
    assert linears["BridgeAttention"] + linears["BridgeMlp"] == pytest.approx(11.8767, abs=1e-4)
    assert linears["BridgeEntry"] == pytest.approx(257 * 1408 * 768 / 1e9)
    assert linears["BridgeExit"] == pytest.approx(29 * 768 * 2560 / 1e9)
    assert counter.get_flop_counts()["BridgeMlp"][torch.ops.aten.bmm] / 2e9 == pytest.approx(0.227, abs=1e-3)
