"""The run directory: whose it is, and what a start finds, keeps, sets aside and writes down. Rank 0 alone changes it."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from flm_scale.checkpoint.reader import Checkpoint
from flm_scale.checkpoint.store import set_aside
from flm_scale.checkpoint.weights import changes
from flm_scale.config import Run
from flm_scale.errors import ConfigError
from flm_scale.observe.metrics import read_metrics

KEPT = {"run.json", "job"}
"""Files by which a start after a kill on the way knows what it may replace."""


def is_of_this_job(run_dir: Path) -> bool:
    """Return whether an earlier start of this very job has written the run directory. Where no Slurm numbers jobs, all are one."""
    path = run_dir / "job"
    return (path.read_text() if path.is_file() else "") == _this_job()


def open_run_dir(run_dir: Path, run: Run, checkpoint: Checkpoint | None, *, overwrite: bool) -> None:
    """Make the run directory and write run.json. Raises ConfigError when another run is there, unless it may be replaced.

    checkpoint: that the run goes on behind; what it has otherwise than that is said, and written to changes.jsonl.
    A run that goes on behind one of its own checkpoints sets later ones aside: they are of another course than the one it takes now.
    """
    try:
        if checkpoint and checkpoint.folder.parent.resolve() == (run_dir / "checkpoints").resolve():
            for moved in set_aside(run_dir, after=checkpoint.step):
                print(f"flm: {moved} is of the course before; it is not resumed from any more", file=sys.stderr)
            _drop_lines(run_dir / "bad_steps.jsonl", after=checkpoint.step)
        elif run_dir.exists() and any(run_dir.iterdir()):
            _clear(run_dir, overwrite=overwrite)
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "job").write_text(_this_job())
        part = run_dir / "run.json.part"
        part.write_text(run.model_dump_json(indent=2) + "\n")
        part.replace(run_dir / "run.json")
    except OSError as error:
        raise ConfigError(f"{run_dir}: cannot be written ({error.strerror}); choose another --run-dir, or make room") from error
    if checkpoint and (changed := changes(run, checkpoint)):
        shown = ", ".join(f"{path} {then} -> {now}" for path, (then, now) in changed.items())
        print(f"flm: goes on with other values than the checkpoint's: {shown}", file=sys.stderr)
        append_lines(run_dir / "changes.jsonl", [{"step": checkpoint.step, "changes": changed}])


def append_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Append JSON lines; a disk that refuses is told and ends nothing."""
    try:
        with path.open("a") as file:
            file.writelines(f"{json.dumps(line)}\n" for line in lines)
    except OSError as error:
        print(f"flm: {path}: cannot be written ({error.strerror})", file=sys.stderr)


def _clear(run_dir: Path, *, overwrite: bool) -> None:
    if not any((run_dir / name).is_file() for name in KEPT):
        raise ConfigError(f"{run_dir} is not empty and not a run; choose another --run-dir")
    if not overwrite:
        raise ConfigError(f"{run_dir} already holds a run; choose another --run-dir, or add --resume to go on with it, --overwrite to replace it")
    for path in run_dir.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in KEPT:
            path.unlink()


def _drop_lines(path: Path, *, after: int) -> None:
    """Drop the JSON lines of steps that are about to be taken again."""
    if path.is_file():
        path.write_text("".join(f"{json.dumps(line)}\n" for line in read_metrics(path) if line["step"] <= after))


def _this_job() -> str:
    return os.environ.get("SLURM_JOB_ID", "")
