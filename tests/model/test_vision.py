"""The tower that the layer list runs is open_clip's own, with its weights, at any resolution."""

from pathlib import Path

import pytest
import torch

from flm_scale.config import OpenClipVisionConfig
from flm_scale.errors import CheckpointError, ConfigError
from flm_scale.model.assemble import build_model
from flm_scale.model.vision import build_vision, colours
from tests.synthetic import objective_of, random_pixels, tiny_run

NAME = "ViT-S-32-alt"


@pytest.fixture(scope="module")
def weight_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as open_clip's users have them, at the model's own 224 px."""
    import open_clip

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save({"state_dict": open_clip.create_model(NAME).state_dict()}, path)
    return path


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


def test_pixels_are_normalised_as_the_tags_weights_were_trained() -> None:
    """open_clip keeps each tag's mean and deviation; CLIPA's are ImageNet's, not OpenAI's. Weights are not loaded for it."""
    import open_clip

    assert colours(OpenClipVisionConfig(name="ViT-H-14-CLIPA", pretrained="datacomp1b"))[0] == (0.485, 0.456, 0.406)
    assert colours(OpenClipVisionConfig(name="ViT-B-32", pretrained="openai"))[0] == open_clip.OPENAI_DATASET_MEAN
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
    ({"name": "RN50"}, ConfigError, "not one of open_clip's own ViTs"),
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
