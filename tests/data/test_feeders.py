"""Micro-batches by Ray feeders: the bytes of local loading, whatever becomes of feeders, Ray and the trainer."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest

from flm_scale.cli import main
from flm_scale.config import DataConfig, Run
from flm_scale.data import feeders
from flm_scale.data.actors import joined_ray
from flm_scale.data.feeder_pool import FeederPool, GoneError, PoolOptions
from flm_scale.data.loader import Loader
from flm_scale.data.shards import Dataset
from flm_scale.errors import ConfigError, DataError
from tests.conftest import write_toy
from tests.data.test_loader import assert_equal, loader_of, mixed_run, toy_run

ROOT = Path(__file__).parents[2]
STEPS = 120  # long enough to be killed in
# At a constant rate a shorter run has the first losses of a longer one; a low one does not magnify rounding.
WORDS = ["--text.vocab-size", "200", "--steps", str(STEPS), "--batch.micro-batches", "8", "--optim.schedule", "constant", "--optim.lr", "2e-3"]
GONE = "flm: the feeders are gone"
SIZES = (1, 2, 3, 4, 6, 8)

pytestmark = pytest.mark.slow


def wait_until(fact: Callable[[], Any], *, seconds: float = 120) -> Any:
    limit = time.monotonic() + seconds
    while not (value := fact()):
        assert time.monotonic() < limit, "it did not come to that"
        time.sleep(0.1)
    return value


def below(process: psutil.Process, name: str) -> list[psutil.Process]:
    """The processes that it and those below it have started, by the beginning of their command."""
    found = []
    for child in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += [child] if Path("".join(child.cmdline()[:1])).name.startswith(name) else []
    return found


def feeders_below(process: psutil.Process) -> list[psutil.Process]:
    """The feeders that have started; Ray gives their processes the names of what they do."""
    starting = below(process, "ray::Feeder.__init__")
    return [child for child in below(process, "ray::Feeder") if child not in starting]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without CPUs, as on a GPU host, where the trainer is."""
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        yield started
    finally:
        started.shutdown()


@pytest.fixture
def data_node(cluster: Any) -> Iterator[Any]:
    """A node for feeders."""
    node = cluster.add_node(num_cpus=3, labels={"role": "data"})
    yield node
    if node in cluster.list_all_nodes():
        cluster.remove_node(node)


@pytest.fixture(scope="module")
def mixed(toy_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two augmented datasets, at most two of an image's one to three captions, several epochs in 24 micro-batches a step."""
    return mixed_run(toy_dataset, write_toy(tmp_path_factory.mktemp("second") / "data"))


def by_ray(run: Run, cluster: Any, **changes: Any) -> Run:
    return run.replace(data=run.data.replace(**{"feeder": "ray", "feeders": 3, "feeder_labels": ("role=data",), "ray_address": cluster.address,
                                                **changes}))


def test_feeders_make_the_bytes_of_local_loading_on_any_layout_and_behind_any_checkpoint(
        toy_dataset: Dataset, mixed: Run, cluster: Any, data_node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a step at each of sixteen places one pool is asked for all that the ranks of a layout ask for; every size begins at 0 and at random."""
    local, run = loader_of(toy_dataset, mixed), by_ray(mixed, cluster)
    row = [batch for _ in range(10) for batch in local.next_step()]
    places = [*[0] * len(SIZES), *np.random.default_rng(1).choice(200, 10, replace=False).tolist()]
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr("flm_scale.data.loader.fed_by_ray", lambda dataset, orders, run, otherwise: orders)
        for size, place in zip(cycle(SIZES), places, strict=False):
            ranks = [loader_of(toy_dataset, run, rank=rank, size=size, state=local.state | {"micro_batch": place}) for rank in range(size)]
            asked += chain.from_iterable(zip(*(rank.next_step() for rank in ranks), strict=True))
            assert all(rank.state == local.state | {"micro_batch": place + 24} for rank in ranks), "it tells nothing of who feeds whom"
    monkeypatch.setattr(Loader, "_orders", lambda *_, **__: iter(asked))
    fed = loader_of(toy_dataset, run)
    for place in places:
        assert_equal(row[place:place + 24], fed.next_step())
    del fed
    wait_until(lambda: not feeders_below(psutil.Process()), seconds=20)


def test_feeders_that_die_and_hang_are_replaced_and_then_a_lost_node_leaves_the_trainer_to_itself(
        toy_dataset: Dataset, mixed: Run, cluster: Any, data_node: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeders, "BATCH_SECONDS", 4.0)
    monkeypatch.setattr(feeders, "START_SECONDS", 40.0)
    local, fed = loader_of(toy_dataset, mixed), loader_of(toy_dataset, by_ray(mixed, cluster))
    assert_equal(local.next_step(), fed.next_step())
    for signal_number, reason in ((signal.SIGKILL, "its process died"), (signal.SIGSTOP, "has not answered after 4 s")):
        os.kill(wait_until(lambda: feeders_below(psutil.Process()))[0].pid, signal_number)
        assert_equal(local.next_step(), fed.next_step())
        wait_until(lambda reason=reason: f"is replaced: {reason}" in capfd.readouterr().err, seconds=60)
    cluster.remove_node(data_node, allow_graceful=False)
    said, limit = "", time.monotonic() + 120
    while GONE not in said:  # what is under way comes first
        assert time.monotonic() < limit, said
        assert_equal(local.next_step(), fed.next_step())
        said += capfd.readouterr().err
    assert_equal(local.next_step(), fed.next_step())
    said += capfd.readouterr().err
    assert said.count(GONE) == 1, said
    assert "from here on data.workers (0) of the trainer's own machine decode" in said


def test_feeders_that_find_no_node_are_given_up(cluster: Any) -> None:
    pool = FeederPool(b"", PoolOptions(3, {"role": "nobody"}, cluster.address, store_bytes=0, start_seconds=1.0, batch_seconds=1.0))
    reason = r"^3 in a row have come to nothing, the last: has not started after 1 s$"
    with joined_ray(cluster.address, option=""), pytest.raises(GoneError, match=reason):
        wait_until(lambda: list(pool.tend()) and False)


def test_an_error_of_the_data_is_the_one_of_local_loading(tmp_path: Path, cluster: Any, data_node: Any) -> None:
    dataset = write_toy(tmp_path / "data")
    run = toy_run(dataset)
    loaders = [loader_of(dataset, run), loader_of(dataset, by_ray(run, cluster))]
    next((dataset.folder / "tokens").glob("*/train/00000.arrow")).write_bytes(b"something else")
    said = []
    for loader in loaders:
        with pytest.raises(DataError) as raised:
            loader.next_step()
        said.append((type(raised.value), str(raised.value)))
    assert said[0] == said[1]
    assert "\n" not in said[1][1]


def test_an_address_without_a_cluster_is_the_users_mistake(toy_dataset: Dataset) -> None:
    run = toy_run(toy_dataset)
    fed = loader_of(toy_dataset, run.replace(data=run.data.replace(feeder="ray", ray_address="127.0.0.1:9")))
    with pytest.raises(ConfigError, match=r"^--data.ray-address 127.0.0.1:9: .*; give the address of a running cluster, or none$"):
        fed.next_step()


def test_a_label_without_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="feeder_labels"):
        DataConfig(feeder_labels=("data",))


def losses(run_dir: Path) -> list[float]:
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line)["loss"] for line in lines if '"loss"' in line and line.endswith("}")]


@pytest.fixture(scope="module")
def local_losses(toy_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run_dir = tmp_path_factory.mktemp("local") / "run"
    assert main(["train", "debug", "--data.path", str(toy_dataset.folder), "--run-dir", str(run_dir), *WORDS]) == 0
    return losses(run_dir)


class Job(NamedTuple):
    """A run in processes of its own."""

    process: subprocess.Popen[bytes]
    run_dir: Path
    errors: Path

    def said(self) -> str:
        return self.errors.read_text()

    def raylets(self) -> list[psutil.Process]:
        return below(psutil.Process(self.process.pid), "raylet")


@contextmanager
def trainer(dataset: Dataset, folder: Path, *more: str, processes: int = 1) -> Iterator[Job]:
    """A run that starts its own Ray. When it has ended, nothing may be left of all that it has started, nor of its files."""
    with TemporaryDirectory(prefix="fed-") as temporary, (folder / "errors").open("wb") as errors:  # Ray's sockets want short names
        environ = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": temporary, "PYTHONPATH": str(ROOT)}
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"] if processes > 1 else []
        command = [sys.executable, "-m", *launcher, "flm_scale", "train", "debug", "--data.path", str(dataset.folder), "--run-dir",
                   str(folder / "run"), "--data.feeder", "ray", "--data.feeders", "2", *WORDS, *more]
        with subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL, stderr=errors) as process:
            job = Job(process, folder / "run", folder / "errors")
            try:
                wait_until(lambda: process.poll() is not None or losses(job.run_dir))
                started = psutil.Process(process.pid).children(recursive=True)
                assert len(job.raylets()) == processes, job.said()
                yield job
                process.wait(timeout=30)
                wait_until(lambda: not psutil.wait_procs(started, timeout=0)[1], seconds=90)
                wait_until(lambda: not list(Path(temporary).glob("flm-ray-*")), seconds=10)
            finally:
                process.kill()


def test_feeders_killed_every_five_seconds_and_then_a_ray_that_is_gone_change_no_loss(
        toy_dataset: Dataset, local_losses: list[float], tmp_path: Path) -> None:
    rng, kills, killed, before = np.random.default_rng(0), 0, 0.0, 0
    with trainer(toy_dataset, tmp_path) as job:
        while (steps := len(losses(job.run_dir))) < 100:
            assert job.process.poll() is None, job.said()
            # Not before feeders have fed steps since the last one: three deaths in a row end the pool. On quick machines sooner.
            is_due = not kills or (steps >= before + 4 and (time.monotonic() - killed > 5 or steps > before + 40))
            if is_due and (at_work := feeders_below(psutil.Process(job.process.pid))):
                os.kill(at_work[rng.integers(len(at_work))].pid, signal.SIGKILL)
                kills, killed, before = kills + 1, time.monotonic(), steps
            time.sleep(0.1)
        assert kills >= 2
        assert GONE not in job.said()
        assert "is replaced: its process died" in job.said()
        job.raylets()[0].parent().kill()
        assert job.process.wait(timeout=300) == 0, job.said()
    assert job.said().count(GONE) == 1, job.said()
    assert losses(job.run_dir) == local_losses


def test_replicas_on_one_machine_have_a_ray_each(toy_dataset: Dataset, local_losses: list[float], tmp_path: Path) -> None:
    with trainer(toy_dataset, tmp_path, "--parallel.engine", "deepspeed", "--steps", "40", processes=2) as job:
        assert job.process.wait(timeout=300) == 0, job.said()
    assert losses(job.run_dir)[:20] == pytest.approx(local_losses[:20], rel=1e-5)
    assert GONE not in job.said()


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_run_that_is_ended(toy_dataset: Dataset, tmp_path: Path, signal_number: int) -> None:
    with trainer(toy_dataset, tmp_path, "--steps", "100000") as job:
        job.process.send_signal(signal_number)
        job.process.wait(timeout=60)
    if signal_number == signal.SIGTERM:
        assert job.process.returncode == 0
        assert "stopped by SIGTERM after step" in job.said()
