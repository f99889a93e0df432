"""The vision towers of a Run. As config.py: frozen pydantic models, wrong values are a ConfigError, nothing imports torch."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from flm_scale.errors import ConfigError
from flm_scale.section import Section


class VisionSection(Section):
    """What every vision tower has."""

    image_size: int = Field(224, ge=8)
    """Side of the square picture, in pixels."""
    trainable: bool = True
    """False freezes the tower; the projection into the text width always trains."""
    output: Literal["penultimate", "final"] = "penultimate"
    """Which block's tokens the text looks at; the published FLM leaves the last block out."""
    merged: tuple[Annotated[int, Field(ge=0)], ...] = Field((), strict=False)  # JSON has lists alone
    """Rows of a picture that merge behind each block, or one number for all blocks; none, or 0, leaves every row (docs/simvlg.md)."""


class OpenClipVisionConfig(VisionSection):
    """Any ViT that open_clip knows by name."""

    kind: Literal["open_clip"] = "open_clip"
    name: str = "ViT-B-32"
    """open_clip's model name; `python -c 'import open_clip; print(open_clip.list_models())'` lists them."""
    pretrained: str = ""
    """A pretrained tag of open_clip (downloaded once) or a local weight file; empty starts from random."""


class SmallVisionConfig(VisionSection):
    """A ViT of any size, built from open_clip's blocks and always started from random."""

    kind: Literal["vit"] = "vit"
    patch_size: int = Field(8, ge=1)
    width: int = Field(128, ge=1)
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)

    @model_validator(mode="after")
    def _sizes_divide(self) -> Self:
        if self.width % self.heads:
            raise ConfigError(f"vision.width ({self.width}) must be a multiple of vision.heads ({self.heads}); change one of them")
        if self.image_size % self.patch_size:
            raise ConfigError(f"vision.image_size ({self.image_size}) must be a multiple of vision.patch_size ({self.patch_size})")
        if self.output == "penultimate" and self.layers < 2:
            raise ConfigError("vision.output 'penultimate' needs vision.layers (1) to be 2 or more; use 'final'")
        return self


class ConvNetConfig(VisionSection):
    """A convolutional network of timm, frozen: each place of its last feature map is an image row."""

    kind: Literal["convnet"] = "convnet"
    name: str = "resnet50"
    """timm's model name; `python -c 'import timm; print(timm.list_models())'` lists them."""
    pretrained: str = Field("in1k", min_length=1)
    """A pretrained tag of timm (downloaded once) or a local weight file; a frozen network cannot start from random."""
    trainable: Literal[False] = False
    """Its batch norms hold what they learnt in pretraining, so that a picture's rows never depend on the others of its batch."""
    output: Literal["final"] = "final"


Vision = Annotated[OpenClipVisionConfig | SmallVisionConfig | ConvNetConfig, Field(discriminator="kind")]
