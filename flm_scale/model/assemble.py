"""The model of a Run: a flat list of named layers, its initial weights, and what each weight is for the optimizer.

The list is the whole model. Running it is `for layer in layers: state = layer(state)`, here or cut into pipeline stages.
"""

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
from flm_scale.config import Run, TextConfig
from flm_scale.config_lm import LanguageModelConfig
from flm_scale.config_vision import ConvNetConfig, OpenClipVisionConfig, SmallVisionConfig, Vision
from flm_scale.errors import CheckpointError
from flm_scale.model.bridge import bridge_layers, tokens_along
from flm_scale.model.convnet import build_convnet, convnet_shape
from flm_scale.model.frozen_lm import FrozenLm, content_hash, language_shape, open_frozen
from flm_scale.model.parts import Parts, PlainParts, fill, generator_of, shard_of, whole_shape
from flm_scale.model.pretrained import Account, PretrainedEncoder
from flm_scale.model.text import FusionEntry, Head, TextEntry, TextLayer
from flm_scale.model.vision import build_vision, named_sizes, vision_account
from flm_scale.objectives.objective import Objective

# Parameters that are tables of vectors rather than matrices that multiply; like 1-d tensors they are not decayed.
TABLES = re.compile(r"^text_entry\.|\.kinds?\.weight$|_embedding$")
TIED_WITH = {"head.decoder.weight": "text_entry.tokens.weight"}
FRESH_VISION = re.compile(r"^vision_exit\.(fresh_norm|projection|kind)\.|^vision_\d+\.temporal\.")
ZEROS = re.compile(r"\.temporal\.position_embedding$")
# The head is filled too, but reads what no file has trained: the rows behind fusion. So it learns at the full rate.
PRETRAINED_TEXT = re.compile(r"^text_entry\.|^bottom_\d+\.streams\.|^bridge_entry\.(positional_embedding|kind_embedding|norm\.)|^bridge_\d+_")

Turn = Callable[[Tensor], Tensor]
"""What one stage makes of the rows [rows, D] that come in; the last one may end with logits or scores."""
Start = Callable[[str, tuple[int, ...]], Any]
"""Gives a whole weight that a run starts from, by name and shape; None for what it does not have."""
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
        def finish(end: State) -> Tensor:
            return self.head.logits(end) if isinstance(self.head, FrozenLm) else self.head.logits(end.rows.index_select(0, end.target_rows))

        return self._run(state, finish)

    def _run(self, state: State, finish: Callable[[State], Tensor]) -> Tensor:
        """Return what `finish`, which runs where the head is, makes of the state behind the trunk.

        Layers change a state's rows alone; those that merge rows change its sizes too, and no stage cuts them.
        """
        def turn(rows: Tensor) -> Tensor:
            trunk = (layer for name, layer in self.layers.items() if name != "head")
            end = run_layers(trunk, state._replace(rows=rows), recompute=self.recompute)
            return finish(end) if "head" in self.layers else end.rows

        return self.relay(state.rows, turn)

    @property
    def head(self) -> Head | FrozenLm:
        """The last layer."""
        return cast("Head | FrozenLm", self.layers["head"])


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
    if is_tied(run):
        tie(layers)
    return VisionLanguageModel(layers, recompute=run.recompute, pretrained=pretrained_names(run, layers), relay=relay)


def layer_builders(run: Run, objective: Objective, parts: Parts, *, load_pretrained: bool = True, pretrained_text: PretrainedEncoder | None = None,
                   language_model: FrozenLm | None = None, start: Start | None = None,
                   weight_of: Callable[[str], Any] | None = None) -> dict[str, Callable[[], nn.Module]]:
    """Return, in the list's order, what builds each layer with its initial weights; a process calls those of its own stage.

    load_pretrained: False where a run's own weights will fill the layers, so that no download is needed.
    pretrained_text: what `text.pretrained`, or `text.bridge.pretrained`, names, opened; needed where the run names some and starts from them.
    language_model: that of a run around a frozen one, if it is open already.   start: what else it starts from, which goes before all the rest.
    weight_of: gives every whole weight by name, to be filled from (model.parts.fill); then nothing is drawn or downloaded, but a frozen language
    model, whose weights are in no checkpoint.
    """
    # The tower comes in one piece, and only where one of its layers is asked for.
    downloads = load_pretrained and weight_of is None
    text = run.text
    assert pretrained_text or not (downloads and pretrained_name(run)), "a run that names weights must not start from random"
    text_width = text.width if isinstance(text, TextConfig) else text.bridge.width
    tower = lru_cache(maxsize=1)(lambda: build_vision(run.vision, text_width=text_width, parts=parts, load_pretrained=downloads)
                                 if not isinstance(run.vision, ConvNetConfig) else [build_convnet(run.vision, parts, load_pretrained=downloads)])
    names = vision_names(run)
    behind = text_builders(text, objective, parts) if isinstance(text, TextConfig) else language_builders(run, text, objective, language_model)
    builders = {name: partial(lambda place: tower()[place], place) for place, name in enumerate(names)} | behind

    def initialized(name: str, build: Callable[[], nn.Module]) -> nn.Module:
        layer = build()
        if isinstance(layer, FrozenLm):
            return layer
        with torch.no_grad():
            for weight, parameter in layer.named_parameters(prefix=name):
                own_name = TIED_WITH.get(weight, weight) if is_tied(run) else weight
                if weight_of is not None:
                    fill(parameter, weight_of(own_name))
                elif start and (whole := start(own_name, whole_shape(parameter.shape, shard_of(parameter)))) is not None:
                    fill(parameter, whole)
                elif not parameter.is_meta and not (name in names and is_pretrained(run, weight)):
                    values = initial_values(parameter, name=own_name, seed=run.seed)
                    fill(parameter, pretrained_text.over(own_name, values) if pretrained_text else values)
        return layer

    return {name: partial(initialized, name, build) for name, build in builders.items()}


def vision_names(run: Run) -> list[str]:
    """Return the names of the tower's layers; into a bridge it has no exit of its own."""
    leave = ["vision_exit"] if isinstance(run.text, TextConfig) else []
    return ["vision_entry", *(f"vision_{i}" for i in range(tower_sizes(run.vision)["layers"] - (run.vision.output == "penultimate"))), *leave]


def tower_sizes(config: Vision) -> dict[str, Any]:
    """Return width, layers, prefix_tokens and image_tokens (I, the prefix counted) of any tower."""
    if isinstance(config, ConvNetConfig):
        shape = convnet_shape(config)
        return {"width": shape.width, "layers": 0, "prefix_tokens": 0, "image_tokens": shape.image_tokens}
    sizes = {"prefix_tokens": 1} | config.model_dump() if isinstance(config, SmallVisionConfig) else named_sizes(config.name)
    return sizes | {"image_tokens": sizes["prefix_tokens"] + (config.image_size // sizes["patch_size"]) ** 2}


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
        return not isinstance(run.vision, SmallVisionConfig) and bool(run.vision.pretrained) and not FRESH_VISION.search(name)
    own_name = TIED_WITH.get(name, name) if is_tied(run) else name
    return bool(pretrained_name(run)) and PRETRAINED_TEXT.match(own_name) is not None


def pretrained_name(run: Run) -> str:
    """Return what the text side or the bridge starts from; empty for random."""
    return run.text.pretrained if isinstance(run.text, TextConfig) else run.text.bridge.pretrained


def is_tied(run: Run) -> bool:
    """Return whether the decoder's weights are the embedding table's. A frozen language model's own are its own business."""
    return isinstance(run.text, TextConfig) and run.text.tied


def pretrained_names(run: Run, layers: Mapping[str, nn.Module]) -> frozenset[str]:
    """Return the names of the layers' weights that count as pretrained."""
    return frozenset(name for layer in layers for name, _ in layers[layer].named_parameters(prefix=layer) if is_pretrained(run, name))


def account_for(run: Run, objective: Objective, pretrained_text: PretrainedEncoder | None) -> dict[str, Account]:
    """Return, for `vision` and for `text` or `bridge` where the run starts from a file, what became of it. pretrained_text: of layer_builders."""
    accounts = {}
    if isinstance(run.vision, OpenClipVisionConfig) and run.vision.pretrained:
        accounts["vision"] = vision_account(run.vision, names=vision_names(run))
    if pretrained_text:
        text = run.text
        builders = text_builders(text, objective, PlainParts()) if isinstance(text, TextConfig) else language_builders(run, text, objective)
        with torch.device("meta"):
            layers = {name: build() for name, build in builders.items() if name != "head" or isinstance(text, TextConfig)}
        if is_tied(run):
            tie(layers)
        side = "text" if isinstance(text, TextConfig) else "bridge"
        accounts[side] = pretrained_text.account([name for name, _ in nn.ModuleDict(layers).named_parameters()])
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


def language_builders(run: Run, config: LanguageModelConfig, objective: Objective,
                      language_model: FrozenLm | None = None) -> dict[str, Callable[[], nn.Module]]:
    """Return what builds the bridge and, as the head, the frozen language model: `language_model`, or that of the config."""
    sizes = tower_sizes(run.vision)
    builders = bridge_layers(config.bridge, tower_width=sizes["width"], image_tokens=sizes["image_tokens"], prefix_tokens=sizes["prefix_tokens"],
                             lm_width=language_shape(config).width, seed=run.seed)
    return builders | {"head": lambda: language_model or open_language_model(run, config, objective)}


def open_language_model(run: Run, config: LanguageModelConfig, objective: Objective) -> FrozenLm:
    """Return a run's frozen language model. Raises CheckpointError when its weights are not those that the run states."""
    sizes = tower_sizes(run.vision)
    prefix = tokens_along(config.bridge, image_tokens=sizes["image_tokens"], prefix_tokens=sizes["prefix_tokens"])[-1]
    model = open_frozen(config, precision=run.precision, recompute=run.recompute, prefix_tokens=prefix + objective.num_added)
    if config.weights_hash and (found := content_hash(model)) != config.weights_hash:
        raise CheckpointError(f"language model {config.name} has weights with the sha256 {found[:12]}, and the run states "
                              f"{config.weights_hash[:12]}; name the model that it was trained with")
    return model


def initialize(parameter: Tensor, *, name: str, seed: int) -> None:
    """Fill a weight, or the piece of it that the parameter is, with its random initial values."""
    fill(parameter, initial_values(parameter, name=name, seed=seed))


def initial_values(parameter: Tensor, *, name: str, seed: int) -> Tensor:
    """Return the whole of a weight: norms 1, biases 0, tables N(0, .02), matrices N(0, 1/4 of the inputs' inverse), which is .018 at 768 inputs.

    What lets a tower of pictures see clips begins as nothing: alpha, like a bias, and frames' positions at 0.

    Drawn from a generator keyed by seed and name, so that it does not depend on the other weights, their order or the layout.
    """
    # A piece of a sharded weight is cut out of the whole one, so that every layout starts from the same weights.
    shape = whole_shape(parameter.shape, shard_of(parameter))
    if (parameter.ndim < 2 and not name.endswith("_embedding")) or ZEROS.search(name):
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0)
    generator = generator_of(name, seed=seed)
    scale = 0.02 if is_table(name, parameter) else 0.5 * math.prod(shape[1:]) ** -0.5
    return torch.randn(shape, generator=generator) * scale


def is_table(name: str, parameter: Tensor) -> bool:
    """Return whether a weight of `layers` is a norm, a bias or a table of vectors: what weight decay leaves alone."""
    return parameter.ndim < 2 or TABLES.search(name) is not None
