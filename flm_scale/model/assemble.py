"""The model of a Run: a flat list of named layers, its initial weights, and what each weight is for the optimizer.

The list is the whole model. Running it is `for layer in layers: state = layer(state)`, here or cut into pipeline stages.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from typing import Any, Protocol, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flm_scale.batch import State
from flm_scale.config import OpenClipVisionConfig, Run, SmallVisionConfig, TextConfig
from flm_scale.model.parts import Parts, PlainParts, fill, shard_of, whole_shape
from flm_scale.model.pretrained import Account, PretrainedText
from flm_scale.model.text import FusionEntry, Head, TextEntry, TextLayer
from flm_scale.model.vision import build_vision, named_sizes, vision_account
from flm_scale.objectives.objective import Objective

# Parameters that are tables of vectors rather than matrices that multiply; like 1-d tensors they are not decayed.
TABLES = re.compile(r"^text_entry\.|\.kinds?\.weight$|_embedding$")
TIED_WITH = {"head.decoder.weight": "text_entry.tokens.weight"}
FRESH_VISION = re.compile(r"^vision_exit\.(fresh_norm|projection|kind)\.")
# The head is filled too, but reads what no file has trained: the rows behind fusion. So it learns at the full rate.
PRETRAINED_TEXT = re.compile(r"^text_entry\.|^bottom_\d+\.streams\.")

Turn = Callable[[Tensor], Tensor]
"""What one stage makes of the rows [rows, D] that come in; the last one may end with logits or scores."""
Relay = Callable[[Tensor, Turn], Tensor]
"""Lets every stage take its turn, first to last, and returns on all of them what the last one gave."""


class LayerList(Protocol):
    """The whole flat list, or the run of it that one pipeline stage holds."""

    layers: nn.ModuleDict
    pretrained: frozenset[str]
    """Names, within `layers`, of the weights that the optimizer trains slower (is_pretrained)."""


def alone(rows: Tensor, turn: Turn) -> Tensor:
    """Return what the one stage makes of the rows: the relay of a list that is not cut."""
    return turn(rows)


class VisionLanguageModel(nn.Module):
    """The layers in their order, each under its name; or those of one pipeline stage, with the relay that joins them to the others'."""

    def __init__(self, layers: dict[str, nn.Module], *, recompute: bool, pretrained: frozenset[str] = frozenset(), relay: Relay = alone) -> None:
        super().__init__()
        self.layers, self.recompute, self.pretrained, self.relay = nn.ModuleDict(layers), recompute, pretrained, relay

    def trunk(self, state: State) -> State:
        """Run everything but the head: pixels in, rows of every stream, query and image out."""
        return state._replace(rows=self._run(state, lambda end: end.rows))

    def forward(self, state: State) -> tuple[Tensor, Tensor]:
        """Return (loss [R], correct [R]) of the state's targets, the fields of batch.Scores."""
        loss, correct = self._run(state, lambda end: torch.stack(self.head(end)))
        return loss, correct > 0

    def logits(self, state: State) -> Float[Tensor, "R V"]:
        """Return all logits at the state's targets."""
        return self._run(state, lambda end: self.head.logits(end.rows.index_select(0, end.target_rows)))

    def _run(self, state: State, finish: Callable[[State], Tensor]) -> Tensor:
        """Return what `finish`, which runs where the head is, makes of the state behind the trunk. Layers change a state's rows alone."""
        def turn(rows: Tensor) -> Tensor:
            trunk = (layer for name, layer in self.layers.items() if name != "head")
            end = run_layers(trunk, state._replace(rows=rows), recompute=self.recompute)
            return finish(end) if "head" in self.layers else end.rows

        return self.relay(state.rows, turn)

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


def build_model(run: Run, objective: Objective) -> VisionLanguageModel:
    """Return the model of a run with its initial weights: pretrained where named, else drawn from the seed and each weight's name."""
    return assemble(run, layer_builders(run, objective, PlainParts()))


def assemble(run: Run, builders: Mapping[str, Callable[[], nn.Module]], *, relay: Relay = alone) -> VisionLanguageModel:
    """Return the model of the layers that these build: the whole list, or a stage of it and the relay to the others."""
    layers = {name: build() for name, build in builders.items()}
    if run.text.tied:
        tie(layers)
    return VisionLanguageModel(layers, recompute=run.recompute, pretrained=pretrained_names(run, layers), relay=relay)


def layer_builders(run: Run, objective: Objective, parts: Parts, *, load_pretrained: bool = True, pretrained_text: PretrainedText | None = None,
                   weight_of: Callable[[str], Any] | None = None) -> dict[str, Callable[[], nn.Module]]:
    """Return, in the list's order, what builds each layer with its initial weights; a process calls those of its own stage.

    load_pretrained: False where a run's own weights will fill the layers, so that no download is needed.
    pretrained_text: what `text.pretrained` names, opened; needed where the run names some and its weights are to start from them.
    weight_of: gives every whole weight by name, to be filled from (model.parts.fill); then nothing is drawn or downloaded.
    """
    # The tower comes in one piece, and only where one of its layers is asked for.
    downloads = load_pretrained and weight_of is None
    assert pretrained_text or not (downloads and run.text.pretrained), "a run that names text weights must not start from random"
    tower = lru_cache(maxsize=1)(lambda: build_vision(run.vision, text_width=run.text.width, parts=parts, load_pretrained=downloads))
    names = vision_names(run.vision)
    builders = {name: partial(lambda place: tower()[place], place) for place, name in enumerate(names)} | text_builders(run.text, objective, parts)

    def initialized(name: str, build: Callable[[], nn.Module]) -> nn.Module:
        layer = build()
        with torch.no_grad():
            for weight, parameter in layer.named_parameters(prefix=name):
                own_name = TIED_WITH.get(weight, weight) if run.text.tied else weight
                if weight_of is not None:
                    fill(parameter, weight_of(own_name))
                elif not parameter.is_meta and not (name in names and is_pretrained(run, weight)):
                    values = initial_values(parameter, name=own_name, seed=run.seed)
                    fill(parameter, pretrained_text.over(own_name, values) if pretrained_text else values)
        return layer

    return {name: partial(initialized, name, build) for name, build in builders.items()}


def vision_names(config: OpenClipVisionConfig | SmallVisionConfig) -> list[str]:
    """Return the names of the tower's layers."""
    depth = config.layers if isinstance(config, SmallVisionConfig) else named_sizes(config.name)["layers"]
    return ["vision_entry", *(f"vision_{i}" for i in range(depth - (config.output == "penultimate"))), "vision_exit"]


def tie(layers: Mapping[str, nn.Module]) -> None:
    """Let the decoder's weights be the embedding table; where that is on another stage, note that they are a copy of it."""
    if "head" not in layers:
        return
    decoder = cast("Head", layers["head"]).decoder
    if "text_entry" in layers:
        decoder.weight = cast("TextEntry", layers["text_entry"]).tokens.weight
    else:
        decoder.weight.tied_to = TIED_WITH["head.decoder.weight"]  # type: ignore[union-attr]


def is_pretrained(run: Run, name: str) -> bool:
    """Return whether a weight of `layers` counts as pretrained, which is decided by the run alone: it trains at the slower rate.

    The token table does as a whole, although tokens that the file cannot spell start from random: one table has one rate.
    """
    if name.startswith("vision_"):
        return isinstance(run.vision, OpenClipVisionConfig) and bool(run.vision.pretrained) and not FRESH_VISION.search(name)
    own_name = TIED_WITH.get(name, name) if run.text.tied else name
    return bool(run.text.pretrained) and PRETRAINED_TEXT.match(own_name) is not None


def pretrained_names(run: Run, layers: Mapping[str, nn.Module]) -> frozenset[str]:
    """Return the names of the layers' weights that count as pretrained."""
    return frozenset(name for layer in layers for name, _ in layers[layer].named_parameters(prefix=layer) if is_pretrained(run, name))


def account_for(run: Run, objective: Objective, pretrained_text: PretrainedText | None) -> dict[str, Account]:
    """Return, for `vision` and `text` where the run starts from a file, what became of all of it. pretrained_text: of layer_builders."""
    accounts = {}
    if isinstance(run.vision, OpenClipVisionConfig) and run.vision.pretrained:
        accounts["vision"] = vision_account(run.vision, names=vision_names(run.vision), text_width=run.text.width)
    if pretrained_text:
        with torch.device("meta"):
            layers = {name: build() for name, build in text_builders(run.text, objective, PlainParts()).items()}
        if run.text.tied:
            tie(layers)
        accounts["text"] = pretrained_text.account([name for name, _ in nn.ModuleDict(layers).named_parameters()])
    return accounts


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
    """Fill a weight, or the piece of it that the parameter is, with its random initial values."""
    fill(parameter, initial_values(parameter, name=name, seed=seed))


def initial_values(parameter: Tensor, *, name: str, seed: int) -> Tensor:
    """Return the whole of a weight: norms 1, biases 0, tables N(0, .02), matrices N(0, 1/4 of the inputs' inverse), which is .018 at 768 inputs.

    Drawn from a generator keyed by seed and name, so that it does not depend on the other weights, their order or the layout.
    """
    # A piece of a sharded weight is cut out of the whole one, so that every layout starts from the same weights.
    shape = whole_shape(parameter.shape, shard_of(parameter))
    if parameter.ndim < 2 and not name.endswith("_embedding"):
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0)
    key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "big") >> 1)
    scale = 0.02 if is_table(name, parameter) else 0.5 * math.prod(shape[1:]) ** -0.5
    return torch.randn(shape, generator=generator) * scale


def is_table(name: str, parameter: Tensor) -> bool:
    """Return whether a weight of `layers` is a norm, a bias or a table of vectors: what weight decay leaves alone."""
    return parameter.ndim < 2 or TABLES.search(name) is not None
