"""Starts real processes that have imported everything: forks of one server, which did that once for all of a test run.

Importing torch, DeepSpeed and megatron-core takes a process seconds; a fork takes none and is fresh otherwise: no thread, no process group.
torchrun's own part, the environment and the end of all when one fails, is done here.
"""

import multiprocessing
import os
import random
import runpy
import socket
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing import connection, forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self
from unittest.mock import patch

ROOT = Path(__file__).parents[2]


class Launch:
    """The processes of one launch, gloo and one thread each. A context manager, which kills those that are left.

    What rank N prints is in FOLDER/rank_N.out and FOLDER/rank_N.err.
    """

    def __init__(self, function: Callable[..., object], *arguments: object, processes: int, folder: Path) -> None:
        """function: found by its name in its module; what it returns is the exit code, None for 0."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        meeting = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        context = server()
        environs = [{**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        self.processes = [context.Process(target=_be_rank, args=(function, arguments, environ, folder)) for environ in environs]
        for process in self.processes:
            process.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def wait(self, timeout: float, *, patience: float = 0.0) -> list[int]:
        """Wait until all processes have ended, and return their exit codes. When one has failed the others are killed, as torchrun does.

        timeout: in seconds; raises TimeoutError, with what they said, when it is over.   patience: seconds for the others to end by themselves.
        """
        limit = time.monotonic() + timeout
        while running := [process.sentinel for process in self.processes if process.exitcode is None]:
            if not connection.wait(running, timeout=limit - time.monotonic()):
                self.kill()
                raise TimeoutError(f"not done after {timeout} s; {self.said()}")
            if any(process.exitcode for process in self.processes):
                self._end_within(patience)
        return [process.exitcode or 0 for process in self.processes]

    def _end_within(self, seconds: float) -> None:
        limit = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(limit - time.monotonic(), 0))
        self.kill()

    def kill(self) -> None:
        """Kill -9 all that are running."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def said(self) -> str:
        """Return the ends of what all wrote to standard error."""
        return "\n".join(f"{path.stem}: {path.read_text()[-3000:]}" for path in sorted(self.folder.glob("rank_*.err")))


def run_worker(worker: str, *arguments: object, processes: int, timeout: float) -> None:
    """Run a module of this folder as a program in several processes.   timeout: seconds."""
    with TemporaryDirectory() as folder, Launch(_run_module, f"tests.distributed.{worker}", [str(word) for word in arguments],
                                                processes=processes, folder=Path(folder)) as launch:
        codes = launch.wait(timeout)
        assert codes == [0] * processes, f"exit codes {codes}; {launch.said()}"


def server() -> Any:
    """Return what makes forks of the server, and start the server when it is not there."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.preload"])
    # The server reads these when it starts; children have them from it.
    with patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}):
        forkserver.ensure_running()
    return context


def free_port() -> int:
    """Return a port below those that the system gives to sockets without one, of which gloo takes many."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _be_rank(function: Callable[..., object], arguments: tuple[object, ...], environ: Mapping[str, str], folder: Path) -> None:
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        with (folder / f"rank_{environ['RANK']}.{name}").open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.environ.update(environ)
    import torch

    torch.set_num_threads(1)
    sys.exit(function(*arguments))


def _run_module(module: str, words: list[str]) -> None:
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__")
