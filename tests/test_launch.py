"""Launching as a cluster's user does: sbatch on a real Slurm cluster of two nodes, a job on a real Ray cluster of two; signals, stalls, losses."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from flm_scale.cli import main
from flm_scale.data.shards import Dataset, open_dataset
from tests.data.prepare.crawl import Crawl
from tests.distributed.launch import Launch
from tests.test_train import lines_of, train

ROOT = Path(__file__).parents[1]
FOR_EVER = ("--steps", "1000000")
ENVIRON = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def words(dataset: Dataset, *more: str) -> list[str]:
    return ["debug", "--data.path", str(dataset.folder), "--text.vocab-size", "200", "--steps", "6", *more]


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in lines_of(run_dir) if "loss" in line] if (run_dir / "metrics.jsonl").exists() else []


def wait_until(true: Callable[[], object], *, seconds: float = 300) -> None:
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.3)


def said_to_stop_at(run_dir: Path, console: str) -> int:
    """The step after which a run said that it stops, where its weights are."""
    found = re.search(r"flm: stopped by SIGTERM after step (\d+) of 1000000, saved", console)
    assert found, console
    assert (run_dir / f"checkpoints/step-{int(found[1]):06d}/manifest.json").is_file()
    return int(found[1])


@pytest.fixture(scope="module")
def one_process(toy_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process of plain PyTorch."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    assert train(toy_dataset.folder, run_dir) == 0
    return losses(run_dir)


@pytest.mark.slow
def test_sigterm_to_a_process_and_its_data_workers_finishes_the_step_saves_and_exits_with_0(toy_dataset: Dataset, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "flm_scale", "train", *words(toy_dataset, *FOR_EVER, "--data.workers", "2", "--run-dir", str(run_dir))]
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRON, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        wait_until(lambda: losses(run_dir))
        os.killpg(process.pid, signal.SIGTERM)
        console = process.communicate(timeout=60)[1]
    assert process.returncode == 0
    assert said_to_stop_at(run_dir, console) == len(losses(run_dir))
    assert f"flm: stopped by SIGTERM after step {len(losses(run_dir))}" in (run_dir / "logs/rank_0.log").read_text()


class Slurm:
    """A real Slurm cluster of two nodes on this machine."""

    def __init__(self, folder: Path) -> None:
        # The nodes' names are in no DNS, so the meeting point that would be the first of them is given.
        self.environ = ENVIRON | {"SLURM_CONF": f"{folder}/slurm.conf", "MASTER_ADDR": "127.0.0.1", "HEAD": "127.0.0.1", "PYTHON": sys.executable}

    def run(self, *command: str) -> str:
        return subprocess.run(command, cwd=ROOT, env=self.environ, check=True, timeout=60, capture_output=True, text=True).stdout.strip()

    def submit(self, run_dir: Path, arguments: list[str], *options: str) -> str:
        """Submit the batch file as a user does, with more options of sbatch; what the job prints goes to RUN_DIR.out."""
        return self.run("sbatch", "--parsable", "--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={run_dir}.out", *options,
                        "cluster/slurm/pretrain.sbatch", *arguments, "--run-dir", str(run_dir), "--parallel.engine", "deepspeed")

    def state(self, job: str) -> str:
        return self.run("scontrol", "show", "job", job).split("JobState=")[1].split()[0]

    def last_state(self, job: str) -> str:
        """Wait for the job's end."""
        wait_until(lambda: self.state(job) not in {"PENDING", "RUNNING", "SIGNALING", "COMPLETING"})
        return self.state(job)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Skipped where Slurm is not installed, but not in CI."""
    if not (shutil.which("slurmctld") and shutil.which("munged") and os.geteuid() == 0):
        assert not os.environ.get("CI"), ".ci/run installs slurm-wlm and munge"
        pytest.skip("needs root and Debian's slurm-wlm and munge")
    script, folder = str(Path(__file__).with_name("slurm-cluster")), tmp_path_factory.mktemp("slurm")
    subprocess.run([script, "start", str(folder)], check=True, timeout=60)
    yield Slurm(folder)
    subprocess.run([script, "stop", str(folder)], check=True, timeout=60)


@pytest.mark.slow
def test_a_batch_job_on_two_nodes_gives_the_losses_of_one_process(slurm: Slurm, toy_dataset: Dataset, one_process: list[float],
                                                                  tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert slurm.last_state(slurm.submit(run_dir, words(toy_dataset))) == "COMPLETED"
    assert losses(run_dir) == pytest.approx(one_process, rel=1e-5)
    assert [json.loads((run_dir / f"heartbeats/rank_{rank}.json").read_text())["phase"] for rank in (0, 1)] == ["done", "done"]
    assert {path.name for path in (run_dir / "logs").iterdir()} == {"rank_0.log", "rank_1.log"}
    console = Path(f"{run_dir}.out").read_text()
    assert console.count("flm: debug: flm") == 1
    assert "step 6/6" in console


@pytest.mark.slow
def test_scancel_lets_a_job_save_its_weights_and_say_so(slurm: Slurm, toy_dataset: Dataset, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = slurm.submit(run_dir, words(toy_dataset, *FOR_EVER))
    wait_until(lambda: losses(run_dir))
    slurm.run("scancel", job)
    assert slurm.last_state(job) == "CANCELLED"
    console = Path(f"{run_dir}.out").read_text()
    assert said_to_stop_at(run_dir, console) == len(losses(run_dir))
    assert "Traceback" not in console


@pytest.mark.slow
def test_a_job_whose_time_ends_saves_its_weights_and_ends_well(slurm: Slurm, toy_dataset: Dataset, tmp_path: Path) -> None:
    """The batch file asks for the signal five minutes before the end."""
    run_dir = tmp_path / "run"
    job = slurm.submit(run_dir, words(toy_dataset, *FOR_EVER), "--time=60")
    wait_until(lambda: losses(run_dir))
    slurm.run("scontrol", "update", f"job={job}", "timelimit=5")
    assert slurm.last_state(job) == "COMPLETED"
    assert said_to_stop_at(run_dir, Path(f"{run_dir}.out").read_text()) == len(losses(run_dir))


@pytest.mark.slow
def test_a_job_that_is_queued_again_ends_like_an_unbroken_one(slurm: Slurm, toy_dataset: Dataset, tmp_path: Path) -> None:
    """Of the same two processes, to the bit."""
    run_dir, more = tmp_path / "run", ("--steps", "60", "--log.save-every-steps", "5")
    unbroken = ["train", *words(toy_dataset, *more), "--run-dir", str(tmp_path / "unbroken"), "--parallel.engine", "deepspeed"]
    with Launch(main, unbroken, processes=2, folder=tmp_path / "said") as launch:
        assert launch.wait(200) == [0, 0], launch.said()
    job = slurm.submit(run_dir, words(toy_dataset, *more))
    wait_until(lambda: len(losses(run_dir)) > 6)
    slurm.run("scontrol", "requeue", job)
    wait_until(lambda: slurm.state(job) == "PENDING")
    slurm.run("scontrol", "update", f"job={job}", "starttime=now")
    assert slurm.last_state(job) == "COMPLETED"
    assert "goes on behind" in Path(f"{run_dir}.out").read_text()
    assert losses(run_dir) == losses(tmp_path / "unbroken")


@pytest.mark.slow
def test_a_job_with_a_stopped_rank_names_it_and_ends(slurm: Slurm, toy_dataset: Dataset, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = slurm.submit(run_dir, words(toy_dataset, *FOR_EVER, "--log.stall-timeout", "12"))
    wait_until(lambda: losses(run_dir))
    os.kill(json.loads((run_dir / "heartbeats/rank_1.json").read_text())["pid"], signal.SIGSTOP)
    stopped = time.monotonic()
    assert slurm.last_state(job) == "FAILED"
    assert time.monotonic() - stopped < 60
    assert re.search(r"^flm: rank 1 \(.*\) is stopped or lost: nothing has moved for 10 s", Path(f"{run_dir}.out").read_text(), re.MULTILINE)
    assert "distributed_c10d.py" in (run_dir / "logs/rank_0.log").read_text(), "its stacks show what it waited for"


@pytest.mark.slow
def test_a_batch_job_prepares_on_two_nodes_what_one_machine_does(slurm: Slurm, tmp_path: Path) -> None:
    with Crawl(120) as crawl:
        words = ("data", "prepare", "--input", str(crawl.write_table(tmp_path / "table.parquet")), "--samples-per-shard", "20",
                 "--fetch.allow-loopback", "--fetch.total-seconds", "2")
        assert main([*words, "--output", str(tmp_path / "here"), "--workers", "2"]) == 0
        job = slurm.run("sbatch", "--parsable", "--cpus-per-task=1", f"--output={tmp_path}/job.out", "cluster/slurm/prepare.sbatch", *words[2:],
                        "--workers", "2", "--output", str(tmp_path / "there"))
        assert slurm.last_state(job) == "COMPLETED", (tmp_path / "job.out").read_text()
    assert open_dataset(tmp_path / "there").root == open_dataset(tmp_path / "here").root
    log = Path(tempfile.gettempdir(), f"ray-{job}.log")
    assert log.read_text().count("Ray runtime started") == 2
    log.unlink()


@pytest.mark.slow
def test_a_ray_job_on_two_nodes_gives_the_losses_of_one_process_and_ends_with_a_line_when_a_node_is_lost(
        toy_dataset: Dataset, one_process: list[float], tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)

    def start(run_dir: Path, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "cluster/ray/pretrain.py", "--workers", "2", "--on-cpu", "--run-dir", str(run_dir),
                   *words(toy_dataset, "--parallel.engine", "deepspeed", *more)]
        # A Ray that this process has started before may have switched on authentication, for the cluster too.
        auth = {"RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "disabled")}
        return subprocess.Popen(command, cwd=ROOT, env=ENVIRON | {"RAY_ADDRESS": cluster.address} | auth, stderr=subprocess.PIPE, text=True)

    try:
        with start(tmp_path / "whole") as job:
            console = job.communicate(timeout=300)[1]
        assert job.returncode == 0, console[-3000:]
        assert losses(tmp_path / "whole") == pytest.approx(one_process, rel=1e-5)
        assert {path.name for path in tmp_path.iterdir()} == {"whole"}
        with start(tmp_path / "lost", *FOR_EVER) as job:
            wait_until(lambda: losses(tmp_path / "lost"))
            cluster.remove_node(second, allow_graceful=False)
            console = job.communicate(timeout=120)[1]
        assert job.returncode == 1
        assert re.search(r"^flm: lost rank [01](, [01])?, with its process or its node$", console, re.MULTILINE), console[-3000:]
    finally:
        cluster.shutdown()


def test_the_ray_cluster_file_is_one_that_ray_up_takes() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load((ROOT / "cluster/ray/cluster.yaml").read_text())))


def test_the_ray_job_asks_for_a_worker_a_gpu_and_names_files_that_are_there() -> None:
    spec = yaml.safe_load((ROOT / "cluster/ray/rayjob.yaml").read_text())["spec"]
    command = shlex.split(spec["entrypoint"])
    assert (ROOT / Path(command[1]).relative_to("/flm_scale")).is_file()
    nodes = spec["rayClusterSpec"]["workerGroupSpecs"][0]
    gpus = nodes["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert command[command.index("--workers") + 1] == str(nodes["replicas"] * int(gpus))
    assert f"ray=={spec['rayClusterSpec']['rayVersion']}" in (ROOT / "requirements.lock").read_text().replace(" \\", "")
