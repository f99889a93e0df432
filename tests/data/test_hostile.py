"""Files that mean harm: each ends in its own error or a counted rejection, in time, in bounded memory, and none runs code."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.data.hostile import SECONDS, TRAP

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[2]
# Large pictures: 8 bytes a pixel before and behind the white; 6 for progressive coefficients and pixels. Everything else stays small.
MEGABYTES = {"image: png of 4,000 x 4,000 transparent pixels": 160, "image: jpeg of 99 scans at the limit of pixels": 450}


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """How each file ended, in one process with 2 GB of its own."""
    Path(TRAP).unlink(missing_ok=True)
    command = [sys.executable, "-W", "error", "-m", "tests.data.hostile", str(tmp_path_factory.mktemp("hostile"))]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"ended at '{lines[-1]['name'] if lines else 'the start'}' with {done.returncode}: {done.stderr[-2000:]}"
    assert not done.stderr  # nothing of what a file says is printed
    return {line["name"]: line for line in lines if "outcome" in line}


def test_every_hostile_file_ends_as_it_must(ends: dict[str, dict[str, Any]]) -> None:
    assert {name: end["outcome"] for name, end in ends.items()} == {name: end["must"] for name, end in ends.items()}


def test_every_hostile_file_ends_in_time_and_in_bounded_memory(ends: dict[str, dict[str, Any]]) -> None:
    assert not {name: end["seconds"] for name, end in ends.items() if end["seconds"] >= SECONDS}
    assert not {name: end["megabytes"] for name, end in ends.items() if end["megabytes"] >= MEGABYTES.get(name, 120)}


def test_corpus_is_large_and_none_of_it_ran_code(ends: dict[str, dict[str, Any]]) -> None:
    assert len(ends) >= 150
    assert not Path(TRAP).exists()
