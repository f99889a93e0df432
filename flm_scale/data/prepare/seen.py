"""What the files of an input were found to be, remembered between the starts of a driver: reading all tars of LAION again would take hours.

A file that has the size and the time of change that it had counts as the one it was.
"""

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any, NamedTuple

from flm_scale.data.tar import list_members
from flm_scale.errors import DataError


class Look(NamedTuple):
    """What one file was found to be."""

    size: int
    modified_ns: int
    sha256: str
    rows: int
    """Samples of a tar; -1 of a file that was not looked at as one."""


class Seen:
    """Looks at files, those that were looked at before excepted. Threads may share it."""

    def __init__(self, notes: Path | None = None, *, hashed: bool = True) -> None:
        """notes: JSON lines, a file each; without it nothing is remembered.   hashed: whether the sha256 is wanted; else it stays empty."""
        self._notes, self._hashed, self._lock = notes, hashed, threading.Lock()
        self._known = _read_notes(notes) if notes and notes.exists() else {}

    def look(self, path: Path, *, is_tar: bool) -> Look:
        """Return what a file is; a tar's samples are counted. Raises DataError when it cannot be read, ShardError when a tar is refused."""
        try:
            with path.open("rb") as stream:
                stat = os.fstat(stream.fileno())
                known = self._known.get(str(path))
                if known and known[:2] == (stat.st_size, stat.st_mtime_ns) and (known.rows >= 0 or not is_tar):
                    return known
                sha256 = hashlib.file_digest(stream, "sha256").hexdigest() if self._hashed else ""
        except OSError as error:
            raise DataError(f"input {path} cannot be read ({error.strerror}); correct the path or its rights") from error
        found = Look(stat.st_size, stat.st_mtime_ns, sha256, _count_samples(path) if is_tar else -1)
        if self._notes:
            with self._lock, self._notes.open("a", encoding="utf-8") as notes:
                notes.write("\n" + json.dumps({"path": str(path), **found._asdict()}))  # the line before may be torn
        return found


def _count_samples(tar: Path) -> int:
    """Walk all headers, strictly."""
    rows, key = 0, None
    for member in list_members(tar):
        rows += member.key != key
        key = member.key
    return rows


def _read_notes(notes: Path) -> dict[str, Look]:
    """Return what is known of each path. A line that a kill has torn is passed over."""
    known = {}
    for text in notes.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line: dict[str, Any] = json.loads(text)
            path = line.pop("path")
            known[path] = Look(**line)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return known
