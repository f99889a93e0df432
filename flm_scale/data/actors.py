"""The only door to Ray: joining a cluster or starting one on this machine, actors, and what their calls come to.

Ray restarts nothing here: a call is answered, raises what its method raised, or is lost with its process or node, and the fleet and the feeders
decide what then.
"""

import fcntl
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from flm_scale.errors import ConfigError

REACH_SECONDS = 10.0
LEAST_STORE_BYTES = 80 * 1024**2
"""Ray's least for its object store."""
FOLDERS = "flm-ray-"
"""How the folders begin, in the machine's temporary one, that a Ray on this machine has; short, because Ray puts sockets into them."""
REMOVALS = 20
"""Tries, a tenth of a second each, to remove one that a dying process still writes into."""


class RaisedError(Exception):
    """What an actor's method raised, in one line; Ray's text for it, a traceback, is its cause."""

    def __init__(self, error: BaseException) -> None:
        """error: Ray's."""
        self.original: BaseException = getattr(error, "cause", None) or error
        super().__init__(f"{type(self.original).__name__}: {_last_line(self.original)}")


class LostError(Exception):
    """An actor's process or node is gone, and why."""

    def __init__(self, error: BaseException) -> None:
        """error: Ray's, a page."""
        page = str(error)
        self.last_line = _last_line(error)
        """Of the page; says what kept an actor from starting."""
        super().__init__("its node died" if "node has died" in page or "node was terminated" in page else
                         "the node ran low on memory" if "running low on memory" in page else "its process died")


def cluster_address(given: str) -> str:
    """Return the address that was given, or RAY_ADDRESS, or of the cluster that this process is a part of, or else `local`."""
    address = given or os.environ.get("RAY_ADDRESS", "")
    if not address and "ray" in sys.modules:
        import ray

        address = ray.get_runtime_context().gcs_address if ray.is_initialized() else ""
    return address or "local"


@contextmanager
def joined_ray(address: str, *, option: str, cpus: int = 0, store_bytes: int = LEAST_STORE_BYTES) -> Iterator[None]:
    """Join the cluster at an address, or start Ray on this machine for `local`, quietly. What this process has joined already stays so.

    option: that gives the address.   cpus, store_bytes: of a Ray on this machine; 0 is all of its CPUs.
    Raises ConfigError when there is no cluster at the address.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # A death is told by whoever meets it; Ray would print a paragraph.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")
    import ray

    with ExitStack() as stack:
        if not ray.is_initialized():
            own: dict[str, Any] = {}
            if address == "local":
                own = {"num_cpus": cpus or len(os.sched_getaffinity(0)), "include_dashboard": False, "object_store_memory": store_bytes,
                       "_temp_dir": stack.enter_context(_temporary_folder())}
            handler = signal.getsignal(signal.SIGTERM)
            try:
                _reach(address)
                ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own)
            except Exception as error:  # Ray raises bare ones too
                if own:
                    raise ConfigError(f"Ray does not start on this machine: {_first_line(error)}; it needs {store_bytes >> 20} MB of /dev/shm (of a "
                                      "container: --shm-size), free processes, and a short TMPDIR") from error
                raise ConfigError(f"{option} {address}: {_first_line(error)}; give the address of a running cluster, or none") from error
            stack.callback(ray.shutdown)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)  # Ray has set its own
        yield


@contextmanager
def _temporary_folder() -> Iterator[str]:
    """Make a folder for Ray, and a file beside it that this process holds a lock on; remove both, also where earlier processes were killed.

    The kernel lets go of a lock with its process, so a free one says that nobody needs the folder, whatever container the process was in.
    """
    remove_abandoned_folders()
    with tempfile.NamedTemporaryFile("w", prefix=FOLDERS, suffix=".lock", delete=False) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(_boot_id())
        lock.flush()
        folder = Path(lock.name).with_suffix("")
        folder.mkdir(mode=0o700)
        try:
            yield str(folder)
        finally:
            _remove(folder)


def remove_abandoned_folders() -> None:
    """Remove what this user's processes that were killed have left of Ray in the temporary folder."""
    for file in Path(tempfile.gettempdir()).glob(f"{FOLDERS}*.lock"):
        with suppress(OSError):  # one that is in use cannot be locked
            if file.lstat().st_uid == os.getuid():
                with file.open() as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    # Empty while it is being made; of another kernel, whose locks may be its own, where machines share the folder.
                    if lock.read() == _boot_id():
                        _remove(file.with_suffix(""))


def _remove(folder: Path) -> None:
    for _ in range(REMOVALS):
        _kill_starting(folder)
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            folder.with_suffix(".lock").unlink(missing_ok=True)
            return
        time.sleep(0.1)


def _kill_starting(folder: Path) -> None:
    """Kill processes of a Ray that is gone which have not come up yet: they do not know, and make the folder again. Later Ray renames them."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            if f"--temp-dir={folder}".encode() in file.read_bytes().split(b"\0"):
                os.kill(int(file.parent.name), signal.SIGKILL)


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")


def cluster_cpus() -> int:
    """Return how many CPUs the cluster has by now."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def cluster_gpus() -> int:
    """Return how many GPUs it has."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def _reach(address: str) -> None:
    """Raise OSError when nobody answers at an address; Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=REACH_SECONDS).close()


def start_actor(kind: type, *arguments: object, labels: Mapping[str, str], threads: Collection[str] = (),
                gpus: int = 0) -> Any:  # noqa: ANN401 - Ray's handle
    """Return the handle of a new actor, which takes a CPU, and so many GPUs, of any node with these labels.

    labels: as in Ray's label selectors.   threads: names of concurrency groups, a thread each beside the one that does all else.
    """
    import ray

    # A running actor takes 0 CPUs unless told.
    options = {"num_cpus": 1, "num_gpus": gpus, "max_restarts": 0, "max_task_retries": 0, "scheduling_strategy": "SPREAD",
               "label_selector": dict(labels)}
    remote: Any = ray.remote  # its types know of no groups
    return remote(concurrency_groups=dict.fromkeys(threads, 1))(kind).options(**options).remote(*arguments)


def kill_actor(actor: Any) -> None:  # noqa: ANN401 - Ray's handle
    """Kill an actor's process, if it is still there."""
    import ray

    with suppress(ray.exceptions.RayError, ValueError):
        ray.kill(actor)


def arrived(calls: list[Any], *, seconds: float) -> list[Any]:
    """Return which calls have come to something, when one has or the seconds are over."""
    import ray

    come, _ = ray.wait(calls, timeout=seconds)
    if come:
        come, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
    return come


def answer(call: Any) -> Any:  # noqa: ANN401 - Ray's reference, and what the method returns
    """Return what a call has come to; arrays lie in Ray's memory and are read-only. Raises RaisedError and LostError."""
    import ray

    try:
        return ray.get(call)
    except ray.exceptions.RayTaskError as error:
        raise RaisedError(error) from error
    except ray.exceptions.RayError as error:
        raise LostError(error) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
