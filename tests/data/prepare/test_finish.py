"""Behind the last shard: the first of equal pictures stays, the others go, and a kill at any moment changes nothing of that."""

import itertools
import os
import shutil
import signal
import sys
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from flm_scale.data.demo import train_dataset_tokenizer
from flm_scale.data.manifest import Shard
from flm_scale.data.prepare import finish as module
from flm_scale.data.prepare.finish import finish
from flm_scale.data.prepare.inputs import Input, open_inputs
from flm_scale.data.prepare.rewrite import STAGING, is_whole, settle
from flm_scale.data.prepare.spec import FilterConfig, InputConfig, Spec
from flm_scale.data.prepare.stages import plan_work, prepare_shard
from flm_scale.data.shards import Dataset, open_dataset, read_committed_shard
from flm_scale.data.sidecars import TokenIds
from flm_scale.data.tar import read_shard
from flm_scale.data.tokens import Tokenizer, train_tokenizer
from tests.data.prepare.pictures import drawn, picture

SPEC = Spec(samples_per_shard=4, input=InputConfig(kind="folder"), filter=FilterConfig(near_duplicates=True))
# Number of the picture, what was done to it, and what becomes of it.
PICTURES = [(0, "", ""), (1, "", ""), (2, "", ""), (3, "", ""),
            (1, "", "duplicate"), (4, "", ""), (0, "smaller", "near_duplicate"), (0, "", "duplicate"),
            (5, "", ""), (6, "", ""), (7, "", ""), (8, "", ""),
            (4, "", "duplicate"), (4, "smaller", "near_duplicate"), (4, "", "duplicate"), (1, "smaller", "near_duplicate")]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Input]:
    folder = tmp_path_factory.mktemp("pictures")
    for place, (number, change, _) in enumerate(PICTURES):
        file = folder / f"{place:02d}.jpg"
        if change:
            drawn(number).resize((320, 240), Image.Resampling.LANCZOS).save(file, quality=92)
        else:
            file.write_bytes(picture(number))
        file.with_suffix(".txt").write_text(f"picture {place}")
    return open_inputs(SPEC, [folder])


@pytest.fixture(scope="module")
def before(inputs: list[Input], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("before")
    prepare(folder, inputs)
    return folder


def prepare(folder: Path, inputs: list[Input], spec: Spec = SPEC) -> list[Shard]:
    """Do what is not done yet, as a driver would."""
    settle(folder)
    for work in plan_work(spec, inputs):
        if read_committed_shard(folder, work.name) is None:
            prepare_shard(folder, spec, inputs, work, attempt=1)
    return committed(folder, inputs, spec)


def committed(folder: Path, inputs: list[Input], spec: Spec = SPEC) -> list[Shard]:
    shards = [read_committed_shard(folder, work.name) for work in plan_work(spec, inputs)]
    assert all(shards)
    return shards  # type: ignore[return-value]


def fates(dataset: Dataset) -> list[str]:
    return [message or "" for shard in dataset.shards() for message in
            parquet.read_table(dataset.folder / shard.table_name)["error_message"].to_pylist()]


def test_the_first_of_equal_pictures_stays_and_keeps_its_bytes(inputs: list[Input], before: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(before, tmp_path / "data")
    dataset = finish(folder, SPEC, inputs, committed(folder, inputs))
    assert fates(dataset) == [fate for *_, fate in PICTURES]
    held = {sample.key: sample.members for shard in dataset.shards() for sample in read_shard(folder / shard.name)}
    old = {sample.key: sample.members for shard in sorted((before / "train").glob("*.tar")) for sample in read_shard(shard)}
    assert held == {key: old[key] for key, (*_, fate) in zip(sorted(old), PICTURES, strict=True) if not fate}
    opened = open_dataset(folder)
    assert len(opened.index("train")) == len(held) == opened.manifest.splits["train"].images
    assert opened.manifest.preparation is not None
    assert opened.manifest.preparation.fates == {"duplicate": 4, "near_duplicate": 3, "success": 9}
    assert opened.manifest.preparation.spec_hash == SPEC.hash
    assert [entry.rows for entry in opened.manifest.preparation.inputs] == [len(PICTURES)]
    assert "| duplicate | 4 |" in (folder / "README.md").read_text()
    assert not (folder / STAGING).exists()


def test_a_shard_without_its_duplicates_is_as_if_it_had_been_written_so(inputs: list[Input], before: Path, tmp_path: Path) -> None:
    """Its tar and index equal those of a preparation in which these rows were never kept."""
    folder = shutil.copytree(before, tmp_path / "data")
    entries = finish(folder, SPEC, inputs, committed(folder, inputs)).shards()
    for work, entry in zip(plan_work(SPEC, inputs), entries, strict=True):
        gone = [row for row in range(4) if PICTURES[work.first + row][2]]
        prepare_shard(tmp_path / "other", SPEC, inputs, work, attempt=0, skip=gone)
        other = read_committed_shard(tmp_path / "other", work.name)
        assert other
        assert (other.sha256, other.index_sha256) == (entry.sha256, entry.index_sha256)


def test_finishing_twice_or_with_several_workers_gives_the_same_root(inputs: list[Input], before: Path, tmp_path: Path) -> None:
    folder, other = (shutil.copytree(before, tmp_path / name) for name in ("one", "other"))
    root = finish(folder, SPEC, inputs, committed(folder, inputs)).root
    assert finish(folder, SPEC, inputs, committed(folder, inputs)).root == root
    with ThreadPoolExecutor(3) as threads:
        assert finish(other, SPEC, inputs, committed(other, inputs), run=threads.map).root == root


def test_a_tokenizer_that_was_trained_since_stays_the_datasets(inputs: list[Input], before: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(before, tmp_path / "data")
    finish(folder, SPEC, inputs, committed(folder, inputs))
    train_dataset_tokenizer(folder, vocab_size=40)
    root = open_dataset(folder).root
    (folder / "dataset.json").unlink()  # as `retry` and `repair` do, which may then be killed
    assert finish(folder, SPEC, inputs, committed(folder, inputs)).root == root


@pytest.mark.parametrize(("changes", "kinds"), [({"near_duplicates": False}, {"duplicate"}), ({"duplicates": False}, {"near_duplicate"}),
                                                ({"duplicates": False, "near_duplicates": False}, set())])
def test_each_kind_of_duplicate_can_be_left_in(changes: dict[str, bool], kinds: set[str], inputs: list[Input], tmp_path: Path) -> None:
    spec = SPEC.replace(filter=SPEC.filter.replace(**changes))
    found = fates(finish(tmp_path, spec, inputs, prepare(tmp_path, inputs, spec)))
    assert set(found) - {""} == kinds
    assert {place for place, fate in enumerate(found) if fate == "duplicate"} == (
        {place for place, (*_, fate) in enumerate(PICTURES) if fate == "duplicate"} if "duplicate" in kinds else set())


def killed_before_change(number: int, action: Callable[[], object]) -> bool:
    """Run the action in a fork that ends before its change of the disk of that number; return whether it did."""
    child = os.fork()
    if child == 0:
        numbers = itertools.count()

        def watch(event: str, args: tuple[Any, ...]) -> None:
            is_opened_to_write = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
            if (is_opened_to_write or event in {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}) and next(numbers) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        try:
            action()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.mark.slow
def test_finish_killed_at_any_change_of_the_disk_and_begun_again_gives_the_same_root(inputs: list[Input], before: Path, tmp_path: Path) -> None:
    whole = shutil.copytree(before, tmp_path / "whole")
    root = finish(whole, SPEC, inputs, committed(whole, inputs)).root
    names = {path.relative_to(whole) for path in whole.rglob("*")}
    for number in itertools.count():
        folder = shutil.copytree(before, tmp_path / str(number))
        is_killed = killed_before_change(number, lambda: finish(folder, SPEC, inputs, committed(folder, inputs)))  # noqa: B023 - called at once
        if number % 2:  # a driver that does not settle first prepares half a shard again
            shards = [entry for work in plan_work(SPEC, inputs) if (entry := read_committed_shard(folder, work.name)) or prepare_shard(
                folder, SPEC, inputs, work, attempt=2)]
            shards = committed(folder, inputs)
        else:
            shards = prepare(folder, inputs)
        assert finish(folder, SPEC, inputs, shards).root == root
        assert {path.relative_to(folder) for path in folder.rglob("*")} == names
        assert not [line for shard in open_dataset(folder).shards() if (line := read_committed_shard(folder, shard.name)) != shard]
        shutil.rmtree(folder)
        if not is_killed:
            break
    assert number > 40


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=30), st.integers(1, 4))
def test_every_sample_that_equals_an_earlier_one_goes_however_many_files_sort_them(samples: list[tuple[int, int]], buckets: int) -> None:
    seen: dict[str, set[int]] = defaultdict(set)
    expected = []
    for place, (one, other) in enumerate(samples):
        if one in seen["one"] or other in seen["other"]:
            expected.append(place)
        seen["one"].add(one)
        seen["other"].add(other)
    found: list[int] = []
    for values in zip(*samples, strict=True):
        records = np.zeros(len(samples), module.RECORD)
        records["hash"][:, 0], records["place"] = values, range(len(samples))
        for bucket in range(buckets):
            found += module._later_ones(records[records["hash"][:, 0] % buckets == bucket]).tolist()
    assert sorted(set(found)) == expected


def test_the_tokenizer_of_the_spec_becomes_the_datasets(inputs: list[Input], tmp_path: Path) -> None:
    model = tmp_path / "words.model"
    train_tokenizer([f"picture {number}" for number in range(40)], vocab_size=60, model_file=model)
    spec = SPEC.replace(tokenizer=model)
    dataset = finish(tmp_path / "data", spec, inputs, prepare(tmp_path / "data", inputs, spec))
    opened = open_dataset(tmp_path / "data", tokenizer_hash=dataset.tokenizer_fingerprint)
    assert opened.tokenizer_file.read_bytes() == model.read_bytes()
    ids = TokenIds(opened, "train", Tokenizer(model))
    assert [len(ids[number]) for number in range(9)] == [1] * 9  # a caption each, of the shards without their duplicates
    assert spec.hash != SPEC.hash


def test_files_of_one_name_are_no_duplicates_unless_their_bytes_are(tmp_path: Path) -> None:
    """Two cameras number their pictures alike, and whoever wrote the captions had little to say."""
    for camera in range(2):
        (tmp_path / f"camera{camera}").mkdir()
        for number in range(3):
            file = tmp_path / f"camera{camera}" / f"{number}.jpg"
            file.write_bytes(picture(10 * camera + number))
            file.with_suffix(".txt").write_text("a dog")
    spec = SPEC.replace(filter=FilterConfig())
    inputs = open_inputs(spec, [tmp_path / "camera0", tmp_path / "camera1"])
    dataset = finish(tmp_path / "out", spec, inputs, prepare(tmp_path / "out", inputs, spec))
    assert dataset.manifest.preparation.fates == {"success": 6}


def test_a_shard_with_files_of_two_writers_is_found_and_made_again(inputs: list[Input], before: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(before, tmp_path / "raced")
    shard = committed(folder, inputs)[0]
    tar = bytearray((folder / shard.name).read_bytes())
    tar[700] ^= 1
    (folder / shard.name).write_bytes(tar)
    assert [is_whole(before, one.name) for one in committed(before, inputs)] == [True] * len(committed(before, inputs))
    assert not is_whole(folder, shard.name)
    assert read_committed_shard(folder, shard.name) is None
    assert prepare(folder, inputs) == committed(before, inputs)
