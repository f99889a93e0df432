"""Starts a worker module in several processes and waits for them."""

import os
import subprocess
import sys
from pathlib import Path


def run_worker(worker: str, *arguments: object, processes: int, timeout: float) -> None:
    """timeout: seconds. gloo, one thread a process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
               "-m", f"tests.distributed.{worker}", *map(str, arguments)]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
