"""What README tells a user to type is read by the command line as it stands there."""

import re
from pathlib import Path

import pytest

from flm_scale.cli import main
from tests.language import write_language_model

README = (Path(__file__).parents[1] / "README.md").read_text()
COMMANDS = [(int(processes or 1), words.split("#")[0].split()) for processes, words in
            re.findall(r"^(?:flm|torchrun --nproc-per-node (\d+) -m flm_scale) (train .*)$", README, re.MULTILINE) if "--help" not in words]


@pytest.mark.parametrize(("processes", "words"), COMMANDS, ids=lambda value: " ".join(value) if isinstance(value, list) else str(value))
def test_a_train_command_gets_as_far_as_its_dataset(processes: int, words: list[str], capsys: pytest.CaptureFixture[str],
                                                    monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = ["--text.name", str(write_language_model(tmp_path / "model"))] if "simvlg" in words[1] else []
    for name, value in {"RANK": 0, "WORLD_SIZE": processes, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    assert main([*words, *model, "--data.path", "no-such-dataset"]) == 2
    assert "no-such-dataset does not exist" in capsys.readouterr().err


def test_readme_shows_train_commands() -> None:
    assert len(COMMANDS) >= 4
