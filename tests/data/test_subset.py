"""A subset is exactly the samples that were asked for, without a picture written; token ids are those of its captions; nothing else passes for it."""

import errno
import fcntl
import os
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from flm_scale.cli import main
from flm_scale.data import shards, sidecars
from flm_scale.data import subset as subset_module
from flm_scale.data.derive import Rewriter
from flm_scale.data.manifest import Derivation
from flm_scale.data.shards import Dataset, open_dataset, write_dataset
from flm_scale.data.sidecars import give_tokenizer, write_sidecars
from flm_scale.data.storage import file_sha256
from flm_scale.data.subset import UIDS, filter_dataset, parse_condition, read_keys
from flm_scale.data.tokens import Tokenizer, train_tokenizer
from flm_scale.data.verify import verify
from flm_scale.errors import ConfigError, DataError
from tests.conftest import COLORS, SHAPES, drawn_sample
from tests.data.killed import is_killed_before_change

SCORES = [round(0.1 + 0.013 * (7 * number % 30), 3) for number in range(30)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """24 + 6 samples in shards of eight, with scores and a tokenizer; number 29 has no score."""
    samples = [drawn_sample(number, color=COLORS[number % 4], shape=SHAPES[number // 4 % 2]) for number in range(30)]
    samples = [replace(sample, key=f"{number:032x}", columns={"clip_score": SCORES[number] if number < 29 else float("nan"),
                                                              "phash": 2**64 - 1 - number, "original_width": 100 + number})
               for number, sample in enumerate(samples)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SAMPLES_PER_SHARD", 8)
        dataset = write_dataset(tmp_path_factory.mktemp("whole") / "data", name="whole", sources=[], readme="Drawn.",
                                splits={"train": samples[:24], "val": samples[24:]})
    train_tokenizer((text for sample in samples for text in sample.captions), vocab_size=80, model_file=dataset.tokenizer_file)
    give_tokenizer(dataset)
    return open_dataset(dataset.folder)


def numbers_of(dataset: Dataset, split: str) -> list[int]:
    return [int(key, 16) for key in dataset.index(split).keys]


def test_subset_has_exactly_what_meets_all_conditions_and_the_tars_of_the_whole(whole: Dataset, tmp_path: Path) -> None:
    made = filter_dataset(whole, tmp_path / "kept", where=["clip_score >= 0.2", "original_width<125"], captions_at_least=2)
    subset = open_dataset(tmp_path / "kept", manifest_hash=made.root, tokenizer_hash=whole.tokenizer_fingerprint)
    expected = [number for number in range(25) if SCORES[number] >= 0.2 and number % 3 >= 1]
    assert numbers_of(subset, "train") + numbers_of(subset, "val") == expected
    assert 0 < len(expected) < 25
    index, parent = subset.index("train"), whole.index("train")
    for place, number in enumerate(numbers_of(subset, "train")):
        assert index.read_image(place) == parent.read_image(number)
        assert index.captions[place] == parent.captions[number]
    assert verify(subset) == verify(subset, fast=True) == []
    for shard in subset.shards():
        assert (subset.folder / shard.name).samefile(whole.folder / shard.name)
    (step,) = subset.manifest.derivations
    assert (step.parent, step.by) == (whole.root, "filter")
    assert step.counts == {"clip_score >= 0.2": sum(score >= 0.2 for score in SCORES[:29]), "original_width < 125": 25, "captions >= 2": 20}
    assert subset.root != whole.root == open_dataset(whole.folder).root


def test_token_ids_are_cut_to_the_bytes_that_encoding_gives(whole: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.delattr(sidecars, "write_sidecar")  # nothing is encoded
        subset = filter_dataset(whole, tmp_path / "kept", where=["clip_score > 0.2"])
    files = [file for file in (subset.folder / "tokens").rglob("*") if file.is_file()]
    cut = {file: file.read_bytes() for file in files}
    for file in files:
        file.unlink()
    write_sidecars(subset, Tokenizer(subset.tokenizer_file))
    assert {file: file.read_bytes() for file in files} == cut


def test_shards_without_a_kept_sample_are_left_out_and_a_subset_has_subsets(whole: Dataset, tmp_path: Path) -> None:
    first = filter_dataset(whole, tmp_path / "first", where=["original_width >= 107", "original_width < 120"])
    assert [shard.name for shard in first.shards()] == ["train/00000.tar", "train/00001.tar", "train/00002.tar"]
    assert [(split, of_split.images) for split, of_split in first.manifest.splits.items()] == [("train", 13), ("val", 0)]
    second = open_dataset(filter_dataset(first, tmp_path / "second", where=["original_width < 116"]).folder)
    assert [shard.count for shard in second.shards()] == [1, 8]
    assert verify(second) == []
    assert [step.parent for step in second.manifest.derivations] == [whole.root, first.root]


def test_a_killed_filter_goes_on_to_the_root_of_an_undisturbed_one(whole: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = filter_dataset(whole, tmp_path / "undisturbed", where=["clip_score >= 0.2", "width == 20"])
    write, out = Rewriter.write, tmp_path / "kept"

    def dies(self: Rewriter, *args: object, **options: object) -> object:
        if (out / "train/00001_stats.json").exists():
            raise KeyboardInterrupt
        return write(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Rewriter, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            filter_dataset(whole, out, where=["clip_score >= 0.2", "width == 20"])
    with pytest.raises(DataError, match="holds an unfinished build"):
        open_dataset(out)
    with pytest.raises(DataError, match="unfinished build of something else"):
        filter_dataset(whole, out, where=["clip_score >= 0.3"])
    before = (out / "train/00000_stats.json").stat().st_mtime_ns
    assert filter_dataset(whole, out, where=["width == 20", "clip_score >= 0.2"]).root == undisturbed.root  # in any order
    assert (out / "train/00000_stats.json").stat().st_mtime_ns == before
    assert not (out / ".unfinished").exists()
    assert open_dataset(out).tokenizer_fingerprint == whole.tokenizer_fingerprint


@pytest.mark.slow
def test_killed_before_any_change_of_the_disk_it_is_finished_by_the_same_command(whole: Dataset, tmp_path: Path) -> None:
    undisturbed = filter_dataset(whole, tmp_path / "undisturbed", where=["original_width < 103"])
    for number in count():
        out = tmp_path / str(number)
        if not is_killed_before_change(number, lambda: filter_dataset(whole, out, where=["original_width < 103"])):  # noqa: B023 - called at once
            break
        made = open_dataset(filter_dataset(whole, out, where=["original_width < 103"]).folder)
        assert (made.root, verify(made)) == (undisturbed.root, [])
        assert not [file for file in out.rglob(".*") if file.is_file()]
    assert number > 15  # links, index, token ids, counts, seal, tokenizer


def test_a_folder_is_never_written_over_and_the_same_again_is_left_alone(whole: Dataset, tmp_path: Path) -> None:
    made = filter_dataset(whole, tmp_path / "kept", where=["width == 20"])
    (tmp_path / "kept/tokenizer.model").touch()
    times = {file: file.stat().st_mtime_ns for file in made.folder.rglob("*")}
    assert filter_dataset(whole, tmp_path / "kept", where=["width == 20"]).root == made.root
    assert {file: file.stat().st_mtime_ns for file in made.folder.rglob("*")} == times
    with pytest.raises(DataError, match="holds another dataset"):
        filter_dataset(whole, tmp_path / "kept", where=["width >= 20"])
    with pytest.raises(DataError, match="holds another dataset"):
        filter_dataset(whole, whole.folder, where=["width == 20"])


def test_two_commands_never_work_in_one_folder(whole: Dataset, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    with (tmp_path / "kept/.unfinished").open("w") as mark:
        fcntl.flock(mark, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is making this dataset"):
            filter_dataset(whole, tmp_path / "kept", where=["width == 20"])


def test_where_files_have_no_second_name_tars_are_symbolic_links_and_it_is_said(
        whole: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    subset = filter_dataset(whole, tmp_path / "kept", where=["clip_score >= 0.2"])
    assert (subset.folder / "train/00000.tar").readlink() == whole.folder / "train/00000.tar"
    assert f"symbolic links, because the file system gives them no second name; keep {whole.folder}" in capsys.readouterr().err
    assert verify(open_dataset(subset.folder)) == []


def test_verify_knows_a_subset_by_what_the_dataset_says(whole: Dataset, tmp_path: Path) -> None:
    subset = filter_dataset(whole, tmp_path / "kept", where=["original_width != 101"])
    moved = whole.index("train").values(3, ["image_offset"])[0]
    as_whole = Dataset(subset.folder, subset.manifest.model_copy(update={"derivations": []}), subset.shards())
    assert "00000.tar" in verify(as_whole)[0]
    file = subset.folder / subset.shards()[0].index_name
    file.write_bytes(file.read_bytes().replace(moved.to_bytes(8, "little"), (moved + 512).to_bytes(8, "little")))
    shard = subset.shards()[0].model_copy(update={"index_sha256": file_sha256(file)})
    lying = Dataset(subset.folder, subset.manifest, shards.Shards.of([shard, *list(subset.shards())[1:]]))
    assert "shard train/00000.tar holds other keys or places than its index states" in verify(lying)


def test_only_what_was_not_written_anew_since_it_was_filtered_is_a_subset(whole: Dataset) -> None:
    def is_subset(*steps: str) -> bool:
        made = [Derivation(parent="", by=step, values={}) for step in steps]
        return whole.manifest.model_copy(update={"derivations": made}).is_subset

    assert is_subset("filter")
    assert is_subset("reshard", "filter", "score")
    assert not is_subset()
    assert not is_subset("score")
    assert not is_subset("filter", "reshard", "score")


@pytest.mark.parametrize(("text", "normal", "kept"), [
    ("clip_score>=0.28", "clip_score >= 0.28", [n for n in range(24) if SCORES[n] >= 0.28]),
    (" clip_score == 0.1 ", "clip_score == 0.1", [0]), ("clip_score < 1.5e-1", "clip_score < 0.15", [n for n in range(24) if SCORES[n] < 0.15]),
    ("phash > 18446744073709551613", "phash > 18446744073709551613", [0, 1]), ("original_width <= 101", "original_width <= 101", [0, 1]),
    ("image_bytes != 0", "image_bytes != 0", [*range(24)]), ("width > -1", "width > -1", [*range(24)]),
    ("width < 99999999999999999999", "width < 99999999999999999999", [*range(24)])])
def test_a_condition_compares_a_number_of_the_index_exactly(whole: Dataset, tmp_path: Path, text: str, normal: str, kept: list[int]) -> None:
    assert parse_condition(text)[0] == normal
    assert numbers_of(filter_dataset(whole, tmp_path / "kept", where=[text]), "train") == kept


def test_a_score_that_is_no_number_meets_no_bound(whole: Dataset, tmp_path: Path) -> None:
    assert 29 not in numbers_of(filter_dataset(whole, tmp_path / "kept", where=["clip_score > -1"]), "val")


@pytest.mark.parametrize("text", ["clip_score", "clip_score = 0.3", "0.3 < clip_score", "clip_score > 0.3 or 1", "__import__('os') > 1",
                                  "width > 1.2.3", "width > nan", "", "width > clip_score"])
def test_what_is_no_condition_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is no condition; .* 'clip_score >= 0.28'"):
        parse_condition(text)


def test_mistakes_are_told_in_one_line_and_leave_nothing(whole: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(*words: str) -> str:
        assert main(["data", "filter", str(whole.folder), "--out", str(tmp_path / "kept"), *words]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    assert "say which samples to keep" in told()
    assert "no column of numbers 'clip_scor'; did you mean 'clip_score'?" in told("--where", "clip_scor >= 0.2")
    assert "no column of numbers 'key'" in told("--where", "key == 1")
    assert "no sample is left (clip_score > 2: 0)" in told("--where", "clip_score > 2")
    assert "cannot be read" in told("--keys", str(tmp_path / "none"))
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    assert "cannot be read" in told("--keys", str(tmp_path / "objects.npy"))
    np.save(tmp_path / "wide.npy", np.zeros(3))
    assert "DataComp's subset files hold pairs of u8" in told("--keys", str(tmp_path / "wide.npy"))
    assert main(["data", "filter", str(whole.folder), "--out", str(tmp_path / "kept"), "--where", "clip_score > 0.2", "width > 1"]) == 0
    assert "width > 1: 30" in capsys.readouterr().out


def test_keys_are_a_text_or_datacomps_sorted_pairs(whole: Dataset, tmp_path: Path) -> None:
    wanted = [3, 4, 11, 26]
    (tmp_path / "keys.txt").write_text("".join(f"{number:032x}\n" for number in [*wanted, 99]))
    np.save(tmp_path / "keys.npy", np.array([(0, number) for number in [*wanted, 99]], UIDS))
    roots = []
    for name in ("keys.txt", "keys.npy"):
        subset = filter_dataset(whole, tmp_path / name.replace(".", "-"), keys=tmp_path / name)
        assert numbers_of(subset, "train") + numbers_of(subset, "val") == wanted
        assert subset.manifest.derivations[0].counts == {"keys": 4}
        roots.append(subset.root)
    assert roots[0] != roots[1]  # it is stated which file it was
    np.save(tmp_path / "none.npy", np.zeros(0, UIDS))
    with pytest.raises(DataError, match=r"no sample is left \(keys: 0\)"):
        filter_dataset(whole, tmp_path / "none", keys=tmp_path / "none.npy")


def test_uids_are_found_as_in_a_set_whatever_their_halves(tmp_path: Path) -> None:
    import pyarrow as pa

    rng = np.random.default_rng(0)
    top = 2**64 - 1
    halves = rng.choice(np.array([0, 1, 2, top - 1, top, *rng.integers(0, top, 30, np.uint64)], np.uint64), (400, 2))  # first halves meet often
    everything = sorted({(int(high), int(low)) for high, low in halves})
    held = [uid for number, uid in enumerate(everything) if number % 3]
    np.save(tmp_path / "uids.npy", np.array(held, UIDS))
    batch = pa.record_batch({"key": [f"{high:016x}{low:016x}" for high, low in everything]})
    assert read_keys(tmp_path / "uids.npy")(batch).tolist() == [uid in set(held) for uid in everything]


def test_uids_that_are_not_sorted_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subset_module, "CHECKED_AT_ONCE", 2)
    for name, uids in {"first": [(0, 1), (5, 0), (5, 0), (9, 9), (8, 9)], "second": [(0, 1), (5, 1), (5, 0)]}.items():
        np.save(tmp_path / f"{name}.npy", np.array(uids, UIDS))
        with pytest.raises(DataError, match=rf"{name}\.npy is not sorted"):
            read_keys(tmp_path / f"{name}.npy")


def test_uids_for_a_dataset_of_other_keys_are_refused(toy_dataset: Dataset, tmp_path: Path) -> None:
    np.save(tmp_path / "uids.npy", np.zeros(1, UIDS))
    with pytest.raises(ConfigError, match="key '000072' is no uid of 32 hex digits; give --keys as a text"):
        filter_dataset(toy_dataset, tmp_path / "kept", keys=tmp_path / "uids.npy")
