"""The vision tower, cut into entries of the layer list. The one door to open_clip, whose blocks it uses as they are.

Pixels [N, 3, height, width] uint8 become image rows [N*I, D] in the text width; every token is kept, the class token first.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flm_scale.batch import State
from flm_scale.config import OpenClipVisionConfig, SmallVisionConfig
from flm_scale.errors import CheckpointError, ConfigError, did_you_mean

if TYPE_CHECKING:
    from open_clip.transformer import VisionTransformer

Colour = Sequence[float]


class VisionEntry(nn.Module):
    """Pixels to patch tokens: normalise, patch projection, class token, positions."""

    def __init__(self, tower: "VisionTransformer", *, mean: Colour, std: Colour) -> None:
        """mean, std: of red, green and blue in [0, 1], as the tower's weights were trained with."""
        super().__init__()
        self.patches, self.norm = tower.conv1, tower.ln_pre
        self.class_embedding = tower.class_embedding
        if tower.positional_embedding.requires_grad:
            self.positional_embedding = tower.positional_embedding
        else:  # sines and cosines: not a weight
            self.register_buffer("positional_embedding", tower.positional_embedding.detach())
        self.mean, self.std = mean, std

    def embed(self, pixels: Tensor) -> Tensor:
        """Return tokens [N*I, width] of uint8 pixels."""
        dtype, shape = self.patches.weight.dtype, (1, 3, 1, 1)
        mean, std = (torch.tensor(values, device=pixels.device).view(shape) for values in (self.mean, self.std))
        tokens = self.patches(((pixels.float() / 255 - mean) / std).to(dtype)).flatten(2).transpose(1, 2)
        first = self.class_embedding.to(dtype).expand(len(tokens), 1, -1)
        embedded: Tensor = self.norm(torch.cat([first, tokens], dim=1) + self.positional_embedding.to(dtype))
        return embedded.flatten(0, 1)

    def forward(self, state: State) -> State:
        """State with pixels in, with image rows out."""
        return state._replace(rows=self.embed(state.rows))


class VisionBlock(nn.Module):
    """One of the tower's transformer blocks."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, state: State) -> State:
        """Image rows [N*I, width] in and out."""
        images = state.rows.unflatten(0, (len(state.image_slots), -1))
        return state._replace(rows=self.block(images).flatten(0, 1))


class VisionExit(nn.Module):
    """The tower's last norm, the projection into the text width, and the vector that marks image rows."""

    def __init__(self, tower: "VisionTransformer", *, text_width: int) -> None:
        super().__init__()
        width = tower.conv1.out_channels
        # Behind an attention pooler the tower's own norm has another width and never saw single tokens.
        self.norm = tower.ln_post if tower.attn_pool is None else nn.LayerNorm(width)
        self.projection, self.kind = nn.Linear(width, text_width), nn.Embedding(1, text_width)

    def forward(self, state: State) -> State:
        """Image rows [N*I, width] in, [N*I, D] out."""
        marks = torch.zeros(len(state.rows), dtype=torch.long, device=state.rows.device)
        return state._replace(rows=self.projection(self.norm(state.rows)) + self.kind(marks))


def named_sizes(name: str) -> dict[str, Any]:
    """Return open_clip's 'vision_cfg' of a model. Raises ConfigError for a name that is not one of its own ViTs."""
    import open_clip

    known = open_clip.list_models()
    if name not in known:
        raise ConfigError(f"vision.name: open_clip has no model '{name}'{did_you_mean(name, known)}")
    sizes: dict[str, Any] = open_clip.get_model_config(name)["vision_cfg"]
    if "timm_model_name" in sizes or not isinstance(sizes["layers"], int):
        raise ConfigError(f"vision.name: '{name}' is not one of open_clip's own ViTs; choose one such as ViT-B-32 or ViT-L-14")
    return sizes


def colours(config: OpenClipVisionConfig | SmallVisionConfig) -> tuple[Colour, Colour]:
    """Return mean and deviation of the colours that the tower's weights were trained with: those of its tag, OpenAI's by default."""
    import open_clip

    tag = open_clip.get_pretrained_cfg(config.name, config.pretrained) if isinstance(config, OpenClipVisionConfig) and config.pretrained else {}
    return tag.get("mean", open_clip.OPENAI_DATASET_MEAN), tag.get("std", open_clip.OPENAI_DATASET_STD)


def build_vision(config: OpenClipVisionConfig | SmallVisionConfig, *, text_width: int, load_pretrained: bool = True) -> list[nn.Module]:
    """Return the tower's layers, with pretrained weights when the config names some (and they are not about to be replaced by a run's own).

    Raises ConfigError for a name that is not one of open_clip's ViTs, CheckpointError for weights that cannot be had or do not fit.
    """
    tower = _small_tower(config) if isinstance(config, SmallVisionConfig) else _named_tower(config, load_pretrained=load_pretrained)
    mean, std = colours(config)
    blocks = list(tower.transformer.resblocks)
    if config.output == "penultimate":
        blocks.pop()
    layers = [VisionEntry(tower, mean=mean, std=std), *map(VisionBlock, blocks), VisionExit(tower, text_width=text_width)]
    if not config.trainable:
        for layer in layers:
            layer.requires_grad_(False)
        for module in (layers[-1].projection, layers[-1].kind):
            module.requires_grad_(True)
    return layers


def _small_tower(config: SmallVisionConfig) -> "VisionTransformer":
    import open_clip

    vision = open_clip.CLIPVisionCfg(layers=config.layers, width=config.width, head_width=config.width // config.heads,
                                     patch_size=config.patch_size, image_size=config.image_size)
    text = open_clip.CLIPTextCfg(context_length=1, vocab_size=1, width=1, heads=1, layers=1)
    return open_clip.CLIP(embed_dim=1, vision_cfg=vision, text_cfg=text).visual


def _named_tower(config: OpenClipVisionConfig, *, load_pretrained: bool) -> "VisionTransformer":
    import open_clip

    sizes = named_sizes(config.name)
    if config.image_size % sizes["patch_size"]:
        raise ConfigError(f"vision.image_size ({config.image_size}) must be a multiple of {config.name}'s patch size ({sizes['patch_size']})")
    tags = open_clip.list_pretrained_tags_by_model(config.name)
    if config.pretrained and config.pretrained not in tags and not Path(config.pretrained).is_file():
        raise CheckpointError(f"vision.pretrained ('{config.pretrained}') is neither a file nor a tag of {config.name}; its tags: "
                              f"{', '.join(tags) or 'none'}")
    try:
        model = open_clip.create_model(config.name, pretrained=(load_pretrained and config.pretrained) or None, force_image_size=config.image_size)
    except (RuntimeError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"vision.pretrained ('{config.pretrained}') does not load into {config.name}: {reason}") from error
    return model.visual
