"""An exported model for Hugging Face's transformers, in one file that needs nothing else of flm_scale; open_clip builds the vision tower.

`flm checkpoint export` (checkpoint/publish.py) puts a copy of it beside the weights as modeling_flm.py, so that AutoModelForCausalLM loads them
where flm_scale is not installed. The model is that of model/ in its plainest form: padded captions, no packing, no parallelism. Its weights
have the names that they have in a checkpoint, so nothing is converted; tests hold its logits against the packed model's.

Shapes: B captions, each with a picture of its own; L tokens, BOS and EOS counted; I tokens of a picture; D width; H heads of size d; V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name everyone knows
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_base import BatchFeature, ImageProcessingMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

KeysValues = tuple[Tensor, Tensor]
"""Keys and values [B, H, positions, d]."""


class FlmScaleConfig(PreTrainedConfig):
    """What decides the model's shapes, and what its pictures and first tokens are."""

    model_type = "flm_scale"

    def __init__(self, *, objective: str = "flm", norm: str = "pre", vocab_size: int = 50265, hidden_size: int = 768, num_attention_heads: int = 12,
                 max_position_embeddings: int = 50, bottom_layers: int = 6, fusion_layers: int = 6, reconstructor_bottom_layers: int = 6,
                 reconstructor_fusion_layers: int = 6, vision: dict[str, Any] | None = None, image_mean: Sequence[float] = (0.5, 0.5, 0.5),
                 image_std: Sequence[float] = (0.5, 0.5, 0.5), **others: Any) -> None:  # noqa: ANN401 - transformers' own values
        """objective, norm and the sizes: of flm_scale's Run.   vision: its section of that name.   image_mean, image_std: of colours in [0, 1]."""
        self.objective, self.norm = objective, norm
        self.vocab_size, self.hidden_size, self.num_attention_heads = vocab_size, hidden_size, num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.bottom_layers, self.fusion_layers = bottom_layers, fusion_layers
        self.reconstructor_bottom_layers, self.reconstructor_fusion_layers = reconstructor_bottom_layers, reconstructor_fusion_layers
        self.num_hidden_layers = bottom_layers + fusion_layers
        self.vision = vision or {"kind": "open_clip", "name": "ViT-B-32", "image_size": 224, "output": "penultimate"}
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        super().__init__(**others)


class Tower(NamedTuple):
    """What the model takes of a plain ViT of open_clip, its own or timm's."""

    patches: nn.Conv2d
    class_embedding: Tensor | None
    positional_embedding: Tensor
    """[I, width]"""
    first_norm: nn.Module
    blocks: list[nn.Module]
    last_norm: nn.Module | None
    rope: Tensor | None


def build_tower(vision: dict[str, Any]) -> Tower:
    """Return a tower, with its weights where it names some. Raises ValueError for a name that the installed open_clip does not know."""
    import open_clip

    if vision["kind"] == "vit":
        model: dict[str, Any] | None = {"embed_dim": 1, "vision_cfg": {name: vision[name] for name in ("layers", "width", "patch_size", "image_size")}
                                        | {"head_width": vision["width"] // vision["heads"]}}
    else:
        model = open_clip.get_model_config(vision["name"])
    if model is None:
        raise ValueError(f"open_clip {open_clip.__version__} has no model '{vision['name']}', which this model's pictures are read with; update it")
    sizes = model["vision_cfg"] | {"image_size": vision["image_size"]}
    text = open_clip.CLIPTextCfg(context_length=1, vocab_size=1, width=1, heads=1, layers=1)
    if vision.get("pretrained"):
        visual = open_clip.create_model(vision["name"], pretrained=vision["pretrained"], force_image_size=vision["image_size"]).visual
    else:
        visual = open_clip.CLIP(embed_dim=model["embed_dim"], vision_cfg=sizes, text_cfg=text, quick_gelu=model.get("quick_gelu", False)).visual
    if not hasattr(visual, "trunk"):
        norms_tokens = visual.attn_pool is None and not visual.final_ln_after_pool
        blocks = list(visual.transformer.resblocks)
        tower = Tower(visual.conv1, visual.class_embedding, visual.positional_embedding, visual.ln_pre, blocks,
                      visual.ln_post if norms_tokens else None, rope=None)
    else:
        visual.set_input_size(vision["image_size"])
        trunk = visual.trunk
        for block in trunk.blocks:
            block.drop_path1 = block.drop_path2 = nn.Identity()
        rope = getattr(trunk, "rope", None)
        tower = Tower(trunk.patch_embed.proj, None if trunk.cls_token is None else nn.Parameter(trunk.cls_token[0, 0]),
                      nn.Parameter(trunk.pos_embed[0]), trunk.norm_pre, list(trunk.blocks),
                      None if isinstance(trunk.norm, nn.Identity) else trunk.norm,
                      rope=None if rope is None else rope.get_embed(trunk.patch_embed.grid_size))
    return tower._replace(blocks=tower.blocks[:-1]) if vision["output"] == "penultimate" else tower


class VisionEntry(nn.Module):
    """Pixels to patch tokens: normalise, patch projection, class token, positions."""

    def __init__(self, tower: Tower, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.patches, self.norm, self.class_embedding = tower.patches, tower.first_norm, tower.class_embedding
        # Sines and cosines are no weight: a plain attribute, which loading leaves as it is.
        self.positional_embedding = tower.positional_embedding if tower.positional_embedding.requires_grad else tower.positional_embedding.detach()
        self.mean, self.std = mean, std

    def forward(self, pixels: Tensor) -> Tensor:
        """Return tokens [B, I, width] of uint8 pixels [B, 3, S, S]."""
        dtype = self.patches.weight.dtype
        mean, std = (torch.tensor(values, device=pixels.device, dtype=torch.float32).view(1, 3, 1, 1) for values in (self.mean, self.std))
        tokens = self.patches(((pixels.float() / 255 - mean) / std).to(dtype)).flatten(2).transpose(1, 2)
        if self.class_embedding is not None:
            tokens = torch.cat([self.class_embedding.to(dtype).expand(len(tokens), 1, -1), tokens], dim=1)
        return cast("Tensor", self.norm(tokens + self.positional_embedding.to(tokens)))


class VisionBlock(nn.Module):
    """One of the tower's transformer blocks."""

    def __init__(self, block: nn.Module, rope: Tensor | None) -> None:
        super().__init__()
        self.block, self.rope = block, rope

    def forward(self, images: Tensor) -> Tensor:
        """[B, I, width] in and out."""
        return cast("Tensor", self.block(images) if self.rope is None else self.block(images, rope=self.rope.to(images)))


class VisionExit(nn.Module):
    """The tower's last norm, the projection into the text width, and the vector that marks image rows."""

    def __init__(self, tower: Tower, text_width: int) -> None:
        super().__init__()
        width = tower.patches.out_channels
        self.norm = nn.Identity() if tower.last_norm is None else tower.last_norm
        self.fresh_norm = nn.LayerNorm(width) if tower.last_norm is None else nn.Identity()
        self.projection, self.kind = nn.Linear(width, text_width), nn.Embedding(1, text_width)

    def forward(self, images: Tensor) -> Tensor:
        """[B, I, width] in, [B, I, D] out."""
        return cast("Tensor", self.projection(self.fresh_norm(self.norm(images))) + self.kind.weight)


class SelfAttention(nn.Module):
    """Attention among the rows of a caption."""

    def __init__(self, config: FlmScaleConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.qkv, self.out = nn.Linear(config.hidden_size, 3 * config.hidden_size), nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, rows: Tensor, visible: Tensor, cache: EncoderDecoderCache | None, layer: int) -> Tensor:
        """visible: [B, L, positions].   cache: of what stands before the rows; gets theirs too."""
        q, *new = (part.transpose(1, 2) for part in self.qkv(rows).unflatten(-1, (self.heads, 3, -1)).unbind(-2))
        keys, values = new if cache is None else cache.self_attention_cache.update(*new, layer)
        return cast("Tensor", self.out(attend(q, keys, values, visible)))


class CrossAttention(nn.Module):
    """Attention to the picture, or from reconstruction queries to both streams."""

    def __init__(self, config: FlmScaleConfig) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.query, self.key_value, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def keys_values(self, memory: Tensor) -> KeysValues:
        """Return keys and values of what is looked at, [B, positions, D]."""
        keys, values = (part.transpose(1, 2) for part in self.key_value(memory).unflatten(-1, (self.heads, 2, -1)).unbind(-2))
        return keys, values

    def forward(self, rows: Tensor, keys_values: KeysValues, visible: Tensor | None = None) -> Tensor:
        """visible: [B, L, positions]; None shows everything."""
        q = self.query(rows).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return cast("Tensor", self.out(attend(q, *keys_values, visible)))


def attend(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None) -> Tensor:
    """Return [B, L, D] of heads [B, H, L, d]; what `visible` does not name is as if it were not there."""
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=None if visible is None else visible[:, None]).transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    """Linear to four times the width, GELU, linear back."""

    def __init__(self, config: FlmScaleConfig) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(config.hidden_size, 4 * config.hidden_size), nn.Linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, rows: Tensor) -> Tensor:
        """Each row by itself."""
        return cast("Tensor", self.down(F.gelu(self.up(rows))))


class Residual(nn.Module):
    """A layer of residual sums: normalised before each sublayer ('pre') or after the sum ('post')."""

    def __init__(self, config: FlmScaleConfig) -> None:
        super().__init__()
        self.is_pre = config.norm == "pre"
        self.mlp_norm, self.mlp = nn.LayerNorm(config.hidden_size), Mlp(config)

    def add(self, rows: Tensor, norm: nn.Module, sublayer: nn.Module, *inputs: Any) -> Tensor:  # noqa: ANN401 - whatever the sublayer wants
        """Return rows + sublayer(rows)."""
        if self.is_pre:
            return cast("Tensor", rows + sublayer(norm(rows), *inputs))
        return cast("Tensor", norm(rows + sublayer(rows, *inputs)))


class StreamLayer(Residual):
    """Self-attention, attention to the picture (in fusion layers), MLP."""

    def __init__(self, config: FlmScaleConfig, *, fuses: bool) -> None:
        super().__init__(config)
        self.self_norm, self.self_attention = nn.LayerNorm(config.hidden_size), SelfAttention(config)
        self.image_norm = nn.LayerNorm(config.hidden_size) if fuses else None
        self.image_attention = CrossAttention(config) if fuses else None

    def forward(self, rows: Tensor, visible: Tensor, images: Tensor | None, cache: EncoderDecoderCache | None, layer: int) -> Tensor:
        """images: [B, I, D], or None where the cache has their keys and values."""
        rows = self.add(rows, self.self_norm, self.self_attention, visible, cache, layer)
        if self.image_attention is not None and self.image_norm is not None:
            rows = self.add(rows, self.image_norm, self.image_attention, self._look(images, cache, layer))
        return self.add(rows, self.mlp_norm, self.mlp)

    def _look(self, images: Tensor | None, cache: EncoderDecoderCache | None, layer: int) -> KeysValues:
        assert self.image_attention is not None
        if cache is not None and cache.is_updated.get(layer):
            kept: Any = cache.cross_attention_cache.layers[layer]
            return kept.keys, kept.values
        assert images is not None
        keys, values = self.image_attention.keys_values(images)
        if cache is not None:
            cache.cross_attention_cache.update(keys, values, layer)
            cache.is_updated[layer] = True
        return keys, values


class ReconstructorLayer(Residual):
    """Attention from queries to both streams, then an MLP."""

    def __init__(self, config: FlmScaleConfig) -> None:
        super().__init__(config)
        self.span_norm, self.span_attention = nn.LayerNorm(config.hidden_size), CrossAttention(config)
        self.memory_norm = nn.LayerNorm(config.hidden_size) if self.is_pre else nn.Identity()

    def forward(self, queries: Tensor, streams: Tensor, visible: Tensor) -> Tensor:
        """queries: [B, L, D].   streams: [2B, L, D], forward then reverse.   visible: [B, L, 2L]."""
        memory = self.memory_norm(torch.cat(streams.chunk(2), dim=1))
        queries = self.add(queries, self.span_norm, self.span_attention, self.span_attention.keys_values(memory), visible)
        return self.add(queries, self.mlp_norm, self.mlp)


class TextEntry(nn.Module):
    """Token and position vectors; queries are a mask vector and a position."""

    def __init__(self, config: FlmScaleConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.query = nn.Embedding(1, config.hidden_size) if config.objective == "flm" else None
        self.norm = nn.LayerNorm(config.hidden_size) if config.norm == "post" else nn.Identity()

    def forward(self, ids: Tensor | None, positions: Tensor) -> Tensor:
        """Return rows [B, L, D]; those of the queries where there are no ids."""
        first = self.tokens(ids) if ids is not None else cast("nn.Embedding", self.query).weight
        return cast("Tensor", self.norm(first + self.positions(positions)))


class FusionEntry(nn.Module):
    """Between the stages: one linear for all rows, and a vector that tells the streams and the queries apart."""

    def __init__(self, config: FlmScaleConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.hidden_size, config.hidden_size)
        self.kinds = nn.Embedding(3 if config.objective == "flm" else 1, config.hidden_size)

    def forward(self, rows: Tensor, kinds: list[int]) -> Tensor:
        """kinds: of each part of the batch, which are of one size; 0 forward, 1 reverse, 2 queries."""
        kind = self.kinds.weight[kinds].repeat_interleave(len(rows) // len(kinds), dim=0)
        return cast("Tensor", self.linear(rows) + kind[:, None])


class Head(nn.Module):
    """Linear, GELU, norm, decoder."""

    def __init__(self, config: FlmScaleConfig) -> None:
        super().__init__()
        self.entry_norm = nn.LayerNorm(config.hidden_size) if config.norm == "pre" else nn.Identity()
        self.linear, self.norm = nn.Linear(config.hidden_size, config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, rows: Tensor) -> Tensor:
        """Return float32 logits [B, L, V] of rows [B, L, D]."""
        return cast("Tensor", self.decoder(self.norm(F.gelu(self.linear(self.entry_norm(rows))))).float())


class FlmScaleForCausalLM(PreTrainedModel, GenerationMixin):
    """A picture's caption, token by token from the left; for FLM also any hidden span from both of its sides (`reconstruct`)."""

    config_class = FlmScaleConfig
    _tied_weights_keys = {"head.decoder.weight": "text_entry.tokens.weight"}  # noqa: RUF012 - transformers' way
    _no_split_modules = ["VisionBlock", "StreamLayer", "ReconstructorLayer"]  # noqa: RUF012

    def __init__(self, config: FlmScaleConfig) -> None:
        super().__init__(config)
        # On a device of its own, because loading would leave the values of rotary positions, which are in no file, on the meta device.
        with torch.device("cpu"):
            tower = build_tower(config.vision)
        self.vision_entry = VisionEntry(tower, mean=config.image_mean, std=config.image_std)
        for i, block in enumerate(tower.blocks):
            self.add_module(f"vision_{i}", VisionBlock(block, tower.rope))
        self.vision_exit, self.text_entry = VisionExit(tower, config.hidden_size), TextEntry(config)
        for stage in ("bottom", "fusion"):
            depth = getattr(config, f"{stage}_layers")
            first_read = depth - getattr(config, f"reconstructor_{stage}_layers") if config.objective == "flm" else depth
            for i in range(depth):
                layer = nn.ModuleDict({"streams": StreamLayer(config, fuses=stage == "fusion")})
                if i >= first_read:
                    layer["reconstructor"] = ReconstructorLayer(config)
                self.add_module(f"{stage}_{i}", layer)
        self.fusion_entry, self.head = FusionEntry(config), Head(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the table of token vectors."""
        return self.text_entry.tokens

    def get_output_embeddings(self) -> nn.Module:
        """Return the decoder."""
        return self.head.decoder

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Return the rows [B, I, D] that the text looks at. pixel_values: uint8 [B, 3, S, S], as FlmScaleImageProcessor gives them."""
        if pixel_values.dtype != torch.uint8:
            raise ValueError(f"pixel_values are {pixel_values.dtype}, and the model normalises bytes itself; use FlmScaleImageProcessor")
        images = self.vision_entry(pixel_values)
        for block in (layer for layer in self.children() if isinstance(layer, VisionBlock)):
            images = block(images)
        return cast("Tensor", self.vision_exit(images))

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None, *, attention_mask: Tensor | None = None, labels: Tensor | None = None,
                past_key_values: EncoderDecoderCache | None = None, image_rows: Tensor | None = None, logits_to_keep: int = 0,
                use_cache: bool | None = None, return_dict: bool | None = None) -> CausalLMOutputWithPast:  # noqa: ARG002 - generate passes them
        """Return logits [B, L, V]: of the next token in the forward stream, or for MLM of each token itself, which has seen the whole caption.

        input_ids: [B, L] BOS, tokens, EOS; with past_key_values those behind it.   attention_mask: [B, positions], 1 where there is a token.
        labels: [B, L] the ids, -100 where there is no loss.   image_rows: of `encode_images`, instead of pixels.
        """
        if image_rows is None and pixel_values is not None:
            image_rows = self.encode_images(pixel_values)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        size = input_ids.shape[1]
        valid = torch.ones_like(input_ids[:, :1]).expand(-1, past + size) if attention_mask is None else attention_mask
        valid = valid.bool()
        positions = (valid.cumsum(-1) - 1).clamp(min=0)[:, past:]
        places = torch.arange(past + size, device=input_ids.device)
        visible = valid[:, None].expand(-1, size, -1)
        if self.config.objective != "mlm":
            visible = visible & (places <= places[past:, None])
        visible = visible | (places == places[past:, None])  # a padded row sees itself, so that it is finite
        rows, _ = self._read(self.text_entry(input_ids, positions), visible, image_rows, kinds=[0], cache=past_key_values)
        logits = self.head(rows[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            shift = int(self.config.objective != "mlm")
            loss = F.cross_entropy(logits[:, : size - shift].flatten(0, 1), labels[:, shift:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def generate(self, inputs: Tensor | None = None, *, pixel_values: Tensor, **options: Any) -> Any:  # type: ignore[override]  # noqa: ANN401
        """Return the ids of a caption a picture, with BOS and EOS; all options of transformers' generate.

        Raises ValueError for MLM, which has no stream that reads from the left.
        """
        if self.config.objective == "mlm":
            raise ValueError("objective 'mlm' has no stream that reads from the left, so it cannot say a caption; use flm, ar or prefix_lm")
        if options.get("use_cache", True):
            options.setdefault("past_key_values", EncoderDecoderCache(DynamicCache(), DynamicCache()))
        mixin: Any = super()
        with torch.no_grad():
            return mixin.generate(inputs, image_rows=self.encode_images(pixel_values), **options)

    def reconstruct(self, pixel_values: Tensor, input_ids: Tensor, spans: Tensor | None = None, *, attention_mask: Tensor | None = None) -> Tensor:
        """Return logits [B, L, V] of every token from what is left and right of the span that hides it; of BOS and EOS they mean nothing.

        spans: [B, L, 2] first and last hidden position of each token's span, BOS being at 0; without, each token alone is hidden.
        attention_mask: [B, L], 1 where there is a token; padding stands on the right.   Raises ValueError for what is not an FLM.
        """
        if self.config.objective != "flm":
            raise ValueError(f"a model of objective '{self.config.objective}' has no reconstructor; only flm has one")
        valid = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).bool()[:, None]
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        first, last = (places[:, None],) * 2 if spans is None else (spans[..., :1], spans[..., 1:])
        left, right = places <= places[:, None], places >= places[:, None]
        itself = left & right
        read = torch.cat([valid & (places < first), valid & (places > last)], dim=-1)
        text = self.text_entry(input_ids, places).repeat(2, 1, 1)
        queries = self.text_entry(None, places).expand(len(input_ids), -1, -1)
        _, queries = self._read(text, torch.cat([valid & left | itself, valid & right | itself]), self.encode_images(pixel_values).repeat(2, 1, 1),
                                kinds=[0, 1], queries=queries, read=read)
        return cast("Tensor", self.head(queries))

    def _read(self, rows: Tensor, visible: Tensor, images: Tensor | None, *, kinds: list[int], cache: EncoderDecoderCache | None = None,
              queries: Tensor | None = None, read: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return what the text layers make of the streams' rows [S*B, L, D], and of the queries that read them. kinds: the S streams."""
        config = self.config
        names = [f"bottom_{i}" for i in range(config.bottom_layers)] + [f"fusion_{i}" for i in range(config.fusion_layers)]
        for number, name in enumerate(names):
            if number == config.bottom_layers:
                rows = self.fusion_entry(rows, kinds)
                queries = None if queries is None else self.fusion_entry(queries, [2])
            layer = cast("nn.ModuleDict", getattr(self, name))
            rows = layer["streams"](rows, visible, images, cache, number)
            if queries is not None and "reconstructor" in layer:
                queries = layer["reconstructor"](queries, rows, read)
        return rows, queries


class FlmScaleImageProcessor(ImageProcessingMixin):
    """Pictures to bytes: the centre square, scaled; transparency is laid on white. As flm_scale reads them in training."""

    model_input_names = ["pixel_values"]  # noqa: RUF012 - transformers' way

    def __init__(self, image_size: int = 224, **others: Any) -> None:  # noqa: ANN401 - transformers' own values
        """image_size: side in pixels."""
        super().__init__(**others)
        self.image_size = image_size

    def __call__(self, images: Image.Image | Sequence[Image.Image], **_: Any) -> BatchFeature:  # noqa: ANN401
        """Return pixel_values: uint8 [B, 3, image_size, image_size]."""
        pictures = [images] if isinstance(images, Image.Image) else images
        squares = [np.asarray(centre_square(on_white(picture), self.image_size)).transpose(2, 0, 1) for picture in pictures]
        return BatchFeature({"pixel_values": torch.from_numpy(np.stack(squares))})


def on_white(image: Image.Image) -> Image.Image:
    """Return the image as RGB, with whatever is transparent laid on white."""
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey to white instead of scaling it
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours)
    return image.convert("RGB")


def centre_square(image: Image.Image, size: int) -> Image.Image:
    """Cut at whole pixels, then scale (bicubic, antialiased)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


# So that save_pretrained puts a copy of this file beside what it saves.
FlmScaleConfig.register_for_auto_class("AutoConfig")
FlmScaleForCausalLM.register_for_auto_class("AutoModelForCausalLM")
FlmScaleImageProcessor.register_for_auto_class("AutoImageProcessor")
