"""`flm data prepare` as a user runs it, on real Ray workers and a loopback server: what is kept, kills, other specs, retries, repairs."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import psutil
import pytest
from pyarrow import parquet

from flm_scale.cli import main
from flm_scale.data.prepare.fleet import FleetOptions, ray_session
from flm_scale.data.prepare.ledger import FOLDER, read_ledger, read_lines
from flm_scale.data.prepare.status import as_prometheus, as_text, read_status
from flm_scale.data.shards import Dataset, open_dataset
from flm_scale.data.verify import verify
from tests.data.prepare.crawl import Crawl

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
ROWS, ROWS_PER_SHARD = 600, 150  # each shard has a server that never comes to an end: a worker is at it for four seconds
SPEC = ("--fetch.allow-loopback", "--fetch.total-seconds", "4", "--samples-per-shard", str(ROWS_PER_SHARD), "--image.size", "64")


@pytest.fixture(scope="module")
def crawl() -> Iterator[Crawl]:
    with Crawl(ROWS) as crawl:
        yield crawl


@pytest.fixture(scope="module")
def table(crawl: Crawl, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return crawl.write_table(tmp_path_factory.mktemp("table") / "table.parquet")


def words(table: Path, output: Path, *more: str) -> list[str]:
    return ["data", "prepare", "--input", str(table), "--output", str(output), *SPEC, *more]


def start(*arguments: str, **environ: str) -> subprocess.Popen[str]:
    """A driver with a Ray of its own."""
    return subprocess.Popen([sys.executable, "-m", "flm_scale", *arguments], cwd=ROOT, env=os.environ | environ, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    """One for all drivers of this process."""
    with ray_session(FleetOptions(workers=2)):
        yield


@pytest.fixture(scope="module")
def undisturbed(ray: None, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("undisturbed") / "data"
    assert main(words(table, folder, "--workers", "2")) == 0
    return open_dataset(folder)


def fates(dataset: Dataset) -> list[str]:
    """Of every row of the input, in order."""
    tables = [parquet.read_table(dataset.folder / shard.table_name) for shard in dataset.shards()]
    return [fate or "success" for table in tables for fate in table["error_message"].to_pylist()]


def keys(dataset: Dataset) -> list[str]:
    return [str(key) for shard in dataset.shards() for key in parquet.read_table(dataset.folder / shard.table_name)["key"].to_pylist()]


def test_every_row_has_the_fate_that_it_must_have_and_what_is_good_is_kept_once(undisturbed: Dataset, crawl: Crawl) -> None:
    expected = [crawl.fate(row) for row in range(ROWS)]
    assert fates(undisturbed) == expected
    kept = [key for key, fate in zip(keys(undisturbed), expected, strict=True) if fate == "success"]
    assert list(undisturbed.index("train").keys) == kept
    assert undisturbed.manifest.preparation.fates == dict(Counter(expected))
    assert not verify(undisturbed)


def test_status_tells_what_came_of_it_in_all_three_formats(undisturbed: Dataset) -> None:
    status = read_status(undisturbed.folder)
    assert (status.state, status.shards_done, status.rows_done) == ("done", ROWS // ROWS_PER_SHARD, ROWS)
    assert status.kept == len(undisturbed.index("train"))
    assert "lost to: format 2." in as_text(status)
    assert f"\nflm_prepare_rows_done {ROWS}\n" in as_prometheus(status)
    assert '\nflm_prepare_fate_rows{fate="http_404"} 7\n' in as_prometheus(status)


def at_work(process: subprocess.Popen[str], folder: Path) -> list[psutil.Process]:
    """The workers of a driver, while all of them are in the middle of a shard."""
    workers = [child for child in psutil.Process(process.pid).children(recursive=True) if child.name().startswith("ray::Worker")]
    newest = max((folder / FOLDER).glob("*.jsonl"), default=None)
    events = Counter(line["event"] for line in read_lines(newest)) if newest else Counter()
    return workers if workers and events["started"] - events["committed"] - events["killed"] - events["failed"] == len(workers) else []


def killed(folder: Path) -> int:
    """How many workers the ledger knows to have died."""
    return sum(line["event"] == "killed" for line in read_ledger(folder))


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Ray's sockets want short names."""
    with tempfile.TemporaryDirectory(prefix="prep-") as folder:
        yield Path(folder)


def test_kills_of_workers_and_of_the_driver_change_nothing(undisturbed: Dataset, table: Path, crawl: Crawl, tmp_path: Path,
                                                           short_folder: Path) -> None:
    """Two workers in the middle of a shard, then the driver, twice; then two more workers, and it goes on to the end. No Ray's files are left."""
    folder, chance = tmp_path / "data", Random(0)
    for driver_dies in (True, True, False):
        process = start(*words(table, folder, "--workers", "2"), TMPDIR=str(short_folder))
        for _ in range(2):
            noted = killed(folder)
            while killed(folder) == noted:  # a worker may finish its shard before the signal comes: then another one is killed
                while not (workers := at_work(process, folder)):
                    assert process.poll() is None
                    time.sleep(chance.uniform(0, 0.5))
                chance.choice(workers).kill()
                limit = time.monotonic() + 3
                while killed(folder) == noted and time.monotonic() < limit:
                    time.sleep(0.05)
        if driver_dies:
            time.sleep(chance.uniform(0, 0.5))
            process.kill()
        _, said = process.communicate(timeout=300)
        assert process.returncode == (-signal.SIGKILL if driver_dies else 0), said
    events = Counter(line["event"] for line in read_ledger(folder))
    assert events["killed"] >= 6
    assert not events["quarantined"]
    dataset = open_dataset(folder)
    assert dataset.root == undisturbed.root
    assert fates(dataset) == [crawl.fate(row) for row in range(ROWS)]
    assert not list((folder / FOLDER).glob("beats/*"))
    assert not list(short_folder.glob("flm-ray-*"))


def test_a_node_that_is_lost_costs_its_attempts_and_nothing_else(undisturbed: Dataset, table: Path, tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    folder, small = tmp_path / "data", {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    try:
        second = cluster.add_node(**small)
        process = start(*words(table, folder, "--workers", "2", "--ray-address", cluster.address))
        while sum(line["event"] == "started" for line in read_ledger(folder)) < 4:  # both are at work
            assert process.poll() is None
            time.sleep(0.05)
        cluster.remove_node(second, allow_graceful=False)
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    finally:
        cluster.shutdown()
    assert [line["event"] for line in read_ledger(folder)].count("killed") == 1
    assert open_dataset(folder).root == undisturbed.root


def test_sigterm_ends_it_in_order_and_the_same_command_goes_on_with_one_worker_to_the_root_of_two(undisturbed: Dataset, table: Path,
                                                                                                  tmp_path: Path) -> None:
    folder = tmp_path / "data"
    one = words(table, folder, "--workers", "1", "--fetch.concurrency", "7")
    process = start(*one)
    while not any(line["event"] == "committed" for line in read_ledger(folder)):
        assert process.poll() is None
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "flm: stopped; the same command goes on" in said
    assert "Traceback" not in said
    assert read_status(folder).state == "stopped"
    assert not psutil.wait_procs(children, timeout=10)[1]
    assert main(one) == 0
    assert open_dataset(folder).root == undisturbed.root


def test_another_spec_or_input_is_refused_with_the_difference(undisturbed: Dataset, table: Path, crawl: Crawl, tmp_path: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(table, undisturbed.folder, "--image.quality", "80")) == 2
    assert "has another spec: image.quality was 90, is 80; give the old values" in capsys.readouterr().err
    other = Crawl(ROWS)
    other.port = crawl.port + 1
    assert main(words(other.write_table(tmp_path / "other.parquet"), undisturbed.folder)) == 2
    assert f"what differs: {tmp_path / 'other.parquet'}" in capsys.readouterr().err
    assert main(words(table, tmp_path)) == 2
    assert "holds files that no preparation has made" in capsys.readouterr().err


def test_failed_rows_are_fetched_again_and_the_others_keep_their_bytes(undisturbed: Dataset, table: Path, crawl: Crawl, tmp_path: Path,
                                                                       capsys: pytest.CaptureFixture[str]) -> None:
    """Half of the shards are made while the server hangs up on everybody; then it is asked again for these rows alone."""
    folder = tmp_path / "data"
    crawl.is_down = True
    try:
        process = start(*words(table, folder, "--workers", "1", "--fetch.server-retries", "0"))
        while sum(line["event"] == "committed" for line in read_ledger(folder)) < ROWS // ROWS_PER_SHARD // 2:
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        crawl.is_down = False
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    before, crawl.requests = open_dataset(folder), Counter()
    lost = [row for row, fate in enumerate(fates(before)) if fate == "disconnected"]
    assert len(lost) > 150
    assert main(["data", "retry", str(folder), "--failed", "--reason", "dns"]) == 2
    assert "no row was lost to dns (disconnected" in capsys.readouterr().err
    assert main(["data", "retry", str(folder), "--failed", "--reason", "disconnected", "--workers", "2"]) == 0
    after = open_dataset(folder)
    assert fates(after) == [crawl.fate(row) for row in range(ROWS)]
    assert crawl.requests.keys() == {f"/{row}.jpg" for row in lost}
    assert [shard.sha256 for shard in after.shards()] == [shard.sha256 for shard in undisturbed.shards()]
    assert not verify(after)


def test_repair_makes_damaged_and_missing_shards_again(undisturbed: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = undisturbed.folder
    with (folder / "train/00001.tar").open("r+b") as file:
        file.seek(2000)
        file.write(b"\xff")
    (folder / "index/train/00003.arrow").unlink()
    assert main(["data", "verify", str(folder)]) == 2
    assert main(["data", "repair", str(folder), "--workers", "2"]) == 0
    assert "shard train/00001.tar is damaged" in capsys.readouterr().err
    assert open_dataset(folder).root == undisturbed.root
    assert not verify(open_dataset(folder))


def test_plan_says_what_it_would_come_to(ray: None, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "plan", "--input", str(table), *SPEC, "--rows", "100"]) == 0
    said = capsys.readouterr().out
    assert f"{ROWS} rows in {ROWS // ROWS_PER_SHARD} shards of {ROWS_PER_SHARD} rows" in said
    assert "of 100 rows from the middle: kept 90.0%, " in said
    assert "about 540 samples" in said


def test_a_spec_file_holds_values_that_options_override(undisturbed: Dataset, table: Path, tmp_path: Path,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(json.loads((undisturbed.folder / FOLDER / "preparation.json").read_text())["spec"]))
    assert main(["data", "prepare", "--input", str(table), "--output", str(undisturbed.folder), "--spec", str(file)]) == 0
    assert main(["data", "prepare", "--input", str(table), "--output", str(undisturbed.folder), "--spec", str(file), "--image.size", "32"]) == 2
    assert "image.size was 64, is 32" in capsys.readouterr().err
    file.write_text('{"image": {"sise": 64}}')
    assert main(["data", "prepare", "--input", str(table), "--output", str(tmp_path / "out"), "--spec", str(file)]) == 2
    assert "no key 'sise'" in capsys.readouterr().err
