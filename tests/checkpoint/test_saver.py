"""Saving beside training: what is saved is as it was at the call, and nothing that goes wrong costs a good checkpoint."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flm_scale.checkpoint import saver as saver_module
from flm_scale.checkpoint.saver import Saver
from flm_scale.checkpoint.store import folders_of, last_good, write_rank
from flm_scale.errors import CheckpointError
from flm_scale.model.parts import Piece


@pytest.fixture
def saver(tmp_path: Path) -> Iterator[Saver]:
    saver = Saver(tmp_path, device=torch.device("cpu"), keep_last=2, keep_every=0, timeout_seconds=10)
    yield saver
    saver.close()


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is written before this is set."""
    event = threading.Event()

    def wait_and_write(folder: Path, **more: object) -> None:
        assert event.wait(10)
        write_rank(folder, **more)

    monkeypatch.setattr(saver_module, "write_rank", wait_and_write)
    yield event
    event.set()


def save(saver: Saver, step: int, values: torch.Tensor) -> None:
    pieces = [Piece("weight", "weight", (4,), None, 0, values), Piece("bias", "weight", (4,), None, 0, values)]
    saver.save(step=step, pieces=pieces, rank_state={}, run_json="{}", state={})


def saved(run_dir: Path) -> tuple[int, list[float]]:
    checkpoint = last_good(run_dir, full=True)
    return checkpoint.step, checkpoint.weight("bias")[:].tolist()


def test_what_is_saved_is_as_it_was_at_the_call(saver: Saver, writes: threading.Event, tmp_path: Path) -> None:
    values = torch.arange(4.0)
    save(saver, 1, values)
    values += 100  # training goes on
    assert not folders_of(tmp_path)
    writes.set()
    assert saver.finish()
    assert saved(tmp_path) == (1, [0, 1, 2, 3])
    save(saver, 2, values)
    assert saver.finish()
    assert saved(tmp_path) == (2, [100, 101, 102, 103])


def test_a_save_waits_for_the_one_before(saver: Saver, writes: threading.Event, tmp_path: Path) -> None:
    save(saver, 1, torch.zeros(4))
    threading.Timer(0.2, writes.set).start()
    save(saver, 2, torch.ones(4))
    assert saved(tmp_path)[0] >= 1
    assert saver.finish()
    assert saved(tmp_path) == (2, [1, 1, 1, 1])


def test_closing_lets_a_save_end(saver: Saver, tmp_path: Path) -> None:
    save(saver, 1, torch.zeros(4))
    saver.close()
    assert saved(tmp_path) == (1, [0, 0, 0, 0])


@pytest.mark.parametrize("fails", ["begin", "write_rank", "commit"])
def test_a_save_that_fails_says_so_and_the_next_one_is_as_good_as_ever(saver: Saver, fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                       capsys: pytest.CaptureFixture[str]) -> None:
    save(saver, 1, torch.zeros(4))
    assert saver.finish()

    def full(*_args: object, **_more: object) -> None:
        raise CheckpointError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(saver_module, fails, full)
        save(saver, 2, torch.ones(4))
        assert not saver.finish()
        assert not saver.finish(), "asking again gives the same answer"
    assert capsys.readouterr().err == "flm: saving step 2: no room\n"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()] == ["step-000001"]
    save(saver, 3, torch.ones(4))
    assert saver.finish()
    assert saved(tmp_path) == (3, [1, 1, 1, 1])
