"""The live line of a training run: where it is, how fast, how long still.

On a terminal one line that rewrites itself; into a file or a pipe a plain line every ten seconds and the last one, so that logs stay
readable. Time left comes from a smoothed time a step, which follows a change of speed within about twenty steps.
"""

from collections.abc import Mapping
from time import monotonic
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

PLAIN_LINE_SECONDS = 10.0
SMOOTHING = 0.1
"""Share of the newest step in the smoothed time a step."""


class Progress:
    """Shows the steps of one run; a context manager, so that the terminal is left in order."""

    def __init__(self, total_steps: int, first_step: int, stream: TextIO) -> None:
        """first_step: the first step that will be trained, counted from 1; above 1 in a resumed run."""
        self.total_steps, self.stream = total_steps, stream
        self._line, self._step_seconds, self._weight = "", 0.0, 0.0
        self._last_update: float | None = None
        self._last_print = monotonic()
        self._live: RichProgress | None = None
        if stream.isatty():
            self._live = RichProgress(BarColumn(bar_width=20), TextColumn("{task.fields[line]}", markup=False), console=Console(file=stream))
            self._task = self._live.add_task("", total=total_steps, completed=first_step - 1, line="first step ...")
            self._live.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show a finished step. values: a step line of metrics.py; loss, pairs_per_s, tokens_per_s, data_wait_s and seconds are used."""
        now = monotonic()
        if self._last_update is not None:
            # The weight makes it a true average from the second step on; the first step, which warms everything up, does not count.
            self._weight += SMOOTHING * (1 - self._weight)
            self._step_seconds += SMOOTHING * (now - self._last_update - self._step_seconds)
        self._last_update = now
        data_wait = values["data_wait_s"] / max(values["seconds"], 1e-9)
        self._line = (f"step {step:,}/{self.total_steps:,}  loss {values['loss']:.3f}  {values['pairs_per_s']:,.0f} pairs/s  "
                      f"{values['tokens_per_s']:,.0f} tokens/s  data wait {data_wait:.0%}  {self._time_left(step)} left")
        if self._live is not None:
            self._live.update(self._task, completed=step, line=self._line)
        elif now - self._last_print >= PLAIN_LINE_SECONDS:
            self._print(now)

    def close(self) -> None:
        """Print what has not been shown yet and give the terminal back."""
        if self._live is not None:
            self._live.stop()
        elif self._line:
            self._print(monotonic())

    def _print(self, now: float) -> None:
        print(self._line, file=self.stream, flush=True)
        self._line, self._last_print = "", now

    def _time_left(self, step: int) -> str:
        if step >= self.total_steps:
            return clock(0)
        return clock((self.total_steps - step) * self._step_seconds / self._weight) if self._weight else "?"


def clock(seconds: float) -> str:
    """Return a duration as 0:42, 1:02:03 or 2d 03:04:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}:{minutes:02}:{rest:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
