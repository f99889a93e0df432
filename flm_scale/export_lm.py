"""An exported bridge for Hugging Face's transformers: what was trained, and where the frozen parts around it are.

`flm checkpoint export` (checkpoint/publish_lm.py) puts copies of this file and of export.py beside the weights, so that AutoModelForCausalLM loads
them where flm_scale is not installed. The language model is not among the weights, nor a frozen tower that comes from a file of open_clip's: they
are opened by their names, and must have the hashes of the run. Weights have the names that they have in a checkpoint.

Shapes: B captions, each with a picture of its own; L tokens; I rows of a picture in a tower or bridge, K of them as a prefix; H the language model's
width; D the bridge's.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name everyone knows
from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

# transformers copies what is imported this way along.
from .export import FlmScaleImageProcessor, Mlp, SelfAttention, Tower, VisionBlock, VisionEntry, attend, build_tower


class FlmScaleBridgeConfig(PreTrainedConfig):
    """Sizes of the bridge, and names and hashes of what stands on both sides of it."""

    model_type = "flm_scale_bridge"

    def __init__(self, *, hidden_size: int = 768, num_attention_heads: int = 12, tokens: Sequence[int] = (257, 29), protected: int = 1,
                 reducer: dict[str, Any] | None = None, tower_width: int = 768, lm_width: int = 768, vision: dict[str, Any] | None = None,
                 tower_hash: str = "", image_mean: Sequence[float] = (0.5, 0.5, 0.5), image_std: Sequence[float] = (0.5, 0.5, 0.5),
                 language_model: str = "", language_model_revision: str = "", language_model_file: str = "", language_model_hash: str = "",
                 language_model_dtype: str = "float32", prompt_ids: Sequence[int] = (), caption_tokens: int = 31,
                 **others: Any) -> None:  # noqa: ANN401 - transformers' own values
        """tokens: rows of a picture in front of the first layer and behind each.   protected: of them that never merge.

        tower_hash: empty where the tower is among the weights.   language_model: folder or name on the hub; revision and file (GGUF) may be empty.
        prompt_ids: what every caption begins with.   caption_tokens: longest caption, EOS counted.
        """
        self.hidden_size, self.num_attention_heads, self.tokens, self.protected = hidden_size, num_attention_heads, list(tokens), protected
        self.reducer, self.tower_width, self.lm_width = reducer or {"kind": "none"}, tower_width, lm_width
        self.vision, self.tower_hash = vision or {"kind": "open_clip", "name": "ViT-B-32", "image_size": 224, "output": "penultimate"}, tower_hash
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.language_model, self.language_model_revision, self.language_model_file = language_model, language_model_revision, language_model_file
        self.language_model_hash, self.language_model_dtype = language_model_hash, language_model_dtype
        self.prompt_ids, self.caption_tokens = list(prompt_ids), caption_tokens
        super().__init__(**others)


class BridgeEntry(nn.Module):
    """A norm for the tower's rows, the reducer, the linear into the bridge, positions."""

    def __init__(self, config: FlmScaleBridgeConfig) -> None:
        super().__init__()
        self.reducer, self.protected = config.reducer, config.protected
        factor = self.reducer["factor"] ** 2 if self.reducer["kind"] == "unshuffle" else 1
        self.tower_norm, self.projection = nn.LayerNorm(config.tower_width), nn.Linear(factor * config.tower_width, config.hidden_size)
        self.positional_embedding = nn.Parameter(torch.zeros(config.tokens[0], config.hidden_size))
        self.kind_embedding, self.norm = nn.Parameter(torch.zeros(config.hidden_size)), nn.LayerNorm(config.hidden_size)

    def forward(self, images: Tensor) -> Tensor:
        """[B, I, tower_width] in, [B, I', D] out."""
        rows = self.reduced(self.tower_norm(images))
        return cast("Tensor", self.norm(self.projection(rows) + self.positional_embedding + self.kind_embedding))

    def reduced(self, rows: Tensor) -> Tensor:
        """Return the rows that the first layer gets."""
        prefix, patches = rows[:, :self.protected], rows[:, self.protected:]
        side = int(patches.shape[1] ** 0.5)
        match self.reducer["kind"]:
            case "pool":
                grid = patches.transpose(1, 2).unflatten(2, (side, side))
                patches = F.adaptive_avg_pool2d(grid, (self.reducer["rows"], self.reducer["columns"])).flatten(2).transpose(1, 2)
            case "unshuffle":
                factor = self.reducer["factor"]
                grid = patches.unflatten(1, (side // factor, factor, side // factor, factor)).transpose(2, 3)
                prefix, patches = prefix.repeat(1, 1, factor ** 2), grid.flatten(3).flatten(1, 2)
            case "drop":
                patches = patches[:, self.reducer["places"]]
        return torch.cat([prefix, patches], dim=1)


class BridgeAttention(nn.Module):
    """The first half of a layer: attention, then which rows merge."""

    def __init__(self, config: FlmScaleBridgeConfig, *, merged: int) -> None:
        super().__init__()
        self.merged, self.protected, self.proportional = merged, config.protected, bool(config.reducer.get("proportional"))
        self.self_attention, self.self_norm = SelfAttention(cast("Any", config)), nn.LayerNorm(config.hidden_size)

    def forward(self, rows: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows [B, I, D] and the slot of each, [B, I]. sizes: patches that a row stands for."""
        q, k, v = (part.transpose(1, 2) for part in self.self_attention.qkv(rows).unflatten(-1, (self.self_attention.heads, 3, -1)).unbind(-2))
        bias = sizes.log().to(q)[:, None] if self.proportional else None
        rows = self.self_norm(rows + self.self_attention.out(attend(q, k, v, bias)))
        return rows, self.slots(k.mean(1).float())

    def slots(self, keys: Tensor) -> Tensor:
        """Return where each row goes: [protected; even places that stay; odd places], as in training (ToMe, arXiv 2210.09461)."""
        places, protected = torch.arange(keys.shape[1], device=keys.device), self.protected
        even, odd = slice(protected + protected % 2, None, 2), slice(protected | 1, None, 2)
        first_odd = protected + len(places[even]) - self.merged
        unit = F.normalize(keys, dim=-1)
        best, partner = (unit[:, even] @ unit[:, odd].transpose(1, 2)).max(-1)
        goes = best.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) < self.merged
        slots = places.repeat(len(keys), 1)
        slots[:, even] = torch.where(goes, first_odd + partner, protected - 1 + (~goes).cumsum(-1))
        slots[:, odd] = first_odd + torch.arange(len(places[odd]), device=keys.device)
        return slots


class BridgeMlp(nn.Module):
    """The second half of a layer: rows of one slot become their mean; then the MLP."""

    def __init__(self, config: FlmScaleBridgeConfig, *, num_tokens: int) -> None:
        """num_tokens: rows that are left."""
        super().__init__()
        self.num_tokens, self.weighted = num_tokens, bool(config.reducer.get("weighted"))
        self.mlp, self.mlp_norm = Mlp(cast("Any", config)), nn.LayerNorm(config.hidden_size)

    def forward(self, rows: Tensor, sizes: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows [B, num_tokens, D] and their sizes."""
        if self.num_tokens < rows.shape[1]:
            member_sizes = sizes[:, None].where(slots[:, None] == torch.arange(self.num_tokens, device=slots.device)[:, None], 0)
            shares = member_sizes if self.weighted else member_sizes.clamp(max=1)
            rows, sizes = (shares / shares.sum(-1, keepdim=True)).to(rows) @ rows, member_sizes.sum(-1)
        return self.mlp_norm(rows + self.mlp(rows)), sizes


class BridgeExit(nn.Module):
    """The linear to the language model's width."""

    def __init__(self, config: FlmScaleBridgeConfig) -> None:
        super().__init__()
        self.projection = nn.Linear(config.hidden_size, config.lm_width)

    def forward(self, rows: Tensor) -> Tensor:
        """[B, K, D] in, [B, K, H] out."""
        return cast("Tensor", self.projection(rows))


class FlmScaleBridgeForCausalLM(PreTrainedModel):
    """A picture's caption, said by a language model that has never learned to see."""

    config_class = FlmScaleBridgeConfig
    main_input_name = "pixel_values"

    def __init__(self, config: FlmScaleBridgeConfig) -> None:
        super().__init__(config)
        if not config.tower_hash:
            with torch.device("cpu"):  # as in export.py: rotary positions are in no file
                tower = build_tower(config.vision)
            for name, layer in self.layers_of(tower).items():
                self.add_module(name, layer)
        self.bridge_entry = BridgeEntry(config)
        for i, (before, after) in enumerate(pairwise(config.tokens)):
            self.add_module(f"bridge_{i}_attention", BridgeAttention(config, merged=before - after))
            self.add_module(f"bridge_{i}_mlp", BridgeMlp(config, num_tokens=after))
        self.bridge_exit = BridgeExit(config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - transformers' signature
        """Load the bridge, and then the frozen parts by their names. language_model: another folder that the same language model is in.

        Raises ValueError when one of them is not there, or another one than the bridge was trained with.
        """
        loaded = super().from_pretrained(*args, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.frozen_tower, model.frozen_lm  # noqa: B018 - opened here, where that can fail
        return loaded

    @cached_property
    def frozen_tower(self) -> dict[str, nn.Module]:
        """The tower's layers: those among the weights, or opened by name and then no part of this module's weights."""
        if not self.config.tower_hash:
            return {name: layer for name, layer in self.named_children() if name.startswith("vision_")}
        vision = self.config.vision
        try:
            layers = self.layers_of(build_tower(vision))
        except Exception as error:  # open_clip raises nothing narrower
            raise ValueError(f"vision tower {vision['name']} with the weights '{vision['pretrained']}' cannot be had ({first_line(error)}); fetch it "
                             "where there is a connection, or name its file: from_pretrained(FOLDER, vision={... 'pretrained': FILE})") from error
        found = tower_hash((f"{name}.{key}", weight) for name, layer in layers.items() for key, weight in layer.named_parameters())
        check_hash(f"vision tower {vision['pretrained']}", found, self.config.tower_hash)
        return {name: layer.requires_grad_(False).to(self.device, self.dtype) for name, layer in layers.items()}

    @cached_property
    def frozen_lm(self) -> Any:  # noqa: ANN401 - of any of transformers' classes
        """The language model; no part of this module's weights."""
        config, options = self.config, {}
        if config.language_model_file:
            options = {"gguf_file": config.language_model_file, "quantization_config": GgufConfig(dequantize=True)}
        try:
            model = AutoModelForCausalLM.from_pretrained(config.language_model, revision=config.language_model_revision or "main",
                                                         dtype=config.language_model_dtype, **options)
        except (OSError, ValueError) as error:
            raise ValueError(f"language model '{config.language_model}' cannot be had ({first_line(error)}); give the folder that it is in: "
                             "from_pretrained(FOLDER, language_model=...)") from error
        digest = hashlib.sha256()
        for name, weight in sorted(model.named_parameters()):
            digest.update(name.encode() + weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        check_hash(f"language model {config.language_model}", digest.hexdigest(), config.language_model_hash)
        model.generation_config = GenerationConfig()  # its own may sample, or punish repetition
        # generate hands over a strided slice of the rows, for which torch copies the weights once a caption: gigabytes.
        model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
        return model.requires_grad_(False).eval().to(self.device)

    def layers_of(self, tower: Tower) -> dict[str, nn.Module]:
        """Return the layers that run a tower, by their names in a checkpoint."""
        return {"vision_entry": VisionEntry(tower, mean=self.config.image_mean, std=self.config.image_std),
                **{f"vision_{i}": VisionBlock(block, tower.rope) for i, block in enumerate(tower.blocks)}}

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Return the prefix [B, K, H] of pictures: uint8 [B, 3, S, S], as FlmScaleImageProcessor gives them."""
        if pixel_values.dtype != torch.uint8:
            raise ValueError(f"pixel_values are {pixel_values.dtype}, and the model normalises bytes itself; use FlmScaleImageProcessor")
        rows = pixel_values
        for layer in self.frozen_tower.values():
            rows = layer(rows)
        rows = self.bridge_entry(rows)
        sizes = torch.ones(rows.shape[:2], device=rows.device)
        for i in range(len(self.config.tokens) - 1):
            rows, slots = getattr(self, f"bridge_{i}_attention")(rows, sizes)
            rows, sizes = getattr(self, f"bridge_{i}_mlp")(rows, sizes, slots)
        return cast("Tensor", self.bridge_exit(rows))

    def forward(self, input_ids: Tensor, pixel_values: Tensor, *, attention_mask: Tensor | None = None,
                labels: Tensor | None = None) -> CausalLMOutputWithPast:
        """Return logits [B, L, V] of the next token. input_ids: [B, L] BOS, prompt, caption.   attention_mask: [B, L], 1 where there is a token.

        labels: [B, L] the ids, -100 where there is no loss.
        """
        rows, valid = self._behind_pictures(input_ids, pixel_values, attention_mask)
        logits = self.frozen_lm(inputs_embeds=rows, attention_mask=valid, use_cache=False, logits_to_keep=input_ids.shape[1]).logits.float()
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    @torch.no_grad()
    def generate(self, input_ids: Tensor | None = None, *, pixel_values: Tensor, **options: Any) -> Any:  # noqa: ANN401 - transformers' own
        """Return the ids of a caption a picture, EOS counted; all options of transformers' generate. input_ids: [B, L] for another prompt."""
        if input_ids is None:
            input_ids = torch.tensor([self.config.prompt_ids] * len(pixel_values), device=pixel_values.device)
        rows, valid = self._behind_pictures(input_ids, pixel_values, None)
        eos = self.config.eos_token_id
        standard = GenerationConfig(max_new_tokens=self.config.caption_tokens, do_sample=False, eos_token_id=eos, pad_token_id=eos)
        return self.frozen_lm.generate(inputs_embeds=rows, attention_mask=valid, generation_config=standard, **options)

    def _behind_pictures(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return embeddings [B, K + L, H] and which of them count."""
        tokens, prefix = self.frozen_lm.get_input_embeddings()(input_ids), self.encode_images(pixel_values)
        valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return torch.cat([prefix.to(tokens.dtype), tokens], dim=1), torch.cat([valid.new_ones(prefix.shape[:2]), valid], dim=1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Take the frozen parts along, to another device or precision."""
        super()._apply(fn, recurse)
        hidden = self.__dict__.get("frozen_tower", {}) if self.config.tower_hash else {}
        for part in [*hidden.values(), *filter(None, [self.__dict__.get("frozen_lm")])]:
            part._apply(fn)  # noqa: SLF001 - torch has no other way to do the same to two modules
        return self


def tower_hash(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Return the sha256 of a tower's weights by name, rounded to bfloat16: a run in that precision keeps no more of them."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights, key=lambda item: item[0]):
        digest.update(name.encode() + weight.detach().cpu().to(torch.bfloat16).contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_hash(part: str, found: str, expected: str) -> None:
    """Raise ValueError when a frozen part is another one than the bridge was trained with."""
    if found != expected:
        raise ValueError(f"{part} has weights with the sha256 {found[:12]}, and this bridge was trained with {expected[:12]}; name that one")


def first_line(error: Exception) -> str:
    """Return what an error says, in one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


# So that save_pretrained puts copies of both files beside what it saves.
FlmScaleBridgeConfig.register_for_auto_class("AutoConfig")
FlmScaleBridgeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
FlmScaleImageProcessor.register_for_auto_class("AutoImageProcessor")
