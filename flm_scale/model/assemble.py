"""The model of a Run: a flat list of named layers, its initial weights, and what each weight is for the optimizer.

The list is the whole model. Running it is `for layer in layers: state = layer(state)`, here or cut into pipeline stages.
"""

import hashlib
import re
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flm_scale.batch import State
from flm_scale.config import OpenClipVisionConfig, Run, TextConfig
from flm_scale.model.parts import Parts, PlainParts
from flm_scale.model.text import FusionEntry, Head, TextEntry, TextLayer
from flm_scale.model.vision import build_vision
from flm_scale.objectives.objective import Objective

# Parameters that are tables of vectors rather than matrices that multiply; like 1-d tensors they are not decayed.
TABLES = re.compile(r"^text_entry\.|\.kinds?\.weight$|_embedding$")
FRESH_VISION = re.compile(r"^vision_exit\.(projection|kind)\.")


class VisionLanguageModel(nn.Module):
    """The layers in their order, each under its name."""

    def __init__(self, layers: dict[str, nn.Module], *, recompute: bool) -> None:
        super().__init__()
        self.layers, self.recompute = nn.ModuleDict(layers), recompute
        self.pretrained: frozenset[str] = frozenset()
        """Names, within `layers`, of weights that do not start from random; the optimizer trains them slower."""

    def trunk(self, state: State) -> State:
        """Run everything but the head: pixels in, rows of every stream, query and image out."""
        for name, layer in self.layers.items():
            if name != "head":
                # A state that needs no gradient yet (pixels, a frozen tower) has nothing to save.
                recompute = self.recompute and state.rows.requires_grad
                state = checkpoint(layer, state, use_reentrant=False) if recompute else layer(state)
        return state

    def forward(self, state: State) -> tuple[Tensor, Tensor]:
        """Return (loss [R], correct [R]) of the state's targets, the fields of batch.Scores."""
        scores: tuple[Tensor, Tensor] = self.layers["head"](self.trunk(state))
        return scores

    @property
    def head(self) -> Head:
        """The last layer."""
        return cast("Head", self.layers["head"])


def build_model(run: Run, objective: Objective, *, parts: Parts | None = None, load_pretrained: bool = True) -> VisionLanguageModel:
    """Return the model of a run with its initial weights: pretrained where named, else drawn from the seed and each weight's name.

    load_pretrained: False where a run's own weights will fill the model, so that no download is needed.
    """
    vision = build_vision(run.vision, text_width=run.text.width, load_pretrained=load_pretrained)
    names = ["vision_entry", *(f"vision_{i}" for i in range(len(vision) - 2)), "vision_exit"]
    layers = dict(zip(names, vision, strict=True)) | text_layers(run.text, objective, parts or PlainParts())
    model = VisionLanguageModel(layers, recompute=run.recompute)
    if isinstance(run.vision, OpenClipVisionConfig) and run.vision.pretrained:
        model.pretrained = frozenset(name for name, _ in model.layers.named_parameters()
                                     if name.startswith("vision_") and not FRESH_VISION.search(name))
    with torch.no_grad():
        for name, parameter in model.layers.named_parameters():
            if name not in model.pretrained:
                initialize(parameter, name=name, seed=run.seed)
    return model


def text_layers(config: TextConfig, objective: Objective, parts: Parts) -> dict[str, nn.Module]:
    """Return the text side of the list. A shallow reconstructor stands beside the last layers of each stage."""
    layers: dict[str, nn.Module] = {"text_entry": TextEntry(config, parts, has_queries=objective.has_queries)}
    stages = (("bottom", config.bottom_layers, config.reconstructor_bottom_layers),
              ("fusion", config.fusion_layers, config.reconstructor_fusion_layers))
    for stage, depth, reconstructor_depth in stages:
        if stage == "fusion":
            layers["fusion_entry"] = FusionEntry(config, num_streams=objective.num_streams, has_queries=objective.has_queries)
        for i in range(depth):
            reconstructs = objective.has_queries and i >= depth - reconstructor_depth
            layers[f"{stage}_{i}"] = TextLayer(config, parts, fuses=stage == "fusion", reconstructs=reconstructs)
    layers["head"] = Head(config, parts)
    return layers


def initialize(parameter: Tensor, *, name: str, seed: int) -> None:
    """Fill a weight: norms 1, biases 0, tables N(0, .02), matrices N(0, 1/4 of the inputs' inverse), which is .018 at 768 inputs.

    Drawn from a generator keyed by seed and name, so that it does not depend on the other weights, their order or the layout.
    """
    if parameter.ndim < 2 and not name.endswith("_embedding"):
        parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        return
    key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "big") >> 1)
    scale = 0.02 if is_table(name, parameter) else 0.5 * parameter[0].numel() ** -0.5
    parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def is_table(name: str, parameter: Tensor) -> bool:
    """Return whether a weight of `layers` is a norm, a bias or a table of vectors: what weight decay leaves alone."""
    return parameter.ndim < 2 or TABLES.search(name) is not None
