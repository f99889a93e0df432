"""What a micro-step costs with each way to make image rows fewer, and how many rows the language model gets.

A scaled-down SimVLG with the proportions of the published one: a frozen tower of 257 rows at 224 px, a bridge of 12 layers that costs a twentieth of
it, and a language model whose layers have 2.6 times the tower's weights; or a real language model, with --model. All variants take turns in one
process, so that a noisy machine disturbs them alike. Measured ratios are medians over rounds, each against merging to 29 in the same round;
calculated ones are of FLOPs.

    python -m tools.bench_simvlg [--model FOLDER] [--pairs 16] [--rounds 5]
"""

import platform
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from flm_scale.config import BatchConfig, CaptioningConfig, Run
from flm_scale.config_lm import (
    BridgeConfig,
    DropConfig,
    LanguageModelConfig,
    MergeConfig,
    NoReducerConfig,
    PoolConfig,
    Reducer,
    UnshuffleConfig,
)
from flm_scale.config_vision import SmallVisionConfig
from flm_scale.data.pack import pack
from flm_scale.engine.base import keep_freed_memory
from flm_scale.model.assemble import build_model
from flm_scale.model.bridge import tokens_along
from flm_scale.objectives.captioning import Captioning
from flm_scale.observe.cost import shape_of
from tools.bench import Variant, interleave

REDUCERS: dict[str, tuple[Reducer, int]] = {
    "merge": (MergeConfig(), 224), "merge, plain mean": (MergeConfig(weighted=False), 224),
    "merge, proportional": (MergeConfig(proportional=True), 224),
    "pool 4 x 7": (PoolConfig(), 224), "drop": (DropConfig(), 224), "merge 16 a layer": (MergeConfig(merged=(16,)), 224),
    "unshuffle 2 x 2": (UnshuffleConfig(), 224), "pool 8 x 8": (PoolConfig(rows=8, columns=8), 224), "none, at 112 px": (NoReducerConfig(), 112),
    "none": (NoReducerConfig(), 224)}
"""What is compared, and the side of the picture."""
CONTENT_TOKENS = 11


def write_llama(folder: Path) -> Path:
    """Write a LLaMA of random weights: 14 million in its layers, as the tower has 5."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
                                 max_position_embeddings=512)).save_pretrained(folder)
    return folder


def run_of(reducer: Reducer, image_size: int, model: Path) -> Run:
    """Return the Run of a variant."""
    return Run(
        name="bench", objective=CaptioningConfig(), batch=BatchConfig(text_tokens=4096),
        vision=SmallVisionConfig(image_size=image_size, patch_size=14, width=192, layers=12, heads=3, trainable=False),
        text=LanguageModelConfig(name=str(model), max_length=32, bridge=BridgeConfig(width=96, heads=3, layers=12, reducer=reducer)))


def main(*, model: Path | None = None, pairs: int = 16, rounds: int = 5) -> None:
    """Print the table. model: folder of a language model.   pairs: captions, each with its image, in a micro-step."""
    keep_freed_memory()
    console = Console(width=150)
    with TemporaryDirectory() as scratch:
        folder, rng = model or write_llama(Path(scratch)), np.random.default_rng(0)
        objective, variants = Captioning(np.empty(0, np.int32)), list[Variant]()
        examples = [objective.corrupt(np.concatenate([[1], rng.integers(5, 4000, CONTENT_TOKENS), [2]]).astype(np.int32), rng) for _ in range(pairs)]
        for name, (reducer, side) in REDUCERS.items():
            run, pixels = run_of(reducer, side, folder), rng.integers(0, 256, (pairs, 3, side, side), dtype=np.uint8)
            variants.append(Variant(name, run, build_model(run, objective), objective, pack(examples, pixels)))
        seconds = interleave(variants, rounds=rounds)
    console.print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32, "
                  f"{time.strftime('%Y-%m-%d')}; {pairs} pairs, {rounds} rounds, {folder.name if model else 'a random LLaMA'}")
    table = Table("reducer", "rows into the language model", "GFLOP a pair", "ms a pair", "time, of merge's", "FLOPs, of merge's")
    for variant, times in zip(variants, seconds, strict=True):
        assert isinstance(variant.run.text, LanguageModelConfig)
        vision = shape_of(variant.run.vision)
        rows = tokens_along(variant.run.text.bridge, image_tokens=vision.image_tokens, prefix_tokens=vision.prefix_tokens)[-1]
        ratio = statistics.median(own / merge for own, merge in zip(times, seconds[0], strict=True))
        table.add_row(variant.name, str(rows), f"{variant.flops / pairs / 1e9:.2f}", f"{statistics.median(times) / pairs * 1000:.0f}", f"{ratio:.2f}",
                      f"{variant.flops / variants[0].flops:.2f}")
    console.print(table)


if __name__ == "__main__":
    tyro.cli(main)
