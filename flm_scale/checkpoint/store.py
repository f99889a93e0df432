"""A run's checkpoints: what every rank holds, committed as one folder that is whole when it has its name, and read by any layout.

    checkpoints/step-000123/
        rank-00000.safetensors   the pieces that rank 0 wrote: runs of float32 weights and of their moments
        rank-00000.json          rank 0's own state
        run.json, state.json     the resolved Run; step, loader state, layout
        manifest.json            size and hash of every file above, and of itself; written last
    checkpoints/latest           name of the newest folder, for people and scripts; never trusted here

To save, rank 0 calls `begin`, all ranks wait for it, each calls `write_rank`, and rank 0 `commit`, which needs no collective: a rank is
done when its entry file is there. One save at a time. A crash at any instant leaves the last good checkpoint for `last_good`.
"""

import contextlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b, file_digest
from itertools import chain, count
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from torch import Tensor

from flm_scale.checkpoint.reader import Checkpoint, first_of, rank_name
from flm_scale.checkpoint.reshard import encode_pieces
from flm_scale.errors import CheckpointError, ConfigError
from flm_scale.model.parts import Piece
from flm_scale.parallel.mesh import find_ranks
from flm_scale.parallel.processes import gather, place

FORMAT = 1
MANIFEST, LATEST = "manifest.json", "latest"
USE_ANOTHER = "; use another step"
POLL_SECONDS = 0.1


class FileEntry(TypedDict):
    """What the manifest says of a file."""

    bytes: int
    blake2b: str


class Listed(NamedTuple):
    """One line of the list of a run's checkpoints."""

    step: int
    num_bytes: int
    layout: str
    age_seconds: float
    problem: str
    """What is wrong, as far as names and sizes tell; empty for a good one."""


def partial_folder(run_dir: Path, *, step: int) -> Path:
    """Return where all ranks write until the checkpoint is committed."""
    return run_dir / "checkpoints" / f".step-{step:06d}.partial"


def begin(run_dir: Path, *, step: int) -> Path:
    """Clear what earlier saves left unfinished and make the partial folder: rank 0 only, then all wait. Raises CheckpointError."""
    partial = partial_folder(run_dir, step=step)
    with _writing(partial):
        partial.parent.mkdir(parents=True, exist_ok=True)
        for leftover in partial.parent.glob(".step-*.partial"):
            shutil.rmtree(leftover)
        _clear_trash(partial.parent)
        partial.mkdir()
    return partial


def write_rank(partial: Path, *, rank: int, pieces: Sequence[Piece], state: Mapping[str, Any],
               values_of: Callable[[Piece], Tensor] = attrgetter("values")) -> None:
    """Write a rank's pieces and its own JSON state; when this returns they are on the disk.

    Pieces on a GPU are copied to the host one at a time; those on the meta device get their values from `values_of` when their turn has come.
    Raises CheckpointError when the disk is full, read-only or gone; what was written is deleted then, so that it does not keep the disk full for
    others.
    """
    name = rank_name(rank)
    with _writing(partial), _deleted_on_failure(partial, name):
        (partial / f"{name}.entry").unlink(missing_ok=True)
        files = {f"{name}.safetensors": _write(partial / f"{name}.safetensors", encode_pieces(pieces, values_of)),
                 f"{name}.json": _write(partial / f"{name}.json", [json.dumps(state).encode()])}
        _write(partial / f".{name}.entry", [json.dumps(files).encode()])
        _flush_folder(partial)
        (partial / f".{name}.entry").replace(partial / f"{name}.entry")


def commit(partial: Path, *, num_ranks: int, run_json: str, state: Mapping[str, Any], timeout_seconds: float,
           give_up: threading.Event | None = None) -> Path:
    """Wait until all ranks have written, seal the folder, give it its name and return it: rank 0 only.

    give_up: ends the wait for a rank that could not write.
    An older checkpoint of the same step stays good until this one is. Raises CheckpointError when the disk is full, read-only or gone,
    when what is there is not what the ranks wrote, and when a rank has not written after timeout_seconds.
    """
    final = partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))
    replaced = partial.with_name(f".{final.name}.replaced")
    with _writing(partial):
        files = _wait_for_entries(partial, num_ranks, timeout_seconds, give_up or threading.Event())
        files["run.json"] = _write(partial / "run.json", [run_json.encode()])
        files["state.json"] = _write(partial / "state.json", [json.dumps({"step": step_of(final), **state}, indent=1).encode()])
        for rank in range(num_ranks):
            (partial / f"{rank_name(rank)}.entry").unlink()
        _write(partial / MANIFEST, [_manifest(FORMAT, files)])
        _flush_folder(partial)
        open_checkpoint(partial, full=False)
        if final.exists():
            _discard(replaced)
            final.rename(replaced)
        partial.rename(final)
        _flush_folder(final.parent)
    # It is committed. What follows is for people, and for the next save to do.
    with contextlib.suppress(OSError):
        _discard(replaced)
        _point_at(final, final.parent)
    return final


def open_checkpoint(folder: Path, *, full: bool, share: tuple[int, int] = (0, 1)) -> Checkpoint:
    """Check that every file is there with its size, and with `full` its content: one altered byte in any file is found.

    share: (i, n) reads every n-th file alone, from the i-th on; n processes read all of them between them.
    Raises CheckpointError that names what is missing, damaged or too much.
    """
    try:
        data = (folder / MANIFEST).read_bytes()
        content = json.loads(data)
        files: dict[str, FileEntry] = content["files"]
        is_sealed = data == _manifest(content["format"], files)
    except OSError as error:
        raise CheckpointError(f"{folder / MANIFEST}: cannot be read ({error.strerror}), so this is no whole checkpoint{USE_ANOTHER}") from error
    except (ValueError, KeyError, TypeError):
        is_sealed = False
    if not is_sealed:
        raise CheckpointError(f"{folder / MANIFEST}: is damaged{USE_ANOTHER}")
    if content["format"] != FORMAT:
        raise CheckpointError(f"{folder}: is of format {content['format']}, and this program reads {FORMAT}; use the program that wrote it")
    own = set(sorted(files, key=lambda name: files[name]["bytes"])[share[0]::share[1]]) if full else set()
    with ThreadPoolExecutor(8) as pool:
        problems = [problem for problem in pool.map(lambda name: _problem(folder / name, files[name], full=name in own), files) if problem]
    problems += [f"{name} is too much" for name in sorted(path.name for path in folder.glob("rank-*")) if name not in files]
    if problems:
        raise CheckpointError(f"{folder}: {first_of(problems)}{USE_ANOTHER}")
    return Checkpoint(folder, num_ranks=sum(name.endswith(".safetensors") for name in files))


def open_together(folder: Path) -> Checkpoint:
    """Return a checkpoint after reading all of it, each process its share of the files; collective.

    Raises on all of them CheckpointError when it is missing or damaged, and ConfigError when not all processes see the same.
    """
    problems = gather(_opened(folder, full=False)[1])
    if any(problems) and not all(problems):
        rank, problem = next((rank, problem) for rank, problem in enumerate(problems) if problem)
        raise ConfigError(f"rank {rank} does not see what others see: {problem.removesuffix(USE_ANOTHER)}; is the run directory on a disk that all "
                          "nodes share? name an older step with --resume STEP to leave this one out")
    checkpoint, problem = (None, problems[0]) if problems[0] else _opened(folder, full=True)
    for found in gather(problem):
        if found:
            raise CheckpointError(found)
    assert checkpoint is not None
    return checkpoint


def _opened(folder: Path, *, full: bool) -> tuple[Checkpoint | None, str]:
    """Return the checkpoint, or what is wrong with it."""
    try:
        return open_checkpoint(folder, full=full, share=place()), ""
    except CheckpointError as error:
        return None, str(error)


def last_good(run_dir: Path, *, full: bool) -> Checkpoint:
    """Return the newest checkpoint that is whole, with `full` after reading all of it. Says on standard error which newer ones were passed over.

    Raises CheckpointError when there is none, or none that is good: nothing may start from random then.
    """
    return _newest(run_dir, folders_of(run_dir), lambda folder: open_checkpoint(folder, full=full))


def last_good_together(run_dir: Path) -> Checkpoint:
    """last_good of processes that have met, which read it between them and all return the same one; collective. Rank 0 speaks."""
    # The longest list is the one of whoever sees most; what others do not see, open_together says.
    return _newest(run_dir, max(gather(folders_of(run_dir)), key=len), open_together)


def _newest(run_dir: Path, folders: Sequence[Path], open_one: Callable[[Path], Checkpoint]) -> Checkpoint:
    for folder in folders:
        try:
            return open_one(folder)
        except CheckpointError as error:
            if find_ranks(os.environ)[0].rank == 0:
                print(f"flm: passed over {error}", file=sys.stderr, flush=True)
    if folders:
        raise CheckpointError(f"{run_dir}: none of the {len(folders)} checkpoints is good; restore one from a copy, or train anew in "
                              "another run directory")
    raise no_checkpoint(run_dir)


def prune(run_dir: Path, *, keep_last: int, keep_every: int) -> None:
    """Delete all but the newest `keep_last` checkpoints (at least 1) and those of steps that `keep_every` divides (0: none).

    Counts those whose names and sizes are right, so that damaged ones push no good one out. A damaged one is deleted with what is as old.
    Raises CheckpointError when the disk refuses.
    """
    assert keep_last >= 1
    folders = folders_of(run_dir)
    good: dict[int, Path] = {}
    for folder in folders:
        with contextlib.suppress(CheckpointError):
            good.setdefault(step_of(folder), open_checkpoint(folder, full=False).folder)
    if not good:
        return
    oldest = list(good)[:keep_last][-1]
    with _writing(run_dir / "checkpoints"):
        _clear_trash(run_dir / "checkpoints")
        for leftover in (run_dir / "checkpoints").glob(".step-*.partial"):
            if step_of(leftover) <= max(good):
                _discard(leftover)
        for folder in folders:
            step = step_of(folder)
            is_old = step < oldest and not (keep_every and step % keep_every == 0)
            if is_old or good.get(step, folder) != folder:
                _discard(folder)


def set_aside(run_dir: Path, *, after: int) -> list[Path]:
    """Rename the checkpoints of later steps to superseded-step-N, which nothing here looks at, and return their new names.

    Raises CheckpointError when the disk refuses.
    """
    moved = []
    with _writing(run_dir / "checkpoints"):
        for folder in folders_of(run_dir):
            if step_of(folder) > after:
                name = f"superseded-{folder.name.lstrip('.')}"
                names = chain([name], (f"{name}-{number}" for number in count(2)))
                moved.append(folder.rename(next(aside for aside in map(folder.with_name, names) if not aside.exists())))
        if moved:
            _point_at(next(iter(folders_of(run_dir)), None), run_dir / "checkpoints")
    return moved


def describe(run_dir: Path) -> list[Listed]:
    """List a run's checkpoints, newest first, without reading the weights."""
    rows = []
    for folder in folders_of(run_dir):
        layout = problem = ""
        try:
            layout = str(open_checkpoint(folder, full=False).state.get("layout", ""))
        except CheckpointError as error:
            problem = str(error)
        with contextlib.suppress(FileNotFoundError):  # a newer one has taken its place meanwhile
            num_bytes = sum(path.stat().st_size for path in folder.iterdir())
            rows.append(Listed(step_of(folder), num_bytes, layout, time.time() - folder.stat().st_mtime, problem))
    return rows


def no_checkpoint(run_dir: Path) -> CheckpointError:
    """Return what to say of a run directory without any."""
    return CheckpointError(f"{run_dir}: no checkpoint under checkpoints/; train first with: flm train RECIPE --run-dir {run_dir}")


def _wait_for_entries(partial: Path, num_ranks: int, timeout_seconds: float, give_up: threading.Event) -> dict[str, FileEntry]:
    names = {f"{rank_name(rank)}.entry" for rank in range(num_ranks)}
    deadline = time.monotonic() + timeout_seconds
    # The folder is listed, because a network file system remembers for a while that a name it was asked for was not there.
    while missing := sorted(names - {path.name for path in partial.iterdir()}):
        which = first_of([name.removesuffix(".entry") for name in missing])
        if time.monotonic() > deadline:
            raise CheckpointError(f"{partial}: {which} not written after {timeout_seconds:g} s; is the run directory on a disk that all nodes share?")
        if give_up.wait(POLL_SECONDS):
            raise CheckpointError(f"{partial}: {which} could not be written")
    files: dict[str, FileEntry] = {}
    for name in sorted(names):
        files |= json.loads((partial / name).read_text())
    return files


def _manifest(version: int, files: Mapping[str, FileEntry]) -> bytes:
    """Return the only text that a manifest of these files has: any other one is damaged."""
    content: dict[str, Any] = {"format": version, "files": files}
    seal = blake2b(json.dumps(content).encode(), digest_size=32).hexdigest()
    return json.dumps(content | {"blake2b": seal}, indent=1).encode()


def _problem(path: Path, entry: FileEntry, *, full: bool) -> str:
    try:
        if (size := path.stat().st_size) != entry["bytes"]:
            return f"{path.name} has {size} bytes instead of {entry['bytes']}"
        if full:
            with path.open("rb") as file:
                if file_digest(file, lambda: blake2b(digest_size=32)).hexdigest() != entry["blake2b"]:
                    return f"{path.name} is damaged (its hash is another)"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return ""


def _write(path: Path, blocks: Iterable[bytes | memoryview]) -> FileEntry:
    """Write a file to the disk itself, and return its entry."""
    digest, size = blake2b(digest_size=32), 0
    with _writing(path), path.open("wb") as file:
        for block in blocks:
            file.write(block)
            digest.update(block)
            size += len(block)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "blake2b": digest.hexdigest()}


@contextlib.contextmanager
def _deleted_on_failure(folder: Path, name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, CheckpointError):
        for suffix in (".safetensors", ".json"):
            with contextlib.suppress(OSError):
                (folder / f"{name}{suffix}").unlink()
        raise


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: cannot be written ({error.strerror}); the disk must be there, writable and have room; "
                              "older checkpoints are as they were") from error


def _point_at(newest: Path | None, checkpoints: Path) -> None:
    if newest is None:
        (checkpoints / LATEST).unlink(missing_ok=True)
        return
    _write(checkpoints / f".{LATEST}", [newest.name.encode()])
    (checkpoints / f".{LATEST}").replace(checkpoints / LATEST)
    _flush_folder(checkpoints)


def _discard(folder: Path) -> None:
    """Delete a folder, which loses its name first, so that no crash leaves half of it under that."""
    if folder.exists():
        trash = folder.with_name(f".{folder.name.lstrip('.')}.trash")
        shutil.rmtree(trash, ignore_errors=True)
        folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def _clear_trash(checkpoints: Path) -> None:
    for trash in checkpoints.glob(".step-*.trash"):
        shutil.rmtree(trash, ignore_errors=True)


def folders_of(run_dir: Path) -> list[Path]:
    """Return the folders that should be whole checkpoints, newest first; of one step the replaced one last, which a crash may have left."""
    found = [*(run_dir / "checkpoints").glob("step-*"), *(run_dir / "checkpoints").glob(".step-*.replaced")]
    return sorted((path for path in found if path.is_dir() and re.fullmatch(r"step-\d+|\.step-\d+\.replaced", path.name)),
                  key=lambda path: (-step_of(path), path.name.startswith(".")))


def step_of(folder: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    return int(folder.name.lstrip(".").removeprefix("step-").partition(".")[0])


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
