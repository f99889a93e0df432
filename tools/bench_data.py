"""The order of 400 million captions in 41,000 shards: what it costs to plan, to hold and to enter anywhere; how full micro-batches are; and what it
costs to open a dataset of a million pictures for training.

Lengths are drawn and stand in a file, mapped into memory as token sidecars would be, an image a caption; shards and budgets are those of flm_1b on
LAION-400M. "Held" is memory that the process alone can give back; pages of the file, which the kernel drops when it wants them, stand beside it.
The dataset that is opened has real indexes and token ids, and tars that are holes of the right size.

Last, what reading from an object store costs: JPEGs of 24.6 KB from a server on loopback, windows of 16 chunks so that several pass. CPU time is that
of the trainer and its decoding processes, over nine tenths of an epoch with an empty cache. The server takes cores too, more for more requests, so
pictures a second say little where cores are few.

    python -m tools.bench_data [--samples 400000000] [--shards 41000] [--seeks 100] [--opened 1000000] [--stored 8192] [--folder DIR]
"""

import hashlib
import io
import multiprocessing
import os
import resource
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table

from flm_scale.config import BatchConfig, DataConfig
from flm_scale.data import ahead, loader, order
from flm_scale.data.index import write_index
from flm_scale.data.loader import Loader, costs_of, open_mixture
from flm_scale.data.manifest import Shard
from flm_scale.data.order import Costs, Shuffle
from flm_scale.data.shards import Dataset, Sample, seal_dataset, write_shard
from flm_scale.data.sidecars import give_tokenizer, write_sidecars
from flm_scale.data.tokens import Tokenizer, train_tokenizer
from flm_scale.objectives.objective import build_objective
from flm_scale.recipes import RECIPES, flm_1b
from tests.data.object_store import open_store, serve_s3

CONSOLE = Console(width=150)
# Tokens of a caption with BOS and EOS, mean and deviation: COCO, and about those of the 4M mix (docs/flm.md).
COCO, MIX = (13.8, 2.8), (10.3, 4.9)
STORED_QUALITY = 81
"""Gives noise of 64 pixels a side, scaled to 256, 24.6 KB."""


def resident_mb() -> dict[str, float]:
    """Return this process's resident memory in 10**6 bytes: its own, and pages of files."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 / 1e6 for name in ("RssAnon", "RssFile")}


def clocks() -> np.ndarray:
    """Return the time in seconds, and what this process has had of a core: on a busy machine the second tells more."""
    return np.array([time.perf_counter(), time.process_time()])


def draw_lengths(path: Path, *, samples: int, block: int = 10_000_000) -> None:
    """Write two bytes a caption, as token sidecars have them: log-normal, 23 tokens on average, at most 64."""
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        for begin in range(0, samples, block):
            words = rng.standard_normal(min(block, samples - begin), np.float32) * np.float32(0.6) + np.float32(np.log(18))
            file.write((np.clip(np.exp(words), 1, 62) + 2).astype(np.uint16).tobytes())


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
    run, lengths_file = flm_1b(), np.asarray(np.memmap(path, np.uint16, mode="r"))
    costs = costs_of(lengths_file, None, build_objective(run.objective, mask_id=Tokenizer.mask_id), longest=64)
    shuffle = Shuffle(costs, shard_sizes, run.batch, seed=0, captions_per_image=1)
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
        spent = []
        for epoch, place in places:
            begun = clocks()
            shuffle.micro_batch(epoch, place)
            spent.append(1e3 * (clocks() - begun))
        (median, median_core), (worst, worst_core) = np.median(spent, axis=0), np.max(spent, axis=0)
        table.add_row(title, f"median {median:.1f} ms, worst of {seeks} {worst:.1f} ms; of a core {median_core:.1f} and {worst_core:.1f} ms")
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


def write_large(folder: Path, *, samples: int, per_shard: int = 10_000, picture_bytes: int = 24_600) -> None:
    """Write a dataset without pictures: captions of 1 to 62 of 8,000 words, their token ids, and tars that are holes."""
    rng, entries = np.random.default_rng(0), []
    words = np.array([hashlib.sha256(str(number).encode()).hexdigest()[:1 + number % 6].translate(str.maketrans("0123456789", "ghijklmnop"))
                      for number in range(8000)])
    for name in ("train", "index/train"):
        (folder / name).mkdir(parents=True)
    for number, first in enumerate(range(0, samples, per_shard)):
        lengths = np.clip(np.exp(rng.normal(np.log(14), 0.6, min(per_shard, samples - first))), 1, 62).astype(int)
        texts = np.split(words[(rng.random(lengths.sum()) ** 3 * len(words)).astype(int)], np.cumsum(lengths)[:-1])
        rows = [{"key": f"{first + row:09d}", "captions": [" ".join(text)], "questions": [], "answers": [], "concept": "", "width": 256,
                 "height": 256, "image_offset": 512 + row * picture_bytes, "image_bytes": picture_bytes - 512, "sha256": "0" * 64}
                for row, text in enumerate(texts)]
        entry = Shard(name=f"train/{number:05d}.tar", count=len(rows), captions=len(rows), bytes=len(rows) * picture_bytes, sha256="0" * 64,
                      index_bytes=0, index_sha256="")
        index = folder / entry.index_name
        write_index(index, rows, ())
        with (folder / entry.name).open("wb") as tar:
            tar.truncate(entry.bytes)
        digest = hashlib.sha256(index.read_bytes()).hexdigest()
        entries.append(entry.model_copy(update={"index_bytes": index.stat().st_size, "index_sha256": digest}))
    dataset = seal_dataset(folder, name="large", sources=[], splits={"train": entries}, readme="")
    train_tokenizer((" ".join(words[begin:begin + 20]) for begin in range(0, len(words), 20)), vocab_size=8000, model_file=dataset.tokenizer_file)
    tokenizer = Tokenizer(dataset.tokenizer_file)
    started = time.perf_counter()
    write_sidecars(dataset, tokenizer)
    CONSOLE.print(f"token ids of {samples:,} captions written in {time.perf_counter() - started:.0f} s")
    dataset.set_tokenizer(tokenizer.fingerprint, tokenizer.vocab_size)


def open_large(folder: Path) -> dict[str, str]:
    """Return what it costs to open a dataset for training, up to the samples of the first step, and of one far away."""
    run = flm_1b()
    run = run.replace(data=DataConfig(path=folder, workers=0))
    before, started = resident_mb(), time.perf_counter()
    (dataset,) = open_mixture(run.data)
    opened = time.perf_counter() - started
    tokenizer = Tokenizer(dataset.tokenizer_file)
    loader = Loader(run, [dataset], tokenizer, build_objective(run.objective, mask_id=tokenizer.mask_id))
    built = time.perf_counter() - started
    loader.keys_of_step(1)
    first = time.perf_counter() - started
    after = resident_mb()
    started = time.perf_counter()
    loader.keys_of_step(100_000)
    return {"dataset opened": f"{opened:.2f} s", "loader built": f"{built:.2f} s", "samples of step 1 known": f"{first:.2f} s",
            "samples of step 100,000 known": f"{time.perf_counter() - started:.2f} s more",
            "held": f"{after['RssAnon'] - before['RssAnon']:.0f} MB; pages of files {after['RssFile'] - before['RssFile']:.0f} MB"}


def compare_open(folder: Path, *, samples: int) -> None:
    """Print it, of a process of its own."""
    write_large(folder, samples=samples)
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        found = fresh.apply(open_large, (folder,))
    table = Table("", "", title=f"opening {samples:,} pictures for training")
    for row in found.items():
        table.add_row(*row)
    CONSOLE.print(table)


def write_stored(folder: Path, *, samples: int, per_shard: int = 1000) -> Dataset:
    """Write a dataset of JPEGs of 24.6 KB on average."""
    rng, pictures = np.random.default_rng(0), []
    for _ in range(64):
        noise = rng.integers(0, 256, (64, 64, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).resize((256, 256), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=STORED_QUALITY)
        pictures.append(buffer.getvalue())
    words = [f"{color} {shape}" for color in ("red", "green", "blue", "black") for shape in ("circle", "square", "star")]
    entries = [write_shard(folder, f"train/{number:05d}.tar", (
        Sample(key=f"{row:08d}", image=pictures[row % len(pictures)] + row.to_bytes(4, "big"), image_format="jpg", captions=[words[row % len(words)]],
               questions=[], answers=[], concept="", width=256, height=256) for row in range(first, min(first + per_shard, samples))))
        for number, first in enumerate(range(0, samples, per_shard))]
    dataset = seal_dataset(folder, name="stored", sources=[], splits={"train": entries}, readme="")
    train_tokenizer(words * 10, vocab_size=40, model_file=dataset.tokenizer_file)
    give_tokenizer(dataset)
    CONSOLE.print(f"{samples:,} pictures of {np.mean([len(picture) for picture in pictures]) / 1e3:.1f} KB")
    return dataset


def read_epoch(place: str, workers: int, *, is_chunked: bool, results: Connection) -> None:
    """Send pictures, CPU seconds and seconds of an epoch, and a hash of its pixels; in a process of its own, with an empty cache."""
    multiprocessing.set_start_method("fork", force=True)  # as in a process that was not spawned
    order.WINDOW = ahead.WINDOW = 16
    ahead.LOOKED_AHEAD = order.CHUNK * order.WINDOW // 2
    loader.LEAST_SHARE = ahead.LEAST_SHARE if is_chunked else 2.0
    with tempfile.TemporaryDirectory() as cache:
        os.environ["FLM_CACHE"] = cache
        run = RECIPES["flm_base"]()
        run = run.replace(data=DataConfig(path=place, workers=workers), text=run.text.replace(vocab_size=40, max_length=16),
                          batch=run.batch.replace(micro_batches=1))
        datasets = open_mixture(run.data)
        tokenizer = Tokenizer(datasets[0].tokenizer_file)
        batches = Loader(run, datasets, tokenizer, build_objective(run.objective, mask_id=tokenizer.mask_id))
        batches.next_step()
        digest, pictures, cpu, started = hashlib.sha256(), 0, -cpu_seconds(), time.perf_counter()
        while pictures < 0.9 * len(datasets[0].index("train")):
            (batch,) = batches.next_step()
            digest.update(batch.state.rows.numpy().tobytes())
            pictures += len(batch.keys)
        seconds = time.perf_counter() - started
        del batches
        cpu += cpu_seconds()
        left = [file.name for file in Path(cache).glob("ranges/*")]
        assert not left, left
    results.send((pictures, cpu, seconds, digest.hexdigest()))


def cpu_seconds() -> float:
    """Return what this process and those of its children that have ended have taken."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def compare_stores(folder: Path, *, samples: int) -> None:
    """Print what a picture costs from disk, as a range each, and as ranges of chunks; the same pixels each time."""
    dataset = write_stored(folder, samples=samples)
    os.environ |= {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "something", "AWS_DEFAULT_REGION": "us-east-1"}
    table = Table("workers", "from", "CPU ms a picture", "pictures/s", title=f"reading and decoding {samples:,} pictures")
    with serve_s3() as port:
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
        store = open_store(port)
        store.mkdir("bucket")
        store.put(str(dataset.folder), "bucket/data", recursive=True)
        for workers in (1, 4):
            seen = set()
            for name, place, is_chunked in (("disk", str(folder), False), ("a range a picture", "s3://bucket/data", False),
                                            ("ranges of chunks", "s3://bucket/data", True)):
                context = multiprocessing.get_context("spawn")
                mine, theirs = context.Pipe()
                process = context.Process(target=read_epoch, args=(place, workers), kwargs={"is_chunked": is_chunked, "results": theirs})
                process.start()
                theirs.close()
                pictures, cpu, seconds, digest = mine.recv()
                process.join()
                seen.add(digest)
                table.add_row(str(workers), name, f"{1e3 * cpu / pictures:.2f}", f"{pictures / seconds:.0f}")
            assert len(seen) == 1, "the same pixels"
    CONSOLE.print(table)


def main(*, samples: int = 400_000_000, shards: int = 41_000, seeks: int = 100, opened: int = 1_000_000, stored: int = 8192,
         folder: Path | None = None) -> None:
    """Print the tables. A size of 0 leaves its table out.

    Args:
        samples: captions of the large order, two bytes of disk each.
        shards: that they lie in.
        seeks: how many random places are entered.
        opened: pictures of the dataset that is opened; below 100,000 the holes would be hashed, and found out.
        stored: pictures of the dataset in an object store.
        folder: where the lengths and the dataset stand; a temporary folder by default.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        if samples:
            plan_large(Path(temporary) / "lengths", samples=samples, shards=shards, seeks=seeks)
            compare_fill()
        if opened:
            compare_open(Path(temporary) / "large", samples=opened)
        if stored:
            compare_stores(Path(temporary) / "stored", samples=stored)


if __name__ == "__main__":
    tyro.cli(main)
