"""Which steps' updates are not taken: those whose loss or gradient norm is not a number, and those whose loss is a spike.

Every rank decides by the same global loss, so all decide alike.
"""

import math
from collections import deque
from collections.abc import Sequence
from statistics import median

from flm_scale.engine.base import StepResult

SPIKE_WINDOW, SPIKE_HISTORY = 100, 20
"""A spike is told by the median of the last losses, at most so many and, before any is looked for, at least so many."""


class Guard:
    """Judges steps one after another."""

    def __init__(self, *, spike_factor: float, losses: Sequence[float] = ()) -> None:
        """losses: `losses` of the guard whose work this one goes on with."""
        self.spike_factor = spike_factor
        self._losses = deque(losses, maxlen=SPIKE_WINDOW)
        self.in_a_row = 0
        """Bad steps since the last good one."""

    @property
    def losses(self) -> list[float]:
        """The last good steps' losses, which a spike is told by."""
        return list(self._losses)

    def go_back(self, losses: Sequence[float]) -> None:
        """Tell spikes by the losses of earlier weights, which the run has taken up again."""
        self._losses = deque(losses, maxlen=SPIKE_WINDOW)

    def takes(self, loss: float) -> bool:
        """Return whether a step with this loss is good, as far as its loss tells."""
        return math.isfinite(loss) and loss <= self._limit

    def problem(self, result: StepResult) -> str:
        """Say why a step's update was not taken; nothing when it was."""
        self.in_a_row = 0 if result.is_taken else self.in_a_row + 1
        if result.is_taken:
            self._losses.append(result.loss)
            return ""
        if not math.isfinite(result.loss):
            return f"loss is {result.loss}"
        if not math.isfinite(result.grad_norm):
            return f"gradient norm is {result.grad_norm}"
        return f"loss {result.loss:.4g} is a spike, above {self._limit:.4g} (bad_step.spike_factor {self.spike_factor:g} times the usual)"

    @property
    def _limit(self) -> float:
        is_on = self.spike_factor and len(self._losses) >= SPIKE_HISTORY
        return self.spike_factor * median(self._losses) if is_on else math.inf
