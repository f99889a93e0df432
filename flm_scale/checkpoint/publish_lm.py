"""What `flm checkpoint export` writes of a run around a frozen language model: the bridge, and names and hashes of the frozen parts.

    FOLDER/
        model.safetensors        the bridge's weights, and the tower's; not those of a frozen tower that comes from a file of open_clip's
        config.json              sizes; name, revision and sha256 of the language model and of such a tower; preprocessor_config.json
        export.py, export_lm.py  copies of flm_scale's
        run.json, README.md      the resolved Run; a model card
"""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from flm_scale import __version__
from flm_scale.checkpoint.reader import Checkpoint
from flm_scale.config import CaptioningConfig, Run
from flm_scale.config_lm import DropConfig, LanguageModelConfig
from flm_scale.config_vision import OpenClipVisionConfig
from flm_scale.data.tokens import LmTokenizer
from flm_scale.model.assemble import tower_sizes
from flm_scale.model.bridge import tokens_along
from flm_scale.model.frozen_lm import dtype_of, find_folder, language_shape
from flm_scale.model.reducers import kept_patches
from flm_scale.model.vision import colours, tower_hash

CODE = ("export", "export_lm")
"""Modules that are copied, under the names by which one imports the other."""


def exported_shapes(run: Run, checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight that goes into the folder, by name."""
    return {name: shape for name, shape in checkpoint.names().items() if not (tower_is_pointed_at(run) and name.startswith("vision_"))}


def tower_is_pointed_at(run: Run) -> bool:
    """Return whether the tower is named and not exported: it never changes, and everyone can have it where the run had it."""
    return isinstance(run.vision, OpenClipVisionConfig) and bool(run.vision.pretrained) and not run.vision.trainable


def bridge_config(run: Run, text: LanguageModelConfig, checkpoint: Checkpoint, *, dtype: Literal["float32", "bfloat16"]) -> dict[str, Any]:
    """Return the values of flm_scale.export_lm.FlmScaleBridgeConfig. Raises CheckpointError and DataError when the language model is not there."""
    sizes, (mean, std) = tower_sizes(run.vision), colours(run.vit)
    tokenizer = LmTokenizer(find_folder(text), fingerprint=run.data.tokenizer_hash)
    prompt = run.objective.prompt if isinstance(run.objective, CaptioningConfig) else ""
    reducer = text.bridge.reducer.model_dump()
    if isinstance(text.bridge.reducer, DropConfig):
        kept = kept_patches(sizes["image_tokens"] - sizes["prefix_tokens"], num_kept=text.bridge.reducer.kept, seed=run.seed)
        reducer["places"] = list(kept)
    tower: Mapping[str, Tensor] = {}
    if tower_is_pointed_at(run):
        tower = {name: checkpoint.weight(name)[:] for name in checkpoint.names() if name.startswith("vision_")}
    return {
        "architectures": ["FlmScaleBridgeForCausalLM"], "model_type": "flm_scale_bridge", "flm_scale_version": __version__, "dtype": dtype,
        "auto_map": {"AutoConfig": "export_lm.FlmScaleBridgeConfig", "AutoModel": "export_lm.FlmScaleBridgeForCausalLM",
                     "AutoModelForCausalLM": "export_lm.FlmScaleBridgeForCausalLM"},
        "hidden_size": text.bridge.width, "num_attention_heads": text.bridge.heads, "protected": sizes["prefix_tokens"], "reducer": reducer,
        "tokens": list(tokens_along(text.bridge, image_tokens=sizes["image_tokens"], prefix_tokens=sizes["prefix_tokens"])),
        "tower_width": sizes["width"], "lm_width": language_shape(text).width,
        "vision": run.vision.model_dump(exclude={"trainable"} if tower else {"trainable", "pretrained"}),
        "tower_hash": tower_hash(tower) if tower else "", "image_mean": list(mean), "image_std": list(std),
        "language_model": text.name, "language_model_revision": text.revision, "language_model_file": text.gguf_file,
        "language_model_hash": text.weights_hash, "language_model_dtype": str(dtype_of(text, run.precision)).removeprefix("torch."),
        "tokenizer_hash": tokenizer.fingerprint, "prompt_ids": tokenizer.encode_all([prompt])[0][:-1], "caption_tokens": text.max_length - 1,
        "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "tie_word_embeddings": False}
