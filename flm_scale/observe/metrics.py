"""metrics.jsonl: one JSON object a step, the run's memory of how it went, and the same scalars for TensorBoard.

A line is on disk when `log` returns. It is strict JSON, so a value that is not finite becomes null. Step lines, validation lines and
those of saves stand in one file, told apart by their keys ('loss', 'validation/loss', 'save_wait_s'). A full disk does not end a run for their
sake: lines wait until there is room.
"""

import contextlib
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flm_scale.errors import DataError


class MetricsLog:
    """Appends to a run's metrics."""

    def __init__(self, run_dir: Path, *, first_step: int | None = None) -> None:
        """first_step: the step about to be trained; lines of an earlier attempt at it and at later ones are dropped.

        Raises DataError when the disk refuses, and as read_metrics does.
        """
        try:
            self._open(run_dir, first_step)
        except OSError as error:
            raise DataError(f"{error.filename or run_dir}: cannot be written ({error.strerror}); the disk must be there, writable and have "
                            "room") from error

    def _open(self, run_dir: Path, first_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "metrics.jsonl"
        # Written anew even when all is kept, since a killed run leaves half a line that the next one would be glued to.
        kept = [line for line in read_metrics(path) if first_step is None or line["step"] < first_step] if path.exists() else []
        part = path.with_suffix(".jsonl.part")
        part.write_text("".join(json.dumps(line) + "\n" for line in kept))
        part.replace(path)
        self._file = path.open("ab", buffering=0)
        self._unwritten, self._complained, self._shows = b"", False, True
        self._board: Any = SummaryWriter(run_dir / "tensorboard", purge_step=first_step, flush_secs=10)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line. Names keep their group: 'loss/reconstruction'."""
        finite = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
        self._unwritten += json.dumps({"step": step} | finite, allow_nan=False).encode() + b"\n"
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten):]
            self._complained = False
        except OSError as error:
            if not self._complained:
                print(f"flm: {self._file.name}: cannot be written ({error.strerror}); its lines wait until there is room", file=sys.stderr)
            self._complained = True
        self._show(step, values)

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        with contextlib.suppress(OSError):
            self._board.close()

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        try:
            for name, value in values.items() if self._shows else ():
                self._board.add_scalar(name, value, step)
        except OSError as error:  # which TensorBoard's writer does not get over
            print(f"flm: {self._board.log_dir}: cannot be written ({error.strerror}); its curves end here", file=sys.stderr)
            self._shows = False


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl; a last line that was cut off by a kill is left out.

    Raises DataError for a damaged line anywhere else.
    """
    lines = []
    for number, text in enumerate(whole := path.read_text().split("\n"), start=1):
        try:
            line = json.loads(text)
            lines.append(line | {"step": int(line["step"])})
        except (ValueError, TypeError, KeyError) as error:
            if number < len(whole):
                raise DataError(f"{path} line {number} ({text[:40]!r}) is no object with a 'step'; delete that line") from error
    return lines
