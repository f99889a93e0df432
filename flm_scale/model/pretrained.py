"""Weights of a BERT or RoBERTa for the text side or for the bridge, and the account of what became of every tensor of a file.

The published FLM starts its bottom layers from RoBERTa's first six. In comes a folder as Hugging Face models have it; out come initial values by
canonical name, whole, of which model/assemble.py cuts each layout's pieces. Nothing is passed over without a word in the account.
"""

import json
import pickle
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from flm_scale.config import TextConfig
from flm_scale.config_lm import BridgeConfig
from flm_scale.errors import CheckpointError, ConfigError
from flm_scale.model.spelling import speller

LAYER = {"self_attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
         "self_attention.out": ("attention.output.dense",), "self_norm": ("attention.output.LayerNorm",),
         "mlp.up": ("intermediate.dense",), "mlp.down": ("output.dense",), "mlp_norm": ("output.LayerNorm",)}
"""Modules of a stream layer, and those of theirs that they are made of."""
GAMMA_BETA = {"weight": "gamma", "bias": "beta"}
"""What the first BERTs call the weight and bias of a norm."""
LEFT_OUT = {"pooler.": "pooler", "seq_relationship": "next-sentence head", "position_ids": "buffers", "token_type_ids": "buffers",
            "word_embeddings.": "token table", "cls.predictions.": "head", "lm_head.": "head"}
SAFETENSORS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
"""Files of weights, whole or in shards."""
MASK = "<mask>"
OUR_EPS = 1e-5
"""Of every norm here, torch's own."""


class Fate(NamedTuple):
    """What became of a tensor of the file."""

    fate: Literal["used", "resized", "converted", "left out"]
    why: str = ""
    """What was done to it, or what it belongs to that the model does not have; empty when it is used as it is."""


class Account(NamedTuple):
    """All tensors of a file and all weights that it might have filled."""

    source: str
    tensors: dict[str, Fate]
    weights: dict[str, tuple[str, ...]]
    """Of each weight of the model the tensors that it comes from; none when it starts from random."""
    remarks: tuple[str, ...] = ()
    random_tokens: tuple[str, ...] = ()
    """Pieces of the tokenizer whose vectors start from random."""

    def summary(self) -> str:
        """Return the account as one line reads it."""
        groups: defaultdict[Fate, list[str]] = defaultdict(list)
        for name, fate in self.tensors.items():
            groups[fate].append(".".join(name.removesuffix(".weight").split(".")[-2:]))
        parts: defaultdict[str, list[str]] = defaultdict(list)
        for (kind, why), names in groups.items():
            if kind != "used":
                parts[kind].append(f"{' and '.join(names)} ({why})" if kind == "resized" else f"{why} ({len(names)})")
        random = sum(not tensors for tensors in self.weights.values())
        return "; ".join([f"{self.source}: {len(groups[Fate('used')])} tensors used as they are",
                          *(f"{kind}: {', '.join(parts[kind])}" for kind in ("resized", "converted", "left out") if parts[kind]),
                          f"{random} of {len(self.weights)} weights of this side start from random", *self.remarks])

    def as_json(self) -> dict[str, Any]:
        """Return what RUN/pretrained.json keeps."""
        return self._asdict() | {"tensors": {name: fate._asdict() for name, fate in self.tensors.items()}}


class HeadNames(NamedTuple):
    """How a kind of model calls the parts of its head."""

    linear: str
    norm: str
    decoder: str
    biases: tuple[str, ...]
    """The decoder's bias is stored under one of these, or alike under several."""


HEADS = {
    "bert": HeadNames("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.decoder.weight",
                      ("cls.predictions.bias", "cls.predictions.decoder.bias")),
    "roberta": HeadNames("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder.weight", ("lm_head.bias", "lm_head.decoder.bias")),
}


class SourceConfig(BaseModel):
    """What config.json must say. Our layers compute nothing but this."""

    model_type: Literal["bert", "roberta"]
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    pad_token_id: int = 0
    hidden_act: Literal["gelu"] = "gelu"
    position_embedding_type: Literal["absolute"] = "absolute"
    layer_norm_eps: float = 1e-12
    tie_word_embeddings: bool = True

    @property
    def first_position(self) -> int:
        """Row of the first token's position: RoBERTa counts from behind the padding's."""
        return self.pad_token_id + 1 if self.model_type == "roberta" else 0

    @property
    def num_positions(self) -> int:
        """Rows that stand for a position."""
        return self.max_position_embeddings - self.first_position


class Origin(NamedTuple):
    """How one weight comes out of the file."""

    tensors: tuple[str, ...]
    make: Callable[..., Tensor]
    """Of the weight's random values and of these tensors in float32."""
    resized: Mapping[str, str] = MappingProxyType({})
    """Of a tensor of which not all rows go in as they are, what becomes of its rows."""


class PretrainedEncoder:
    """The weights of a BERT or RoBERTa under our names. Tensors are read from disk when they are asked for."""

    num_layers: int
    """Of theirs that are taken, from the first on."""

    def __init__(self, pretrained: str, *, option: str) -> None:
        """pretrained: folder or name on the hub.   option: the user's word for it. Raises CheckpointError for files that cannot be used."""
        self.pretrained, self.folder = pretrained, find_folder(pretrained, option=option)
        self.source = read_config(self.folder, option=option)
        self.tensors: Mapping[str, Tensor] = {}
        self.origins: dict[str, Origin] = {}

    def open_tensors(self) -> None:
        """Open the weights and find where each of ours comes from. Raises CheckpointError for files that are missing, damaged or others."""
        self.tensors = read_tensors(self.folder)
        kind = self.source.model_type
        self.body = f"{kind}." if any(name.startswith(f"{kind}.") for name in self.tensors) else ""
        self.origins = self._origins()
        missing = sorted({name for origin in self.origins.values() for name in origin.tensors} - self.tensors.keys())
        if missing:
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise CheckpointError(f"{self.folder}: '{missing[0]}' is missing{more}: not the weights that its config.json describes; fetch it again")

    def over(self, name: str, fresh: Tensor) -> Tensor:
        """Return a whole weight's initial values: those of the file, or `fresh`, random ones, for what it does not have.

        Raises CheckpointError when the file's tensors have other shapes than its config.json and tokenizer say.
        """
        if name not in self.origins:
            return fresh
        origin = self.origins[name]
        tensors = [self.tensors[tensor].float() for tensor in origin.tensors]
        try:
            values = origin.make(fresh, *tensors)
        except (RuntimeError, IndexError):
            values = None
        if values is None or values.shape != fresh.shape:
            shapes = ", ".join(f"'{of}' {list(tensor.shape)}" for of, tensor in zip(origin.tensors, tensors, strict=True))
            raise CheckpointError(f"{self.folder}: {shapes} cannot become {name} {list(fresh.shape)}: not the weights that its config.json and "
                                  "tokenizer describe; fetch it again")
        return values

    def account(self, weights: Collection[str]) -> Account:
        """Return what became of the file. weights: the names of all weights of the side that it fills."""
        origins = {name: self.origins[name] for name in weights if name in self.origins}
        used = {tensor for origin in origins.values() for tensor in origin.tensors}
        resized = {tensor: change for origin in origins.values() for tensor, change in origin.resized.items()}
        fates = {name: Fate("left out", self._why_left_out(name)) if name not in used else
                 Fate("resized", f"{len(tensor):,} rows {resized[name]}") if name in resized else Fate("used")
                 for name, tensor in self.tensors.items()}
        eps = self.source.layer_norm_eps
        return Account(
            source=f"{self.pretrained} ({self.source.model_type}, {self.source.num_hidden_layers} layers)", tensors=fates,
            weights={name: origins[name].tensors if name in origins else () for name in weights},
            remarks=() if eps == OUR_EPS else (f"its norms were trained with an epsilon of {eps:g}, here it is {OUR_EPS:g}",))

    def _origins(self) -> dict[str, Origin]:
        """Return where every weight comes from that the file can fill."""
        raise NotImplementedError

    def _tables(self) -> list[str]:
        """Return the names of the tables of tokens, positions and token types."""
        return [f"{self.body}embeddings.{table}_embeddings.weight" for table in ("word", "position", "token_type")]

    def _layer(self, index: int, names: Mapping[str, str]) -> dict[str, Origin]:
        """Return the origins of one encoder layer. names: of our modules, by those of LAYER."""
        return {name: origin for ours, theirs in LAYER.items() for name, origin in self._module(
            names[ours], *(f"{self.body}encoder.layer.{index}.{module}" for module in theirs)).items()}

    def _module(self, ours: str, *theirs: str) -> dict[str, Origin]:
        """Return the origins of a linear's or a norm's weight and bias; of three linears, those of one that does the work of all."""
        def named(module: str, kind: str) -> str:
            old = f"{module}.{GAMMA_BETA[kind]}"
            return old if old in self.tensors else f"{module}.{kind}"

        make = partial(interleave, heads=self.source.num_attention_heads)
        return {f"{ours}.{kind}": Origin(tuple(named(module, kind) for module in theirs), make) for kind in GAMMA_BETA}

    def _why_left_out(self, name: str) -> str:
        layer = re.search(r"encoder\.layer\.(\d+)\.", name)
        if layer and int(layer[1]) >= self.num_layers:
            return f"layers from {self.num_layers} on"
        return next((why for part, why in LEFT_OUT.items() if part in name), "not known")


class PretrainedText(PretrainedEncoder):
    """Embeddings, first layers and head, for the text side."""

    def __init__(self, config: TextConfig, pieces: Sequence[str]) -> None:
        """pieces: of our tokenizer, by id.

        Raises CheckpointError for files that are missing, damaged or of another kind of model, ConfigError when the text side has other sizes.
        """
        super().__init__(config.pretrained, option="text.pretrained")
        self.config, self.pieces, self.num_layers = config, pieces, config.bottom_layers
        source = self.source
        # Positions are not stretched like a picture's: that would move every word of every caption.
        check_fit(source, self.folder, option="text.pretrained",
                  equal={"text.norm": (config.norm, "post"), "text.width": (config.width, source.hidden_size),
                         "text.heads": (config.heads, source.num_attention_heads)},
                  at_most={"text.bottom_layers": (config.bottom_layers, source.num_hidden_layers),
                           "text.max_length": (config.max_length, source.num_positions)})
        spell = speller(self.folder)
        self.spellings = [spell(piece) for piece in pieces]
        self.open_tensors()

    def account(self, weights: Collection[str]) -> Account:
        """Return what became of the file. weights: the names of all weights of the text side."""
        return super().account(weights)._replace(
            random_tokens=tuple(piece for piece, ids in zip(self.pieces, self.spellings, strict=True) if not ids))

    def _origins(self) -> dict[str, Origin]:
        tokens, positions, token_types = self._tables()
        mean = partial(mean_rows, spellings=self.spellings)
        first, length = self.source.first_position, self.config.max_length
        origins = {
            "text_entry.tokens.weight": Origin((tokens,), mean, {tokens: self._vocabulary()}),
            "text_entry.positions.weight": Origin(
                (positions, token_types), lambda _, table, types: table[first:first + length] + types[0],
                {positions: f"to {length}, from row {first} on", token_types: "to one, which is added to every position"})}
        # Queries stand for hidden tokens, as the mask does there.
        if mask := self.spellings[self.pieces.index(MASK)]:
            origins["text_entry.query.weight"] = Origin((tokens,), lambda _, table: table[mask])
        origins |= self._module("text_entry.norm", f"{self.body}embeddings.LayerNorm")
        for i in range(self.num_layers):
            origins |= self._layer(i, {ours: f"bottom_{i}.streams.{ours}" for ours in LAYER})
        head = HEADS[self.source.model_type]
        if any(name.startswith(head.linear) for name in self.tensors):
            origins |= self._module("head.linear", head.linear) | self._module("head.norm", head.norm)
            decoder = head.decoder if head.decoder in self.tensors or not self.source.tie_word_embeddings else tokens
            bias = next((name for name in head.biases if name in self.tensors), head.biases[0])
            if not self.config.tied:
                origins["head.decoder.weight"] = Origin((decoder,), mean, {decoder: self._vocabulary()})
            origins["head.decoder.bias"] = Origin((bias,), mean, {bias: self._vocabulary()})
        return origins

    def _vocabulary(self) -> str:
        pieces = Counter(min(len(ids), 2) for ids in self.spellings)
        rows = self.config.vocab_size
        return f"to {rows:,}: {pieces[1]:,} as they are, {pieces[2]:,} the mean of several, {rows - pieces[1] - pieces[2]:,} random"

    def _why_left_out(self, name: str) -> str:
        head = HEADS[self.source.model_type]
        if name == head.decoder and self.config.tied:
            return "decoder, which is the token table here"
        return "stored twice" if name in head.biases else super()._why_left_out(name)


class PretrainedBridge(PretrainedEncoder):
    """Encoder layers, positions and the norm behind them, for the bridge of a frozen language model. Its linears to and from others stay random."""

    def __init__(self, config: BridgeConfig, *, num_tokens: int) -> None:
        """num_tokens: rows of an image in front of the first layer. Raises what PretrainedText raises."""
        super().__init__(config.pretrained, option="text.bridge.pretrained")
        self.num_layers, self.num_tokens, source = config.layers, num_tokens, self.source
        check_fit(source, self.folder, option="text.bridge.pretrained",
                  equal={"text.bridge.width": (config.width, source.hidden_size), "text.bridge.heads": (config.heads, source.num_attention_heads)},
                  at_most={"text.bridge.layers": (config.layers, source.num_hidden_layers),
                           "rows in front of the bridge's first layer": (num_tokens, source.num_positions)})
        self.open_tensors()

    def _origins(self) -> dict[str, Origin]:
        _, positions, token_types = self._tables()
        first, length = self.source.first_position, self.num_tokens
        origins = {
            "bridge_entry.positional_embedding": Origin(
                (positions,), lambda _, table: table[first:first + length], {positions: f"to {length}, from row {first} on"}),
            "bridge_entry.kind_embedding": Origin((token_types,), lambda _, table: table[0], {token_types: "to one"})}
        origins |= self._module("bridge_entry.norm", f"{self.body}embeddings.LayerNorm")
        for i in range(self.num_layers):
            origins |= self._layer(i, {ours: f"bridge_{i}_{'mlp' if ours.startswith('mlp') else 'attention'}.{ours}" for ours in LAYER})
        return origins


def find_folder(pretrained: str, *, option: str) -> Path:
    """Return the folder of that name, or of that model of the hub, pickled weights only where there are no others. Raises CheckpointError."""
    folder = folder_of_model(pretrained, option=option, files=[
        "config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt", *SAFETENSORS])
    return folder if list(folder.glob("*.safetensors")) else folder_of_model(pretrained, option=option, files=["pytorch_model.bin"])


def folder_of_model(name: str, *, option: str, files: Sequence[str], revision: str = "") -> Path:
    """Return the folder of that name, or of that model of the hub, of which some files are fetched when they are not there yet.

    option: the user's word for the name. Raises CheckpointError.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(files)))
    except (OSError, ValueError) as error:  # no connection, no such model or revision, not the name of one
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{option} ('{name}') is not a folder, and cannot be had from the hub ({why}); "
                              "fetch it where there is a connection and give its folder") from error


def read_config(folder: Path, *, option: str) -> SourceConfig:
    """Return what the folder's config.json says. Raises CheckpointError when it is missing or that of another kind of model."""
    path = folder / "config.json"
    try:
        return SourceConfig.model_validate_json(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); {option} wants a folder as save_pretrained writes it") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "it"
        value = "" if problem["type"] in {"missing", "json_invalid"} else f" ({problem['input']!r})"
        raise CheckpointError(f"{path}: {where}{value}: {problem['msg']}; {option} takes BERT and RoBERTa") from error


def check_fit(source: SourceConfig, folder: Path, *, option: str, equal: Mapping[str, tuple[Any, Any]],
              at_most: Mapping[str, tuple[int, int]]) -> None:
    """Raise one error with all sizes that must be otherwise to compute what the source computes. equal, at_most: ours and theirs by name."""
    if source.intermediate_size != 4 * source.hidden_size:
        raise CheckpointError(f"{folder}: intermediate_size ({source.intermediate_size}) must be four times hidden_size ({source.hidden_size}), as "
                              "every MLP here; choose another model")
    wrong = [f"{name} ({ours}) must be {theirs}" for name, (ours, theirs) in equal.items() if ours != theirs]
    wrong += [f"{name} ({ours}) must be at most {theirs}" for name, (ours, theirs) in at_most.items() if ours > theirs]
    if wrong:
        raise ConfigError(f"{option} {folder}: {', '.join(wrong)}")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the folder's tensors by name; those of safetensors are read when they are looked at. Raises CheckpointError for damaged files."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path, index, pickled = (folder / name for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"))
    tensors: dict[str, Tensor] = {}
    try:
        if path.is_file():
            tensors = load_file(path)
        elif index.is_file():
            path = index
            for name in sorted(set(json.loads(index.read_text())["weight_map"].values())):
                path = folder / name
                tensors |= load_file(path)
        elif pickled.is_file():
            path = pickled
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise CheckpointError(f"{folder}: has no model.safetensors and no pytorch_model.bin; give a folder as save_pretrained writes it")
    except (SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read ({str(error).splitlines()[0]}); fetch it again") from error
    return tensors


def interleave(_fresh: Tensor, *tensors: Tensor, heads: int) -> Tensor:
    """Return linears as one: the features of head 0 of each, then of head 1. Of one linear it is that one."""
    if len(tensors) == 1:
        return tensors[0]
    return torch.stack([tensor.unflatten(0, (heads, -1)) for tensor in tensors], dim=1).flatten(0, 2)


def mean_rows(fresh: Tensor, table: Tensor, *, spellings: Sequence[Sequence[int]]) -> Tensor:
    """Return, for each token, the mean of the rows that spell it, and its own random row where none do. Tables [V, D] or biases [V]."""
    found = torch.tensor([i for i, ids in enumerate(spellings) if ids])
    groups = [torch.tensor(ids) for ids in spellings if ids]
    starts = torch.tensor([0, *map(len, groups)])[:-1].cumsum(0)
    means = F.embedding_bag(torch.cat(groups), table.reshape(len(table), -1), starts, mode="mean")
    return fresh.index_copy(0, found, means.reshape(-1, *fresh.shape[1:]))
