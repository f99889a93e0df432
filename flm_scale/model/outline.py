"""The layers of a Run on the meta device: every weight's shape and no weight, for what is counted before a model is bought (`flm plan`).

The text side is the real one. Of open_clip's own towers a stand-in is built from the size files that open_clip comes with, because
importing it takes longer than all the rest; timm's are built by open_clip. A frozen language model is transformers', without weights.
A test holds all of them against the real layers.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flm_scale.config import Run, TextConfig
from flm_scale.config_vision import OpenClipVisionConfig, SmallVisionConfig
from flm_scale.model.assemble import is_tied, language_builders, layer_builders, text_builders, tie
from flm_scale.model.frozen_lm import outline_frozen
from flm_scale.model.parts import Decoder, PlainParts, Shard
from flm_scale.model.vision import Tower, build_vision, tower_layers
from flm_scale.objectives.objective import Objective

# What the stand-in needs to know of a tower, and what does not change its weights.
STAND_IN_KNOWS = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio", "no_ln_pre", "attentional_pool", "final_ln_after_pool",
                  "attn_pooler_heads", "pool_type", "output_tokens"}


class ShapeParts(PlainParts):
    """Blocks with the shapes and marks of the first shard's (parallel/tensor.py), without a process group."""

    def __init__(self, num_shards: int) -> None:
        self.num_shards = num_shards

    def _mark(self, parameter: Tensor, *, dim: int, size: int) -> None:
        if self.num_shards > 1:
            parameter.shard = Shard(dim, 0, self.num_shards, size)  # type: ignore[attr-defined]

    def column_linear(self, size_in: int, size_out: int) -> nn.Module:
        """Return a linear to a share of the features."""
        linear = nn.Linear(size_in, size_out // self.num_shards)
        self._mark(linear.weight, dim=0, size=size_out)
        self._mark(linear.bias, dim=0, size=size_out)
        return linear

    def row_linear(self, size_in: int, size_out: int) -> nn.Module:
        """Return a linear from a share of the features."""
        linear = nn.Linear(size_in // self.num_shards, size_out)
        self._mark(linear.weight, dim=1, size=size_in)
        return linear

    def embedding(self, num_rows: int, size: int) -> nn.Module:
        """Return a table of a share of the rows, rounded up."""
        table = nn.Embedding(-(-num_rows // self.num_shards), size)
        self._mark(table.weight, dim=0, size=num_rows)
        return table

    def decoder(self, size: int, num_rows: int) -> nn.Module:
        """Return a decoder of a share of the vocabulary, rounded up."""
        decoder = Decoder(size, -(-num_rows // self.num_shards))
        self._mark(decoder.weight, dim=0, size=num_rows)
        self._mark(decoder.bias, dim=0, size=num_rows)
        return decoder


def named_outline(run: Run, objective: Objective) -> dict[str, nn.Module]:
    """Return the layers as `outline` does, untied, and with every weight's real name: open_clip builds its own towers too, in seconds."""
    with torch.device("meta"), _Unfilled():
        language_model = None if isinstance(run.text, TextConfig) else outline_frozen(run.text, precision=run.precision)
        builders = layer_builders(run, objective, ShapeParts(run.parallel.tensor), load_pretrained=False, language_model=language_model)
        return {name: build() for name, build in builders.items()}


def outline(run: Run, objective: Objective) -> nn.ModuleDict:
    """Return the layers by name, as one process of the run's tensor group holds them. They cannot be run."""
    parts = ShapeParts(run.parallel.tensor)
    with torch.device("meta"), _Unfilled():
        entry, *blocks, leave = _vision(run, parts)
        layers = {"vision_entry": entry, **{f"vision_{i}": block for i, block in enumerate(blocks)}}
        if isinstance(run.text, TextConfig):
            layers["vision_exit"] = leave
            builders = text_builders(run.text, objective, parts)
        else:
            builders = language_builders(run, run.text, objective, outline_frozen(run.text, precision=run.precision))
        layers |= {name: build() for name, build in builders.items()}
    if is_tied(run):
        tie(layers)
    return nn.ModuleDict(layers)


class _Unfilled(TorchFunctionMode):
    """Leaves new tables as they are. There is nothing to fill, and on the meta device torch loads its compiler for it: five seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401 - torch's signature
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **(kwargs or {}))


def _vision(run: Run, parts: ShapeParts) -> list[nn.Module]:
    sizes, text_width = _tower_sizes(run.vit), run.text.width if isinstance(run.text, TextConfig) else run.text.bridge.width
    if sizes is None or run.vision.image_size % sizes["patch_size"]:  # build_vision says what is wrong
        return build_vision(run.vit, text_width=text_width, parts=parts, load_pretrained=False)
    width, patch_size = sizes["width"], sizes["patch_size"]
    normed_behind_pooling = sizes.get("attentional_pool") or sizes.get("final_ln_after_pool")
    tower = Tower(
        patches=nn.Conv2d(3, width, patch_size, patch_size, bias=False), class_embedding=nn.Parameter(torch.empty(width)),
        positional_embedding=nn.Parameter(torch.empty(1 + (run.vision.image_size // patch_size) ** 2, width)),
        first_norm=nn.Identity() if sizes.get("no_ln_pre") else nn.LayerNorm(width),
        # torch's own block has the same weights.
        blocks=[nn.TransformerEncoderLayer(width, nhead=1, dim_feedforward=int(width * sizes.get("mlp_ratio", 4.0))) for _ in range(sizes["layers"])],
        last_norm=None if normed_behind_pooling else nn.LayerNorm(width), rope=None)
    return tower_layers(tower, run.vit, parts, text_width=text_width, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def _tower_sizes(config: OpenClipVisionConfig | SmallVisionConfig) -> dict[str, Any] | None:
    """Return the sizes of one of open_clip's own towers, or None for timm's and for one with something that the stand-in does not know."""
    if isinstance(config, SmallVisionConfig):
        return config.model_dump()
    package = find_spec("open_clip")
    path = Path(str(package and package.origin)).parent / "model_configs" / f"{config.name}.json"
    if not path.is_file():
        return None
    sizes: dict[str, Any] = json.loads(path.read_text())["vision_cfg"]
    return sizes if sizes.keys() <= STAND_IN_KNOWS and isinstance(sizes["layers"], int) else None
