"""Micro-batches by Ray feeders: the bytes of local loading, whatever becomes of feeders, Ray and the trainer."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import pytest

from flm_scale.cli import main
from flm_scale.config import DataConfig, Run
from flm_scale.data import feeders
from flm_scale.data.shards import Dataset
from flm_scale.errors import ConfigError, DataError
from tests.conftest import write_toy
from tests.data.test_loader import assert_equal, loader_of, toy_run

ROOT = Path(__file__).parents[2]
STEPS = 250  # long enough to be killed in
WORDS = ["--text.vocab-size", "200", "--steps", str(STEPS), "--batch.micro-batches", "16"]
GONE = "flm: the feeders are gone"

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
    node = cluster.add_node(num_cpus=2, labels={"role": "data"})
    yield node
    if node in cluster.list_all_nodes():
        cluster.remove_node(node)


@pytest.fixture(scope="module")
def second(toy_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_toy(tmp_path_factory.mktemp("second") / "data")


@pytest.fixture
def mixed(toy_dataset: Dataset, second: Dataset) -> Run:
    """Two datasets, at most two of an image's one to three captions, several epochs in 24 micro-batches a step."""
    run = toy_run(toy_dataset)
    return run.replace(data=run.data.replace(also=(second.folder,), weights=(2.0, 1.0), captions_per_image=2),
                       batch=run.batch.replace(micro_batches=24))


def by_ray(run: Run, cluster: Any, **changes: Any) -> Run:
    return run.replace(data=run.data.replace(feeder="ray", feeders=2, feeder_labels=("role=data",), ray_address=cluster.address, **changes))


def test_feeders_make_the_bytes_of_local_loading_also_behind_a_checkpoint(toy_dataset: Dataset, mixed: Run, cluster: Any, data_node: Any) -> None:
    """From the start and from three places; the checkpoint does not tell who fed the run."""
    local = loader_of(toy_dataset, mixed)
    row = [batch for _ in range(10) for batch in local.next_step()]
    for place in (0, *np.random.default_rng(1).choice(200, 3, replace=False).tolist()):
        fed = loader_of(toy_dataset, by_ray(mixed, cluster), state=local.state | {"micro_batch": place})
        assert_equal(row[place:place + 24], fed.next_step())
        assert fed.state == local.state | {"micro_batch": place + 24}
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


@contextmanager
def trainer(dataset: Dataset, run_dir: Path, *more: str, processes: int = 1, tidies: bool = True) -> Iterator[subprocess.Popen[str]]:
    """A run that starts its own Ray. When it has ended, nothing may be left of all that it has started, nor, where it `tidies`, of its files."""
    with TemporaryDirectory(prefix="fed-") as temporary:  # Ray's sockets want short names
        environ = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": temporary, "PYTHONPATH": str(ROOT)}
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"] if processes > 1 else []
        command = [sys.executable, "-m", *launcher, "flm_scale", "train", "debug", "--data.path", str(dataset.folder), "--run-dir", str(run_dir),
                   "--data.feeder", "ray", "--data.feeders", "3", *WORDS, *more]
        with subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as job:
            try:
                wait_until(lambda: job.poll() is not None or losses(run_dir))
                started = psutil.Process(job.pid).children(recursive=True)
                assert len(below(psutil.Process(job.pid), "raylet")) == processes
                yield job
                job.wait(timeout=30)
                wait_until(lambda: not psutil.wait_procs(started, timeout=0)[1], seconds=90)
                wait_until(lambda: not (tidies and list(Path(temporary).glob("flm-ray-*"))), seconds=10)
            finally:
                job.kill()


def test_a_run_whose_feeders_are_killed_every_five_seconds_has_the_losses_of_local_loading(
        toy_dataset: Dataset, local_losses: list[float], tmp_path: Path) -> None:
    rng, kills = np.random.default_rng(0), 0
    with trainer(toy_dataset, tmp_path / "run") as job:
        while job.poll() is None:
            if at_work := feeders_below(psutil.Process(job.pid)):
                os.kill(at_work[rng.integers(len(at_work))].pid, signal.SIGKILL)
                kills += 1
            job_ends = time.monotonic() + 5
            while job.poll() is None and time.monotonic() < job_ends:
                time.sleep(0.1)
        said = job.stderr.read()
    assert job.returncode == 0, said
    assert kills >= 2
    assert losses(tmp_path / "run") == local_losses
    assert GONE not in said
    assert "is replaced: its process died" in said


def test_a_run_whose_ray_is_gone_goes_on_with_the_losses_of_local_loading(toy_dataset: Dataset, local_losses: list[float], tmp_path: Path) -> None:
    with trainer(toy_dataset, tmp_path / "run", tidies=False) as job:  # who would tidy is killed
        below(psutil.Process(job.pid), "raylet")[0].parent().kill()
        said = job.communicate(timeout=300)[1]
    assert job.returncode == 0, said
    assert said.count(GONE) == 1, said
    assert losses(tmp_path / "run") == local_losses


def test_replicas_on_one_machine_have_a_ray_each(toy_dataset: Dataset, local_losses: list[float], tmp_path: Path) -> None:
    with trainer(toy_dataset, tmp_path / "run", "--parallel.engine", "deepspeed", processes=2) as job:
        said = job.communicate(timeout=300)[1]
    assert job.returncode == 0, said
    assert losses(tmp_path / "run")[:20] == pytest.approx(local_losses[:20], rel=1e-5)
    assert GONE not in said


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_run_that_is_ended(toy_dataset: Dataset, tmp_path: Path, signal_number: int) -> None:
    with trainer(toy_dataset, tmp_path / "run", "--steps", "100000") as job:
        job.send_signal(signal_number)
        said = job.communicate(timeout=60)[1]
    if signal_number == signal.SIGTERM:
        assert job.returncode == 0
        assert "stopped by SIGTERM after step" in said
