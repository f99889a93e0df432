"""The order of 400 million captions in 41,000 shards: what it costs to plan, to hold and to enter anywhere; and how full micro-batches are.

Lengths are drawn and stand in a file, mapped into memory as token sidecars would be, an image a caption; shards and budgets are those of flm_1b on
LAION-400M. "Held" is memory that the process alone can give back; pages of the file, which the kernel drops when it wants them, stand beside it.

    python -m tools.bench_data [--samples 400000000] [--shards 41000] [--seeks 100] [--folder DIR]
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from flm_scale.config import BatchConfig
from flm_scale.data.order import Costs, Shuffle
from flm_scale.recipes import flm_1b

CONSOLE = Console(width=150)
# Tokens of a caption with BOS and EOS, mean and deviation: COCO, and about those of the 4M mix (docs/flm.md).
COCO, MIX = (13.8, 2.8), (10.3, 4.9)


def resident_mb() -> dict[str, float]:
    """Return this process's resident memory in 10**6 bytes: its own, and pages of files."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 / 1e6 for name in ("RssAnon", "RssFile")}


def draw_lengths(path: Path, *, samples: int, block: int = 10_000_000) -> None:
    """Write one byte a caption: log-normal, 23 tokens on average, at most 64."""
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        for begin in range(0, samples, block):
            words = rng.standard_normal(min(block, samples - begin), np.float32) * np.float32(0.6) + np.float32(np.log(18))
            file.write((np.clip(np.exp(words), 1, 62) + 2).astype(np.uint8).tobytes())


def first_fit(tokens: np.ndarray, views: np.ndarray, batch: BatchConfig) -> int:
    """Return how many micro-batches it takes to fill one after the other, in random order."""
    count, room = 1, (batch.text_tokens, batch.captions, batch.images)
    for number in np.random.default_rng(0).permutation(len(tokens)).tolist():
        taken = (int(tokens[number]), int(views[number]), 1)
        if any(need > left for need, left in zip(taken, room, strict=True)):
            count, room = count + 1, (batch.text_tokens, batch.captions, batch.images)
        room = (room[0] - taken[0], room[1] - taken[1], room[2] - 1)
    return count


def plan_large(path: Path, *, samples: int, shards: int, seeks: int) -> None:
    """Print what planning and entering the large order costs."""
    draw_lengths(path, samples=samples)
    shard_sizes = np.diff(np.linspace(0, samples, shards + 1).astype(np.int64)).tolist()
    before, started = resident_mb(), time.perf_counter()
    tokens = np.memmap(path, np.uint8, mode="r")
    shuffle = Shuffle(Costs(tokens, np.broadcast_to(np.uint8(1), samples)), shard_sizes, flm_1b().batch, seed=0, captions_per_image=1)
    built = time.perf_counter() - started
    lengths = [shuffle.length(epoch) for epoch in range(3)]
    rng = np.random.default_rng(1)
    table = Table("", "", title=f"{samples:,} captions in {shards:,} shards, {lengths[0]:,} micro-batches an epoch")
    table.add_row("build", f"{built:.2f} s")
    for title, places in (
        ("seek within an epoch", [(0, place) for place in rng.integers(lengths[0], size=seeks).tolist()]),
        # Each opens its epoch. Epochs differ by a few micro-batches, so the last places are left out.
        ("seek to another epoch", list(zip(range(1, seeks + 1), rng.integers(lengths[0] * 99 // 100, size=seeks).tolist(), strict=True))),
    ):
        shuffle.micro_batch(0, 0)
        seconds = []
        for epoch, place in places:
            started = time.perf_counter()
            shuffle.micro_batch(epoch, place)
            seconds.append(time.perf_counter() - started)
        table.add_row(title, f"median {1e3 * statistics.median(seconds):.1f} ms, worst of {seeks} {1e3 * max(seconds):.1f} ms")
    started = time.perf_counter()
    epoch, _ = shuffle.find(2 * sum(lengths))
    table.add_row(f"find a micro-batch of epoch {epoch} by its number", f"{1e3 * (time.perf_counter() - started):.0f} ms, once a run")
    window = shuffle._window(0, 0)  # noqa: SLF001 - what is timed is the packing alone
    started = time.perf_counter()
    for number in range(1, 11):
        shuffle._window(0, number)  # noqa: SLF001
    table.add_row(f"pack a window of {len(window[0]):,} samples", f"{1e2 * (time.perf_counter() - started):.1f} ms")
    after = resident_mb()
    table.add_row("held", f"{after['RssAnon'] - before['RssAnon']:.0f} MB; pages of the file {after['RssFile'] - before['RssFile']:.0f} MB")
    CONSOLE.print(table)


def compare_fill() -> None:
    """Print how full micro-batches are, against filling one after the other."""
    rng, table = np.random.default_rng(0), Table("captions", "a picture", "together", "tokens, captions, pictures of a batch", "fill: tokens",
                                                 "captions", "by first fit: tokens", "captions", title="mean fill")
    for name, (mean, deviation), num_images, captions, cap, budgets in (
        ("demo", (5, 0), 3146, 1, 8, (512, 64, 64)), ("4M mix", MIX, 100_000, 1, 1, (704, 64, 64)), ("COCO", COCO, 100_000, 5, 1, (704, 64, 64)),
        ("COCO", COCO, 100_000, 5, 5, (704, 64, 64)), ("COCO", COCO, 100_000, 5, 5, (1536, 128, 64)),
    ):
        lengths = np.clip(rng.normal(mean, deviation, num_images * captions).round(), 3, 50).astype(np.int64)
        batch = BatchConfig(text_tokens=budgets[0], captions=budgets[1], images=budgets[2])
        costs = Costs(lengths, np.ones_like(lengths), np.arange(0, len(lengths) + 1, captions))
        shuffle = Shuffle(costs, [num_images], batch, seed=0, captions_per_image=cap)
        chosen = shuffle.choose(np.arange(num_images), 0)
        fills = [share for count in (shuffle.length(0), first_fit(chosen.tokens, chosen.views, batch))
                 for share in (chosen.tokens.sum() / count / batch.text_tokens, chosen.views.sum() / count / batch.captions)]
        table.add_row(name, str(captions), str(cap), ", ".join(map(str, budgets)), *(f"{100 * fill:.1f} %" for fill in fills))
    CONSOLE.print(table)


def main(*, samples: int = 400_000_000, shards: int = 41_000, seeks: int = 100, folder: Path | None = None) -> None:
    """Print two tables.

    Args:
        samples: captions of the large order, a byte of disk each.
        shards: that they lie in.
        seeks: how many random places are entered.
        folder: where the lengths stand; a temporary folder by default.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        plan_large(Path(temporary) / "lengths", samples=samples, shards=shards, seeks=seeks)
    compare_fill()


if __name__ == "__main__":
    tyro.cli(main)
