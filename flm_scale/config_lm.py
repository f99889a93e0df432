"""Sections of a Run as SimVLG has them: a bridge from pictures into a frozen language model, what makes its image rows fewer, and clips.

As config.py: frozen pydantic models, wrong values are a ConfigError, nothing imports torch.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from flm_scale.errors import ConfigError
from flm_scale.section import Section


class MergeConfig(Section):
    """Bipartite merging: in every layer the rows that resemble another one most are merged into it (ToMe, arXiv 2210.09461)."""

    kind: Literal["merge"] = "merge"
    merged: tuple[Annotated[int, Field(ge=0)], ...] = Field((19,), min_length=1, strict=False)  # JSON has lists alone
    """Rows that go in each layer, or one number for all of them; never more than half of those that may merge."""
    weighted: bool = True
    """A merged row is the mean of the patches that it stands for; False takes the mean of the rows, as SimVLG was published."""
    proportional: bool = False
    """A row is attended to as if each patch that it stands for were there: the logarithm of its size is added to its keys' logits."""


class PoolConfig(Section):
    """Average pooling of the grid of patches, in front of the first layer."""

    kind: Literal["pool"] = "pool"
    rows: int = Field(4, ge=1)
    columns: int = Field(7, ge=1)


class UnshuffleConfig(Section):
    """Squares of neighbouring patches become one row of all their features, in front of the first layer."""

    kind: Literal["unshuffle"] = "unshuffle"
    factor: int = Field(2, ge=1)
    """Patches on a side of a square."""


class DropConfig(Section):
    """Patches at random places go in front of the first layer; the same ones of every picture, drawn from the run's seed."""

    kind: Literal["drop"] = "drop"
    kept: int = Field(28, ge=1)
    """Patches that stay."""


class NoReducerConfig(Section):
    """Every row stays, up to the language model."""

    kind: Literal["none"] = "none"


Reducer = Annotated[MergeConfig | PoolConfig | UnshuffleConfig | DropConfig | NoReducerConfig, Field(discriminator="kind")]


class BridgeConfig(Section):
    """The transformer between the vision tower and the language model: BERT's encoder, which reads image rows and makes them fewer."""

    width: int = Field(768, ge=1)
    heads: int = Field(12, ge=1)
    layers: int = Field(12, ge=0)
    """0 leaves a norm, a linear and positions in front of the linear to the language model's width."""
    reducer: Reducer = MergeConfig()
    pretrained: str = ""
    """Folder, or name on the Hugging Face hub (downloaded once), of a BERT or RoBERTa that encoder layers and positions start from."""

    @model_validator(mode="after")
    def _sizes_divide(self) -> Self:
        if self.width % self.heads:
            raise ConfigError(f"bridge.width ({self.width}) must be a multiple of bridge.heads ({self.heads}); change one of them")
        return self


class LanguageModelConfig(Section):
    """A causal language model of the Hugging Face hub whose weights never change, and the bridge into it (SimVLG, arXiv 2310.03291)."""

    kind: Literal["language_model"] = "language_model"
    name: str = Field(min_length=1)
    """Folder as transformers' save_pretrained writes it, or name on the Hugging Face hub (downloaded once)."""
    revision: str = ""
    """Branch, tag or commit of a model of the hub; empty takes its main branch, which may change."""
    weights_hash: str = ""
    """When set, its weights must have this sha256; run.json always records it, and no checkpoint holds them."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of its weights and activations; 'auto' is that of the run."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Implementation of its attention: torch's, transformers' own, or that of the package flash-attn."""
    gguf_file: str = ""
    """A GGUF file of the folder or model, which is read instead of safetensors and unpacked into `dtype`."""
    max_length: int = Field(32, ge=3)
    """Longest caption in tokens, with its first token and EOS; longer ones are cut and keep their EOS."""
    bridge: BridgeConfig = BridgeConfig()
