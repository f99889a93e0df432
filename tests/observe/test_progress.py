"""The live line, in a log file and on a terminal."""

import io

import pytest

from flm_scale.observe import progress
from flm_scale.observe.progress import Progress, clock

VALUES = {"loss": 1.2341, "pairs_per_s": 212.3, "tokens_per_s": 1530.2, "data_wait_s": 0.01, "seconds": 1.0}


class FakeClock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """Replace the clock of the progress line."""
    fake = FakeClock()
    monkeypatch.setattr(progress, "monotonic", fake)
    return fake


def test_a_log_file_gets_a_line_every_ten_seconds_and_the_last_one(time: FakeClock) -> None:
    """Forty steps of a second each: not forty lines."""
    stream = io.StringIO()
    with Progress(40, 1, stream) as line:
        for step in range(1, 39):
            time.now += 1
            line.update(step, VALUES)
    steps = [text.split()[1] for text in stream.getvalue().splitlines()]
    assert steps == ["10/40", "20/40", "30/40", "38/40"]
    assert stream.getvalue().splitlines()[0] == "step 10/40  loss 1.234  212 pairs/s  1,530 tokens/s  data wait 1%  0:30 left"


def test_time_left_follows_a_change_of_speed_and_forgets_the_slow_first_step(time: FakeClock) -> None:
    """The first step compiles and warms up; later a machine may slow down."""
    stream = io.StringIO()
    with Progress(1000, 1, stream) as line:
        time.now += 300
        line.update(1, VALUES)
        for step in range(2, 100):
            time.now += 1 if step < 50 else 2
            line.update(step, VALUES)
    lines = stream.getvalue().splitlines()
    assert lines[0].endswith("? left")
    assert lines[2].endswith("16:19 left"), "979 steps of one second"
    assert lines[-1].endswith(("29:56 left", "29:57 left", "29:58 left")), "901 steps of nearly two seconds"


def test_a_terminal_gets_one_line_that_rewrites_itself(time: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left behind but the last state."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress(40, 11, stream) as line:
        time.now += 1
        line.update(11, VALUES)
        time.now += 1
        line.update(12, VALUES)
    text = stream.getvalue()
    assert "12/40" in text
    assert "0:28 left" in text
    assert "\x1b[2K" in text, "the line is cleared before it is written again"


def test_durations_read_like_a_clock() -> None:
    """Seconds always, hours and days only when there are some."""
    assert [clock(42), clock(3723), clock(183845)] == ["0:42", "1:02:03", "2d 03:04:05"]
