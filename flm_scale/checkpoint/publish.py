"""`flm checkpoint export`: a checkpoint as a folder that transformers loads without flm_scale, and that `flm eval` and `flm caption` open.

Of a run around a frozen language model see publish_lm.py. Of any other:

    FOLDER/
        model.safetensors        the weights under their canonical names; model-00001-of-00003.safetensors, ... with an index above 5 GB
        config.json              sizes and objective; generation_config.json, preprocessor_config.json: first and last token, the pictures' size
        modeling_flm.py          a copy of flm_scale/export.py
        tokenizer.json           the tokenizer, converted; tokenizer_config.json, and the tokenizer.model that it was made from
        run.json                 the resolved Run
        README.md                a model card

Weights go from disk to disk, one at a time.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch

from flm_scale import __version__
from flm_scale.checkpoint.card import model_card
from flm_scale.checkpoint.publish_lm import CODE, bridge_config, exported_shapes
from flm_scale.checkpoint.reader import Checkpoint
from flm_scale.checkpoint.weights import checkpoint_at
from flm_scale.config import Run, TextConfig
from flm_scale.config_lm import LanguageModelConfig
from flm_scale.data.shards import Dataset, open_dataset
from flm_scale.data.tokens import SPECIAL_PIECES, Tokenizer
from flm_scale.errors import CheckpointError, ConfigError
from flm_scale.model.vision import colours

SHARD_BYTES = 5 * 10**9
DTYPES = {"float32": (torch.float32, "F32"), "bfloat16": (torch.bfloat16, "BF16")}
"""torch's, and the name that it has in a safetensors header."""
MODULE = "modeling_flm"


def export(run_dir: Path, out: Path, *, step: int | None = None, dtype: Literal["float32", "bfloat16"] = "float32") -> None:
    """Write the folder `out`, whole or not at all. step: of the checkpoint; by default the latest good one's.

    Raises CheckpointError when there is no such checkpoint, when `out` holds something or the disk refuses; DataError when the run's dataset,
    of which the tokenizer is part, is not there; ConfigError when the tower merges rows.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"--out {out}: is there already; name a new folder, or remove it")
    checkpoint = checkpoint_at(run_dir, step)
    run = Run.model_validate_json(checkpoint.run_json)
    if any(run.vision.merged):
        raise ConfigError(f"vision.merged ({run.vision.merged}): the exported code merges no rows; evaluate the run itself (flm eval, flm caption)")
    if run.vision.frames > 1:
        raise CheckpointError(f"{run_dir}: vision.frames ({run.vision.frames}): the exported code reads pictures, and this run has seen clips; "
                              "flm eval and flm caption read the run itself")
    own_tokens = isinstance(run.text, TextConfig)
    dataset = open_dataset(run.data.path, manifest_hash=run.data.manifest_hash, tokenizer_hash=run.data.tokenizer_hash if own_tokens else "")
    print(f"exports {checkpoint.folder}", flush=True)
    part = out.with_name(f".{out.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        if isinstance(run.text, LanguageModelConfig):
            write_weights(part, checkpoint, exported_shapes(run, checkpoint), dtype=dtype)
            copy_code(part, dict(zip(CODE, CODE, strict=True)))
            write_json(part / "config.json", bridge_config(run, run.text, checkpoint, dtype=dtype))
            write_json(part / "preprocessor_config.json", processor_config(run, module=CODE[0]))
        else:
            write_weights(part, checkpoint, checkpoint.names(), dtype=dtype)
            write_configs(part, run, dataset, dtype=dtype)
            shutil.copyfile(dataset.tokenizer_file, part / "tokenizer.model")
        (part / "run.json").write_text(checkpoint.run_json)
        (part / "README.md").write_text(model_card(run_dir, run, checkpoint, dataset, out=out))
        part.replace(out)
    except OSError as error:
        raise CheckpointError(f"{error.filename or part}: cannot be written ({error.strerror}); the disk must be there, writable and have "
                              "room") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(out)


def write_weights(folder: Path, checkpoint: Checkpoint, shapes: Mapping[str, Sequence[int]], *, dtype: str) -> None:
    """Write the weights of these names as one safetensors file, or as several of at most SHARD_BYTES with an index that says which has which."""
    from rich.progress import Progress

    size_of = {name: prod(shape) * DTYPES[dtype][0].itemsize for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    for name in sorted(shapes):
        if shards[-1] and sum(map(size_of.__getitem__, shards[-1])) + size_of[name] > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    files = ["model.safetensors"] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    with Progress(transient=True) as progress:
        task = progress.add_task("weights", total=len(shapes))
        for name, held in zip(files, shards, strict=True):
            with (folder / name).open("wb") as file:
                for block in encode_weights(checkpoint, {weight: shapes[weight] for weight in held}, dtype=dtype):
                    file.write(block)
                    progress.advance(task)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(size_of.values())}, "weight_map": {weight: name for name, held in zip(files, shards, strict=True)
                                                                                   for weight in held}}
        write_json(folder / "model.safetensors.index.json", index)


def encode_weights(checkpoint: Checkpoint, shapes: Mapping[str, Sequence[int]], *, dtype: str) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file: its header, then weight after weight, as many as are in memory at once."""
    torch_dtype, code = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, offset := offset + prod(shape) * torch_dtype.itemsize]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in shapes:
        yield checkpoint.weight(name)[:].to(torch_dtype).contiguous().flatten().view(torch.uint8).numpy().data


def write_configs(folder: Path, run: Run, dataset: Dataset, *, dtype: str) -> None:
    """Write what transformers wants to know beside the weights, and the file that it runs."""
    tokenizer = Tokenizer(dataset.tokenizer_file)
    copy_code(folder, {"export": MODULE})
    special_ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    write_json(folder / "config.json", model_config(run) | special_ids | {"dtype": dtype})
    # What flm_scale.model.generate does: no BOS, no token that the tokenizer lacks, and EOS at the longest.
    never_said = [tokenizer.bos_id, *range(tokenizer.vocab_size, run.transformer.vocab_size)]
    write_json(folder / "generation_config.json", special_ids | {
        "max_length": run.text.max_length, "forced_eos_token_id": tokenizer.eos_id, "suppress_tokens": never_said})
    write_json(folder / "preprocessor_config.json", processor_config(run, module=MODULE))
    write_tokenizer(folder, tokenizer, max_length=run.text.max_length)


def processor_config(run: Run, *, module: str) -> dict[str, Any]:
    """Return the values of flm_scale.export.FlmScaleImageProcessor. module: what export.py is called in the folder."""
    return {"image_processor_type": "FlmScaleImageProcessor", "auto_map": {"AutoImageProcessor": f"{module}.FlmScaleImageProcessor"},
            "image_size": run.vision.image_size}


def copy_code(folder: Path, modules: Mapping[str, str]) -> None:
    """Copy modules of flm_scale, each under the name that it is to have there."""
    for module, name in modules.items():
        code = find_spec(f"flm_scale.{module}")
        assert code is not None and code.origin is not None  # noqa: PT018
        shutil.copyfile(code.origin, folder / f"{name}.py")


def model_config(run: Run) -> dict[str, Any]:
    """Return the values of flm_scale.export.FlmScaleConfig."""
    mean, std = colours(run.vit)
    text = run.transformer
    return {
        "architectures": ["FlmScaleForCausalLM"], "model_type": "flm_scale", "flm_scale_version": __version__,
        "auto_map": {"AutoConfig": f"{MODULE}.FlmScaleConfig", "AutoModel": f"{MODULE}.FlmScaleForCausalLM",
                     "AutoModelForCausalLM": f"{MODULE}.FlmScaleForCausalLM"},
        "objective": run.objective.kind, "norm": text.norm, "tie_word_embeddings": text.tied, "vocab_size": text.vocab_size,
        "hidden_size": text.width, "num_attention_heads": text.heads, "max_position_embeddings": text.max_length,
        "bottom_layers": text.bottom_layers, "fusion_layers": text.fusion_layers,
        "reconstructor_bottom_layers": text.reconstructor_bottom_layers, "reconstructor_fusion_layers": text.reconstructor_fusion_layers,
        "vision": run.vision.model_dump(exclude={"trainable", "pretrained", "merged"}), "image_mean": list(mean), "image_std": list(std)}


def write_tokenizer(folder: Path, tokenizer: Tokenizer, *, max_length: int) -> None:
    """Write sentencepiece's BPE as the files of a fast tokenizer that gives the same ids and texts, truncation included.

    A piece's merges are all ways to put it together out of two others, and rank as the piece does: its id, because training numbers pieces
    in the order in which it made them.
    """
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, processors
    from tokenizers import Tokenizer as FastTokenizer

    ids = {piece: number for number, piece in enumerate(tokenizer.pieces(range(tokenizer.vocab_size)))}
    ordinary = set(ids) - set(SPECIAL_PIECES)
    merges = [(piece[:cut], piece[cut:]) for piece in ids if piece in ordinary for cut in range(1, len(piece))
              if piece[:cut] in ordinary and piece[cut:] in ordinary]
    pad, bos, eos, unk, mask = SPECIAL_PIECES
    fast = FastTokenizer(models.BPE(vocab=ids, merges=merges, unk_token=unk, fuse_unk=True))
    # Tokenizer.encode's NFC, then what sentencepiece does to spaces, which are '▁' from there on.
    fast.normalizer = normalizers.Sequence([
        normalizers.NFC(), normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" +"), "▁"), normalizers.Prepend("▁"),
        normalizers.Replace(Regex(r"▁+\z"), "")])
    fast.post_processor = processors.TemplateProcessing(single=f"{bos} $A {eos}", special_tokens=[(bos, ids[bos]), (eos, ids[eos])])
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Replace(Regex(r"\A +"), "")])
    fast.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in SPECIAL_PIECES])
    fast.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length, "model_input_names": ["input_ids", "attention_mask"],
        "pad_token": pad, "bos_token": bos, "eos_token": eos, "unk_token": unk, "mask_token": mask, "clean_up_tokenization_spaces": False,
        # No special token comes out of text.
        "split_special_tokens": True})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
