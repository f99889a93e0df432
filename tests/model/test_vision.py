"""The tower that the layer list runs is open_clip's own, with its weights, at any resolution."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flm_scale.batch import State
from flm_scale.config_vision import OpenClipVisionConfig
from flm_scale.errors import CheckpointError, ConfigError
from flm_scale.model.assemble import build_model
from flm_scale.model.vision import build_vision, colours, named_sizes
from tests.synthetic import objective_of, random_pixels, tiny_run

NAME = "ViT-S-32-alt"
# One of each kind of timm's ViTs and EVAs: without a class token; dropped blocks and a norm before the first; absolute positions only;
# norms behind attention and MLP; rotary positions and a gated MLP; rotary positions with another attention.
TIMM_NAMES = ["ViT-B-16-SigLIP", "MobileCLIP2-L-14", "EVA01-g-14", "EVA02-E-14", "EVA02-B-16", "PE-Core-B-16"]
TINY_TEXT = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}


@pytest.fixture(scope="module")
def weight_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as open_clip's users have them, at the model's own 224 px."""
    import open_clip

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save({"state_dict": open_clip.create_model(NAME).state_dict()}, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("output", ["penultimate", "final"])
@pytest.mark.parametrize("image_size", [224, 96])
def test_tokens_are_open_clips_own_from_a_local_file_at_any_resolution(weight_file: Path, image_size: int, output: str) -> None:
    import numpy as np
    import open_clip

    layers = build_vision(OpenClipVisionConfig(name=NAME, pretrained=str(weight_file), image_size=image_size, output=output), text_width=32)
    theirs = open_clip.create_model(NAME, pretrained=str(weight_file), force_image_size=image_size).visual.eval()
    pixels = torch.from_numpy(random_pixels(2, np.random.default_rng(0), size=image_size))
    rows = layers[0].embed(pixels)
    for block in layers[1:-1]:
        rows = block.block(rows.unflatten(0, (2, -1))).flatten(0, 1)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    found = theirs.forward_intermediates((pixels.float() / 255 - mean) / std, indices=2, normalize_intermediates=True, output_fmt="NLC",
                                         output_extra_tokens=True)
    wanted = -1 if output == "final" else -2
    tokens = torch.cat([found["image_intermediates_prefix"][wanted], found["image_intermediates"][wanted]], dim=1)
    torch.testing.assert_close(layers[-1].norm(rows), tokens.flatten(0, 1), rtol=1e-4, atol=1e-5)


@pytest.fixture
def shrunk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """open_clip's timm models with few and narrow layers, all else as they are; a random weight file of each as TMP_PATH/NAME."""
    import open_clip
    import timm

    create_model = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *name, **changes: create_model(*name, embed_dim=48, depth=3, num_heads=3, **changes))
    for name in TIMM_NAMES:
        register(monkeypatch, name, open_clip.get_model_config(name)["vision_cfg"], tmp_path)


def register(monkeypatch: pytest.MonkeyPatch, name: str, vision_cfg: dict[str, Any], folder: Path) -> None:
    """Make open_clip know a model with a tiny text tower, and save weights for it that are all random, norms too."""
    import open_clip

    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, {"embed_dim": 48, "vision_cfg": vision_cfg, "text_cfg": TINY_TEXT})
    model = open_clip.create_model(name)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())), alpha=0.1)
    torch.save({"state_dict": model.state_dict()}, folder / name)


def run_layers(layers: list[nn.Module], pixels: torch.Tensor) -> torch.Tensor:
    nothing = torch.zeros(len(pixels), 0, dtype=torch.long)
    state = State(*(nothing for _ in State._fields))._replace(rows=pixels)
    for layer in layers:
        state = layer(state)
    return state.rows


@pytest.mark.parametrize("output", ["penultimate", "final"])
@pytest.mark.parametrize("name", TIMM_NAMES)
def test_tokens_are_timms_own_from_a_local_file_at_another_resolution(shrunk: None, tmp_path: Path, name: str, output: str) -> None:
    """Five patches a side instead of the 14 or 16 of the file; and in training, where timm would drop some of MobileCLIP's blocks."""
    import numpy as np
    import open_clip

    file, image_size = str(tmp_path / name), 5 * named_sizes(name)["patch_size"]
    config = OpenClipVisionConfig(name=name, pretrained=file, image_size=image_size, output=output)
    layers = build_vision(config, text_width=32)
    trunk = open_clip.create_model(name, pretrained=file, force_image_size=image_size).visual.eval().trunk
    pixels = torch.from_numpy(random_pixels(2, np.random.default_rng(0), size=image_size))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in colours(config))
    normalised = (pixels.float() / 255 - mean) / std
    if output == "penultimate":
        trunk.blocks = trunk.blocks[:-1]
    tokens = trunk.forward_features(normalised)
    assert tokens.shape[1] == 25 + (name != "ViT-B-16-SigLIP")
    torch.testing.assert_close(layers[-1].norm(run_layers(layers[:-1], pixels)), tokens.flatten(0, 1), rtol=1e-6, atol=1e-6)
    assert not [key for layer in layers for key in layer.state_dict() if "rope" in key]


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("name", [NAME, "ViT-B-16-SigLIP", "EVA02-B-16"])
def test_gradients_reach_every_weight_of_a_trainable_tower_and_none_of_a_frozen_one(shrunk: None, name: str, trainable: bool) -> None:
    layers = build_vision(OpenClipVisionConfig(name=name, image_size=64, trainable=trainable), text_width=32)
    run_layers(layers, torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)).square().sum().backward()
    reached = {f"{i}.{key}": weight.grad is not None and bool(weight.grad.any()) for i, layer in enumerate(layers, 1 - len(layers))
               for key, weight in layer.named_parameters()}
    assert {key for key in reached if key.startswith("0.") and "norm" not in key} == {"0.projection.weight", "0.projection.bias", "0.kind.weight"}
    assert {key for key, has_gradient in reached.items() if has_gradient} == (
        set(reached) if trainable else {"0.projection.weight", "0.projection.bias", "0.kind.weight"})


@pytest.mark.parametrize("vision_cfg", [
    {"layers": 2, "width": 48, "head_width": 16, "patch_size": 32, "image_size": 64, "attentional_pool": True, "attn_pooler_heads": 3},
    {"timm_model_name": "vit_base_patch16_224", "timm_pool": "avg", "timm_proj": "", "image_size": 224},
], ids=["attention pooler", "average"])
def test_a_norm_that_never_saw_single_tokens_is_replaced_by_a_fresh_one(
        shrunk: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, vision_cfg: dict[str, Any]) -> None:
    """It trains even before a frozen tower, and at the rate of what starts from random."""
    register(monkeypatch, "pooled", vision_cfg, tmp_path)
    run = tiny_run("ar", vision=OpenClipVisionConfig(name="pooled", pretrained=str(tmp_path / "pooled"), image_size=64, trainable=False))
    model = build_model(run, objective_of(run))
    norm = {"vision_exit.fresh_norm.weight", "vision_exit.fresh_norm.bias"}
    trained = {name for name, weight in model.layers.named_parameters() if name.startswith("vision_") and weight.requires_grad}
    assert trained == norm | {"vision_exit.projection.weight", "vision_exit.projection.bias", "vision_exit.kind.weight"}
    assert "vision_0.block.mlp." in " ".join(model.pretrained)
    assert not trained & model.pretrained
    assert bool((model.layers["vision_exit"].fresh_norm.weight == 1).all())


@pytest.mark.slow
def test_every_name_of_open_clip_is_a_vit_or_refused() -> None:
    """Refused are convolutions, windows, relative positions, and ViTs behind a convolutional stem. One resolution of each tower will do."""
    import open_clip

    no_vit = re.compile(r"RN|convnext|swin|vit_relpos|ViTamin|MobileCLIP-|MobileCLIP2-[BS]")
    towers = {re.sub(r"_\d+$", "", open_clip.get_model_config(name)["vision_cfg"].get("timm_model_name", name)): name
              for name in open_clip.list_models()}
    for name in towers.values():
        if no_vit.match(name):
            with pytest.raises(ConfigError, match=f"'{name}' is not a plain ViT; choose one such as ViT-B-32"):
                named_sizes(name)
        else:
            assert named_sizes(name)["layers"] >= 10, name


def test_pixels_are_normalised_as_the_tags_weights_were_trained() -> None:
    """open_clip keeps each tag's mean and deviation; CLIPA's are ImageNet's, not OpenAI's, and a file of SigLIP's has SigLIP's."""
    import open_clip

    assert colours(OpenClipVisionConfig(name="ViT-H-14-CLIPA", pretrained="datacomp1b"))[0] == (0.485, 0.456, 0.406)
    assert colours(OpenClipVisionConfig(name="ViT-B-32", pretrained="openai"))[0] == open_clip.OPENAI_DATASET_MEAN
    assert colours(OpenClipVisionConfig(name="ViT-B-16-SigLIP", pretrained="some/file.pt"))[0] == (0.5, 0.5, 0.5)
    entry = build_vision(OpenClipVisionConfig(name=NAME), text_width=32)[0]
    pixels = torch.full((1, 3, 224, 224), 100, dtype=torch.uint8)
    before = entry.embed(pixels)
    entry.mean = (0.485, 0.456, 0.406)
    assert not torch.equal(entry.embed(pixels), before)


def test_pretrained_weights_are_kept_and_the_rest_starts_from_the_seed(weight_file: Path) -> None:
    vision = OpenClipVisionConfig(name=NAME, pretrained=str(weight_file), image_size=224)
    run = tiny_run("ar", vision=vision)
    model = build_model(run, objective_of(run))
    saved = torch.load(weight_file)["state_dict"]
    assert torch.equal(model.layers["vision_0"].block.mlp.c_fc.weight, saved["visual.transformer.resblocks.0.mlp.c_fc.weight"])
    assert "vision_0.block.mlp.c_fc.weight" in model.pretrained
    assert not {"vision_exit.projection.weight", "text_entry.tokens.weight"} & model.pretrained


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"name": "ViT-B-23"}, ConfigError, "no model 'ViT-B-23'; did you mean 'ViT-B-32'"),
    ({"name": "RN50"}, ConfigError, "'RN50' is not a plain ViT; choose one such as ViT-B-32"),
    ({"name": NAME, "image_size": 100}, ConfigError, r"image_size \(100\) must be a multiple of ViT-S-32-alt's patch size \(32\)"),
    ({"name": "ViT-B-32", "pretrained": "opneai"}, CheckpointError, "neither a file nor a tag of ViT-B-32; its tags: openai"),
])
def test_a_tower_that_cannot_be_had_is_refused(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_vision(OpenClipVisionConfig(**changes), text_width=32)


def test_weights_of_another_tower_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"visual.class_embedding": torch.zeros(3)}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="does not load into ViT-S-32-alt"):
        build_vision(OpenClipVisionConfig(name=NAME, pretrained=str(tmp_path / "other.pt")), text_width=32)
