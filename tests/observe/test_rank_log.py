"""What a rank prints: all of it in its log, and on the console rank 0's and every rank's standard error."""

import sys
from pathlib import Path

import pytest

from flm_scale.observe.rank_log import rank_log


@pytest.mark.parametrize(("rank", "out", "error"), [(0, "loss\n", "careful\n"), (3, "", "rank 3: careful\n")])
def test_the_console_has_rank_0_and_the_warnings_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str], rank: int, out: str,
                                                           error: str) -> None:
    with rank_log(tmp_path, rank=rank):
        print("loss")
        print("careful", file=sys.stderr)
    assert capsys.readouterr() == (out, error)
    assert (tmp_path / f"logs/rank_{rank}.log").read_text() == "loss\ncareful\n"


def test_the_error_that_ends_a_run_is_in_its_ranks_log(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="boom"), rank_log(tmp_path, rank=1):
        raise ValueError("boom")
    assert "ValueError: boom" in (tmp_path / "logs/rank_1.log").read_text()


def test_a_second_session_in_the_same_run_keeps_the_first_ones_log(tmp_path: Path) -> None:
    for word in ("one", "two"):
        with rank_log(tmp_path, rank=0):
            print(word)
    assert (tmp_path / "logs/rank_0.log").read_text() == "one\ntwo\n"
