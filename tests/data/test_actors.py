"""Ray's temporary folder has an owner: it goes with the process that made it, by whoever comes next, and never before."""

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from flm_scale.data import actors

OWNER = "import sys; from flm_scale.data import actors\nwith actors._temporary_folder() as folder: print(folder, flush=True); sys.stdin.read()"
STARTING = "import sys; print(flush=True); sys.stdin.read()"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_a_folder_stays_while_its_process_lives_and_goes_when_that_was_killed(temporary: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        folder = Path(owner.stdout.readline().strip())
        (folder / "session" / "logs").mkdir(parents=True)
        with subprocess.Popen([sys.executable, "-c", STARTING, f"--temp-dir={folder}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as starting:
            starting.stdout.readline()  # while a process is still being made it has no command line to be known by
            actors.remove_abandoned_folders()
            assert (folder / "session" / "logs").exists()
            assert starting.poll() is None
            owner.kill()
            owner.wait()
            assert folder.exists()
            with actors._temporary_folder() as another:
                assert {path.name for path in temporary.iterdir()} == {Path(another).name, f"{Path(another).name}.lock"}
            assert starting.wait(10) == -signal.SIGKILL, "it would have made the folder again"
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("content", ["", "0b5e1d0c-another-kernel\n"])
def test_a_folder_that_is_being_made_or_that_another_machine_has_is_left_alone(temporary: Path, content: str) -> None:
    """Machines may share the folder and not see each other's locks."""
    (temporary / "flm-ray-abc").mkdir()
    (temporary / "flm-ray-abc.lock").write_text(content)
    actors.remove_abandoned_folders()
    assert len(list(temporary.iterdir())) == 2


def test_what_cannot_be_removed_yet_is_removed_the_next_time(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies slowly may still write."""
    monkeypatch.setattr(actors, "REMOVALS", 1)
    with monkeypatch.context() as patch:
        with actors._temporary_folder() as folder:
            patch.setattr(actors.shutil, "rmtree", lambda *_, **__: None)
        assert Path(folder).exists()
    actors.remove_abandoned_folders()
    assert not list(temporary.iterdir())
