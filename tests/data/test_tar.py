"""The strict tar reader: what good writers write comes back, any damage is named, and it agrees with Python's reader or refuses."""

import contextlib
import io
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_scale.data.tar import ShardError, TarSample, list_members, read_json, read_shard
from flm_scale.errors import DataError
from tests.data.hostile import END, GOOD, encoded, jpeg, member, pax, png, shard
from tools.fuzz_data import check_image, check_json, check_tar

SAMPLES = {f"{number:09d}": {"jpg": bytes([number]) * (number * 37), "json": b"{}", "txt": b"w" * number} for number in range(40)}


def with_webdataset(file: Path, _: Path) -> None:
    with file.open("wb") as stream, webdataset.TarWriter(stream, encoder=False) as writer:
        for key, members in SAMPLES.items():
            writer.write({"__key__": key, **members})


def with_tarfile(form: int) -> Callable[[Path, Path], None]:
    def write(file: Path, folder: Path) -> None:
        with tarfile.open(file, "w", format=form) as tar:
            for path in sorted(folder.iterdir()):
                tar.add(path, arcname=path.name)

    return write


def with_gnu_tar(form: str) -> Callable[[Path, Path], None]:
    def write(file: Path, folder: Path) -> None:
        subprocess.run(["tar", "-C", folder, f"--format={form}", "--sort=name", "-cf", file, "."], check=True)

    return write


WRITERS = {"webdataset": with_webdataset, "tarfile ustar": with_tarfile(tarfile.USTAR_FORMAT), "tarfile gnu": with_tarfile(tarfile.GNU_FORMAT),
           "tarfile pax": with_tarfile(tarfile.PAX_FORMAT), "tar ustar": with_gnu_tar("ustar"), "tar gnu": with_gnu_tar("gnu"),
           "tar posix": with_gnu_tar("posix")}


@pytest.fixture(params=WRITERS)
def good(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The samples in one tar of each writer."""
    folder = tmp_path / "files"
    folder.mkdir()
    for key, members in SAMPLES.items():
        for extension, content in members.items():
            (folder / f"{key}.{extension}").write_bytes(content)
    WRITERS[request.param](tmp_path / "good.tar", folder)
    return tmp_path / "good.tar"


def test_shard_of_every_good_writer_is_read_as_python_reads_it(good: Path) -> None:
    size = good.stat().st_size
    with tarfile.open(good, "r:") as tar:
        places = [(entry.name.removeprefix("./"), entry.offset_data, entry.size) for entry in tar if entry.isreg()]
    members = list(list_members(good, expected_bytes=size, expected_count=40))
    assert [(f"{one.key}.{one.extension}", one.offset, one.size) for one in members] == places
    with good.open("rb") as stream:
        for source in (good, stream):
            assert {sample.key: sample.members for sample in read_shard(source, expected_bytes=size, expected_count=40)} == SAMPLES


@pytest.mark.slow
def test_cut_anywhere_is_found(good: Path) -> None:
    """At every block's edge, beside it, and inside: only the zeros behind the two that end a tar may be missing."""
    whole = good.read_bytes()
    end = len(whole.rstrip(b"\0"))
    needed = end + -end % 512 + 1024
    cuts = sorted({cut for edge in range(0, needed, 512) for cut in (edge, edge + 1, edge + 300) if cut < needed})
    for cut in cuts[:200] + cuts[-200:]:
        for read in (read_shard, list_members):
            with pytest.raises(ShardError, match=r"stream") as caught:
                list(read(io.BytesIO(whole[:cut])))
            assert caught.value.reason in ("truncated", "trailing"), caught.value


def test_long_names_of_both_kinds_are_read(tmp_path: Path) -> None:
    key = "/".join(["folder-of-a-collection"] * 6) + "/0001"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        with tarfile.open(tmp_path / "long.tar", "w", format=form) as tar:
            for extension in ("jpg", "txt"):
                entry = tarfile.TarInfo(f"{key}.{extension}")
                entry.size = 3
                tar.addfile(entry, io.BytesIO(b"abc"))
        assert list(read_shard(tmp_path / "long.tar")) == [TarSample(key, {"jpg": b"abc", "txt": b"abc"})]


def test_expectations_find_a_shard_that_only_looks_whole() -> None:
    shorter = GOOD + END
    assert len(list(read_shard(io.BytesIO(shorter)))) == 1
    for expected in ({"expected_count": 2}, {"expected_bytes": len(shorter) + 512}, {"expected_bytes": len(shorter) - 512}):
        with pytest.raises(ShardError, match="expected") as caught:
            list(list_members(io.BytesIO(shorter), **expected))
        assert caught.value.reason in ("count", "size")
    with pytest.raises(ShardError, match="expected"):  # a file's size is known before the first sample is given out
        next(read_shard(io.BytesIO(shard()), expected_bytes=1))


def test_error_names_file_member_and_place(tmp_path: Path) -> None:
    file = tmp_path / "00007.tar"
    file.write_bytes(shard(member("0003.pkl")))
    with pytest.raises(ShardError) as caught:
        list(read_shard(file))
    assert str(caught.value) == (f"shard {file}: member '0003.pkl' at byte {len(GOOD)}: loading .pkl files may run code; "
                                 "fetch or build the shard again, or leave it out")
    file.write_bytes(shard()[:len(GOOD) + 513])
    for read in (read_shard, list_members):
        with pytest.raises(ShardError, match=rf"member '0009\.jpg' at byte {len(GOOD)}: .*ends"):
            list(read(file))
    with pytest.raises(ShardError, match="cannot be read") as caught:
        list(read_shard(tmp_path / "none.tar"))
    assert caught.value.reason == "unreadable"


def test_rejected_sample_keeps_its_neighbours_and_its_content_is_never_read() -> None:
    class Counted(io.BytesIO):
        num_read = 0

        def read(self, size: int | None = -1) -> bytes:
            self.num_read += size or 0
            return super().read(size)

    stream = Counted(shard(member("0001.jpg", bytes(5_000_000)), member("0001.txt")))
    samples = list(read_shard(stream, max_sample_bytes=1_000_000))
    assert [(sample.key, sample.rejected, len(sample.members)) for sample in samples] == [("0000", "", 3), ("0001", "too_large", 0), ("0009", "", 2)]
    assert stream.num_read < 100_000


def test_caller_names_further_extensions() -> None:
    stream = shard(member("0001.webm"), member("0001.txt"))
    assert [sample.rejected for sample in read_shard(io.BytesIO(stream), extensions={"jpg", "txt", "json", "webm"})] == ["", "", ""]
    assert [one.rejected for one in list_members(io.BytesIO(stream))][3:5] == ["extension", ""]


def test_folders_and_dots_in_front_do_not_matter() -> None:
    stream = member("./", b"", b"5") + pax(mtime="1.5") + member("./a/", b"", b"5") + member("./a/0.seg.jpg") + member("./a/0.txt") + END
    assert list(read_shard(io.BytesIO(stream), extensions={"seg.jpg", "txt"})) == [TarSample("a/0", {"seg.jpg": b"x", "txt": b"x"})]


def test_fields_of_a_good_sidecar_come_back() -> None:
    assert read_json('{"caption": "über \\ud83d\\ude00", "n": [1, -2.5, null, true], "o": {}}'.encode()) == (
        {"caption": "über 😀", "n": [1, -2.5, None, True], "o": {}}, 0)


@st.composite
def changed(draw: st.DrawFn, content: bytes) -> bytes:
    """A few bytes or blocks of a good file changed, moved, cut out or repeated."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.sampled_from([0, 1, 2, 8, 12, 512, 1024]))
        match draw(st.sampled_from(["set", "cut", "insert", "copy", "end"])):
            case "set":
                data[place:place + length] = draw(st.binary(min_size=length, max_size=length))
            case "cut":
                del data[place:place + length]
            case "insert":
                data[place:place] = draw(st.binary(max_size=16))
            case "copy":
                data[place:place] = data[:length]
            case "end":
                del data[place:]
    return bytes(data)


@settings(max_examples=300, deadline=1000)
@given(changed(shard(pax(mtime="1.5"), member("0001.jpg"), member("./@LongLink", b"0002.jpg\0", b"L"), member("x"))))
def test_changed_tar_is_read_as_python_reads_it_or_refused(content: bytes) -> None:
    check_tar(content)


@settings(max_examples=200, deadline=1000)
@given(st.lists(st.tuples(st.text(min_size=1, max_size=120), st.sampled_from(["jpg", "txt", "exe", ""]), st.binary(max_size=700)), max_size=6),
       st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_tar_of_any_names_is_read_as_python_reads_it_or_refused(files: list[tuple[str, str, bytes]], form: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for key, extension, content in files:
            entry = tarfile.TarInfo(f"{key}.{extension}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    check_tar(buffer.getvalue())


PICTURES = [encoded("PNG"), encoded("JPEG"), encoded("JPEG", progressive=True), encoded("WEBP"), png(), jpeg(scans=2)]


@settings(max_examples=300, deadline=2000)
@given(st.one_of([changed(picture) for picture in PICTURES]))
def test_changed_picture_decodes_or_is_a_data_error(content: bytes) -> None:
    with contextlib.suppress(DataError):
        check_image(content)


@settings(max_examples=300, deadline=1000)
@given(st.one_of(st.binary(max_size=200), changed(b'{"a": [1, 2.5, NaN, "\\ud800", {"b": null}], "c": 1e999}')))
def test_changed_sidecar_is_fields_or_a_data_error(content: bytes) -> None:
    with contextlib.suppress(DataError):
        check_json(content)
