"""The model of a Run: a flat list of named layers, its initial weights, and what each weight is for the optimizer.

The list is the whole model. Running it is `for layer in layers: state = layer(state)`, here or cut into pipeline stages.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flm_scale.batch import State
from flm_scale.config import OpenClipVisionConfig, Run, SmallVisionConfig, TextConfig
from flm_scale.model.parts import Parts, PlainParts, shard_of
from flm_scale.model.text import FusionEntry, Head, TextEntry, TextLayer
from flm_scale.model.vision import build_vision, named_sizes
from flm_scale.objectives.objective import Objective

# Parameters that are tables of vectors rather than matrices that multiply; like 1-d tensors they are not decayed.
TABLES = re.compile(r"^text_entry\.|\.kinds?\.weight$|_embedding$")
TIED_WITH = {"head.decoder.weight": "text_entry.tokens.weight"}
FRESH_VISION = re.compile(r"^vision_exit\.(fresh_norm|projection|kind)\.")


class LayerList(Protocol):
    """The whole flat list, or the run of it that one pipeline stage holds."""

    layers: nn.ModuleDict
    pretrained: frozenset[str]
    """Names, within `layers`, of weights that do not start from random; the optimizer trains them slower."""


class VisionLanguageModel(nn.Module):
    """The layers in their order, each under its name."""

    def __init__(self, layers: dict[str, nn.Module], *, recompute: bool, pretrained: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.layers, self.recompute, self.pretrained = nn.ModuleDict(layers), recompute, pretrained

    def trunk(self, state: State) -> State:
        """Run everything but the head: pixels in, rows of every stream, query and image out."""
        return run_layers((layer for name, layer in self.layers.items() if name != "head"), state, recompute=self.recompute)

    def forward(self, state: State) -> tuple[Tensor, Tensor]:
        """Return (loss [R], correct [R]) of the state's targets, the fields of batch.Scores."""
        scores: tuple[Tensor, Tensor] = self.head(self.trunk(state))
        return scores

    @property
    def head(self) -> Head:
        """The last layer."""
        return cast("Head", self.layers["head"])


def run_layers(layers: Iterable[nn.Module], state: State, *, recompute: bool) -> State:
    """Return what the layers make of the state, one after another. recompute: save only what stands between layers."""
    for layer in layers:
        # A state that needs no gradient yet (pixels, a frozen tower) has nothing to save.
        saves = recompute and state.rows.requires_grad
        state = checkpoint(layer, state, use_reentrant=False) if saves else layer(state)
    return state


def build_model(run: Run, objective: Objective, *, load_pretrained: bool = True) -> VisionLanguageModel:
    """Return the model of a run with its initial weights: pretrained where named, else drawn from the seed and each weight's name.

    load_pretrained: False where a run's own weights will fill the model, so that no download is needed.
    """
    layers = {name: build() for name, build in layer_builders(run, objective, PlainParts(), load_pretrained=load_pretrained).items()}
    if run.text.tied:
        tie(layers)
    return VisionLanguageModel(layers, recompute=run.recompute, pretrained=pretrained_names(run, layers))


def layer_builders(run: Run, objective: Objective, parts: Parts, *, load_pretrained: bool = True) -> dict[str, Callable[[], nn.Module]]:
    """Return, in the list's order, what builds each layer with its initial weights; a process calls those of its own stage."""
    # The tower comes in one piece, and only where one of its layers is asked for.
    tower = lru_cache(maxsize=1)(lambda: build_vision(run.vision, text_width=run.text.width, parts=parts, load_pretrained=load_pretrained))
    names = vision_names(run.vision)
    builders = {name: partial(lambda place: tower()[place], place) for place, name in enumerate(names)} | text_builders(run.text, objective, parts)

    def initialized(name: str, build: Callable[[], nn.Module]) -> nn.Module:
        layer = build()
        with torch.no_grad():
            for weight, parameter in layer.named_parameters(prefix=name):
                if not is_pretrained(run, weight) and not parameter.is_meta:
                    initialize(parameter, name=TIED_WITH.get(weight, weight) if run.text.tied else weight, seed=run.seed)
        return layer

    return {name: partial(initialized, name, build) for name, build in builders.items()}


def vision_names(config: OpenClipVisionConfig | SmallVisionConfig) -> list[str]:
    """Return the names of the tower's layers."""
    depth = config.layers if isinstance(config, SmallVisionConfig) else named_sizes(config.name)["layers"]
    return ["vision_entry", *(f"vision_{i}" for i in range(depth - (config.output == "penultimate"))), "vision_exit"]


def tie(layers: Mapping[str, nn.Module]) -> None:
    """Let the decoder's weights be the embedding table, where both are here."""
    if "text_entry" in layers and "head" in layers:
        cast("Head", layers["head"]).decoder.weight = cast("TextEntry", layers["text_entry"]).tokens.weight


def is_pretrained(run: Run, name: str) -> bool:
    """Return whether a weight of `layers` is filled from pretrained weights."""
    return (isinstance(run.vision, OpenClipVisionConfig) and bool(run.vision.pretrained) and name.startswith("vision_")
            and not FRESH_VISION.search(name))


def pretrained_names(run: Run, layers: Mapping[str, nn.Module]) -> frozenset[str]:
    """Return the names of the layers' pretrained weights."""
    return frozenset(name for layer in layers for name, _ in layers[layer].named_parameters(prefix=layer) if is_pretrained(run, name))


def text_builders(config: TextConfig, objective: Objective, parts: Parts) -> dict[str, Callable[[], nn.Module]]:
    """Return what builds the text side of the list. A shallow reconstructor stands beside the last layers of each stage."""
    builders: dict[str, Callable[[], nn.Module]] = {"text_entry": partial(TextEntry, config, parts, has_queries=objective.has_queries)}
    stages = (("bottom", config.bottom_layers, config.reconstructor_bottom_layers),
              ("fusion", config.fusion_layers, config.reconstructor_fusion_layers))
    for stage, depth, reconstructor_depth in stages:
        if stage == "fusion":
            builders["fusion_entry"] = partial(FusionEntry, config, num_streams=objective.num_streams, has_queries=objective.has_queries)
        for i in range(depth):
            reconstructs = objective.has_queries and i >= depth - reconstructor_depth
            builders[f"{stage}_{i}"] = partial(TextLayer, config, parts, fuses=stage == "fusion", reconstructs=reconstructs)
    builders["head"] = partial(Head, config, parts)
    return builders


def initialize(parameter: Tensor, *, name: str, seed: int) -> None:
    """Fill a weight: norms 1, biases 0, tables N(0, .02), matrices N(0, 1/4 of the inputs' inverse), which is .018 at 768 inputs.

    Drawn from a generator keyed by seed and name, so that it does not depend on the other weights, their order or the layout.
    """
    if parameter.ndim < 2 and not name.endswith("_embedding"):
        parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        return
    key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "big") >> 1)
    # A piece of a sharded weight is cut out of the whole one, so that every layout starts from the same weights.
    shape, shard = list(parameter.shape), shard_of(parameter)
    if shard is not None:
        shape[shard.dim] = shard.size
    scale = 0.02 if is_table(name, parameter) else 0.5 * math.prod(shape[1:]) ** -0.5
    values = torch.randn(shape, generator=generator) * scale
    if shard is None:
        parameter.copy_(values)
        return
    held = max(0, min(parameter.shape[shard.dim], shard.size - shard.start))
    parameter.zero_().narrow(shard.dim, 0, held).copy_(values.narrow(shard.dim, min(shard.start, shard.size), held))


def is_table(name: str, parameter: Tensor) -> bool:
    """Return whether a weight of `layers` is a norm, a bias or a table of vectors: what weight decay leaves alone."""
    return parameter.ndim < 2 or TABLES.search(name) is not None
