"""metrics.jsonl: what is written, what survives a kill and a resume."""

import json
import math
import resource
from pathlib import Path

import pytest

from flm_scale.errors import DataError
from flm_scale.observe.metrics import MetricsLog, read_metrics


def test_a_line_is_on_disk_before_the_log_is_closed(tmp_path: Path) -> None:
    """A run that is killed keeps all of its history, step first in each line."""
    log = MetricsLog(tmp_path)
    log.log(1, {"loss": 2.5, "loss/reconstruction": 3.0})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.5, "loss/reconstruction": 3.0}\n'
    log.close()


def test_a_value_that_is_not_finite_becomes_null(tmp_path: Path) -> None:
    """NaN is no JSON; other readers would refuse the whole file."""
    log = MetricsLog(tmp_path)
    log.log(1, {"loss": math.nan, "grad_norm": math.inf, "lr": 1e-3})
    log.close()

    def refuse(token: str) -> None:
        raise AssertionError(token)

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": None, "grad_norm": None, "lr": 1e-3}


def test_a_resumed_run_drops_the_lines_it_will_write_again(tmp_path: Path) -> None:
    """A run killed at step 4 that resumes from its checkpoint of step 2 logs each step once, half a line or not."""
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.log(step, {"loss": 10.0 + step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    log = MetricsLog(tmp_path, first_step=3)
    log.log(3, {"loss": 99.0})
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 11.0}, {"step": 2, "loss": 12.0}, {"step": 3, "loss": 99.0}]


def test_half_a_last_line_is_left_out_and_a_damaged_line_is_named(tmp_path: Path) -> None:
    """A kill explains the first; the second is somebody's editor, and silence would hide it."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 1.0}]
    path.write_text('{"step": 1, "loss": 1.0}\noops\n{"step": 2, "loss": 1.0}\n')
    with pytest.raises(DataError, match=r"line 2 \('oops'\).*delete that line"):
        read_metrics(path)


def test_tensorboard_gets_the_same_scalars_under_grouped_names(tmp_path: Path) -> None:
    """'loss/reconstruction' and 'loss/forward' share a panel."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    log = MetricsLog(tmp_path)
    log.log(7, {"loss/reconstruction": 1.5})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/reconstruction")] == [(7, 1.5)]


def test_a_full_disk_delays_lines_and_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(tmp_path)
    log._shows = False  # TensorBoard's thread would meet the limit at a moment of its own
    log.log(1, {"loss": 1.0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 5, limits[1]))  # half a line fits
    try:
        for step in (2, 3):
            log.log(step, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capsys.readouterr().err.count("metrics.jsonl: cannot be written (File too large)") == 1
    log.log(4, {"loss": 1.0})
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_run_on_a_full_disk_ends_with_one_line_and_keeps_the_lines_it_had(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.log(1, {"loss": 1.0})
    log.close()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    try:
        with pytest.raises(DataError, match=r"cannot be written \(File too large\); the disk must be there, writable and have room"):
            MetricsLog(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]
