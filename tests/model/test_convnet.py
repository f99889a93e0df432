"""A frozen convolutional network of timm as a tower: its own features as rows, whatever mode, batch or checkpoint it runs in."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flm_scale.batch import State
from flm_scale.config_vision import ConvNetConfig
from flm_scale.errors import CheckpointError, ConfigError
from flm_scale.model.convnet import ConvNetEntry, build_convnet, convnet_shape
from flm_scale.model.parts import PlainParts
from flm_scale.observe.cost import shape_of, vision_flops
from tests.model.test_bridge import tower_state
from tests.synthetic import tiny_run

NAME, SIDE, PICTURES = "test_efficientnet", 96, 3


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    """One of timm's with random weights, also in what its batch norms have seen; and its file."""
    torch.manual_seed(0)
    model = timm.create_model(NAME)
    for name, buffer in model.named_buffers():
        if name.endswith(("mean", "var")):
            buffer.uniform_(0.5, 1.5)
    save_file(model.state_dict(), file := tmp_path_factory.mktemp("timm") / "network.safetensors")
    return model.eval(), file


def config_of(file: Path, **values: object) -> ConvNetConfig:
    return ConvNetConfig(**{"name": NAME, "pretrained": str(file), "image_size": SIDE} | values)


def pictures() -> State:
    pixels = torch.randint(256, (PICTURES, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return tower_state(PICTURES)._replace(rows=pixels)


def rows_of(entry: ConvNetEntry, state: State) -> Tensor:
    return entry(state).rows.unflatten(0, (len(state.rows), -1))


def test_rows_are_the_features_of_timm_from_the_top_left_row_by_row(network: tuple[torch.nn.Module, Path]) -> None:
    model, file = network
    entry, state = build_convnet(config_of(file), PlainParts()), pictures()
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        features = model.forward_features((state.rows.float() / 255 - mean) / std)
    rows = rows_of(entry, state)
    assert rows.shape == (PICTURES, convnet_shape(config_of(file)).image_tokens, convnet_shape(config_of(file)).width)
    for place, (i, j) in enumerate((i, j) for i in range(features.shape[2]) for j in range(features.shape[3])):
        torch.testing.assert_close(rows[:, place], features[:, :, i, j], rtol=1e-4, atol=1e-5)


def test_a_picture_has_the_same_rows_in_training_and_alone(network: tuple[torch.nn.Module, Path]) -> None:
    entry, state = build_convnet(config_of(network[1]), PlainParts()), pictures()
    together = rows_of(entry.train(), state)
    alone = torch.cat([rows_of(entry.eval(), state._replace(rows=picture[None])) for picture in state.rows])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_what_batch_norms_have_seen_is_among_the_weights(network: tuple[torch.nn.Module, Path]) -> None:
    entry, state = build_convnet(config_of(network[1]), PlainParts()), pictures()
    again = build_convnet(config_of(network[1]), PlainParts(), load_pretrained=False)
    with torch.no_grad():
        for name, weight in again.named_parameters():
            weight.copy_(entry.get_parameter(name))
    assert torch.equal(rows_of(again, state), rows_of(entry, state))
    assert not any(weight.requires_grad for weight in again.parameters())


def test_flops_are_those_that_torch_counts(network: tuple[torch.nn.Module, Path]) -> None:
    entry, state = build_convnet(config_of(network[1]), PlainParts()), pictures()
    with FlopCounterMode(display=False) as counter:
        entry(state)
    assert PICTURES * vision_flops(shape_of(config_of(network[1]))) == counter.get_total_flops()


@pytest.mark.parametrize(("values", "error", "words"), [
    ({"name": "test_eficientnet"}, ConfigError, "timm has no model 'test_eficientnet'; did you mean 'test_efficientnet'"),
    ({"name": "test_vit"}, ConfigError, "gives no feature map"),
    ({"pretrained": "in9k"}, ConfigError, "'in9k' is neither a file nor one of timm's tags of test_efficientnet .*r160_in1k"),
    ({"name": "test_resnet"}, CheckpointError, "of test_resnet does not load"),
])
def test_what_cannot_be_a_tower_is_one_line(network: tuple[torch.nn.Module, Path], values: dict[str, str], error: type[Exception],
                                            words: str) -> None:
    config = config_of(network[1], **values)
    with pytest.raises(error, match=words) as caught:
        _ = convnet_shape(config), build_convnet(config, PlainParts())
    assert "\n" not in str(caught.value)


def test_a_text_transformer_of_its_own_wants_a_vit(network: tuple[torch.nn.Module, Path]) -> None:
    with pytest.raises(ConfigError, match=r"vision.kind \('convnet'\): this is made for ViTs"):
        tiny_run("flm").replace(vision=config_of(network[1]))
