"""Files of a dataset wherever they lie: on disk, in an object store, behind a web server. The only door to fsspec.

What is mapped (indexes, token ids) or opened by its path (the tokenizer) is copied into a cache on disk that processes share; pictures are read as
ranges of their shard, those of a micro-batch all at once, or from a larger range that is kept on disk for a while. What fails is tried again, and a
file that cannot be had ends the run: it is no bad picture. Credentials come from where the driver looks for them, and stand in no message.
"""

import fcntl
import hashlib
import io
import os
import random
import stat
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from flm_scale.errors import ConfigError, DataError, UserError

Result = TypeVar("Result")

CACHE_BYTES = 20 * 1024**3
"""Copies that are kept; beyond it those that were used longest ago go. As much again of ranges; beyond it no more are kept."""
IN_USE_SECONDS = 600.0
"""Copies used so lately stay in any case: a process may be about to map them. A range that nobody has used for so long is of a killed run."""
WAITS_SECONDS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Before each further try, at most."""
CONNECTIONS = 64
"""Ranges of a micro-batch that are read at once, a process."""
STREAMED_AT_ONCE = 16 * 1024**2
OPTIONS = {"s3": {"config_kwargs": {"max_pool_connections": CONNECTIONS, "retries": {"max_attempts": 0}}}}
"""For drivers: s3fs keeps 10 connections by itself, and below it and us botocore would try again, too, with waits of its own."""


class StorageError(UserError):
    """A file that lies elsewhere and cannot be had: no driver, no permission, or no answer after all tries."""


class Url(str):
    """Where something lies that is not on disk. Joins names as a Path does, which would swallow one of its slashes."""

    __slots__ = ()

    def __truediv__(self, name: str) -> "Url":
        """Return the URL of a file below."""
        return Url(f"{self}/{name}")

    def relative_to(self, folder: object) -> str:
        """Return the name below a folder."""
        return self.removeprefix(f"{folder}/")


class Range(NamedTuple):
    """A part of a file."""

    file: Url
    offset: int
    size: int


def locate(place: Path | str) -> Path | Url:
    """Return a URL where the text is one, else a path. Raises ConfigError for a URL with credentials, which run.json and messages would repeat."""
    if isinstance(place, Path) or "://" not in place:
        return Path(place)
    parts = urlsplit(place)
    if parts.username or parts.password or parts.query:
        raise ConfigError(f"{parts.scheme}://{parts.hostname}{parts.path}: a dataset's URL must hold no user, password or query; leave credentials "
                          "to the driver's own variables, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    return Url(place.rstrip("/"))


def read_bytes(file: Path | Url) -> bytes:
    """Return a whole file. Raises OSError when it is not there, StorageError when it cannot be had."""
    return _ask(file, "cat_file") if isinstance(file, Url) else file.read_bytes()


def size_of(file: Path | Url) -> int:
    """Return the bytes of a file. Raises as `read_bytes`."""
    return int(_ask(file, "info")["size"]) if isinstance(file, Url) else file.stat().st_size


def sizes_of(files: Sequence[Path | Url]) -> list[int | None]:
    """Return the bytes of each file, None for one that is not there; of those that lie elsewhere many are asked for at once. Raises StorageError."""
    def size(file: Path | Url) -> int | None:
        try:
            return size_of(file)
        except OSError:
            return None

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return list((pool.map if any(isinstance(file, Url) for file in files) else map)(size, files))


def open_stream(file: Path | Url) -> io.BufferedReader:
    """Open a file to read it from its start to its end; one that lies elsewhere does not seek. Raises as `read_bytes`, also while it is read."""
    return io.BufferedReader(_Stream(file), STREAMED_AT_ONCE) if isinstance(file, Url) else file.open("rb")


def file_sha256(file: Path | Url) -> str:
    """Return the hash of a file's bytes, as hexadecimal digits. Raises as `read_bytes`."""
    with open_stream(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_ranges(ranges: Sequence[Range]) -> list[bytes]:
    """Return some parts of files of one store, asked for all at once; less of those that reach behind their file's end. Raises as `read_bytes`."""
    found: dict[Range, bytes] = {part: b"" for part in ranges if not part.size}

    def ask() -> None:
        missing = [part for part in ranges if part not in found]
        starts, ends = [part.offset for part in missing], [part.offset + part.size for part in missing]
        driver = _filesystem(missing[0].file)
        bound = {"batch_size": CONNECTIONS} if driver.async_impl else {}  # the others ask for one after another
        answers = driver.cat_ranges([part.file for part in missing], starts, ends, on_error="return", **bound)
        found.update((part, answer) for part, answer in zip(missing, answers, strict=True) if isinstance(answer, bytes))
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer

    if any(part not in found for part in ranges):
        _try(ranges[0].file, ask)
    for part in ranges:
        if len(found[part]) > part.size:
            raise StorageError(f"{part.file}: the server sends whole files where a range is asked for; serve the dataset from one that knows ranges")
    return [found[part] for part in ranges]


def local_copy(file: Path | Url, *, sha256: str = "") -> Path:
    """Return a path to a file's content: its own, or that of a copy in the cache, made when there is none.

    sha256: of the content where it is stated. Other files are copied again when their store says that they have changed.
    Raises as `read_bytes`, and DataError when the content is not what is stated.
    """
    if isinstance(file, Path):
        return file
    cached = cache_folder() / (sha256 or hashlib.sha256(repr(sorted(_ask(file, "info").items())).encode()).hexdigest())
    try:
        os.utime(cached)  # in use from here on, so that no other process removes it
    except FileNotFoundError:
        cached.parent.mkdir(parents=True, exist_ok=True)
        _copy(file, cached, sha256)
        _make_room(cached.parent)
    return cached


def in_background(do: Callable[[], Result], *, is_left: bool | None = None) -> "Future[Result]":
    """Do something that waits for a store in a thread of its own.

    is_left: a process that ends leaves it where it is, as a loader's worker should, which no interpreter outlives; an executor's threads would be
    waited for. None does as the thread that asks.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(do())
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            future.set_exception(error)

    Thread(target=run, daemon=is_left).start()
    return future


def keep_range(part: Range, name: str) -> None:
    """Copy a part of a file into the cache under a name, unless it is there, another process is at it, or it cannot be had or kept.

    Nothing depends on it: who does not find it reads what he needs from the store, and is told there what is wrong with that.
    """
    folder = _ranges_folder()
    kept, written = folder / name, folder / f".{name}.part"
    with suppress(OSError, StorageError):  # a full disk, a store that does not answer, or forgotten meanwhile
        folder.mkdir(parents=True, exist_ok=True)
        if kept.exists() or not _has_room(folder, part.size):
            return
        with written.open("ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                if kept.exists():  # and what was opened may be this very file
                    return
                stream.truncate(0)
                for offset in range(part.offset, part.offset + part.size, STREAMED_AT_ONCE):
                    stream.write(*read_ranges([Range(part.file, offset, min(STREAMED_AT_ONCE, part.offset + part.size - offset))]))
                stream.flush()
                written.replace(kept)
            finally:
                written.unlink(missing_ok=True)


def read_kept(name: str, offset: int, size: int) -> bytes:
    """Return a part of what `keep_range` has kept, nothing when it is not there. What a machine has lost in a crash may be missing or wrong."""
    with suppress(OSError), (_ranges_folder() / name).open("rb", buffering=0) as stream:
        os.utime(stream.fileno())
        return os.pread(stream.fileno(), size, offset)
    return b""


def forget_range(name: str) -> None:
    """Remove what was kept under a name, or is being written."""
    for file in (name, f".{name}.part"):
        with suppress(OSError):
            (_ranges_folder() / file).unlink()


def _ranges_folder() -> Path:
    return cache_folder() / "ranges"


def _has_room(folder: Path, size: int) -> bool:
    """Remove what killed runs have left, and return whether as much more may be kept."""
    for file in os.scandir(folder):
        with suppress(FileNotFoundError):  # forgotten meanwhile
            about = file.stat()
            if about.st_mtime < time.time() - IN_USE_SECONDS:
                Path(file).unlink()
            else:
                size += about.st_size
    return size <= CACHE_BYTES


def cache_folder() -> Path:
    """Return where copies are: $FLM_CACHE, or flm_scale in the user's cache folder."""
    return Path(os.environ.get("FLM_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flm_scale")


def _copy(file: Url, cached: Path, sha256: str) -> None:
    """Copy whole, check, then rename. Processes that want the same file wait for the first one; a killed one's lock is gone with it."""
    part = cached.with_name(f".{cached.name}.part")
    with part.open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        if cached.exists():
            return
        stream.truncate(0)
        digest = hashlib.sha256()
        with open_stream(file) as source:
            while block := source.read(STREAMED_AT_ONCE):
                digest.update(block)
                stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
        if sha256 and digest.hexdigest() != sha256:
            part.unlink()
            raise DataError(f"{file} has the sha256 {digest.hexdigest()[:12]}; the dataset states {sha256[:12]}; restore the file or build the "
                            "dataset again")
        part.replace(cached)


def _make_room(folder: Path) -> None:
    """Remove the copies that were used longest ago, until the rest fits. A copy that is mapped stays readable where it is."""
    files = []
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # removed by another process
            about = file.stat()
            if stat.S_ISREG(about.st_mode):
                files.append((about.st_mtime, about.st_size, file))
    total = sum(size for _, size, _ in files)
    for used, size, file in sorted(files):
        if total <= CACHE_BYTES or used > time.time() - IN_USE_SECONDS:
            break
        file.unlink(missing_ok=True)
        total -= size


class _Stream(io.RawIOBase):
    """A file that lies elsewhere, read range after range."""

    def __init__(self, file: Url) -> None:
        self.file, self.offset, self.size = file, 0, size_of(file)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - any writable buffer
        part = Range(self.file, self.offset, min(len(buffer), self.size - self.offset))
        (data,) = read_ranges([part])
        if len(data) < part.size:
            raise StorageError(f"{self.file} has ended after {self.offset + len(data)} bytes of {self.size}; it was changed: start again")
        buffer[:len(data)] = data
        self.offset += len(data)
        return len(data)


def _ask(file: Url, what: str) -> Any:  # noqa: ANN401 - what the driver answers
    """Call a method of the driver for one file."""
    return _try(file, lambda: getattr(_filesystem(file), what)(file))


def _filesystem(file: Url) -> Any:  # noqa: ANN401 - fsspec has no types
    """Return the driver: this process's own, since a forked one's connections are its parent's. fsspec keeps it."""
    import fsspec

    scheme = file.partition("://")[0]
    try:
        return fsspec.filesystem(scheme, **OPTIONS.get(scheme, {}))
    except (ImportError, ValueError) as error:  # fsspec names the package to install, or says that it knows no such protocol
        raise StorageError(f"{file} cannot be read here ({error})") from error


def _try(file: Url, ask: Callable[[], Result]) -> Result:
    """Ask until there is an answer, waiting longer each time: at random, so that processes do not come back together."""
    for wait in (*WAITS_SECONDS, None):
        try:
            return ask()
        except Exception as error:  # each driver raises errors of its own
            if isinstance(error, UserError) or _is_absent(file, error):
                raise
            if wait is None or isinstance(error, PermissionError):
                raise StorageError(f"{file} cannot be read ({_first_line(error)}); look at the network, the address and the credentials, then "
                                   "start again") from error
        time.sleep(wait * random.uniform(0.5, 1))
    raise AssertionError("the last try returns or raises")


def _is_absent(file: Url, error: Exception) -> bool:
    """Return whether the file is not there: of fsspec's web driver, whatever goes wrong is a FileNotFoundError, whose cause says what it was."""
    cause = error.__cause__ if file.startswith("http") else None
    return isinstance(error, FileNotFoundError) and (cause is None or isinstance(cause, FileNotFoundError))


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0]
