"""The real pretrained parts that a registry has: what is written is what flm train reads, and it knows what it should."""

import os
from pathlib import Path

import pytest

from flm_scale.config_lm import LanguageModelConfig
from flm_scale.config_vision import ConvNetConfig
from flm_scale.data.tokens import LmTokenizer
from flm_scale.errors import DataError
from flm_scale.model.convnet import build_convnet
from flm_scale.model.frozen_lm import open_frozen
from flm_scale.model.parts import PlainParts
from tools.demo_models import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained") / "models"
    try:
        main(folder)
    except DataError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"models cannot be fetched: {error}")
    return folder


def test_the_language_model_knows_the_capital_of_france(models: Path) -> None:
    tokenizer = LmTokenizer(models / "smollm2")
    head = open_frozen(LanguageModelConfig(name=str(models / "smollm2")), precision="fp32", prefix_tokens=0)
    prompt = tokenizer.encode("The capital of France is", max_length=16)[:-1]
    (ids, _), = head.generate(head.no_pictures(1), [prompt], end_ids=[tokenizer.eos_id], max_new=1)
    assert tokenizer.decode(ids).strip() == "Paris"


def test_the_vision_network_has_each_weight_in_its_place(models: Path) -> None:
    """Weights, biases, means and variances of a batch norm have one shape; but only variances are never negative."""
    entry = build_convnet(ConvNetConfig(name="tf_efficientnet_lite0", pretrained=str(models / "lite0.safetensors")), PlainParts())
    variances = [values for name, values in entry.named_parameters() if name.endswith("running_var")]
    assert len(variances) == 49
    assert all((values >= 0).all() for values in variances)


def test_what_is_there_is_left_alone(models: Path) -> None:
    before = (models / "smollm2/model.safetensors").stat().st_mtime_ns
    main(models)
    assert (models / "smollm2/model.safetensors").stat().st_mtime_ns == before
    assert sorted(path.name for path in models.iterdir()) == ["lite0.safetensors", "smollm2"]
