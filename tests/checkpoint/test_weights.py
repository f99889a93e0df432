"""Weights on disk: strict, whole for one process, piece by piece and stage by stage for several."""

from pathlib import Path

import pytest
import torch
from torch import nn

from flm_scale.checkpoint.reader import Checkpoint
from flm_scale.checkpoint.store import last_good
from flm_scale.checkpoint.weights import load_weights
from flm_scale.errors import CheckpointError
from flm_scale.model.assemble import VisionLanguageModel, build_model, tie
from flm_scale.model.parts import Shard
from tests.synthetic import objective_of, tiny_run, write_weights


def opened(run_dir: Path) -> Checkpoint:
    return last_good(run_dir, full=True)


def tiny_model(*, tied: bool = False) -> VisionLanguageModel:
    run = tiny_run(text=tiny_run().text.replace(tied=tied))
    return build_model(run, objective_of(run))


def save(model: VisionLanguageModel, folder: Path) -> dict[str, torch.Tensor]:
    """Write other weights than those that a model starts from."""
    weights = {name: parameter.detach() + 1 for name, parameter in model.layers.named_parameters()}
    write_weights(folder, weights)
    return weights


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_pieces_of_a_weight_make_up_the_whole_and_rows_that_stand_for_nothing_are_zero(tmp_path: Path, dim: int, count: int) -> None:
    whole = torch.arange(25.0).view(5, 5) + 1
    write_weights(tmp_path, {"head.weight": whole})
    size, pieces = -(-5 // count), []
    for index in range(count):
        layer = nn.Linear(*((size, 5) if dim else (5, size)), bias=False)
        layer.weight.shard = Shard(dim, index, count, 5)
        load_weights(nn.ModuleDict({"head": layer}), opened(tmp_path))
        pieces.append(layer.weight.detach())
    joined = torch.cat(pieces, dim)
    assert torch.equal(joined.narrow(dim, 0, 5), whole)
    assert not joined.narrow(dim, 5, size * count - 5).any()


def test_a_stage_is_filled_without_the_layers_of_others(tmp_path: Path) -> None:
    model = tiny_model()
    weights = save(model, tmp_path)
    stage = nn.ModuleDict({name: model.layers[name] for name in ("fusion_0", "fusion_1", "head")})
    load_weights(stage, opened(tmp_path), elsewhere=model.layers.keys() - stage.keys())
    for name, parameter in model.layers.named_parameters():
        assert torch.equal(parameter, weights[name]) == (name.split(".")[0] in stage), name


def test_a_tied_decoder_on_a_stage_of_its_own_is_the_embedding_table(tmp_path: Path) -> None:
    weights = save(tiny_model(tied=True), tmp_path)
    assert "head.decoder.weight" not in weights
    model = tiny_model()
    stage = nn.ModuleDict({"head": model.layers["head"]})
    tie(dict(stage.items()))
    load_weights(stage, opened(tmp_path), elsewhere=model.layers.keys() - {"head"})
    assert torch.equal(model.head.decoder.weight, weights["text_entry.tokens.weight"])


@pytest.mark.parametrize(("change", "message"), [
    ({"head.norm.bias": None}, r"^.*: weights of another model: 'head.norm.bias' is missing$"),
    ({"head.norm.scale": torch.ones(1)}, r"'head.norm.scale' is not in the model$"),
    ({"tail.norm.scale": torch.ones(1)}, r"'tail.norm.scale' is not in the model$"),
    ({"head.norm.bias": torch.ones(31)}, r"'head.norm.bias' has another shape$"),
    ({f"tail.{i}": torch.ones(1) for i in range(4)}, r"'tail.0' is not in the model, 'tail.1' .*, 'tail.2' is not in the model \.\.\.$"),
])
@pytest.mark.parametrize("layers", ["all", "a stage"])
def test_weights_that_do_not_fit_are_named(tmp_path: Path, layers: str, change: dict[str, torch.Tensor | None], message: str) -> None:
    """On the stage that has the layer; and what is in no layer of the model at all, on every stage."""
    model = tiny_model()
    weights = {name: tensor for name, tensor in (save(model, tmp_path) | change).items() if tensor is not None}
    write_weights(tmp_path, weights)
    held = nn.ModuleDict({"head": model.layers["head"]}) if layers == "a stage" else model.layers
    with pytest.raises(CheckpointError, match=message):
        load_weights(held, opened(tmp_path), elsewhere=model.layers.keys() - held.keys())
