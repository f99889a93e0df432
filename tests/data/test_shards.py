"""Datasets on disk: the same bytes every time, and damage of any kind named in one line."""

import gzip
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from flm_scale.data import shards
from flm_scale.data.shards import Dataset, Index, Sample, open_dataset, verify, write_dataset
from flm_scale.data.tokens import Tokenizer, train_tokenizer
from flm_scale.errors import DataError
from tests.data.hostile import END, member, shard


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
    tokenizer = Tokenizer(dataset.tokenizer_file)
    dataset.set_tokenizer(tokenizer.fingerprint, tokenizer.vocab_size)
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
    assert len(files) == 8
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
    assert index.keys == [one.key for one in expected]
    assert index.captions == [one.captions for one in expected]
    assert index.questions == [one.questions for one in expected]
    assert index.answers == [one.answers for one in expected]
    assert index.concepts == [one.concept for one in expected]
    assert [index.read_image(number) for number in range(25)] == [one.image for one in expected]
    split = opened.manifest.splits["train"]
    assert (split.images, split.captions, [shard.count for shard in split.shards]) == (25, 25 - 1, [10, 10, 5])


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
    monkeypatch.setattr(shards, "MAX_OPEN_SHARDS", 1)
    index = dataset.index("train")
    assert [index.read_image(number) for number in (0, 10, 20, 0)] == [sample(number).image for number in (0, 10, 20, 0)]
    # Only the tars: pyarrow closes the index it has read when one of its own threads gets to it.
    links = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert [link for link in links if link.startswith(str(dataset.folder)) and link.endswith(".tar")] == [str(dataset.folder / "train/00000.tar")]


def test_picture_that_changed_after_opening_names_shard_and_key(dataset: Dataset) -> None:
    index = dataset.index("train")
    flip(dataset.folder / "train/00000.tar", index._places[3][1])
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


@pytest.mark.parametrize("name", ["train/00001.tar", "train/00001.parquet"])
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
    name = "val/00000.tar"
    for suffix, content in changes.items():
        file = (dataset.folder / name).with_suffix(f".{suffix}")
        file.chmod(0o644)
        file.write_bytes(content)
    tar, index = ((dataset.folder / name).with_suffix(suffix) for suffix in (".tar", ".parquet"))
    val = dataset.manifest.splits["val"]
    shard = val.shards[0].model_copy(update={
        "bytes": tar.stat().st_size, "sha256": hashlib.sha256(tar.read_bytes()).hexdigest(),
        "index_bytes": index.stat().st_size, "index_sha256": hashlib.sha256(index.read_bytes()).hexdigest()})
    splits = dataset.manifest.splits | {"val": val.model_copy(update={"shards": [shard]})}
    dataset.manifest.model_copy(update={"splits": splits}).write(dataset.folder)
    return open_dataset(dataset.folder)


@pytest.mark.parametrize(("content", "problem"), [
    (shard(), "2 samples; 1 are expected"), (member("0.pkl") + END, "may run code"), (member("0.png") + END, "other keys or places"),
    (gzip.compress(shard()), "compressed"), (member("00000025.png"), "two zero blocks"),
], ids=["count", "pickle", "key", "gzip", "cut"])
def test_verify_names_a_tar_that_is_no_shard_whatever_its_hash(dataset: Dataset, content: bytes, problem: str) -> None:
    (line,) = verify(reseal(dataset, tar=content))
    assert problem in line
    assert "val/00000.tar" in line


@pytest.mark.parametrize("change", ["rows", "columns", "types", "footer", "cut", "no parquet"])
def test_index_that_lies_is_a_data_error_whatever_its_hash(dataset: Dataset, change: str) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    file = dataset.folder / "val/00000.parquet"
    whole, table, buffer = file.read_bytes(), parquet.read_table(file), pa.BufferOutputStream()
    changed = {"rows": lambda: pa.concat_tables([table, table]), "columns": lambda: table.drop_columns(["captions"]),
               "types": lambda: table.set_column(1, "captions", pa.array([7]))}
    if change in changed:
        parquet.write_table(changed[change](), buffer)
        content = buffer.getvalue().to_pybytes()
    else:
        content = {"footer": whole[:-8] + b"\xff\xff\xff\x7fPAR1", "cut": whole[:len(whole) // 2], "no parquet": b"PAR1"}[change]
    opened = reseal(dataset, parquet=content)
    with pytest.raises(DataError, match=r"index val/00000\.parquet of .* cannot be read") as caught:
        opened.index("val")
    assert "\n" not in str(caught.value)
    assert verify(opened) == [str(caught.value)]


def test_all_problems_are_counted(dataset: Dataset) -> None:
    (dataset.folder / "train/00000.tar").unlink()
    (dataset.folder / "val/00000.parquet").unlink()
    assert "is missing (and 1 more)" in one_line(dataset.folder)


def test_manifest_changed_by_hand_is_refused(dataset: Dataset) -> None:
    file = dataset.folder / "manifest.json"
    file.write_text(file.read_text().replace('"name": "small"', '"name": "other"'))
    assert "changed by hand" in one_line(dataset.folder)


@pytest.mark.parametrize("content", ["", "[]", '{"format": 2}', "\x00"])
def test_damaged_manifest_is_refused(dataset: Dataset, content: str) -> None:
    (dataset.folder / "manifest.json").write_text(content)
    assert "manifest.json: " in one_line(dataset.folder)


def test_manifest_cannot_point_outside_the_folder(dataset: Dataset) -> None:
    file = dataset.folder / "manifest.json"
    file.write_text(file.read_text().replace("val/00000.tar", "../00000.tar"))
    assert "pattern" in one_line(dataset.folder)


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
    assert "has no manifest.json" in one_line(tmp_path)


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
