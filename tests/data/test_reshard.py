"""Other shards hold the same samples, byte for byte, whatever their size and order, and however often the command was killed."""

import io
import re
import tarfile
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from flm_scale.cli import main
from flm_scale.data import derive, shards
from flm_scale.data import reshard as module
from flm_scale.data.reshard import Samples, reshard, shuffled
from flm_scale.data.shards import Dataset, open_dataset, write_dataset
from flm_scale.data.sidecars import TokenIds
from flm_scale.data.storage import file_sha256
from flm_scale.data.subset import filter_dataset
from flm_scale.data.tar import read_shard
from flm_scale.data.tokens import Tokenizer
from flm_scale.data.verify import verify
from flm_scale.errors import ConfigError, DataError
from tests.conftest import COLORS, SHAPES, drawn_sample, write_toy
from tests.data.killed import is_killed_before_change


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """64 + 8 + 8 samples in shards of ten, and a tokenizer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SAMPLES_PER_SHARD", 10)
        return write_toy(tmp_path_factory.mktemp("whole") / "data")


def bare_dataset(folder: Path) -> Dataset:
    samples = [drawn_sample(number, color=COLORS[number % 4], shape=SHAPES[0]) for number in range(6)]
    return write_dataset(folder, name="bare", sources=[], splits={"train": samples}, readme="")


def contents(dataset: Dataset, split: str) -> dict[str, dict[str, bytes]]:
    return {sample.key: sample.members for shard in dataset.shards(split) for sample in read_shard(dataset.folder / shard.name)}


def test_there_and_back_gives_the_same_tars_and_indexes_to_the_byte(whole: Dataset, tmp_path: Path) -> None:
    other = reshard(whole, tmp_path / "other", samples_per_shard=7)
    assert [shard.count for shard in other.shards("train")] == [7] * 9 + [1]
    assert verify(open_dataset(other.folder)) == []
    back = reshard(other, tmp_path / "back", samples_per_shard=10)
    assert sorted(shard.name for shard in back.shards()) == sorted(shard.name for shard in whole.shards())
    for split in whole.splits:
        assert list(back.shards(split)) == list(whole.shards(split))  # with the sha256 of each
    assert back.tokenizer_fingerprint == whole.tokenizer_fingerprint
    assert [step.by for step in back.manifest.derivations] == ["reshard", "reshard"]


def test_shuffling_keeps_every_sample_and_member_and_spreads_them(whole: Dataset, tmp_path: Path) -> None:
    made = open_dataset(reshard(whole, tmp_path / "one", samples_per_shard=16, seed=3).folder)
    assert verify(made) == []
    for split in whole.splits:
        assert contents(made, split) == contents(whole, split)
    keys = list(made.index("train").keys)
    assert keys != sorted(keys)
    assert all(len({int(key) // 10 for key in keys[first:first + 16]}) >= 4 for first in range(0, 64, 16))  # of seven old shards
    tokenizer = Tokenizer(whole.tokenizer_file)
    ids, before = TokenIds(made, "train", tokenizer), TokenIds(whole, "train", tokenizer)
    assert all(np.array_equal(one, other) for place, key in enumerate(keys) for one, other in zip(ids[place], before[int(key)], strict=True))
    assert reshard(whole, tmp_path / "two", samples_per_shard=16, seed=3).root == made.root
    assert reshard(whole, tmp_path / "three", samples_per_shard=16, seed=4).manifest.shards_sha256 != made.manifest.shards_sha256


def test_a_killed_reshard_goes_on_to_the_root_of_an_undisturbed_one(whole: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = reshard(whole, tmp_path / "undisturbed", samples_per_shard=9, seed=1)
    read, out = Samples.__getitem__, tmp_path / "out"

    def dies(self: Samples, number: int) -> module.Copy:
        if (out / "train/.00003.tar.0.part").exists():
            raise KeyboardInterrupt
        return read(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Samples, "__getitem__", dies)
        with pytest.raises(KeyboardInterrupt):
            reshard(whole, out, samples_per_shard=9, seed=1)
    assert not (out / "train/00003.tar").exists()
    times = {file: file.stat().st_mtime_ns for file in out.rglob("0*.tar")}
    assert len(times) == 4  # one of test, three of train
    assert reshard(whole, out, samples_per_shard=9, seed=1).root == undisturbed.root
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert not list(out.rglob("*.part"))


@pytest.mark.slow
def test_killed_before_any_change_of_the_disk_it_is_finished_by_the_same_command(tmp_path: Path) -> None:
    whole = bare_dataset(tmp_path / "data")
    undisturbed = reshard(whole, tmp_path / "undisturbed", samples_per_shard=4, seed=0)
    for number in count():
        out = tmp_path / str(number)
        if not is_killed_before_change(number, lambda: reshard(whole, out, samples_per_shard=4, seed=0)):  # noqa: B023 - called at once
            break
        made = open_dataset(reshard(whole, out, samples_per_shard=4, seed=0).folder)
        assert (made.root, verify(made)) == (undisturbed.root, [])
        assert not [file for file in out.rglob(".*") if file.is_file()]
    assert number > 10  # tars, indexes, counts, seal


def test_of_a_subset_the_kept_samples_alone_are_written(whole: Dataset, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("000003\n000004\n000009\n000010\n000063\n000070\n")
    subset = filter_dataset(whole, tmp_path / "subset", keys=tmp_path / "keys")
    made = open_dataset(reshard(subset, tmp_path / "made", samples_per_shard=3).folder)
    assert [shard.count for shard in made.shards()] == [3, 2, 1]  # none of test is left
    assert not made.manifest.is_subset
    assert verify(made) == []
    everything = contents(whole, "train")
    assert contents(made, "train") == {key: everything[key] for key in ["000003", "000004", "000009", "000010", "000063"]}


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_of_any_order_and_long_headers_are_copied_as_they_are(whole: Dataset, tmp_path: Path, form: int) -> None:
    """As other writers have them: the picture between a text and a JSON that no writer of ours would give."""
    import pyarrow as pa

    from flm_scale.data.index import map_index, write_arrow
    from flm_scale.data.tar import list_members

    folder, name, prefix = tmp_path / "foreign", "train/00000.tar", "k" * 120  # too long for a plain header
    rows, file = map_index(whole.folder, whole.shards("train")[0]).to_pylist(), folder / name
    for parent in (folder / "train", folder / "index/train"):
        parent.mkdir(parents=True)
    with tarfile.open(file, "w", format=form) as tar:
        for number, row in enumerate(rows):
            row["key"] = f"{prefix}{number}"
            for extension, data in (("txt", b"a text"), ("png", whole.index("train").read_image(number)), ("json", b'{"score": NaN }')):
                info = tarfile.TarInfo(f"{row['key']}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    pictures = [member for member in list_members(file) if member.extension == "png"]
    rows = [{**row, "image_offset": member.offset} for row, member in zip(rows, pictures, strict=True)]
    entry = whole.shards("train")[0].model_copy(update={"bytes": file.stat().st_size, "sha256": file_sha256(file)})
    index = folder / entry.index_name
    write_arrow(index, pa.RecordBatch.from_pylist(rows, schema=map_index(whole.folder, entry).schema))
    entry = entry.model_copy(update={"index_bytes": index.stat().st_size, "index_sha256": file_sha256(index)})
    foreign = shards.seal_dataset(folder, name="foreign", sources=[], splits={"train": [entry]}, readme="")
    assert verify(foreign) == []
    made = open_dataset(reshard(foreign, tmp_path / "made", samples_per_shard=4, seed=0).folder)
    assert verify(made) == []
    assert contents(made, "train") == contents(foreign, "train")


def test_a_picture_that_is_not_what_the_index_states_stops_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_toy(tmp_path / "data")
    offset = whole.index("train").values(30, ["image_offset"])[0]
    tar = tmp_path / "data/train/00000.tar"
    data = bytearray(tar.read_bytes())
    data[offset + 50] ^= 1
    tar.chmod(0o644)
    tar.write_bytes(data)
    with pytest.raises(DataError, match=r"train/00000\.tar: sample 000030 is not the picture that the index states"):
        reshard(whole, tmp_path / "out", samples_per_shard=20)
    data[offset - 400] ^= 1  # inside its header
    tar.write_bytes(data)
    with pytest.raises(DataError, match=r"train/00000\.tar: .*checksum"):
        reshard(whole, tmp_path / "out", samples_per_shard=20)
    tar.unlink()
    with pytest.raises(DataError, match=r"train/00000\.tar cannot be read \(No such file"):
        reshard(whole, tmp_path / "out", samples_per_shard=20)


def test_a_key_that_two_shards_have_cannot_be_in_one(tmp_path: Path) -> None:
    samples = [drawn_sample(number, color=COLORS[number], shape=SHAPES[0]) for number in range(4)]
    folder = tmp_path / "data"
    entries = [shards.write_shard(folder, f"train/{number:05d}.tar", [replace(sample, key="one") for sample in samples[number:number + 1]])
               for number in range(2)]
    dataset = shards.seal_dataset(folder, name="twice", sources=[], splits={"train": entries}, readme="")
    with pytest.raises(DataError, match="has the key 'one' twice, and a shard cannot"):
        reshard(dataset, tmp_path / "out", samples_per_shard=2)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 64, 65, 100, 1000, 4097])
def test_a_shuffle_is_of_every_number_once_and_the_same_piece_by_piece(count: int) -> None:
    order = shuffled(np.arange(count), count, key="a")
    assert sorted(order) == list(range(count))
    size = 1 + count // 9
    pieces = [shuffled(np.arange(first, min(first + size, count)), count, key="a") for first in range(0, count, size)]
    assert np.array_equal(np.concatenate(pieces), order)


def test_a_shuffle_leaves_no_trace_of_the_order_before() -> None:
    """Over many keys each number comes to each place about equally often, and neighbours part."""
    seen = np.zeros((12, 12))
    for key in range(1200):
        seen[np.arange(12), shuffled(np.arange(12), 12, key=str(key))] += 1
    assert ((seen - 100) ** 2 / 100).sum() < 200  # chi-square of 121 degrees of freedom; 99.999 % stay below 195
    order = shuffled(np.arange(100_000), 100_000, key="a")
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert (np.abs(np.diff(order)) < 1000).mean() == pytest.approx(0.02, abs=0.003)


def test_long_work_tells_how_far_it_is(
        whole: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(derive, "LINE_SECONDS", 0)
    reshard(whole, tmp_path / "out", samples_per_shard=40)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == [f"{number}/80" for number in range(1, 81)]
    assert all(re.fullmatch(r"\d+/80 images  [\d,]+ images/s  0:00:\d\d left", line) for line in lines)


def test_shards_without_a_picture_are_passed_over(tmp_path: Path) -> None:
    """A preparation leaves them where every row was rejected; they have no scores either."""
    samples = [replace(drawn_sample(number, color=COLORS[number], shape=SHAPES[0]), columns={"clip_score": number / 4}) for number in range(4)]
    entries = [shards.write_shard(tmp_path / "data", f"train/{number:05d}.tar", of_shard)
               for number, of_shard in enumerate([[], samples[:2], [], samples[2:], []])]
    dataset = shards.seal_dataset(tmp_path / "data", name="gaps", sources=[], splits={"train": entries}, readme="")
    made = open_dataset(reshard(dataset, tmp_path / "out", samples_per_shard=3).folder)
    assert [made.index("train").values(number, ["clip_score"]) for number in range(4)] == [[0.0], [0.25], [0.5], [0.75]]
    subset = open_dataset(filter_dataset(dataset, tmp_path / "kept", where=["clip_score < 0.4"]).folder)
    assert [shard.name for shard in subset.shards()] == ["train/00001.tar"]
    assert subset.manifest.derivations[0].counts == {"clip_score < 0.4": 2}
    assert verify(made) == verify(subset) == []


def test_the_command_tells_what_it_made_and_refuses_what_cannot_be(whole: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "reshard", str(whole.folder), "--out", str(tmp_path / "out"), "--samples-per-shard"]
    assert main([*words, "40"]) == 0
    assert f"{tmp_path / 'out'}: 80 samples in 4 shards (" in capsys.readouterr().out
    assert main([*words, "0"]) == 2
    assert "--samples-per-shard (0) must be 1 to 300000" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        reshard(whole, tmp_path / "other", samples_per_shard=-1)


def test_a_dataset_written_without_a_tokenizer_is_resharded_without(tmp_path: Path) -> None:
    made = open_dataset(reshard(bare_dataset(tmp_path / "data"), tmp_path / "out", samples_per_shard=4).folder)
    assert made.tokenizer_fingerprint == ""
    assert verify(made) == []
