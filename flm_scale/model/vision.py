"""The vision tower, cut into entries of the layer list. The one door to open_clip and the timm inside it, whose blocks it uses as they are.

Pixels [N, 3, height, width] uint8 become image rows [N*I, D] in the text width; every token is kept, the class token first where there is one.
With `vision.merged` a block ends with the decision which of its rows merge, and the next entry begins with merging them (model/reducers.py).
A clip of F frames is F pictures until the last block, which hands on their mean: behind the tower a clip is an image.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import starmap
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from flm_scale.batch import State
from flm_scale.config_vision import OpenClipVisionConfig, SmallVisionConfig
from flm_scale.errors import CheckpointError, ConfigError, did_you_mean
from flm_scale.model.parts import Parts, PlainParts
from flm_scale.model.pretrained import Account, Fate
from flm_scale.model.reducers import count_patches, match, merge_decided, merge_schedule
from flm_scale.model.temporal import ClipBlock, Steps, TemporalAttention

if TYPE_CHECKING:
    from PIL import Image

Colour = Sequence[float]


class Tower(NamedTuple):
    """What the layer list takes of a plain ViT, whoever built it: no pooling, no head."""

    patches: nn.Conv2d
    class_embedding: Tensor | None
    """[width]; SigLIP has none."""
    positional_embedding: Tensor
    """[I, width]"""
    first_norm: nn.Module
    blocks: list[nn.Module]
    last_norm: nn.Module | None
    """None where the tower's weights hold no norm of single tokens."""
    rope: Tensor | None
    """[patches, 2 * width of a head] sines and cosines of EVA's rotary positions, which every block applies."""


class VisionEntry(nn.Module):
    """Pixels to patch tokens: normalise, patch projection, class token, positions."""

    def __init__(self, tower: Tower, parts: Parts, *, mean: Colour, std: Colour, merges: bool, frames: int = 1) -> None:
        """mean, std: of red, green and blue in [0, 1], as the tower's weights were trained with.   merges: whether rows do, behind some block.

        frames: F.
        """
        super().__init__()
        self.share, self.merges, self.frames = parts.share_of_images, merges, frames
        self.patches, self.norm = tower.patches, tower.first_norm
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
        if self.class_embedding is not None:
            tokens = torch.cat([self.class_embedding.to(dtype).expand(len(tokens), 1, -1), tokens], dim=1)
        embedded: Tensor = self.norm(tokens + self.positional_embedding.to(dtype))
        return embedded.flatten(0, 1)

    def forward(self, state: State) -> State:
        """State with pixels in, with image rows out: of all images, or of this shard's; of clips [N*F*I, width]."""
        pixels = self.share(state.rows)
        if self.frames > 1:
            assert pixels.shape[1] == self.frames, "the loader gives as many frames as the run states"
            pixels = pixels.flatten(0, 1)
        state = state._replace(rows=self.embed(pixels))
        return count_patches(state, num_tokens=len(self.positional_embedding)) if self.merges else state


class VisionBlock(nn.Module):
    """One of the tower's transformer blocks."""

    rope: Tensor | None

    def __init__(self, block: nn.Module, *, arriving: int, image_tokens: int, merged: int, protected: int, rope: Tensor | None = None) -> None:
        """rope: as in Tower. Every block holds it, because rows are all that one layer hands to the next.

        arriving: rows of an image that come in.   image_tokens: I, what they are merged to.   merged: how many of these are to go behind the block.
        protected: how many never merge.
        """
        super().__init__()
        self.block, self.arriving, self.image_tokens, self.merged, self.protected = block, arriving, image_tokens, merged, protected
        self.register_buffer("rope", rope, persistent=False)

    def forward(self, state: State) -> State:
        """Image rows [N*arriving, width] in, [N*I, width] out."""
        state = merge_decided(state, num_tokens=self.arriving, merged_tokens=self.image_tokens)
        images = state.rows.unflatten(0, (-1, self.image_tokens))
        images = self.block(images) if self.rope is None else self.block(images, rope=self.rope)
        state = state._replace(rows=images.flatten(0, 1))
        if not self.merged:
            return state
        # Rows, not keys as in the paper: the blocks are open_clip's and timm's as they are, which keep their keys to themselves.
        return state._replace(merge_slots=match(images, state.sizes, merged=self.merged, protected=self.protected))


def halves_of(block: nn.Module) -> Steps:
    """Return the two residual steps of a block, attention and MLP. Raises ConfigError for a block that is not known to be made of these."""
    from open_clip.transformer import ResidualAttentionBlock
    from timm.models.vision_transformer import Block

    one: Any = block
    # Exact classes: what derives from them does other things between the halves.
    if type(block) is ResidualAttentionBlock:
        return lambda x: x + one.ls_1(one.attention(one.ln_1(x))), lambda x: x + one.ls_2(one.mlp(one.ln_2(x)))
    if type(block) is Block:
        return lambda x: x + one.ls1(one.attn(one.norm1(x))), lambda x: x + one.ls2(one.mlp(one.norm2(x)))
    raise ConfigError(f"vision.frames: a tower of blocks of the kind {type(block).__name__} cannot be opened for clips; choose a plain ViT, such as "
                      "ViT-B-32 or ViT-B-16-SigLIP, or vision.frames 1")


class VisionExit(nn.Module):
    """The tower's last norm, the projection into the text width, and the vector that marks image rows."""

    def __init__(self, tower: Tower, parts: Parts, *, arriving: int, image_tokens: int, text_width: int) -> None:
        """arriving, image_tokens: as of VisionBlock."""
        super().__init__()
        self.join, self.arriving, self.image_tokens = parts.join_images, arriving, image_tokens
        width = tower.patches.out_channels
        self.norm = nn.Identity() if tower.last_norm is None else tower.last_norm
        self.fresh_norm = nn.LayerNorm(width) if tower.last_norm is None else nn.Identity()
        self.projection, self.kind = nn.Linear(width, text_width), nn.Embedding(1, text_width)

    def forward(self, state: State) -> State:
        """Image rows [N*arriving, width] in, [N*I, D] out."""
        state = merge_decided(state, num_tokens=self.arriving, merged_tokens=self.image_tokens)
        marks = torch.zeros(len(state.rows), dtype=torch.long, device=state.rows.device)
        rows = self.projection(self.fresh_norm(self.norm(state.rows))) + self.kind(marks)
        return state._replace(rows=self.join(rows, len(state.image_slots) * self.image_tokens))


def named_sizes(name: str) -> dict[str, int]:
    """Return the sizes that observe.cost.vision_shape wants, of an open_clip model. Raises ConfigError for a name that is not a plain ViT."""
    import open_clip

    known = open_clip.list_models()
    if name not in known:
        raise ConfigError(f"vision.name: open_clip has no model '{name}'{did_you_mean(name, known)}")
    with torch.device("meta"):
        tower = _parts(_fresh_tower(open_clip.get_model_config(name)))
    if tower is None:
        raise ConfigError(f"vision.name: '{name}' is not a plain ViT; choose one such as ViT-B-32, ViT-B-16-SigLIP or EVA02-B-16")
    return {"width": tower.patches.out_channels, "layers": len(tower.blocks), "patch_size": tower.patches.kernel_size[0],
            "prefix_tokens": int(tower.class_embedding is not None),
            "block_weights": sum(weight.numel() for weight in tower.blocks[0].parameters() if weight.ndim == 2)}


def colours(config: OpenClipVisionConfig | SmallVisionConfig) -> tuple[Colour, Colour]:
    """Return mean and deviation of the colours that the tower's weights were trained with: those of its tag, OpenAI's by default.

    Of a local file it is those of the model's first tag: the tags of a model agree, but for one of ViT-L-14's.
    """
    import open_clip

    tag = {}
    if isinstance(config, OpenClipVisionConfig):
        tags = open_clip.list_pretrained_tags_by_model(config.name)
        tag = open_clip.get_pretrained_cfg(config.name, config.pretrained if config.pretrained in tags else next(iter(tags), ""))
    return tag.get("mean", open_clip.OPENAI_DATASET_MEAN), tag.get("std", open_clip.OPENAI_DATASET_STD)


def build_vision(config: OpenClipVisionConfig | SmallVisionConfig, *, text_width: int, parts: Parts | None = None,
                 load_pretrained: bool = True) -> list[nn.Module]:
    """Return the tower's layers, with pretrained weights when the config names some (and they are not about to be replaced by a run's own).

    Raises ConfigError for a name that is not one of open_clip's ViTs, CheckpointError for weights that cannot be had or do not fit.
    """
    tower = _parts(_small_tower(config) if isinstance(config, SmallVisionConfig) else _named_tower(config, load_pretrained=load_pretrained))
    assert tower is not None, "named_sizes refuses what is not a ViT"
    if config.frames > 1:
        halves_of(tower.blocks[0])
    mean, std = colours(config)
    return tower_layers(tower, config, parts or PlainParts(), text_width=text_width, mean=mean, std=std)


def tower_layers(tower: Tower, config: OpenClipVisionConfig | SmallVisionConfig, parts: Parts, *, text_width: int,
                 mean: Colour, std: Colour) -> list[nn.Module]:
    """Return the layers that run a tower. mean, std: of `colours`.

    Raises ConfigError where `vision.merged` does not fit the tower.
    """
    merges, protected = any(config.merged), int(tower.class_embedding is not None)
    if merges and tower.rope is not None:
        raise ConfigError(f"vision.merged ({config.merged}) does not go with rotary positions, which merged rows lose; leave it out, or take a tower "
                          "without them, such as ViT-B-16")
    blocks = tower.blocks[:-1] if config.output == "penultimate" else tower.blocks
    tokens = merge_schedule(config.merged or (0,), len(tower.positional_embedding), len(blocks), protected=protected, option="vision.merged")
    arriving = (tokens[0], *tokens[:-1])

    def block_layer(i: int, block: nn.Module) -> nn.Module:
        if config.frames == 1:
            return VisionBlock(block, arriving=arriving[i], image_tokens=tokens[i], merged=tokens[i] - tokens[i + 1], protected=protected,
                               rope=tower.rope)
        temporal = TemporalAttention(config.temporal, width=tower.patches.out_channels, frames=config.frames)
        return ClipBlock(block, temporal, halves_of=halves_of, image_tokens=tokens[i], is_last=block is blocks[-1])

    layers = [VisionEntry(tower, parts, mean=mean, std=std, merges=merges, frames=config.frames), *starmap(block_layer, enumerate(blocks)),
              VisionExit(tower, parts, arriving=arriving[-1], image_tokens=tokens[-1], text_width=text_width)]
    for layer in layers:
        parts.sum_image_gradients(layer)
    if not config.trainable:
        for layer in layers:
            layer.requires_grad_(False)
        temporal = [layer.temporal for layer in layers if isinstance(layer, ClipBlock)]
        for module in (layers[-1].fresh_norm, layers[-1].projection, layers[-1].kind, *temporal):
            module.requires_grad_(True)
    return layers


def tower_hash(weights: Mapping[str, Tensor]) -> str:
    """Return the sha256 of a tower's weights by name, rounded to bfloat16: a run in that precision keeps no more of them."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(name.encode() + weight.detach().cpu().to(torch.bfloat16).contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def vision_account(config: OpenClipVisionConfig, *, names: Sequence[str]) -> Account:
    """Return what becomes of every tensor of the file that `vision.pretrained` names, without reading their values.

    names: of the tower's layers, those that the model has of `tower_layers`.

    open_clip loads the file, strictly and at the size of the pictures; the layers take what they run.
    """
    with torch.device("meta"):
        visual = _named_tower(config, load_pretrained=False)
        tower = _parts(visual)
        assert tower is not None, "named_sizes refuses what is not a ViT"
        layers = tower_layers(tower, config, PlainParts(), text_width=1, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))[:len(names)]
    known = {id(weight): f"visual.{name}" for name, weight in visual.named_parameters()}
    # These two are copies where timm has made them.
    known |= {id(copy): f"visual.trunk.{name}" for name, copy in (("cls_token", tower.class_embedding), ("pos_embed", tower.positional_embedding))
              if copy is not None and id(copy) not in known}
    weights = {f"{name}.{key}": weight for name, layer in zip(names, layers, strict=True) for key, weight in layer.named_parameters()}
    origins: dict[str, tuple[str, ...]] = {name: (known[id(weight)],) if id(weight) in known else () for name, weight in weights.items()}
    positions = known[id(tower.positional_embedding)]
    used = {positions}.union(*origins.values())
    shapes = _shapes_of(config)
    if not used <= shapes.keys():
        return Account(_title(config), {name: Fate("converted", "by open_clip, from another format") for name in shapes}, origins)
    fates = {name: Fate("used") if name in used else Fate("left out", _why_left_out(name, tower, known)) for name in shapes}
    before, now = (math.isqrt(tokens - (tower.class_embedding is not None)) for tokens in (shapes[positions][-2], len(tower.positional_embedding)))
    if before != now:
        fates[positions] = Fate("resized", f"{before} x {before} patches to {now} x {now}")
    return Account(_title(config), fates, origins)


def _title(config: OpenClipVisionConfig) -> str:
    return f"{config.pretrained} of {config.name}"


def _shapes_of(config: OpenClipVisionConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the pretrained file by the name that open_clip has for it."""
    import open_clip
    from open_clip.factory import load_state_dict

    file = config.pretrained
    if file in open_clip.list_pretrained_tags_by_model(config.name):
        file = open_clip.download_pretrained(open_clip.get_pretrained_cfg(config.name, file))
    if Path(file).suffix == ".npz":
        return dict.fromkeys(np.load(file).files, ())
    # Neither way reads values.
    state = load_state_dict(file, device="cpu" if Path(file).suffix == ".safetensors" else "meta")
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _why_left_out(name: str, tower: Tower, known: dict[int, str]) -> str:
    """Return the part of open_clip's model that a tensor belongs to."""
    if name in {known[id(weight)] for weight in tower.blocks[-1].parameters()}:
        return "last block"
    own = name.removeprefix("visual.").removeprefix("trunk.").split(".")[0]
    return own if name.startswith(("visual.", "logit_")) else "text tower"


def _parts(visual: nn.Module) -> Tower | None:
    """Return the parts of open_clip's tower, its own or timm's; None when it is not a plain ViT (ConvNeXt, a convolutional stem, ...)."""
    from open_clip.transformer import VisionTransformer
    from timm.layers.patch_embed import PatchEmbed
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

    if isinstance(visual, VisionTransformer):
        # Behind pooling the tower's own norm never saw single tokens; behind an attention pooler it even has another width.
        pooled_first = visual.attn_pool is not None or visual.final_ln_after_pool
        return Tower(visual.conv1, visual.class_embedding, visual.positional_embedding, visual.ln_pre, list(visual.transformer.resblocks),
                     None if pooled_first else visual.ln_post, rope=None)
    trunk: Any = getattr(visual, "trunk", None)
    # Exact classes: what derives from them does other things between the parts.
    if type(trunk) not in {TimmVisionTransformer, Eva} or type(trunk.patch_embed) is not PatchEmbed:
        return None
    # VisionEntry and VisionBlock know one way to place tokens, that of every plain ViT that open_clip has now.
    if trunk.reg_token is not None or trunk.no_embed_class or trunk.pos_embed is None or getattr(trunk, "rope_mixed", False):
        return None
    for block in trunk.blocks:  # docs/decisions.md: no dropout, so no block is dropped either
        block.drop_path1 = block.drop_path2 = nn.Identity()
    class_embedding = None if trunk.cls_token is None else nn.Parameter(trunk.cls_token[0, 0])
    # Where timm norms the pooled vector it leaves no norm for tokens.
    last_norm = None if isinstance(trunk.norm, nn.Identity) else trunk.norm
    rope = getattr(trunk, "rope", None)
    return Tower(trunk.patch_embed.proj, class_embedding, nn.Parameter(trunk.pos_embed[0]), trunk.norm_pre, list(trunk.blocks), last_norm,
                 rope=None if rope is None else rope.get_embed(trunk.patch_embed.grid_size))


def _fresh_tower(model: dict[str, Any]) -> nn.Module:
    """Return the tower of an open_clip model config with random weights, without the text tower that open_clip builds beside it."""
    import open_clip

    text, vision = open_clip.CLIPTextCfg(context_length=1, vocab_size=1, width=1, heads=1, layers=1), model["vision_cfg"]
    visual = open_clip.CLIP(embed_dim=model["embed_dim"], vision_cfg=vision, text_cfg=text, quick_gelu=model.get("quick_gelu", False)).visual
    if "timm_model_name" in vision:  # timm builds the size in its name
        visual.set_input_size(vision["image_size"])
    return cast("nn.Module", visual)


def _small_tower(config: SmallVisionConfig) -> nn.Module:
    return _fresh_tower({"embed_dim": 1, "vision_cfg": {
        "layers": config.layers, "width": config.width, "head_width": config.width // config.heads, "patch_size": config.patch_size,
        "image_size": config.image_size}})


class Clip(NamedTuple):
    """An open_clip model whole, to score pictures against captions, with its own way to prepare both."""

    model: Any
    preprocess: Callable[["Image.Image"], Tensor]
    """RGB picture to [3, height, width]."""
    tokenize: Callable[[list[str]], Tensor]
    """[texts, tokens]"""
    weights: str
    """sha256 of all weights by name."""


def load_clip(name: str, pretrained: str, *, device: str, options: str = "--") -> Clip:
    """Return a model with its weights. pretrained: one of its tags, or a file.   options: what the user's begin with, for messages.

    Raises ConfigError for a name that open_clip does not have, CheckpointError for weights that cannot be had or do not fit.
    """
    import open_clip

    known = open_clip.list_models()
    if name not in known:
        raise ConfigError(f"{options}model: open_clip has no model '{name}'{did_you_mean(name, known)}")
    _check_tag_or_file(name, pretrained, option=f"{options}pretrained")
    try:
        model, preprocess = open_clip.create_model_from_pretrained(name, pretrained=pretrained, device=device)
        tokenize = open_clip.get_tokenizer(name)
    except (AssertionError, EOFError, KeyError, OSError, RuntimeError, UnpicklingError, ValueError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{options}pretrained ('{pretrained}') does not load into {name}: {reason}") from error
    digest = hashlib.sha256()
    for key, weight in sorted(model.state_dict().items()):
        digest.update(key.encode() + weight.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return Clip(model.eval(), preprocess, tokenize, digest.hexdigest())


def _check_tag_or_file(name: str, pretrained: str, *, option: str) -> None:
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained not in tags and not Path(pretrained).is_file():
        raise CheckpointError(f"{option} ('{pretrained}') is neither a file nor a tag of {name}; its tags: {', '.join(tags) or 'none'}")


def _named_tower(config: OpenClipVisionConfig, *, load_pretrained: bool) -> nn.Module:
    import open_clip

    patch_size = named_sizes(config.name)["patch_size"]
    if config.image_size % patch_size:
        raise ConfigError(f"vision.image_size ({config.image_size}) must be a multiple of {config.name}'s patch size ({patch_size})")
    if config.pretrained:
        _check_tag_or_file(config.name, config.pretrained, option="vision.pretrained")
    if not (load_pretrained and config.pretrained):
        model = open_clip.get_model_config(config.name)
        model["vision_cfg"]["image_size"] = config.image_size
        return _fresh_tower(model)
    try:
        pretrained = open_clip.create_model(config.name, pretrained=config.pretrained, force_image_size=config.image_size)
    except (RuntimeError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"vision.pretrained ('{config.pretrained}') does not load into {config.name}: {reason}") from error
    return cast("nn.Module", pretrained.visual)
