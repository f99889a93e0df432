"""What a frozen language model saves in memory: a training step around it, frozen and not, each in a process of its own.

Activations are the bytes that autograd keeps for the backward pass of a micro-batch, weights left out; gradients and moments those that the
optimizer meets; resident is how far the process grew over the steps, from after the model was built to its peak. Counted is what `flm plan`
says of the first. Output embeddings stay frozen throughout, because their gradient is not computed here (model/frozen_lm.py).

    python -m tools.bench_memory [--pairs 8] [--steps 2]
"""

import multiprocessing
import platform
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import psutil
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from flm_scale.batch import Batch
from flm_scale.config import BatchConfig, CaptioningConfig, Run, SmallVisionConfig
from flm_scale.config_lm import BridgeConfig, LanguageModelConfig
from flm_scale.data.pack import pack
from flm_scale.engine.base import score
from flm_scale.engine.local import LocalEngine
from flm_scale.model.assemble import build_model
from flm_scale.objectives.captioning import Captioning
from flm_scale.observe.cost import BatchShapes, shape_of
from flm_scale.observe.footprint import footprints

VARIANTS = {"frozen": (False, False), "frozen, recomputed": (False, True), "trained too": (True, False)}
"""Whether the language model learns, and whether layers are recomputed."""
CONTENT_TOKENS = 11


class Measured(NamedTuple):
    """Bytes."""

    weights: int
    activations: int
    gradients: int
    moments: int
    resident: int
    counted: float


def write_llama(folder: Path) -> Path:
    """Write a LLaMA of 34 million random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
                                 max_position_embeddings=512)).save_pretrained(folder)
    return folder


def measure(folder: Path, pairs: int, steps: int, learns: bool, recompute: bool) -> Measured:
    """Train for some steps in this process and look."""
    run = Run(name="bench", objective=CaptioningConfig(), batch=BatchConfig(text_tokens=4096), recompute=recompute,
              vision=SmallVisionConfig(image_size=224, patch_size=14, width=192, layers=12, heads=3, trainable=False),
              text=LanguageModelConfig(name=str(folder), max_length=32, bridge=BridgeConfig(width=192, heads=3, layers=12)))
    objective, rng = Captioning(np.empty(0, np.int32)), np.random.default_rng(0)
    model = build_model(run, objective)
    if learns:
        model.layers["head"].requires_grad_(True)
        model.layers["head"].lm.get_output_embeddings().requires_grad_(False)
    engine = LocalEngine(run, model, objective)
    examples = [objective.corrupt(np.concatenate([[1], rng.integers(5, 4000, CONTENT_TOKENS), [2]]).astype(np.int32), rng) for _ in range(pairs)]
    state = pack(examples, rng.integers(0, 256, (pairs, 3, 224, 224), dtype=np.uint8))
    batch = Batch(state, tuple(map(str, range(pairs))), pairs, len(state.ids), torch.bincount(state.target_parts, minlength=len(objective.parts)))
    before, gradients = psutil.Process().memory_info().rss, list[int]()
    engine.optimizer.register_step_pre_hook(lambda *_: gradients.append(sum(one.grad.nbytes for one in engine.masters if one.grad is not None)))
    for step in range(steps):
        engine.train_step([batch], step=step)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    moments = sum(value.nbytes for of_one in engine.optimizer.state.values() for value in of_one.values() if isinstance(value, Tensor))
    shapes = BatchShapes.of(state)
    counted = footprints(run, shapes, shape_of(run.vision), longest=state.slots.shape[1])
    # Where layers are recomputed only what comes in is kept, and of the language model what it keeps itself.
    return Measured(sum(weight.nbytes for weight in model.parameters()), activations(engine, batch), max(gradients), moments, resident,
                    float("nan") if recompute or learns else sum(layer.saved for layer in counted.values()))


def activations(engine: LocalEngine, batch: Batch) -> int:
    """Return the bytes that a forward pass leaves for the backward pass."""
    seen = {weight.untyped_storage().data_ptr() for weight in engine.model.parameters()}
    kept = list[Tensor]()

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in seen:
            seen.add(tensor.untyped_storage().data_ptr())
            kept.append(tensor)  # or its memory would be used again under the same address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        score(engine.model, batch.state, engine.task)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept)


def main(*, pairs: int = 8, steps: int = 2) -> None:
    """Print the table. pairs: captions, each with its image, in a micro-batch."""
    console, found = Console(width=150), dict[str, Measured]()
    with TemporaryDirectory() as scratch:
        folder = write_llama(Path(scratch))
        for name, (learns, recompute) in VARIANTS.items():
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
                found[name] = alone.submit(measure, folder, pairs, steps, learns, recompute).result()
    console.print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32, "
                  f"{time.strftime('%Y-%m-%d')}; {pairs} pairs of {CONTENT_TOKENS + 2} tokens, {steps} steps")
    table = Table("language model", *(f"{field}, MB" for field in Measured._fields))
    for name, one in found.items():
        table.add_row(name, *("" if size != size else f"{size / 1e6:,.0f}" for size in one))  # noqa: PLR0124 - nan
    console.print(table)


if __name__ == "__main__":
    tyro.cli(main)
