"""One log file a rank, RUN/logs/rank_N.log: all that the rank prints. The console has rank 0's, and of others what goes to standard error."""

import contextlib
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO, cast


class Tee:
    """A stream that writes into a log and, whole lines at a time, on a console; for all else it is the console."""

    def __init__(self, console: TextIO, log: TextIO, *, prefix: str) -> None:
        self._console, self._log, self._prefix, self._line = console, log, prefix, ""

    def write(self, text: str) -> int:
        """Write to both."""
        with contextlib.suppress(OSError):  # a full disk does not end a run for its log's sake
            self._log.write(text)
        *lines, self._line = (self._line + text).split("\n")
        self._console.write("".join(f"{self._prefix}{line}\n" for line in lines))
        return len(text)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the console has
        return getattr(self._console, name)


@contextmanager
def rank_log(run_dir: Path, *, rank: int) -> Iterator[TextIO]:
    """Send what this process prints into its log too, and yield the open log. An error that ends the run is written there as well."""
    path = run_dir / "logs" / f"rank_{rank}.log"
    path.parent.mkdir(exist_ok=True)
    prefix = f"rank {rank}: " if rank else ""
    with path.open("a", buffering=1) as log:
        out = log if rank else cast("TextIO", Tee(sys.stdout, log, prefix=prefix))
        with redirect_stdout(out), redirect_stderr(cast("TextIO", Tee(sys.stderr, log, prefix=prefix))):
            try:
                yield log
            except BaseException:
                traceback.print_exc(file=log)
                raise
