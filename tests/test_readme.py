"""What README tells a user to type is read by the command line as it stands there."""

import re
from pathlib import Path

import pytest

from flm_scale.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text()
COMMANDS = [line.split("#")[0].split() for line in re.findall(r"^(?:flm|torchrun .* flm_scale) (train .*)$", README, re.MULTILINE)]


@pytest.mark.parametrize("words", [words for words in COMMANDS if "--help" not in words], ids=" ".join)
def test_a_train_command_gets_as_far_as_its_dataset(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--data.path", "no-such-dataset"]) == 2
    assert "no-such-dataset does not exist" in capsys.readouterr().err


def test_readme_shows_train_commands() -> None:
    assert len(COMMANDS) >= 4
