"""The frozen language model: the head of a list whose rows are its prefix. The one door to transformers, beside export.py, which runs alone.

A picture's rows, already of the model's own width, stand in front of the caption's embeddings; out come the scores of the caption's targets.
Its weights take no gradient and no dropout, so the same rows give the same bits in training and evaluation. SimVLG, arXiv 2310.03291.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from functools import cache
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F  # noqa: N812

from flm_scale.batch import State
from flm_scale.config_lm import LanguageModelConfig
from flm_scale.errors import CheckpointError, ConfigError
from flm_scale.model.parts import TARGETS_PER_CHUNK
from flm_scale.model.pretrained import SAFETENSORS, folder_of_model

FAMILIES = ("gpt2", "llama", "mistral", "opt", "qwen2", "qwen3", "smollm3")
"""transformers' model types whose logits are their output embeddings of the base model's last rows, and nothing more (tested for each).

Vicuna and SmolLM2 are llamas."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
UNITS_KEPT = {"gpt2": 4, "opt": 1}
"""How often a family's MLP keeps its units for the backward pass: GPT-2's GELU is written out, OPT's ReLU keeps its output, the others are gated."""


class FrozenLm(nn.Module):
    """The last entry of the layer list, in place of text.Head."""

    def __init__(self, lm: Any, *, recompute: bool = False) -> None:  # noqa: ANN401 - its class is behind the import of transformers
        """lm: a causal language model of transformers, of one of FAMILIES and without dropout.   recompute: of its layers, in training."""
        super().__init__()
        # Train mode, as every new layer here: transformers recomputes in no other. Without dropout the modes compute the same.
        self.lm = lm.requires_grad_(False).train()
        for weight in self.lm.parameters():
            weight.is_elsewhere = True  # in its own files, and in no checkpoint
        # transformers' generate hands a strided slice of the rows, for which torch copies the weights once a caption: gigabytes.
        self.lm.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
        if recompute:
            self.lm.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})

    def forward(self, state: State) -> tuple[Float[Tensor, " R"], Bool[Tensor, " R"]]:
        """Return (loss [R], correct [R]), the fields of batch.Scores, of targets that text rows predict. State with prefix rows [N*K, H] in."""
        return self._score(self._target_rows(state), state.target_ids)

    def logits(self, state: State) -> Float[Tensor, "R V"]:
        """Return all logits at the state's targets in float32."""
        logits: Tensor = self.lm.get_output_embeddings()(self._target_rows(state)).float()
        return logits

    def no_pictures(self, count: int) -> Float[Tensor, "N 0 H"]:
        """Return prefixes without a row, for `generate` and for the rows of a State: the language model then reads the text alone."""
        table: Tensor = self.lm.get_input_embeddings().weight
        return table.new_empty(count, 0, table.shape[1])

    @torch.no_grad()
    def generate(self, prefixes: Float[Tensor, "N K H"], prompts: Sequence[Sequence[int]], *, end_ids: Sequence[int], max_new: int,
                 min_new: int = 0, beams: int = 1, length_penalty: float = 1.0) -> list[tuple[list[int], float]]:
        """Return, for each picture, what the model says behind it and its prompt: ids without the end, and the mean log-probability of a token.

        prompts: what each text begins with, BOS first; of any lengths.   end_ids: tokens that end it.   max_new: tokens said, the end counted.
        min_new: tokens said in front of the end.   beams: 1 is greedy search.
        length_penalty: beams are compared by log-probability / tokens ** length_penalty.
        """
        from transformers import GenerationConfig

        options = GenerationConfig(max_new_tokens=max_new, min_new_tokens=min_new, num_beams=beams, do_sample=False, eos_token_id=list(end_ids),
                                   pad_token_id=end_ids[0], **({"length_penalty": length_penalty} if beams > 1 else {}))
        rows, mask = self._begun(prefixes, prompts, pad_id=end_ids[0])
        mode = self.lm.training
        self.lm.eval()  # recomputation would forget keys and values
        try:
            with _quiet():
                said = self.lm.generate(inputs_embeds=rows, attention_mask=mask, generation_config=options)
            ends = torch.isin(said, torch.tensor(end_ids, device=said.device))
            valid = (ends.cumsum(1) - ends.long()) == 0  # up to the first end, itself included
            scores = self._mean_log_probabilities(prefixes, prompts, said, valid)
        finally:
            self.lm.train(mode)
        return [(row[keep].tolist(), score) for row, keep, score in zip(said, valid & ~ends, scores, strict=True)]

    def _begun(self, prefixes: Float[Tensor, "N K H"], prompts: Sequence[Sequence[int]], *,
               pad_id: int) -> tuple[Float[Tensor, "N P H"], Int[Tensor, "N P"]]:
        """Return P rows of pictures and prompts, padding on the left so that all go on at one place, and the mask from which positions follow."""
        longest = max(map(len, prompts))
        padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=prefixes.device)
        padded = torch.tensor([[*prompt, *[pad_id] * (longest - len(prompt))] for prompt in prompts], device=prefixes.device)
        rows = self._embed(prefixes, padded)
        places = torch.arange(rows.shape[1], device=rows.device) - padding[:, None]  # negative ones wrap around, to the padding on the right
        return rows[torch.arange(len(rows), device=rows.device)[:, None], places], (places >= 0).long()

    def _mean_log_probabilities(self, prefixes: Float[Tensor, "N K H"], prompts: Sequence[Sequence[int]], said: Int[Tensor, "N new"],
                                valid: Bool[Tensor, "N new"]) -> list[float]:
        """Return the mean over the valid tokens said of each, read as in training."""
        read = [torch.cat([said.new_tensor(prompt), tokens]) for prompt, tokens in zip(prompts, said, strict=True)]
        first = said.new_tensor([len(prompt) - 1 for prompt in prompts])
        hidden = self._read(prefixes, nn.utils.rnn.pad_sequence(read, batch_first=True))
        places = first[:, None] + torch.arange(said.shape[1], device=said.device)
        loss, _ = self._score(hidden[torch.arange(len(said), device=said.device)[:, None], places].flatten(0, 1), said.flatten())
        means: list[float] = (-(loss.view_as(said) * valid).sum(1) / valid.sum(1)).tolist()
        return means

    def _embed(self, prefixes: Float[Tensor, "C K H"], ids: Int[Tensor, "C L"]) -> Float[Tensor, "C K+L H"]:
        tokens = self.lm.get_input_embeddings()(ids)
        return torch.cat([prefixes.to(tokens.dtype), tokens], dim=1)

    def _read(self, prefixes: Float[Tensor, "C K H"], ids: Int[Tensor, "C L"]) -> Float[Tensor, "C L H"]:
        """Return what the output embeddings read at each text row. Padding stands on the right."""
        # Causal attention never looks to the right, so padding needs no mask, positions count from the left, and fused kernels run.
        hidden: Tensor = self.lm.base_model(inputs_embeds=self._embed(prefixes, ids), use_cache=False).last_hidden_state
        return hidden[:, prefixes.shape[1]:]

    def _target_rows(self, state: State) -> Float[Tensor, "R H"]:
        num_images = len(state.image_slots)
        prefixes = state.rows.unflatten(0, (num_images, len(state.rows) // num_images))
        image_of = state.image_places[state.slots[:, 0]] // state.image_slots.shape[1]
        hidden = self._read(prefixes.index_select(0, image_of), state.ids[state.slots])
        return hidden.flatten(0, 1).index_select(0, state.places[state.target_rows])

    def _score(self, rows: Float[Tensor, "R H"], target_ids: Int[Tensor, " R"]) -> tuple[Float[Tensor, " R"], Bool[Tensor, " R"]]:
        loss, correct = _FrozenCrossEntropy.apply(rows, target_ids, self.lm.get_output_embeddings())
        return loss, correct

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenLm":
        """Go to another device, but keep the precision that was loaded, whatever an engine casts its model to: rotary tables stay float32."""
        def moved(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            return out if out.dtype == tensor.dtype else tensor.to(out.device)

        super()._apply(moved, recurse)
        return self


class _FrozenCrossEntropy(torch.autograd.Function):
    """softmax cross-entropy of frozen output embeddings, a chunk of rows at a time.

    A target's loss depends on its own row alone and the weights take no gradient, so each row's gradient is made with its loss and only
    scaled in the backward pass: logits exist for one chunk and are computed once.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, target_ids: Tensor, decode: nn.Module) -> tuple[Tensor, Tensor]:
        needed: bool = ctx.needs_input_grad[0]  # type: ignore[attr-defined]
        losses, correct = [], []
        slopes: list[Tensor] = []
        for part, targets in zip(rows.split(TARGETS_PER_CHUNK), target_ids.split(TARGETS_PER_CHUNK), strict=True):
            with torch.enable_grad():
                chunk = part.detach().requires_grad_(needed)
                logits = decode(chunk).float()
                loss = F.cross_entropy(logits, targets, reduction="none")
                slopes += torch.autograd.grad(loss.sum(), chunk) if needed else ()
            losses.append(loss.detach())
            correct.append(logits.detach().argmax(-1) == targets)
        if needed:
            ctx.save_for_backward(torch.cat(slopes))
        both = torch.cat(losses), torch.cat(correct)
        ctx.mark_non_differentiable(both[1])
        return both

    @staticmethod
    def backward(ctx: FunctionCtx, grad_loss: Tensor, _grad_correct: Tensor) -> tuple[Tensor, None, None]:
        slopes, = ctx.saved_tensors  # type: ignore[attr-defined]
        return (slopes * grad_loss[:, None]).to(slopes.dtype), None, None


def open_frozen(config: LanguageModelConfig, *, precision: Literal["fp32", "bf16"], prefix_tokens: int, recompute: bool = False) -> FrozenLm:
    """Return the language model that a config names, with its weights, on the CPU. precision: of the run.   prefix_tokens: K, rows of a picture.

    Raises ConfigError for values that cannot work, CheckpointError for files that are missing, damaged or of another model.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

    folder = find_folder(config)
    theirs = _read_config(config, folder)
    _check_positions(config, theirs.max_position_embeddings, prefix_tokens=prefix_tokens)
    if not config.gguf_file:
        _check_files(folder)
    load: Any = AutoModelForCausalLM.from_pretrained
    options = {"gguf_file": str(folder / config.gguf_file), "quantization_config": GgufConfig(dequantize=True)} if config.gguf_file else {}
    try:
        with _quiet(), redirect_stderr(StringIO()) if config.gguf_file else nullcontext():  # the bar of GGUF files has no switch
            lm, info = load(folder, config=theirs, dtype=dtype_of(config, precision),
                            attn_implementation=config.attention, use_safetensors=True, local_files_only=True, trust_remote_code=False,
                            output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except ImportError as error:
        raise ConfigError(f"text.attention ('{config.attention}') cannot be had here ({_first_line(error)}); use sdpa") from error
    except (SafetensorError, StrictDataclassError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / config.gguf_file} does not load ({_first_line(error)}); fetch it again") from error
    _check_weights(info, folder / config.gguf_file)
    lm.generation_config = GenerationConfig()  # the model's own may sample, or punish repetition
    return FrozenLm(lm, recompute=recompute)


class LanguageShape(NamedTuple):
    """Sizes of a language model."""

    width: int
    """H, of its token embeddings, which prefix rows must have; OPT-350M's layers have another one."""
    layers: int
    attention_width: int
    """Heads times their size."""
    layer_weights: int
    """Of all matrices that every row goes through."""
    head_weights: int
    """Of the output embeddings."""
    vocab_size: int
    """V, rows of the output embeddings."""
    kept_width: int
    """Numbers of a row that the attention and the MLP of a layer keep for the backward pass. Its linears keep none, because they do not learn."""
    norm_width: int
    """Those that its norms keep."""
    norms_in_float32: bool
    """Whether they keep them in float32, whatever the model's precision is: RMS norms do."""


@cache
def language_shape(config: LanguageModelConfig) -> LanguageShape:
    """Return the model's sizes, without reading weights; of a folder or of the hub its config.json is enough. Raises as open_frozen."""
    model, theirs = _on_meta(config), _config_alone(config)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = [weight for weight in model.base_model.parameters() if weight.ndim == 2 and id(weight) not in tables]
    width, heads = model.get_input_embeddings().weight.shape[1], theirs.num_attention_heads
    head_width = getattr(theirs, "head_dim", None) or theirs.hidden_size // heads
    attention_width, key_width = heads * head_width, (getattr(theirs, "num_key_value_heads", None) or heads) * head_width
    units = max(size for weight in matrices for size in weight.shape)  # of an MLP: no other matrix of a layer is as wide
    head: Tensor = model.get_output_embeddings().weight
    return LanguageShape(
        width, theirs.num_hidden_layers, attention_width, sum(weight.numel() for weight in matrices), head.numel(), vocab_size=len(head),
        # Queries, keys, values and what attention makes of them, then the units.
        kept_width=2 * attention_width + 2 * key_width + UNITS_KEPT.get(theirs.model_type, 3) * units,
        # Qwen3 norms queries and keys too.
        norm_width=2 * theirs.hidden_size + (theirs.model_type == "qwen3") * (attention_width + key_width),
        norms_in_float32=not any(isinstance(module, nn.LayerNorm) for module in model.modules()))


def outline_frozen(config: LanguageModelConfig, *, precision: Literal["fp32", "bf16"]) -> FrozenLm:
    """Return the language model without its weights, on the meta device: what `flm plan` counts. Raises as open_frozen."""
    return FrozenLm(_on_meta(config).to(dtype_of(config, precision)))


def dtype_of(config: LanguageModelConfig, precision: Literal["fp32", "bf16"]) -> torch.dtype:
    """Return what the language model computes in. precision: of the run."""
    return DTYPES[precision if config.dtype == "auto" else config.dtype]


def _on_meta(config: LanguageModelConfig) -> Any:  # noqa: ANN401 - each family has a class of its own
    from transformers import AutoModelForCausalLM

    theirs = _config_alone(config)
    with torch.device("meta"), _quiet():
        return AutoModelForCausalLM.from_config(theirs)


def _config_alone(config: LanguageModelConfig) -> Any:  # noqa: ANN401 - as _read_config
    """Return transformers' config of the model, of which nothing else need be there."""
    try:
        return _read_config(config, find_folder(config, files=[config.gguf_file or "config.json"]))
    except CheckpointError as error:
        raise CheckpointError(f"{error}; to plan, a folder with its config.json alone is enough") from error


def content_hash(model: FrozenLm) -> str:
    """Return the sha256 of all weights by name, one at a time. It stands for them in a checkpoint, and depends on their precision."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.lm.named_parameters()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _check_positions(config: LanguageModelConfig, positions: int, *, prefix_tokens: int) -> None:
    """Raise ConfigError when a picture and the longest text do not fit into the model's positions."""
    if prefix_tokens + config.max_length > positions:
        raise ConfigError(f"text.max_length ({config.max_length}) behind {prefix_tokens} tokens of a picture must fit into {config.name}'s "
                          f"{positions} positions; use at most {positions - prefix_tokens}, or merge more tokens")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' warnings and progress bars from the terminal: what matters of them is an error here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def find_folder(config: LanguageModelConfig, *, files: Sequence[str] = ()) -> Path:
    """Return the folder that is named, or that of the hub's model, of which the files are fetched that are not there yet: by default all it takes."""
    if config.revision and Path(config.name).is_dir():
        raise ConfigError(f"text.revision ('{config.revision}') is of a model of the hub, and {config.name} is a folder; leave it out")
    weights = [config.gguf_file] if config.gguf_file else SAFETENSORS
    return folder_of_model(config.name, option="text.name", revision=config.revision, files=files or [
        "config.json", "tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", *weights])


def _read_config(config: LanguageModelConfig, folder: Path) -> Any:  # noqa: ANN401 - each family has a class of its own
    """Return transformers' config of the model, with every dropout 0."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    path, options = folder / (config.gguf_file or "config.json"), {}
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; text.name wants a folder as save_pretrained writes it, or with text.gguf_file")
    if config.gguf_file:
        options["gguf_file"] = str(path.absolute())
        for package in ("gguf", "accelerate"):
            try:
                import_module(package)
            except ImportError as error:
                raise ConfigError(f"text.gguf_file needs the package {package}; `pip install {package}`, or name safetensors") from error
    try:
        with _quiet():
            theirs = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **options)
    except (StrictDataclassError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: {_first_line(error)}") from error
    if theirs.model_type not in FAMILIES:
        raise CheckpointError(f"{path}: model_type ('{theirs.model_type}') is not one of {', '.join(FAMILIES)}; choose another model")
    if getattr(theirs, "quantization_config", None):
        raise CheckpointError(f"{path}: its weights are quantised, and gradients must go through them; choose the model without quantisation")
    # Families call them differently, but all have this in the name; modules take what they have from here.
    for name in [name for name in theirs.to_dict() if "drop" in name]:
        setattr(theirs, name, 0.0)
    return theirs


def _check_files(folder: Path) -> None:
    """Raise CheckpointError when the folder's safetensors are not all there."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return
    if not index.is_file():
        raise CheckpointError(f"{folder}: has no model.safetensors; pickled weights (*.bin) are not read, because they can run code: convert them "
                              "with save_pretrained, or name a text.revision that has safetensors")
    try:
        shards = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read ({_first_line(error)}); fetch it again") from error
    missing = sorted(shard for shard in shards if not (folder / shard).is_file())
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} of {len(shards)} files of weights are missing ({', '.join(missing)}); fetch them again")


def _check_weights(info: dict[str, Any], path: Path) -> None:
    """Raise one error for all weights that the model lacks, does not know or has in another shape. Tied weights may be absent."""
    problems = [f"'{name}' {list(found)} must be {list(wanted)}" for name, found, wanted in sorted(info["mismatched_keys"])]
    problems += [f"'{name}' is missing" for name in sorted(info["missing_keys"])]
    problems += [f"'{name}' is not the model's" for name in sorted(info["unexpected_keys"])]
    problems += map(str, info["error_msgs"])
    if problems:
        more = f" and {len(problems) - 3} more" if problems[3:] else ""
        raise CheckpointError(f"{path}: {', '.join(problems[:3])}{more}: not the weights that its config describes; fetch it again")
