"""What preparing a table of addresses costs, end to end, against img2dataset with the same settings and the same loopback server.

The two take turns, round by round, each as its users start it, with two worker processes of 64 fetches: fetch, sha256, decode, scale to a shorter
side of 256, encode as JPEG 90, write webdataset shards of 1,000. Core seconds are those of all processes that a command started, Ray's included; a
small table beforehand tells what starting costs. Pictures are real ones, from a folder:

    uv pip install --no-deps --target PHOTOS scikit-image scikit-learn ultralytics imgaug insightface      (packages with photographs in them)
    python -m venv VENV && VENV/bin/pip install img2dataset "setuptools<80"
    python -m tools.bench_prepare --photos PHOTOS --img2dataset VENV

Sets are those of tools.bench_images: `large`, JPEGs of 0.8 to 2 million pixels; `near`, with a shorter side of 300.
"""

import asyncio
import ctypes
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple, Self

import psutil
import pyarrow as pa
import tyro
from pyarrow import parquet
from rich.console import Console
from rich.table import Table

from flm_scale.data.shards import open_dataset
from tests.data.loopback import Loopback
from tests.data.prepare.crawl import with_comment
from tests.data.prepare.server import answer
from tools.bench_images import picture_sets

CONSOLE = Console(width=150)
WORKERS, FETCHES, PER_SHARD, SIZE, QUALITY = 2, 64, 1000, 256, 90
START_ROWS = 50
PR_SET_CHILD_SUBREAPER = 36


class Photos(Loopback):
    """Serves the pictures in turn, each row's with bytes of its own."""

    def __init__(self, pictures: Sequence[bytes]) -> None:
        self._pictures = pictures
        super().__init__()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one connection."""
        row = int((await reader.readuntil(b"\r\n\r\n")).split()[1].strip(b"/").removesuffix(b".jpg"))
        writer.write(answer(with_comment(self._pictures[row % len(self._pictures)], f"row {row}"), kind="image/jpeg"))
        await writer.drain()


def _serve(pictures: Sequence[bytes], pipe: Connection) -> None:
    photos = Photos(pictures)
    pipe.send(photos.port)
    pipe.recv()


@contextmanager
def served(pictures: Sequence[bytes]) -> Iterator[int]:
    """Serve from a process of its own, whose core seconds do not count; give the port."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(pictures, there), daemon=True)
    process.start()
    yield here.recv()
    here.send("stop")
    process.join()


class Cost(NamedTuple):
    """Of one command."""

    core_seconds: float
    seconds: float


class CoreSeconds:
    """Adds up what the processes below this one take, as long as it is open; each as it was last seen, which is at most a tenth of a second ago.

    The kernel's own sums are no use: they leave out children of a process that does not wait for them, as Ray's raylet.
    """

    def __init__(self) -> None:
        """What is there already, the server, does not count."""
        self._old = set(psutil.Process().children())
        self._seconds, self._stopping = dict[psutil.Process, float](), threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._stopping.wait(0.1):
            for process in set(psutil.Process().children(recursive=True)) - self._old:
                with suppress(psutil.Error):
                    times = process.cpu_times()
                    self._seconds[process] = times.user + times.system

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def wait(self) -> list[psutil.Process]:
        """Wait for the end of all that was started; return what lives on."""
        _, alive = psutil.wait_procs(set(psutil.Process().children()) - self._old, timeout=60)
        return alive

    @property
    def total(self) -> float:
        """So far."""
        return sum(self._seconds.values())


def cost_of(command: Sequence[str]) -> Cost:
    """Run a command to its end, and to the end of all that it started."""
    with tempfile.TemporaryFile() as log, CoreSeconds() as taken:
        started = time.monotonic()
        code = subprocess.call(command, stdout=log, stderr=log, env=os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"})
        seconds = time.monotonic() - started
        if code:
            log.seek(0)
            sys.exit(f"{command[0]} ended with code {code}: {log.read().decode(errors='replace')[-2000:]}")
        if alive := taken.wait():
            sys.exit(f"{command[0]} left {', '.join(process.name() for process in alive)}")
    return Cost(taken.total, seconds)


def by_img2dataset(venv: Path, table: Path, output: Path) -> list[str]:
    """Return the command."""
    options = {"url_list": table, "output_folder": output, "input_format": "parquet", "url_col": "url", "caption_col": "caption",
               "output_format": "webdataset", "image_size": SIZE, "resize_mode": "keep_ratio", "resize_only_if_bigger": True,
               "encode_quality": QUALITY, "processes_count": WORKERS, "thread_count": FETCHES, "number_sample_per_shard": PER_SHARD}
    return [str(venv / "bin" / "img2dataset"), *(f"--{name}={value}" for name, value in options.items())]


def by_us(table: Path, output: Path) -> list[str]:
    """Return the command."""
    return [sys.executable, "-m", "flm_scale", "data", "prepare", "--input", str(table), "--output", str(output), "--fetch.allow-loopback",
            "--fetch.concurrency", str(FETCHES), "--image.size", str(SIZE), "--image.quality", str(QUALITY), "--image.no-pass-through",
            "--samples-per-shard", str(PER_SHARD), "--workers", str(WORKERS)]


def kept(output: Path) -> int:
    """Return how many pictures a folder has got."""
    if (output / "dataset.json").exists():
        return len(open_dataset(output).index())
    return sum(json.loads(file.read_bytes())["successes"] for file in output.glob("*_stats.json"))


def race(name: str, pictures: Sequence[bytes], *, venv: Path, rows: int, rounds: int) -> None:
    """Let both prepare a table in turn, and print the cost of each round."""
    table = Table("round", "", "images/s", "images/s/core", "behind the start: images/s/core", "against img2dataset",
                  title=f"{rows:,} {name} pictures")
    with served(pictures) as port, tempfile.TemporaryDirectory() as scratch:
        small, whole = Path(scratch, "small.parquet"), Path(scratch, "whole.parquet")
        for file, count in ((small, START_ROWS), (whole, rows)):
            urls = [f"http://127.0.0.1:{port}/{row}.jpg" for row in range(count)]
            parquet.write_table(pa.table({"url": urls, "caption": [f"picture {row}" for row in range(count)]}), file)
        for turn in range(rounds):
            rates = []
            for way in ("img2dataset", "flm_scale"):
                costs = []
                for file in (small, whole):
                    output = Path(scratch, f"{way}-{turn}-{file.stem}")
                    costs.append(cost_of(by_img2dataset(venv, file, output) if way == "img2dataset" else by_us(file, output)))
                if (got := kept(output)) != rows:
                    sys.exit(f"{way} kept {got} of {rows} pictures; it is no race then")
                start, total = costs
                rates.append((total.seconds, total.core_seconds, (total.core_seconds - start.core_seconds) / (1 - START_ROWS / rows)))
                seconds, core_seconds, marginal = rates[-1]
                table.add_row(str(turn + 1), way, f"{rows / seconds:.0f}", f"{rows / core_seconds:.0f}", f"{rows / marginal:.0f}",
                              f"{rates[0][1] / core_seconds:.2f}x, behind the start {rates[0][2] / marginal:.2f}x")
    CONSOLE.print(table)


def main(*, photos: Path, img2dataset: Path, rows: int = 10_000, rounds: int = 3) -> None:
    """Print a table for each set.

    Args:
        photos: folder with real photographs.
        img2dataset: environment that img2dataset is installed in.
        rows: of each table.
        rounds: how often each takes its turn.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    sets = picture_sets(photos)
    for name in ("large", "near"):
        race(name, sets[name], venv=img2dataset, rows=rows, rounds=rounds)


if __name__ == "__main__":
    tyro.cli(main)
