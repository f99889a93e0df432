"""Prepares a table from a hostile loopback server, undisturbed and under kill -9, and wants the same dataset every time.

usage: python -m tools.soak_prepare [--rows 20000] [--rows-per-shard 500] [--worker-kills 20] [--driver-kills 5] [--workers 2] [--seed 0]

Four preparations of one table: undisturbed; with one worker; with workers and drivers killed in the middle of shards; on a cluster of two nodes whose
second raylet is killed. Every row's fate is compared with what the server did to it, and all roots with each other.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random

import psutil
from pyarrow import parquet

from flm_scale.data.prepare.ledger import FOLDER, read_ledger, read_lines
from flm_scale.data.shards import open_dataset
from flm_scale.data.verify import verify
from tests.data.prepare.crawl import Crawl

HANG_SECONDS = 300.0
"""Without an event in the ledger."""


class Memory:
    """Samples what the process trees below some processes take, as long as it is open."""

    def __init__(self) -> None:
        self.roots: list[int] = []
        self.peak_rss = self.peak_pss = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stopping.wait(0.5):
            rss = pss = 0
            for root in list(self.roots):
                with suppress(psutil.Error):
                    for process in [psutil.Process(root), *psutil.Process(root).children(recursive=True)]:
                        with suppress(psutil.Error):
                            memory = process.memory_full_info()
                            rss, pss = rss + memory.rss, pss + memory.pss
            self.peak_rss, self.peak_pss = max(self.peak_rss, rss), max(self.peak_pss, pss)

    def close(self) -> None:
        """Stop sampling."""
        self._stopping.set()
        self._thread.join()


class Soak:
    """One table and what is done to it."""

    def __init__(self, crawl: Crawl, folder: Path, options: argparse.Namespace) -> None:
        self.crawl, self.folder, self.options, self.chance = crawl, folder, options, Random(options.seed)
        self.table = crawl.write_table(folder / "table.parquet")
        self.root = ""

    def start(self, output: Path, memory: Memory, *more: str) -> "subprocess.Popen[bytes]":
        """Start a driver."""
        words = ["data", "prepare", "--input", str(self.table), "--output", str(output), "--fetch.allow-loopback", "--fetch.total-seconds", "3",
                 "--samples-per-shard", str(self.options.rows_per_shard), *more]
        process = subprocess.Popen([sys.executable, "-m", "flm_scale", *words], stdout=subprocess.DEVNULL)
        memory.roots.append(process.pid)
        return process

    def wait(self, process: "subprocess.Popen[bytes]", output: Path) -> bool:
        """Wait for a driver's end; False when nothing happens for long."""
        last, seen = time.monotonic(), -1
        while process.poll() is None:
            time.sleep(1)
            events = sum(1 for _ in read_ledger(output))
            if events != seen:
                last, seen = time.monotonic(), events
            elif time.monotonic() - last > HANG_SECONDS:
                process.kill()
                return False
        return process.returncode == 0

    def undisturbed(self, output: Path, memory: Memory, *, workers: int) -> str:
        """Prepare it and let it be."""
        return "" if self.wait(self.start(output, memory, "--workers", str(workers)), output) else "it hung or failed"

    def killed(self, output: Path, memory: Memory) -> str:
        """Kill workers in the middle of shards, and now and then the driver, spread over the whole preparation."""
        kills = ["worker"] * self.options.worker_kills + ["driver"] * self.options.driver_kills
        self.chance.shuffle(kills)
        shards, process = -(-self.crawl.rows // self.options.rows_per_shard), self.start(output, memory, "--workers", str(self.options.workers))
        for number, kind in enumerate(kills):
            # When so many shards are done: the last kill is before the end.
            due = 0.9 * shards * number / len(kills)
            while process.poll() is None and len(done(output)) < due:
                time.sleep(0.05)
            time.sleep(self.chance.uniform(0, 0.5))
            while process.poll() is None and not (workers := at_work(process.pid, output)):
                time.sleep(0.05)
            if process.poll() is not None:
                return f"it ended with {process.returncode} before kill {number + 1}"
            if kind == "worker":
                self.chance.choice(workers).kill()
            else:
                process.kill()
                process.wait()
                process = self.start(output, memory, "--workers", str(self.options.workers))
        return "" if self.wait(process, output) else "it hung or failed"

    def node_lost(self, output: Path, memory: Memory) -> str:
        """Prepare on two nodes and kill the second one's raylet, which takes its workers along."""
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 * 2**20})
        second = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        memory.roots.append(os.getpid())
        try:
            process = self.start(output, memory, "--workers", "2", "--ray-address", cluster.address)
            while process.poll() is None and len(done(output)) < 3:
                time.sleep(0.1)
            cluster.remove_node(second, allow_graceful=False)
            return "" if self.wait(process, output) else "it hung or failed"
        finally:
            memory.roots.remove(os.getpid())
            cluster.shutdown()

    def check(self, output: Path) -> str:
        """Say how a dataset is other than it must be, or nothing."""
        dataset = open_dataset(output)
        tables = [parquet.read_table(output / shard.table_name) for shard in dataset.shards()]
        fates = [fate or "success" for table in tables for fate in table["error_message"].to_pylist()]
        wrong = [(row, fate) for row, fate in enumerate(fates) if fate != self.crawl.fate(row)]
        keys = [key for table in tables for key, fate in zip(table["key"].to_pylist(), table["error_message"].to_pylist(), strict=True) if not fate]
        if len(fates) != self.crawl.rows or wrong:
            return f"{len(fates)} rows, other fates than expected: {wrong[:5]}"
        if list(dataset.index("train").keys) != keys or len(set(keys)) != len(keys):
            return "samples are lost or doubled"
        if self.root and dataset.root != self.root:
            return f"root {dataset.root[:12]}, not {self.root[:12]}"
        self.root = dataset.root
        return "; ".join(verify(dataset)[:3])


def done(output: Path) -> set[str]:
    """Return the shards that were committed, as the ledger tells."""
    return {line["shard"] for line in read_ledger(output) if line["event"] == "committed"}


def at_work(driver: int, output: Path) -> list[psutil.Process]:
    """Return the workers of a driver while any of them is in the middle of a shard; a killed driver's attempts are in other files."""
    newest = max((output / FOLDER).glob("*.jsonl"), default=None)
    events = Counter(line["event"] for line in read_lines(newest)) if newest else Counter[str]()
    if events["started"] == events["committed"] + events["killed"] + events["failed"]:
        return []
    with suppress(psutil.Error):
        return [child for child in psutil.Process(driver).children(recursive=True) if child.name().startswith("ray::Worker")]
    return []


def main() -> int:
    """Run all and print a table; 1 when anything is not as it must be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rows-per-shard", type=int, default=500)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--worker-kills", type=int, default=20)
    parser.add_argument("--driver-kills", type=int, default=5)
    parser.add_argument("--width", type=int, default=1024, help="of the pictures, three quarters as high")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    options = parser.parse_args()
    folder, failed = Path(tempfile.mkdtemp(prefix="soak-prepare-")), False
    with Crawl(options.rows, width=options.width, height=options.width * 3 // 4) as crawl:
        soak = Soak(crawl, folder, options)
        heads = ("preparation", "rows/s", "seconds", "committed", "failed", "killed", "peak PSS MB", "peak RSS MB", "result")
        rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        works: dict[str, Callable[[Path, Memory], str]] = {
            f"undisturbed, {options.workers} workers": partial(soak.undisturbed, workers=options.workers),
            "one worker": partial(soak.undisturbed, workers=1),
            f"{options.worker_kills} workers and {options.driver_kills} drivers killed": soak.killed, "a raylet killed": soak.node_lost}
        for name, work in works.items():
            memory, output, began = Memory(), folder / name.split(",")[0].replace(" ", "-"), time.monotonic()
            problem = work(output, memory)
            seconds = time.monotonic() - began
            memory.close()
            problem = problem or soak.check(output)
            failed |= bool(problem)
            events = Counter(line["event"] for line in read_ledger(output))
            cells = (name, f"{options.rows / seconds:.1f}", f"{seconds:.0f}", events["committed"], events["failed"], events["killed"],
                     f"{memory.peak_pss / 1e6:.0f}", f"{memory.peak_rss / 1e6:.0f}", problem or f"as it must be, {soak.root[:12]}")
            rows.append(f"| {' | '.join(map(str, cells))} |")
            print(rows[-1], file=sys.stderr, flush=True)
            if not problem and output != folder / "undisturbed":
                shutil.rmtree(output)
    print("\n".join(rows))
    if not failed:
        shutil.rmtree(folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
