"""What the drivers of a dataset did, as JSON lines, and the lock that keeps them apart.

    DATASET/ledger/
      preparation.json   the spec and the inputs that everything in the folder was made by
      inputs.seen        a line a file of the input: size, time of change, sha256, so that the next start need not read it again
      00000.jsonl        a file a driver: started, committed, failed, killed and quarantined attempts, each with its shard, number, node and seconds
      status.json        the newest state, as `flm data status` shows it
      lock               host and process of the driver at work
      beats/             what each worker is at
      input-*/           what `flm data demo` has laid out to be prepared

The truth about what is done is on disk, in the shards themselves; the ledger says how it came about, and which attempt numbers are taken. None
of it is part of the dataset's root, and all of it may be deleted when the dataset is sealed, but retry and repair then have
nothing to go by.
"""

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flm_scale.errors import DataError

FOLDER = "ledger"
FOREIGN_LOCK_SECONDS = 60.0
"""How long the lock of a driver on another host holds without a sign of life, where the file system does not tell hosts of each other's locks."""


class Ledger:
    """The file of one driver."""

    def __init__(self, folder: Path) -> None:
        """folder: of the dataset, whose lock the caller holds."""
        ledger = folder / FOLDER
        ledger.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(path.stem) for path in ledger.glob("*.jsonl")), default=-1)
        self._file = (ledger / f"{number:05d}.jsonl").open("a", encoding="utf-8", buffering=1)

    def write(self, event: str, *, shard: str, attempt: int, node: str, **more: object) -> None:
        """Append a line; it is with the system when this returns, so a killed driver has lost none."""
        line = {"time": round(time.time(), 3), "event": event, "shard": shard, "attempt": attempt, "node": node, **more}
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_ledger(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of all drivers in order."""
    for path in sorted((folder / FOLDER).glob("*.jsonl")):
        yield from read_lines(path)


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of one driver. One that a kill or a full disk has torn is passed over."""
    with file.open(encoding="utf-8", errors="replace") as stream:
        for text in stream:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and {"event", "shard", "attempt"} <= line.keys():
                yield line


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other drivers out of a dataset's folder. Raises DataError when one is at work there; a dead one's lock is taken over."""
    path = folder / FOLDER / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        file.seek(0)
        host, _, process = file.read().partition(" ")
        age = time.time() - path.stat().st_mtime
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = not host or host == socket.gethostname() or age > FOREIGN_LOCK_SECONDS
        except BlockingIOError:
            is_free = False
        if not is_free:
            raise DataError(f"{folder} is being prepared by process {process or '?'} on {host or 'another host'}; wait for it or end it "
                            f"(on another host its lock ends {FOREIGN_LOCK_SECONDS:g} s behind its last sign of life)")
        file.truncate(0)
        file.write(f"{socket.gethostname()} {os.getpid()}")
        file.flush()
        ended = threading.Event()

        def give_signs_of_life() -> None:
            """For hosts that cannot see the lock itself."""
            while not ended.wait(FOREIGN_LOCK_SECONDS / 6):
                with suppress(OSError):
                    os.utime(path)

        threading.Thread(target=give_signs_of_life, name="lock", daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            file.truncate(0)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a file in one step."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
