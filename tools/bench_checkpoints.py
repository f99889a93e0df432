"""What a checkpoint costs: saving and loading against torch.save and the bare disk, how long training waits, and the time to a resumed run's first
step.

The state of the demo with a wider model; variants take turns, so that all of them meet the same disk. What is read has just been written, so reads
come from memory, the bare ones too.

    python -m tools.bench_checkpoints [--rounds 5] [--folder DIR]
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from flm_scale.checkpoint.saver import Saver
from flm_scale.checkpoint.store import last_good
from flm_scale.engine.base import Engine
from flm_scale.objectives.objective import build_objective
from flm_scale.observe.metrics import read_metrics
from flm_scale.recipes import demo
from flm_scale.train import build_engine
from tools.bench_layouts import batch_of


def seconds_of(work: Callable[[], object]) -> float:
    """Return how long a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def on_disk(path: Path, write: Callable[[Any], object]) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def time_saves(engine: Engine, step: Callable[[], object], folder: Path, *, rounds: int) -> tuple[int, dict[str, list[float]]]:
    """Return the bytes of a checkpoint, and the seconds of each variant, round by round."""
    pieces = engine.saved_pieces()
    state = {f"{piece.kind}/{piece.name}": piece.values for piece in pieces}
    size = 4 * sum(values.numel() for values in state.values())
    saver, number = Saver(folder, device=engine.device, keep_last=1, keep_every=0, timeout_seconds=600), iter(range(1, 1000))
    raw = bytes(size)

    def save() -> None:
        saver.save(step=next(number), pieces=engine.saved_pieces(), rank_state={}, run_json="{}", state={})

    def save_and_wait() -> None:
        save()
        assert saver.finish()

    variants = {
        "bare write": lambda: on_disk(folder / "raw", lambda file: file.write(raw)),
        "torch.save": lambda: on_disk(folder / "state.pt", lambda file: torch.save(state, file)),
        "save, waited for": save_and_wait, "save, in the background": save, "a step beside it": step, "the rest of it": saver.finish,
        "a step": step, "bare read": (folder / "raw").read_bytes, "torch.load": lambda: torch.load(folder / "state.pt"),
        "load, every byte checked": lambda: last_good(folder, full=True).fill(pieces)}
    save_and_wait()  # takes the memory for the copies, which is done once a run
    step()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, work in variants.items():
            seconds[name].append(seconds_of(work))
    saver.close()
    return size, seconds


def first_step_seconds(run_dir: Path, *words: str) -> float:
    """Return the time from the command to the first finished step."""
    path, before = run_dir / "metrics.jsonl", 0
    if path.exists():
        before = max(line["step"] for line in read_metrics(path))
    started = time.perf_counter()
    command = [sys.executable, "-m", "flm_scale", "train", "debug", "--run-dir", str(run_dir), "--log.save-every-steps", "1", *words]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while not (path.exists() and any(line["step"] > before for line in read_metrics(path))):
            assert process.poll() is None, f"{' '.join(command)} has ended"
            time.sleep(0.02)
        seconds = time.perf_counter() - started
        process.terminate()
    return seconds


def main(*, rounds: int = 5, folder: Path | None = None) -> None:
    """Print two tables.

    Args:
        rounds: times each variant is measured.
        folder: on the disk to measure; a temporary folder by default. Is emptied.
    """
    folder = Path(tempfile.mkdtemp(dir=folder))
    run = demo()
    run = run.replace(text=run.text.replace(width=512, heads=8), vision=run.vision.replace(width=384, heads=6), steps=1000)
    objective = build_objective(run.objective, mask_id=4)
    engine = build_engine(run.replace(parallel=run.parallel.replace(engine="local")), objective)
    batch = batch_of(run, objective, seed=0)
    size, seconds = time_saves(engine, lambda: engine.train_step([batch], step=0), folder, rounds=rounds)
    title = f"{size / 1e9:.2f} GB: {engine.num_weights / 1e6:.0f} M weights and their moments"
    table = Table("", "seconds, median", "GB/s", "least", "most", title=title)
    for name, times in seconds.items():
        middle = statistics.median(times)
        bandwidth = "" if "step" in name or "background" in name or "rest" in name else f"{size / 1e9 / middle:.2f}"
        table.add_row(name, f"{middle:.3f}", bandwidth, f"{min(times):.3f}", f"{max(times):.3f}")
    Console().print(table)
    waits = [background / whole for background, whole in zip(seconds["save, in the background"], seconds["save, waited for"], strict=True)]
    print(f"training waits {100 * statistics.median(waits):.1f} % of the time of a save that is waited for (median of {rounds} pairs)")
    runs = {"from random": folder / "fresh", "behind a checkpoint": folder / "resumed"}
    ways: dict[str, list[float]] = {name: [] for name in runs}
    first_step_seconds(runs["behind a checkpoint"])
    for _ in range(rounds):
        ways["from random"].append(first_step_seconds(runs["from random"], "--overwrite"))
        ways["behind a checkpoint"].append(first_step_seconds(runs["behind a checkpoint"], "--resume", "--steps", "1000"))
    for name, times in ways.items():
        print(f"flm train debug, to the first step {name}: {statistics.median(times):.1f} s (median of {rounds})")
    shutil.rmtree(folder)


if __name__ == "__main__":
    tyro.cli(main)
