"""What a training micro-step costs: packed against padded, FLM against MLM and AR, and where the time goes.

Sizes of the published recipe (ViT-B/32, text width 768, 6+6 layers, reconstructor 6+6, vocabulary 50,265) at 224 and 288 px, and the demo's.
Captions have the lengths of the 4M mix, one to an image. All variants of a size take turns in one process, so that a noisy machine
disturbs them alike; ratios are medians over rounds of paired times. A micro-step is forward and backward; the optimizer, whose share depends on
how many micro-steps it follows, is timed apart.

    python -m tools.bench [--sizes demo b32-224 b32-288] [--pairs 32] [--rounds 3]
    python -m tools.bench --sizes b16-224 --merged 8 16 --pairs 4 --rounds 7        # packed FLM alone, with rows merged in its vision tower
"""

import gc
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from flm_scale.batch import State
from flm_scale.config import ArConfig, BatchConfig, FlmConfig, MlmConfig, OptimConfig, Run, TextConfig
from flm_scale.config_vision import OpenClipVisionConfig, SmallVisionConfig
from flm_scale.data.pack import pack, pad_example
from flm_scale.engine.base import build_optimizer, keep_freed_memory, parameter_groups, score, total_loss
from flm_scale.model.assemble import VisionLanguageModel, build_model
from flm_scale.model.text import TextLayer, join_rows, split_rows
from flm_scale.model.vision import named_sizes
from flm_scale.objectives.objective import Objective, build_objective
from flm_scale.observe.cost import BatchShapes, forward_flops, training_flops, vision_shape
from flm_scale.observe.throughput import peak_flops
from flm_scale.recipes import demo

# Share of the 4M mix's pairs, mean and deviation of wordpieces a caption: COCO, Visual Genome, Conceptual Captions, SBU (docs/flm.md).
MIX = ((567, 11.8, 2.8), (5410, 5.5, 1.8), (3010, 10.7, 4.9), (867, 15.0, 7.7))
MASK_ID = 4
VARIANTS = ("FLM packed", "FLM padded", "MLM .4 packed", "AR packed")
CONSOLE = Console(width=150)


class Variant:
    """One objective and layout of a size, ready to be timed."""

    def __init__(self, name: str, run: Run, model: VisionLanguageModel, objective: Objective, state: State) -> None:
        self.name, self.run, self.model, self.objective, self.state = name, run, model, objective, state
        self.counts = torch.tensor([int((state.target_parts == part).sum()) for part in range(len(objective.parts))])
        vision = vision_shape(run.vision, None if isinstance(run.vision, SmallVisionConfig) else named_sizes(run.vision.name))
        self.flops = training_flops(run, forward_flops(run, BatchShapes.of(state), vision))

    def micro_step(self) -> float:
        """Return the seconds of one forward and backward pass."""
        self.model.zero_grad(set_to_none=False)
        started = time.perf_counter()
        total_loss(score(self.model, self.state, self.objective), self.objective, self.counts).backward()
        return time.perf_counter() - started


def main(sizes: list[Literal["demo", "b32-224", "b32-288", "b16-224"]] = ["demo", "b32-224", "b32-288"], *,  # noqa: B006
         pairs: int = 32, rounds: int = 3, merged: tuple[int, ...] = ()) -> None:
    """Print the tables. pairs: captions, each with its image, in a micro-step of the published sizes; the demo's has 64.

    merged: values of vision.merged that packed FLM is timed with, instead of other objectives and layouts.
    """
    keep_freed_memory()  # as the engines do
    CONSOLE.print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32, "
                  f"{time.strftime('%Y-%m-%d')}; {rounds} rounds")
    for size in sizes:
        names = ("FLM packed", *(f"FLM packed, {some} merged" for some in merged)) if merged else VARIANTS
        variants = build_variants(size, names, pairs=64 if size == "demo" else pairs)
        seconds = interleave(variants, rounds=rounds)
        print_costs(size, variants, seconds)
        print_shares(size, variants[0])
        del variants
        gc.collect()


def run_of(size: str, objective: FlmConfig | MlmConfig | ArConfig) -> Run:
    """Return the Run of a size."""
    if size == "demo":
        return demo().replace(objective=objective)
    return Run(name=size, objective=objective, text=TextConfig(norm="post"), optim=OptimConfig(lr=4e-4), steps=30_000,
               vision=OpenClipVisionConfig(name=f"ViT-B-{size[1:3]}", image_size=int(size.split("-")[1])),
               batch=BatchConfig(text_tokens=4096, captions=64, images=64))


def build_variants(size: str, names: Sequence[str], *, pairs: int) -> list[Variant]:
    """Return the variants of these names; both layouts of FLM share one model and the same captions, spans and pictures."""
    rng = np.random.default_rng(0)
    longest = run_of(size, FlmConfig()).text.max_length
    share, mean, deviation = (np.array(column, float) for column in zip(*MIX, strict=True))
    # Evenly spaced quantiles of a large sample: a few captions stand for the mix without the luck of the draw.
    source = rng.choice(len(MIX), size=100_000, p=share / share.sum())
    sample = np.clip(np.round(rng.normal(mean[source], deviation[source])), 1, longest - 2)
    lengths = np.quantile(sample, (np.arange(pairs) + 0.5) / pairs).round().astype(int)
    CONSOLE.print(f"\n[bold]{size}[/bold]: {pairs} pairs, {lengths.mean():.1f} content tokens a caption on average")
    variants, models = [], dict[str, tuple[VisionLanguageModel, Objective]]()
    for name in names:
        config = {"FLM": FlmConfig(corruption_rate=0.3), "MLM": MlmConfig(mask_rate=0.4), "AR": ArConfig()}[name.split()[0]]
        run = run_of(size, config)
        if "merged" in name:
            run = run.replace(vision=run.vision.replace(merged=(int(name.split()[-2]),)))
        if (key := f"{config.kind} {run.vision.merged}") not in models:
            objective = build_objective(config, mask_id=MASK_ID)
            models[key] = build_model(run, objective), objective
        model, objective = models[key]
        draw = np.random.default_rng(1)
        vocabulary = run.text.vocab_size
        captions = [np.concatenate([[1], draw.integers(5, vocabulary, length), [2]]).astype(np.int32) for length in lengths]
        examples = [objective.corrupt(ids, np.random.default_rng(2)) for ids in captions]
        if "padded" in name:
            examples = [[pad_example(example, length=longest) for example in views] for views in examples]
        side = run.vision.image_size
        pixels = draw.integers(0, 256, (pairs, 3, side, side), dtype=np.uint8)
        variants.append(Variant(name, run, model, objective, pack(examples, pixels)))
    return variants


def interleave(variants: list[Variant], *, rounds: int) -> list[list[float]]:
    """Return the seconds of each variant's micro-steps, the variants taking turns, after one untimed turn."""
    for variant in variants:
        variant.micro_step()
    turns = [[variant.micro_step() for variant in variants] for _ in range(rounds)]
    return [list(column) for column in zip(*turns, strict=True)]


def print_costs(size: str, variants: list[Variant], seconds: list[list[float]]) -> None:
    """Print seconds, ratios to packed FLM and MLM, and utilisation."""
    peak = peak_flops(torch.device("cpu"), "fp32")
    table = Table("variant", "seconds min", "median", "time of packed FLM over it", "same, by FLOPs", "forward GFLOP a pair", "MFU",
                  title=f"{size}: a micro-step")
    for variant, times in zip(variants, seconds, strict=True):
        ratio = statistics.median(flm / own for flm, own in zip(seconds[0], times, strict=True))
        shown = f"{1 / ratio:.2f}x slower" if "padded" in variant.name else f"{ratio:.2f}"
        by_flops = variants[0].flops / variant.flops
        expected = f"{1 / by_flops:.2f}x" if "padded" in variant.name else f"{by_flops:.2f}"
        # A padded run's extra rows are not model FLOPs: its utilisation counts what packed FLM computes for the same captions.
        useful = variants[0].flops if "padded" in variant.name else variant.flops
        table.add_row(variant.name, f"{min(times):.3f}", f"{statistics.median(times):.3f}", shown, expected,
                      f"{variant.flops / 3e9 / len(variant.state.image_slots):.1f}", f"{useful / statistics.median(times) / peak:.0%}")
    CONSOLE.print(table)


def print_shares(size: str, variant: Variant) -> None:
    """Print where a packed FLM step's time goes, forward and backward, layer by layer, and what the optimizer costs."""
    spent: defaultdict[str, float] = defaultdict(float)
    for _ in range(2):
        spent.clear()
        time_layers(variant, spent)
    groups = parameter_groups(variant.model, variant.run.optim)
    optimizer = build_optimizer(groups, variant.run.optim)
    for _ in range(2):
        started = time.perf_counter()
        optimizer.step()
        spent["optimizer"] = time.perf_counter() - started
    whole = sum(spent.values())
    table = Table("part", "seconds", "share", title=f"{size}: packed FLM, one micro-step and one optimizer step")
    for part in ("vision", "text", "reconstructor", "loss", "optimizer"):
        table.add_row(part, f"{spent[part]:.3f}", f"{spent[part] / whole:.0%}")
    CONSOLE.print(table)


def time_layers(variant: Variant, spent: dict[str, float]) -> None:
    """Run the layer list with the graph cut behind every part, so that each part's backward pass can be timed by itself."""
    state, behind = variant.state, []

    def timed(part: str, rows: Tensor, out: Tensor, started: float) -> None:
        spent[part] += time.perf_counter() - started
        behind.append((part, rows, out))

    for name, layer in variant.model.layers.items():
        rows = state.rows.detach().requires_grad_(state.rows.is_floating_point())
        state, started = state._replace(rows=rows), time.perf_counter()
        if isinstance(layer, TextLayer):
            text, queries, images = split_rows(state)
            state = join_rows(state, layer.streams(text, images, state), queries, images)
            timed("text", rows, state.rows, started)
            rows = state.rows.detach().requires_grad_()
            state, started = state._replace(rows=rows), time.perf_counter()
            text, queries, images = split_rows(state)
            state = join_rows(state, text, layer.reconstruct(queries, text, state), images)
            timed("reconstructor", rows, state.rows, started)
        elif name == "head":
            loss, _ = layer(state)
            timed("loss", rows, loss.sum(), started)
        else:
            state = layer(state)
            timed("vision" if name.startswith("vision") else "text", rows, state.rows, started)
    gradient = None
    for part, rows, out in reversed(behind):
        started = time.perf_counter()
        out.backward(gradient)
        spent[part] += time.perf_counter() - started
        gradient = rows.grad


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
