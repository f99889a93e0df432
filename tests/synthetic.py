"""Small Runs and random packed micro-batches, for tests that need a model but no dataset."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flm_scale.batch import Batch, Example
from flm_scale.checkpoint.store import begin, commit, write_rank
from flm_scale.config import ArConfig, BatchConfig, CaptioningConfig, FlmConfig, MlmConfig, OptimConfig, PrefixLmConfig, Run, TextConfig
from flm_scale.config_lm import BridgeConfig, LanguageModelConfig, MergeConfig
from flm_scale.config_vision import SmallVisionConfig
from flm_scale.data.loader import clip_axis
from flm_scale.data.pack import pack
from flm_scale.engine.local import LocalEngine
from flm_scale.model.parts import Piece
from flm_scale.objectives.objective import Objective, build_objective

MASK_ID = 4
VOCAB_SIZE = 60
OBJECTIVES = {"flm": FlmConfig(corruption_rate=0.4), "mlm": MlmConfig(mask_rate=0.4), "ar": ArConfig(), "prefix_lm": PrefixLmConfig()}


def tiny_run(kind: str = "flm", **changes: Any) -> Run:
    """A model of some 100,000 weights."""
    run = Run(
        name="tiny", steps=20, objective=OBJECTIVES[kind],
        vision=SmallVisionConfig(image_size=16, patch_size=8, width=32, layers=2, heads=2, output="final"),
        text=TextConfig(width=32, heads=4, bottom_layers=1, fusion_layers=2, reconstructor_bottom_layers=1, reconstructor_fusion_layers=2,
                        vocab_size=VOCAB_SIZE, max_length=16),
        batch=BatchConfig(micro_batches=4, text_tokens=200, captions=16, images=16), optim=OptimConfig(lr=3e-3, warmup_steps=2))
    return run.replace(**changes)


def tiny_language_run(folder: Path, **changes: Any) -> Run:
    """A bridge of two layers into the language model in a folder: five image rows become three. Adam's large eps is that of worker.case_run."""
    bridge = BridgeConfig(width=32, heads=4, layers=2, reducer=MergeConfig(merged=(1,), proportional=True))
    return tiny_run(objective=CaptioningConfig(), text=LanguageModelConfig(name=str(folder), max_length=16, bridge=bridge),
                    **{"optim": OptimConfig(lr=3e-3, warmup_steps=2, eps=1e-3), **changes})


def objective_of(run: Run) -> Objective:
    return build_objective(run.objective, mask_id=MASK_ID)


def caption_ids(num_content: int, rng: np.random.Generator) -> np.ndarray:
    """BOS, content without a repeated token, EOS."""
    return np.concatenate([[1], rng.permutation(np.arange(5, VOCAB_SIZE))[:num_content], [2]]).astype(np.int32)


def random_examples(objective: Objective, rng: np.random.Generator, *, captions_per_image: Sequence[int], longest: int = 9) -> list[list[Example]]:
    """Corrupted captions of 1..longest content tokens."""
    return [[view for _ in range(count) for view in objective.corrupt(caption_ids(int(rng.integers(1, longest + 1)), rng), rng)]
            for count in captions_per_image]


def random_pixels(num_images: int, rng: np.random.Generator, *, size: int = 16, frames: int = 1) -> np.ndarray:
    return rng.integers(0, 256, (num_images, *clip_axis(frames), 3, size, size), dtype=np.uint8)


def as_batch(examples: list[list[Example]], pixels: np.ndarray, objective: Objective) -> Batch:
    state = pack(examples, pixels)
    return Batch(state, keys=tuple(f"{i:05d}" for i in range(len(examples))), num_captions=len(state.lengths), num_tokens=len(state.ids),
                 part_counts=torch.bincount(state.target_parts, minlength=len(objective.parts)))


def random_batch(run: Run, *, seed: int) -> Batch:
    """A micro-batch of 2 to 5 images with 1 to 3 captions each: token counts differ from batch to batch."""
    rng = np.random.default_rng(seed)
    objective = objective_of(run)
    counts = rng.integers(1, 4, size=rng.integers(2, 6)).tolist()
    return as_batch(random_examples(objective, rng, captions_per_image=counts), random_pixels(len(counts), rng, frames=run.vision.frames), objective)


def weights_of(engine: LocalEngine) -> dict[str, Tensor]:
    """Copies of the float32 weights by name."""
    return {piece.name: piece.values.clone().view(piece.shape) for piece in engine.saved_pieces() if piece.kind == "weight"}


def write_weights(run_dir: Path, weights: dict[str, Tensor], run: Run | None = None, *, step: int = 0) -> Path:
    """Commit a checkpoint of weights alone, as one process would, and return its folder."""
    pieces = [Piece(name, "weight", tuple(weight.shape), None, 0, weight.detach().float().flatten()) for name, weight in weights.items()]
    partial = begin(run_dir, step=step)
    write_rank(partial, rank=0, pieces=pieces, state={})
    return commit(partial, num_ranks=1, run_json=run.model_dump_json() if run else "{}", state={"step": step}, timeout_seconds=1)
