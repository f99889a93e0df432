"""Inputs are read once and known again, and what one column holds is the same in all of them."""

import io
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from flm_scale.data.prepare import seen as module
from flm_scale.data.prepare.inputs import open_inputs
from flm_scale.data.prepare.seen import Seen
from flm_scale.data.prepare.spec import InputConfig, Spec

SHARDS = Spec(input=InputConfig(kind="shards"))


def write_tar(path: Path, *, samples: int) -> Path:
    with tarfile.open(path, "w") as tar:
        for number in range(samples):
            member = tarfile.TarInfo(f"{number:05d}.txt")
            member.size = 4
            tar.addfile(member, io.BytesIO(b"word"))
    return path


def test_a_file_that_was_read_is_known_at_the_next_start_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes, tars = tmp_path / "inputs.seen", tmp_path / "tars"
    tars.mkdir()
    for number in range(3):
        write_tar(tars / f"{number}.tar", samples=2 + number)
    (first,) = open_inputs(SHARDS, [tars], seen=Seen(notes))
    counted: list[Path] = []
    monkeypatch.setattr(module, "_count_samples", lambda tar: counted.append(tar) or 7)
    with notes.open("a") as file:
        file.write('\n{"path": "torn')
    (again,) = open_inputs(SHARDS, [tars], seen=Seen(notes))
    assert again == first
    assert again.rows == 2 + 3 + 4
    assert not counted
    write_tar(tars / "1.tar", samples=3)  # the same bytes, written again
    os.utime(tars / "1.tar", ns=(1, 1))
    assert open_inputs(SHARDS, [tars], seen=Seen(notes))[0].sha256 == first.sha256
    assert counted == [tars / "1.tar"]


def test_a_tar_that_was_taken_for_another_kind_of_file_at_a_first_try_is_counted_at_the_next(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", samples=3)
    Seen(tmp_path / "inputs.seen").look(tar, is_tar=False)
    assert open_inputs(SHARDS, [tar], seen=Seen(tmp_path / "inputs.seen"))[0].rows == 3


def test_without_notes_every_file_is_read_and_none_written(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", samples=1)
    (opened,) = open_inputs(SHARDS, [tar])
    assert len(opened.sha256) == 64
    (unread,) = open_inputs(SHARDS, [tar], seen=Seen(hashed=False))
    assert (unread.sha256, unread.rows) == ("", 1)
    assert list(tmp_path.iterdir()) == [tar]


@pytest.mark.parametrize(("others", "kind"), [([1, 2], "int"), ([0.5, 1.5], "float"), (["many", "few"], "str")])
def test_a_column_is_a_number_only_where_every_input_says_so(others: list[object], kind: str, tmp_path: Path) -> None:
    spec = Spec(input=InputConfig(keep=("score",)))
    for name, scores in (("one", [1, 2]), ("other", others)):
        parquet.write_table(pa.table({"url": ["http://x/1", "http://x/2"], "caption": ["a", "b"], "score": scores}), tmp_path / f"{name}.parquet")
    opened = open_inputs(spec, [tmp_path / "one.parquet", tmp_path / "other.parquet"])
    assert [entry.kinds for entry in opened] == [{"score": kind}] * 2
