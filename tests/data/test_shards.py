"""Datasets on disk: the same bytes every time, and damage of any kind named in one line."""

import gzip
import hashlib
import json
import os
import pickle
import shutil
import struct
import time
import weakref
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from flm_scale.data import index as index_file
from flm_scale.data import shards
from flm_scale.data.index import Index, index_columns
from flm_scale.data.manifest import Shards
from flm_scale.data.shards import Dataset, Sample, open_dataset, read_committed_shard, seal_dataset, write_dataset, write_shard
from flm_scale.data.sidecars import give_tokenizer
from flm_scale.data.tokens import train_tokenizer
from flm_scale.data.verify import verify
from flm_scale.errors import DataError
from tests.data.hostile import END, member, shard
from tests.data.killed import is_killed_before_change


def sample(number: int, **changes: object) -> Sample:
    image = hashlib.sha256(str(number).encode()).digest() * (1 + number % 7)
    fields = {"key": f"{number:08d}", "image": image, "image_format": "png" if number % 2 else "jpg",
              "captions": [f"caption {number}", "über"][: number % 3], "questions": ["what?"], "answers": [f"{number}"],
              "concept": f"concept {number % 4}", "width": 8, "height": 8}
    return Sample(**{**fields, **changes})


def write(folder: Path, *, count: int = 25, **options: bool) -> Dataset:
    splits = {"train": map(sample, range(count)), "val": [sample(count)], "test": [sample(count + 1)]}
    source = {"package": "p", "version": "1", "sha256": "0" * 64, "license": "MIT"}
    return write_dataset(folder, name="small", sources=[source], splits=splits, readme="About.", **options)


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """Three train shards, and a tokenizer."""
    monkeypatch.setattr(shards, "SAMPLES_PER_SHARD", 10)
    dataset = write(tmp_path / "data")
    train_tokenizer(["caption of a thing"] * 3, vocab_size=40, model_file=dataset.tokenizer_file)
    give_tokenizer(dataset)
    return dataset


def flip(file: Path, place: int) -> None:
    file.chmod(0o644)
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def test_two_builds_are_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", iter(range(10**6)).__next__)
    assert write(tmp_path / "one").root == write(tmp_path / "two").root
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 9
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)


def test_root_depends_on_every_caption(tmp_path: Path) -> None:
    write_dataset(tmp_path / "one", name="n", sources=[], splits={"train": [sample(1)]}, readme="")
    other = write_dataset(tmp_path / "two", name="n", sources=[], splits={"train": [sample(1, captions=["caption 2"])]}, readme="")
    assert open_dataset(tmp_path / "one").root != other.root


def test_index_gives_back_what_was_written(dataset: Dataset) -> None:
    opened = open_dataset(dataset.folder, manifest_hash=dataset.root, tokenizer_hash=dataset.tokenizer_fingerprint)
    assert opened.splits == ["test", "train", "val"]
    index = opened.index("train")
    expected = [sample(number) for number in range(25)]
    assert len(index) == 25
    for column, name in ((index.keys, "key"), (index.captions, "captions"), (index.questions, "questions"), (index.answers, "answers"),
                         (index.concepts, "concept")):
        assert list(column) == [column[number] for number in range(25)] == [getattr(one, name) for one in expected]
    assert [index.read_image(number) for number in range(25)] == [one.image for one in expected]
    split = opened.manifest.splits["train"]
    assert (split.shards, split.images, split.captions, opened.shards("train").counts.tolist()) == (3, 25, 25 - 1, [10, 10, 5])
    assert opened.index("val", "train").keys[1] == "00000000"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its file open
def test_plain_webdataset_reads_the_shards(dataset: Dataset) -> None:
    import webdataset

    read = list(webdataset.WebDataset(str(dataset.folder / "train/00001.tar"), shardshuffle=False))
    assert [one["__key__"] for one in read] == [f"{number:08d}" for number in range(10, 20)]
    assert read[1]["png"] == sample(11).image
    assert read[0]["txt"] == b"caption 10"
    assert read[2]["txt"] == b""  # sample 12 has no caption
    about = json.loads(read[1]["json"])
    assert about["sha256"] == hashlib.sha256(sample(11).image).hexdigest()
    assert about["captions"] == ["caption 11", "über"]


class _Pictures:
    def __init__(self, index: Index) -> None:
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> bytes:
        return self.index.read_image(number)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_loader_processes_read_an_index_that_is_already_in_use(dataset: Dataset, start: str) -> None:
    index = dataset.index("train")
    index.read_image(0)
    loader = DataLoader(_Pictures(index), batch_size=None, num_workers=1, multiprocessing_context=start)
    assert list(loader) == [sample(number).image for number in range(25)]


def test_pickled_index_leaves_its_descriptors_behind(dataset: Dataset) -> None:
    index = dataset.index("train")
    index.read_image(0)
    copy = pickle.loads(pickle.dumps(index))
    del index  # closes its descriptors, so that a copied number would read nothing
    assert copy.read_image(0) == sample(0).image


def test_open_files_stay_below_the_limit(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """A map of an index holds no file open, and one that gives way to another is given back."""
    monkeypatch.setattr(index_file, "MAX_OPEN_SHARDS", 1)
    monkeypatch.setattr(index_file, "MAX_MAPPED", 2)
    index = dataset.index("train")
    assert [index.read_image(number) for number in (0, 10, 20, 0)] == [sample(number).image for number in (0, 10, 20, 0)]
    links = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert [link for link in links if link.startswith(str(dataset.folder))] == [str(dataset.folder / "train/00000.tar")]
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if f"{dataset.folder}/index" in line}
    assert mapped == {str(dataset.folder / "index/train" / name) for name in ("00000.arrow", "00002.arrow")}


def test_picture_that_changed_after_opening_names_shard_and_key(dataset: Dataset) -> None:
    index = dataset.index("train")
    flip(dataset.folder / "train/00000.tar", index.values(3, ["image_offset"])[0])
    assert index.read_image(2) == sample(2).image
    with pytest.raises(DataError, match=r"train/00000\.tar: sample 00000003"):
        index.read_image(3)


def test_shard_that_vanished_after_opening_is_a_data_error(dataset: Dataset) -> None:
    index = dataset.index("train")
    (dataset.folder / "train/00002.tar").unlink()
    with pytest.raises(DataError, match=r"train/00002\.tar: sample 00000020 cannot be read"):
        index.read_image(20)


def one_line(folder: Path, **expected: str) -> str:
    with pytest.raises(DataError) as caught:
        open_dataset(folder, **expected)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_truncated_shard_is_named_with_both_sizes(dataset: Dataset) -> None:
    file = dataset.folder / "train/00001.tar"
    size = file.stat().st_size
    os.truncate(file, size - 512)
    message = one_line(dataset.folder)
    assert f"shard train/00001.tar has {size - 512} bytes; the manifest states {size}" in message
    assert "build the dataset again" in message


@pytest.mark.parametrize("name", ["train/00001.tar", "index/train/00001.arrow"])
def test_one_flipped_bit_is_found_on_opening(dataset: Dataset, name: str) -> None:
    flip(dataset.folder / name, 700)
    assert f"shard {name} has the sha256" in one_line(dataset.folder)


def test_large_dataset_opens_by_sizes_and_verify_reads_every_byte(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verify(dataset) == []
    monkeypatch.setattr(shards, "HASHED_ON_OPEN_BYTES", 1)
    flip(dataset.folder / "train/00000.tar", 700)
    flip(dataset.folder / "val/00000.tar", 700)
    assert [problem.split()[1] for problem in verify(open_dataset(dataset.folder))] == ["train/00000.tar", "val/00000.tar"]


def reseal(dataset: Dataset, **changes: bytes) -> Dataset:
    """The dataset as an author would hand it over who puts other bytes in: with every size and hash right."""
    (old,) = dataset.shards("val")
    tar, index = dataset.folder / old.name, dataset.folder / old.index_name
    for file, content in zip((tar, index), (changes.get("tar"), changes.get("index")), strict=True):
        if content is not None:
            file.chmod(0o644)
            file.write_bytes(content)
    shard = old.model_copy(update={
        "bytes": tar.stat().st_size, "sha256": hashlib.sha256(tar.read_bytes()).hexdigest(),
        "index_bytes": index.stat().st_size, "index_sha256": hashlib.sha256(index.read_bytes()).hexdigest()})
    splits = {split: [shard] if split == "val" else list(dataset.shards(split)) for split in dataset.splits}
    return seal_dataset(dataset.folder, name="resealed", sources=[], splits=splits, readme="")


@pytest.mark.parametrize(("content", "problem"), [
    (shard(), "2 samples; 1 are expected"), (member("0.pkl") + END, "may run code"), (member("0.png") + END, "other keys or places"),
    (gzip.compress(shard()), "compressed"), (member("00000025.png"), "two zero blocks"),
], ids=["count", "pickle", "key", "gzip", "cut"])
def test_verify_names_a_tar_that_is_no_shard_whatever_its_hash(dataset: Dataset, content: bytes, problem: str) -> None:
    resealed = reseal(dataset, tar=content)
    assert verify(resealed, fast=True) == []
    (line,) = verify(resealed)
    assert problem in line
    assert "val/00000.tar" in line


@pytest.mark.parametrize("change", ["rows", "batches", "columns", "types", "offsets", "text", "missing value", "footer", "cut", "empty", "no arrow"])
def test_index_that_lies_is_a_data_error_whatever_its_hash(dataset: Dataset, change: str) -> None:
    import pyarrow as pa

    file = dataset.folder / "index/val/00000.arrow"
    whole = file.read_bytes()
    with pa.ipc.open_file(file.read_bytes()) as opened:
        table = opened.read_all()
    key = table["key"].chunk(0)

    def written(*tables: pa.Table) -> bytes:
        buffer = pa.BufferOutputStream()
        with pa.ipc.new_file(buffer, tables[0].schema) as writer:
            for one in tables:
                writer.write_table(one)
        return bytes(buffer.getvalue().to_pybytes())

    def with_key(column: pa.Array) -> bytes:
        return written(table.set_column(0, "key", column))

    content = {
        "rows": lambda: written(pa.concat_tables([table, table]).combine_chunks()), "batches": lambda: written(table, table),
        "columns": lambda: written(table.drop_columns(["captions"])), "types": lambda: written(table.set_column(1, "captions", pa.array([7]))),
        "offsets": lambda: whole.replace(struct.pack("<ii", 0, 8), struct.pack("<ii", 10**9, 2 * 10**9)),
        "text": lambda: with_key(pa.Array.from_buffers(pa.string(), 1, [None, key.buffers()[1], pa.py_buffer(b"\xff" * 8)])),
        "missing value": lambda: with_key(pa.array([None], pa.string())),
        "footer": lambda: whole[:-10] + b"\xff\xff\xff\x7fARROW1", "cut": lambda: whole[:len(whole) // 2], "empty": lambda: b"",
        "no arrow": lambda: b"ARROW1\0\0" * 20,
    }[change]()
    resealed = reseal(dataset, index=content)
    with pytest.raises(DataError, match=r"index index/val/00000\.arrow of .* cannot be read") as caught:
        resealed.index("val").read_image(0)
    assert "\n" not in str(caught.value)
    (line,) = verify(resealed)
    assert line.startswith(str(caught.value).split("(")[0])


def test_an_index_without_a_caption_is_found_by_verify_though_no_picture_needs_it(dataset: Dataset) -> None:
    import pyarrow as pa

    with pa.ipc.open_file((dataset.folder / "index/val/00000.arrow").read_bytes()) as opened:
        table = opened.read_all()
    buffer = pa.BufferOutputStream()
    column = pa.array([[None]], pa.list_(pa.string()))
    with pa.ipc.new_file(buffer, table.schema) as writer:
        writer.write_table(table.set_column(table.column_names.index("captions"), table.schema.field("captions"), column))
    (line,) = verify(reseal(dataset, index=bytes(buffer.getvalue().to_pybytes())))
    assert "index index/val/00000.arrow" in line
    assert "a value is missing" in line


def test_place_outside_of_the_tar_is_a_data_error(dataset: Dataset) -> None:
    import pyarrow as pa

    with pa.ipc.open_file((dataset.folder / "index/val/00000.arrow").read_bytes()) as opened:
        table = opened.read_all()
    for column, place in (("image_offset", 2**62), ("image_offset", -1), ("image_bytes", 2**62), ("image_bytes", -1)):
        buffer = pa.BufferOutputStream()
        with pa.ipc.new_file(buffer, table.schema) as writer:
            writer.write_table(table.set_column(table.schema.get_field_index(column), column, pa.array([place])))
        with pytest.raises(DataError, match=r"val/00000\.tar: sample 00000025"):
            reseal(dataset, index=buffer.getvalue().to_pybytes()).index("val").read_image(0)


def test_all_problems_are_counted(dataset: Dataset) -> None:
    (dataset.folder / "train/00000.tar").unlink()
    (dataset.folder / "index/val/00000.arrow").unlink()
    assert "is missing (and 1 more)" in one_line(dataset.folder)


def test_manifest_changed_by_hand_is_refused(dataset: Dataset) -> None:
    file = dataset.folder / "dataset.json"
    file.write_text(file.read_text().replace('"name": "small"', '"name": "other"'))
    assert "changed by hand" in one_line(dataset.folder)


@pytest.mark.parametrize("content", ["", "[]", '{"format": 3}', "\x00"])
def test_damaged_manifest_is_refused(dataset: Dataset, content: str) -> None:
    (dataset.folder / "dataset.json").write_text(content)
    assert "dataset.json: " in one_line(dataset.folder)


def test_a_split_cannot_be_named_outside_the_folder(dataset: Dataset) -> None:
    file = dataset.folder / "dataset.json"
    file.write_text(file.read_text().replace('"val"', '"../val"'))
    assert "dataset.json: splits" in one_line(dataset.folder)


def test_an_altered_or_missing_list_of_shards_is_refused(dataset: Dataset) -> None:
    flip(dataset.folder / "shards.parquet", 200)
    assert "shards.parquet has the sha256" in one_line(dataset.folder)
    (dataset.folder / "shards.parquet").unlink()
    assert "shards.parquet cannot be read" in one_line(dataset.folder)


@pytest.mark.parametrize(("change", "problem"), [
    ({"name": "../00000.tar"}, "elsewhere than in the folder"), ({"name": None}, "elsewhere than in the folder"),
    ({"count": 11}, "has 26 images in 3 shards of 'train'; dataset.json states 25 in 3"), ({"extra": 1}, "does not hold the columns"),
], ids=["path", "null", "count", "column"])
def test_a_list_of_shards_that_lies_is_refused_whatever_its_hash(dataset: Dataset, change: dict, problem: str) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = parquet.read_table(dataset.folder / "shards.parquet").to_pylist()
    rows[0] |= change
    parquet.write_table(pa.Table.from_pylist(rows), dataset.folder / "shards.parquet")
    digest = hashlib.sha256((dataset.folder / "shards.parquet").read_bytes()).hexdigest()
    dataset.manifest.model_copy(update={"shards_sha256": digest}).write(dataset.folder)
    assert problem in one_line(dataset.folder)


def test_a_dataset_of_format_1_is_to_be_built_again(dataset: Dataset) -> None:
    (dataset.folder / "dataset.json").rename(dataset.folder / "manifest.json")
    assert "format 1" in one_line(dataset.folder)
    assert f"flm data demo {dataset.folder} --overwrite" in one_line(dataset.folder)
    with pytest.raises(DataError, match="holds another dataset"):
        write(dataset.folder)
    write(dataset.folder, overwrite=True)
    assert not (dataset.folder / "manifest.json").exists()


def test_other_dataset_than_expected_names_both_roots(dataset: Dataset) -> None:
    message = one_line(dataset.folder, manifest_hash="abc")
    assert dataset.root in message
    assert "expects abc" in message


def test_other_tokenizer_than_expected_names_both_fingerprints(dataset: Dataset) -> None:
    message = one_line(dataset.folder, tokenizer_hash="abc")
    assert dataset.tokenizer_fingerprint in message
    assert "expects abc" in message


def test_exchanged_tokenizer_file_is_found(dataset: Dataset) -> None:
    train_tokenizer(["quite another text"] * 3, vocab_size=40, model_file=dataset.tokenizer_file)
    assert "tokenizer.model has the fingerprint" in one_line(dataset.folder)
    dataset.tokenizer_file.unlink()
    assert "tokenizer.model is missing" in one_line(dataset.folder)


def test_tokenizer_changes_the_root(dataset: Dataset) -> None:
    before = dataset.root
    dataset.set_tokenizer("f" * 64, 40)
    assert dataset.root != before


def test_missing_folder_names_the_command_that_makes_one(tmp_path: Path) -> None:
    assert f"does not exist; make one with `flm data demo {tmp_path / 'none'}`" in one_line(tmp_path / "none")
    assert "has no dataset.json" in one_line(tmp_path)


def test_split_that_does_not_exist_lists_those_that_do(dataset: Dataset) -> None:
    with pytest.raises(DataError, match="'dev'; choose one of test, train, val"):
        dataset.index("dev")


@pytest.mark.parametrize("key", ["00000001", "a/b", "../x", "a.b", ""])
def test_key_that_is_taken_or_would_break_the_tar_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(DataError, match="sample key"):
        write_dataset(tmp_path / "x", name="n", sources=[], splits={"train": [sample(1)], "val": [sample(2, key=key)]}, readme="")


def test_killed_build_does_not_look_complete_and_is_begun_anew(tmp_path: Path) -> None:
    def dies() -> Iterator[Sample]:
        yield sample(100)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "data", name="n", sources=[], splits={"train": [sample(1)], "val": dies()}, readme="")
    assert (tmp_path / "data/train/00000.tar").exists()
    assert "holds an unfinished build" in one_line(tmp_path / "data")
    assert write(tmp_path / "data").root == write(tmp_path / "undisturbed").root
    assert not (tmp_path / "data/.unfinished").exists()


def prepared(folder: Path, numbers: range = range(5), *, name: str = "train/00000.tar", attempt: int = 0) -> None:
    import pyarrow as pa

    fates: list[str] = []

    def samples() -> Iterator[Sample]:
        for number in numbers:
            fates.append("success")
            yield sample(number, image_format="webp", columns={"phash": 2**63 + number, "similarity": 0.25, "original_width": 640})

    write_shard(folder, name, samples(), table=lambda: pa.table({"status": fates}), stats=lambda: {"count": len(fates)}, attempt=attempt)


def test_a_prepared_shard_is_told_by_its_counts_which_come_last(tmp_path: Path) -> None:
    """Killed before any change of the disk it is not there, or whole; another attempt then gives the same bytes."""
    prepared(tmp_path / "whole")
    entry = read_committed_shard(tmp_path / "whole", "train/00000.tar")
    assert entry is not None
    for name, _, sha256 in entry.files:
        assert hashlib.sha256((tmp_path / "whole" / name).read_bytes()).hexdigest() == sha256
    for number in count():
        folder = tmp_path / str(number)
        is_killed = is_killed_before_change(number, lambda: prepared(folder))  # noqa: B023 - called at once
        assert read_committed_shard(folder, "train/00000.tar") == (None if is_killed else entry)
        prepared(folder, attempt=1)
        assert read_committed_shard(folder, "train/00000.tar") == entry
        if not is_killed:
            break
    assert number > 4
    (tmp_path / "whole/train/00000.parquet").write_bytes(b"short")
    assert read_committed_shard(tmp_path / "whole", "train/00000.tar") is None


def test_prepared_shards_are_sealed_as_a_dataset_with_their_tables_and_scores(tmp_path: Path) -> None:
    for shard_number in range(2):
        prepared(tmp_path, range(5 * shard_number, 5 * shard_number + 5), name=f"train/{shard_number:05d}.tar")
    empty = write_shard(tmp_path, "train/00002.tar", [])  # all of its rows were rejected
    (tmp_path / "train/.00001.tar.7.part").touch()  # left by a killed attempt
    entries = [read_committed_shard(tmp_path, "train/00000.tar"), read_committed_shard(tmp_path, "train/00001.tar")]
    preparation = {"spec": {"image": {"size": 256}}, "spec_hash": "0" * 64,
                   "inputs": [{"path": "a.parquet", "split": "train", "sha256": "0" * 64, "rows": 12}],
                   "fates": {"success": 10, "http_404": 2}, "versions": {"pillow": "11"}}
    sealed = seal_dataset(tmp_path, name="urls", sources=[], splits={"train": [*(one for one in entries if one), empty]},
                          preparation=preparation, readme="")
    opened = open_dataset(tmp_path)
    assert verify(opened) == []
    assert opened.root == sealed.root
    assert opened.manifest.preparation is not None
    assert opened.manifest.preparation.fates == {"success": 10, "http_404": 2}
    assert opened.index("train").values(7, ["key", "phash", "similarity", "original_width"]) == ["00000007", 2**63 + 7, 0.25, 640]
    hashes = [number for shard in opened.shards("train") for number in index_columns(tmp_path, shard, ["phash"])[0]]
    assert hashes == [2**63 + number for number in range(10)]
    assert not (tmp_path / "train/.00001.tar.7.part").exists()
    with pytest.raises(DataError, match="cannot be read"):
        opened.index("train").values(7, ["aesthetic"])
    flip(tmp_path / "train/00001.parquet", 4)
    assert "train/00001.parquet has the sha256" in one_line(tmp_path)


def test_pictures_are_written_as_they_come(tmp_path: Path) -> None:
    """No more than two are held at a time."""
    alive: list[weakref.ref[Sample]] = []

    def samples() -> Iterator[Sample]:
        for number in range(20):
            one = sample(number)
            alive.append(weakref.ref(one))
            yield one
            del one
            assert sum(ref() is not None for ref in alive) <= 2

    assert write_shard(tmp_path, "train/00000.tar", samples()).count == 20


def test_entries_of_many_shards_are_quick_to_read_and_small(tmp_path: Path) -> None:
    """As many as LAION-2B has, with hashes as little alike as real ones."""
    import pyarrow as pa

    num_shards = 231_349
    hashes = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(num_shards)]
    columns = {"split": ["train"] * num_shards, "name": [f"train/{number:05d}.tar" for number in range(num_shards)],
               **dict.fromkeys(("sha256", "index_sha256", "table_sha256"), hashes)}
    like = Shards.of([])._table.schema
    Shards(pa.table({name: columns.get(name, [7] * num_shards) for name in like.names}, schema=like)).write(tmp_path)
    digest = hashlib.sha256((tmp_path / "shards.parquet").read_bytes()).hexdigest()
    started = time.process_time()
    read = Shards.read(tmp_path, digest)
    split = read.of_split("train")
    assert split[231_348].sha256 == hashes[-1]
    assert int(split.counts.sum()) == 7 * num_shards
    assert time.process_time() - started < 5
    assert split._table.nbytes < 400 * num_shards


def test_existing_files_are_never_cleared_without_a_word(dataset: Dataset, tmp_path: Path) -> None:
    (dataset.folder / ".unfinished").touch()  # left by a build that was killed before it cleared or after it wrote everything
    with pytest.raises(DataError, match="holds another dataset; choose an empty folder, or overwrite"):
        write(dataset.folder)
    assert open_dataset(dataset.folder).root == dataset.root
    assert write(dataset.folder, overwrite=True, count=3).root != dataset.root
    assert not (dataset.folder / "tokenizer.model").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match=r"not a dataset's \(thesis\.txt\)"):
        write(tmp_path / "home", overwrite=True)
    assert (tmp_path / "home/thesis.txt").exists()
    shutil.rmtree(dataset.folder)
    dataset.folder.write_text("a file")
    with pytest.raises(DataError, match="is a file"):
        write(dataset.folder)
