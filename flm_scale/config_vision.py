"""The vision towers of a Run. As config.py: frozen pydantic models, wrong values are a ConfigError, nothing imports torch."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from flm_scale.errors import ConfigError
from flm_scale.section import Section


class TemporalConfig(Section):
    """Attention over the frames of a clip, in every block of the tower (SimVLG, arXiv 2310.03291)."""

    width: int = Field(256, ge=1)
    """Of queries and keys; values are the rows themselves."""
    heads: int = Field(8, ge=1)
    position: bool = False
    """Let frames say when they are, in queries and keys; without it a clip's rows do not depend on the order of its frames."""

    @model_validator(mode="after")
    def _sizes_divide(self) -> Self:
        if self.width % self.heads:
            raise ConfigError(f"vision.temporal.width ({self.width}) must be a multiple of vision.temporal.heads ({self.heads}); change one of them")
        return self


class VisionSection(Section):
    """What every vision tower has."""

    image_size: int = Field(224, ge=8)
    """Side of the square picture, in pixels."""
    frames: int = Field(1, ge=1)
    """Frames of a clip that are seen, evenly spread; 1 sees pictures, or the frame in a clip's middle."""
    temporal: TemporalConfig = TemporalConfig()
    """How frames of a clip see each other; without a clip it is not built."""
    trainable: bool = True
    """False freezes the tower; the projection into the text width and what sees a clip's frames together always train."""
    output: Literal["penultimate", "final"] = "penultimate"
    """Which block's tokens the text looks at; the published FLM leaves the last block out."""
    merged: tuple[Annotated[int, Field(ge=0)], ...] = Field((), strict=False)  # JSON has lists alone
    """Rows of a picture that merge behind each block, or one number for all blocks; none, or 0, leaves every row (docs/simvlg.md)."""

    @model_validator(mode="after")
    def _frames_keep_their_places(self) -> Self:
        if self.frames > 1 and any(self.merged):
            raise ConfigError(f"vision.merged ({self.merged}) does not go with vision.frames ({self.frames}): frames are compared place by place; "
                              "leave one of them out")
        return self


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
    frames: Literal[1] = 1
    trainable: Literal[False] = False
    """Its batch norms hold what they learnt in pretraining, so that a picture's rows never depend on the others of its batch."""
    output: Literal["final"] = "final"


Vision = Annotated[OpenClipVisionConfig | SmallVisionConfig | ConvNetConfig, Field(discriminator="kind")]
