"""Pretrain on a Ray cluster. On any of its nodes, or behind `ray job submit --`:

    python cluster/ray/pretrain.py --workers 16 --run-dir /shared/runs/x RECIPE [--group.key VALUE ...]

Ray Train starts a worker a GPU, those of a node with neighbouring ranks, sets torchrun's variables and forms the process group; then each
worker does what `flm train` does. Exits with 1 when a worker failed or was lost; the last line says why.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import ray
from ray.train import RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer


def work(job: dict[str, list[str]]) -> None:
    """Be one rank."""
    from flm_scale.cli import main

    # Relative paths mean to all workers what they mean to whoever submits.
    os.chdir(job["folder"][0])
    # With --debug a user's mistake is raised and not printed, so that Ray ends the other workers.
    main(["--debug", "train", *job["words"]])


def explain(error: TrainingFailedError) -> str:
    """Return one line on why the workers ended."""
    failures = {rank: str(failure).strip() for rank, failure in getattr(error, "worker_failures", {0: error}).items()}
    # A worker that raised comes with its traceback. One without is gone, and the others' broken connections only follow from it.
    lost = [str(rank) for rank, failure in failures.items() if 'File "' not in failure]
    if lost:
        return f"lost rank {', '.join(lost)}, with its process or its node"
    rank, failure = min(failures.items())
    return f"rank {rank}: {failure.splitlines()[-1]}"


def main() -> int:
    """Run the job and return its exit code."""
    parser = argparse.ArgumentParser(description="Everything else goes to flm train.")
    parser.add_argument("--workers", type=int, required=True, help="processes in all, one a GPU")
    parser.add_argument("--run-dir", type=Path, required=True, help="on a file system that all nodes share")
    parser.add_argument("--cpus-per-worker", type=int, default=1, help="cores that each worker reserves")
    parser.add_argument("--on-cpu", action="store_true", help="reserve no GPUs")
    options, words = parser.parse_known_args()
    # Else Ray Train sends what is printed into a log of its own.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    ray.init()
    run_dir = options.run_dir.resolve()
    # Ray wants a shared folder of its own and leaves nothing in it that matters.
    storage = run_dir.with_name(f".{run_dir.name}.ray")
    resources = {"CPU": options.cpus_per_worker} | ({} if options.on_cpu else {"GPU": 1})
    trainer = TorchTrainer(work, train_loop_config={"words": [*words, "--run-dir", str(run_dir)], "folder": [str(Path.cwd())]},
                           scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=not options.on_cpu, resources_per_worker=resources),
                           run_config=RunConfig(name=storage.name, storage_path=str(storage.parent)))
    try:
        trainer.fit()
    except TrainingFailedError as error:
        print(f"flm: {explain(error)}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
