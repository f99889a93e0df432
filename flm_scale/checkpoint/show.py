"""`flm checkpoint list` and `verify`."""

from pathlib import Path

from flm_scale.checkpoint.store import describe, folders_of, no_checkpoint, open_checkpoint
from flm_scale.errors import CheckpointError


def list_checkpoints(run_dir: Path) -> None:
    """Print a table, newest first. Raises CheckpointError when there is none."""
    from rich.console import Console
    from rich.table import Table

    rows = describe(run_dir)
    if not rows:
        raise no_checkpoint(run_dir)
    table = Table("step", "MB", "layout", "age", "")
    for row in rows:
        table.add_row(str(row.step), f"{row.num_bytes / 1e6:,.1f}", row.layout, age(row.age_seconds), row.problem or "whole, by names and sizes")
    Console().print(table)


def verify_checkpoints(run_dir: Path) -> None:
    """Print a line a checkpoint. Raises CheckpointError that names the damaged ones, or when there is none."""
    folders, damaged = [run_dir] if (run_dir / "manifest.json").is_file() else folders_of(run_dir), []
    if not folders:
        raise no_checkpoint(run_dir)
    for folder in folders:
        try:
            open_checkpoint(folder, full=True)
        except CheckpointError as error:
            if folder.exists():  # else the run has pruned it meanwhile
                damaged.append(str(error))
        else:
            print(f"{folder}: every file is as the manifest says")
    if damaged:
        raise CheckpointError("; ".join(damaged))


def age(seconds: float) -> str:
    """Return an age in its largest unit."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
