"""A frozen convolutional network of timm as a vision tower: one entry of the layer list. The door to timm's networks that are no ViTs."""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flm_scale.batch import State
from flm_scale.config_vision import ConvNetConfig
from flm_scale.errors import CheckpointError, ConfigError, did_you_mean
from flm_scale.model.parts import Parts


class ConvNetShape(NamedTuple):
    """Sizes of a network at a size of pictures."""

    width: int
    image_tokens: int
    """I: places of the last feature map; there is no class token."""
    flops: int
    """Forward, of one picture, as torch's counter has them."""


class ConvNetEntry(nn.Module):
    """Pixels to the rows of the last feature map, from the top left, row by row."""

    def __init__(self, network: Any, parts: Parts) -> None:  # noqa: ANN401 - timm's networks share no class
        """network: of timm, without its pooling and classifier."""
        super().__init__()
        self.share, self.network = parts.share_of_images, network.requires_grad_(False)
        self.mean, self.std = network.pretrained_cfg["mean"], network.pretrained_cfg["std"]
        for module in self.network.modules():
            # What a batch norm has seen is a weight here: checkpoints hold it.
            for name in [name for name, _ in module.named_buffers(recurse=False) if name.startswith("running_")]:
                values = module.get_buffer(name)
                delattr(module, name)
                module.register_parameter(name, nn.Parameter(values, requires_grad=False))
        self.train(mode=False)

    def train(self, mode: bool = True) -> "ConvNetEntry":  # noqa: ARG002
        """Stay as in evaluation: batch norms read what they hold, and nothing is dropped."""
        return super().train(mode=False)

    def forward(self, state: State) -> State:
        """State with pixels in, with image rows [N*I, width] out: of all images, or of this shard's."""
        pixels = self.share(state.rows)
        mean, std = (torch.tensor(values, device=pixels.device).view(1, 3, 1, 1) for values in (self.mean, self.std))
        with torch.no_grad():
            # Channels last is the order that convolutions are quick in, of bfloat16 above all.
            pixels = ((pixels.float() / 255 - mean) / std).to(next(self.network.parameters()).dtype, memory_format=torch.channels_last)
            rows: Tensor = self.network.forward_features(pixels).flatten(2).transpose(1, 2)
        return state._replace(rows=rows.flatten(0, 1))


@cache
def convnet_shape(config: ConvNetConfig) -> ConvNetShape:
    """Return the sizes that a config names. Raises ConfigError for what is not a network with a square feature map."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        network = _bare(config)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            features = network.eval().forward_features(torch.empty(1, 3, config.image_size, config.image_size))
    if features.ndim != 4 or features.shape[1] != network.num_features:
        raise ConfigError(f"vision.name: '{config.name}' gives no feature map of channels, height and width; choose a network such as resnet50, or a "
                          "plain ViT with --vision.kind open_clip")
    return ConvNetShape(features.shape[1], features.shape[2] * features.shape[3], counter.get_total_flops())


def build_convnet(config: ConvNetConfig, parts: Parts, *, load_pretrained: bool = True) -> ConvNetEntry:
    """Return the tower's one layer. load_pretrained: False where a run's own weights will fill it.

    Raises ConfigError for a name that timm does not have, CheckpointError for weights that cannot be had or do not fit.
    """
    if not load_pretrained:
        return ConvNetEntry(_bare(config), parts)
    import timm

    file = Path(config.pretrained)
    if not file.is_file() and config.pretrained not in (tags := _tags(config.name)):
        raise ConfigError(f"vision.pretrained: '{config.pretrained}' is neither a file nor one of timm's tags of {config.name} ({', '.join(tags)})")
    try:
        network: Any = (timm.create_model(config.name, checkpoint_path=str(file)) if file.is_file()
                   else timm.create_model(f"{config.name}.{config.pretrained}", pretrained=True))
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{config.pretrained} of {config.name} does not load ({first_line}); fetch it again") from error
    network.reset_classifier(0, "")
    return ConvNetEntry(network, parts)


def _bare(config: ConvNetConfig) -> Any:  # noqa: ANN401
    """Return the network without pooling and classifier, its weights at random."""
    import timm

    if not timm.is_model(config.name):
        raise ConfigError(f"vision.name: timm has no model '{config.name}'{did_you_mean(config.name, timm.list_models())}")
    return timm.create_model(config.name, num_classes=0, global_pool="")


def _tags(name: str) -> list[str]:
    import timm

    return [str(model).partition(".")[2] for model in timm.list_pretrained(f"{name}.*")]
