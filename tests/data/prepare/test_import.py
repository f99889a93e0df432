"""Tars that are there already become a dataset's shards as they are: linked, never written into, no picture decoded; the index says what stays."""

import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import webdataset
from pyarrow import parquet

from flm_scale.cli import main
from flm_scale.data import images
from flm_scale.data.index import index_columns, map_index
from flm_scale.data.manifest import Derivation, Shard
from flm_scale.data.prepare import finish as finish_module
from flm_scale.data.prepare import inputs as inputs_module
from flm_scale.data.prepare import rewrite
from flm_scale.data.prepare.finish import Runner, finish
from flm_scale.data.prepare.inputs import open_inputs
from flm_scale.data.prepare.rewrite import settle
from flm_scale.data.prepare.spec import FilterConfig, ImageConfig, InputConfig, Spec
from flm_scale.data.prepare.stages import plan_work, prepare_shard
from flm_scale.data.reshard import reshard
from flm_scale.data.shards import Dataset, open_dataset, read_committed_shard
from flm_scale.data.subset import filter_dataset
from flm_scale.data.tar import ShardError, list_members, read_shard
from flm_scale.data.verify import verify
from flm_scale.errors import ConfigError, DataError
from flm_scale.score import score
from tests import test_score
from tests.data import hostile
from tests.data.hostile import encoded, png
from tests.data.killed import is_killed_before_change
from tests.data.object_store import open_store, serve_s3
from tests.data.prepare.pictures import drawn, picture
from tests.data.test_loader import assert_equal, loader_of, toy_run

THEIRS = Path(__file__).parents[1] / "img2dataset"
ADOPT = InputConfig(kind="shards", adopt=True)
FORBIDDEN = picture(77)
# Key, members and the fate of each sample.
FIRST: list[tuple[str, dict[str, bytes], str]] = [
    ("000010005", {"jpg": picture(0), "txt": b"one", "json": json.dumps({"url": "http://x/0.jpg", "LICENSE": "MIT", "concept": "dog"}).encode()}, ""),
    ("mp3", {"jpg": picture(1), "mp3": b"noise", "txt": b"with noise"}, "extension"),
    ("a/b@2", {"jpeg": picture(2), "txt": b"words"}, ""),
    ("odd key", {"jpg": picture(3), "txt": b"a blank in its name"}, "key"),
    ("gif", {"jpg": encoded("GIF"), "txt": b"moves"}, "format"),
    ("bomb", {"png": png(30_000, 30_000, pixels=b"\0" * 3000), "txt": b"a bomb"}, "pixels"),
    ("png-as-jpg", {"jpg": picture(4, kind="PNG"), "txt": b"a PNG by another name"}, ""),
    ("broken", {"jpg": picture(5), "json": b"{", "txt": b"broken"}, "bad_json"),
    ("none", {"txt": b"no picture"}, "no_image"),
    ("words", {"jpg": picture(6)}, "no_caption"),
    ("tiny", {"jpg": picture(7, width=60, height=60), "txt": b"very small"}, "small"),
    ("two", {"jpg": picture(8), "png": picture(8, kind="PNG"), "txt": b"twice"}, "two_images"),
    ("closed", {"jpg": picture(9), "json": b'{"LICENSE": "closed"}', "txt": b"not for us"}, "column_LICENSE"),
    ("evaluation", {"jpg": FORBIDDEN, "txt": b"of an evaluation"}, "forbidden"),
    ("last", {"webp": picture(10, kind="WEBP"), "txt": b"the last one"}, "")]
SECOND: list[tuple[str, dict[str, bytes], str]] = [
    ("000000", {"jpg": picture(2), "txt": b"seen before"}, "duplicate"), ("000001", {"jpg": picture(11), "txt": b"new"}, ""),
    ("last", {"jpg": picture(12), "txt": b"a key of the other tar"}, ""), ("000003", {"jpg": picture(11), "txt": b"again"}, "duplicate")]


def write_tar(file: Path, samples: list[tuple[str, dict[str, bytes], str]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream, webdataset.TarWriter(stream, encoder=False) as writer:
        for key, members, _ in samples:
            writer.write({"__key__": key, **members})
    return file


def imported(folder: Path, paths: list[Path], spec: Spec, *, run: Runner = map, skip: tuple[int, ...] = ()) -> Dataset:
    """Do what is not done yet, as a driver would."""
    folder.mkdir(exist_ok=True)
    inputs = open_inputs(spec, paths)
    settle(folder)
    for work in plan_work(spec, inputs):
        if read_committed_shard(folder, work.name) is None:
            prepare_shard(folder, spec, inputs, work, attempt=0, skip=skip)
    shards = [entry for work in plan_work(spec, inputs) if (entry := read_committed_shard(folder, work.name))]
    finish(folder, spec, inputs, shards, run=run)
    return open_dataset(folder)


def table_of(dataset: Dataset, shard: Shard) -> list[dict[str, Any]]:
    return parquet.read_table(dataset.folder / shard.table_name).to_pylist()


def pictures_of(dataset: Dataset) -> list[bytes]:
    index = dataset.index("train")
    return [index.read_image(number) for number in range(len(index))]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    forbidden = tmp_path_factory.mktemp("forbidden") / "sums.txt"
    forbidden.write_text(hashlib.sha256(FORBIDDEN).hexdigest() + "\n")
    return Spec(input=ADOPT, image=ImageConfig(min_side=70), filter=FilterConfig(where=("LICENSE!=closed",), forbidden=forbidden))


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two, with what else a crawl leaves in one, and an empty one between them."""
    folder = tmp_path_factory.mktemp("tars")
    write_tar(folder / "00003.tar", FIRST)
    write_tar(folder / "00004.tar", [])
    write_tar(folder / "00007.tar", SECOND)
    (folder / "00003_stats.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def whole(spec: Spec, tars: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Both tars, without a decoder at hand."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(images, "_decode")
        return imported(tmp_path_factory.mktemp("whole"), [tars], spec)


def test_each_tar_is_a_shard_under_a_second_name_and_none_is_copied(whole: Dataset, tars: Path) -> None:
    assert [shard.name for shard in whole.shards()] == ["train/00000.tar", "train/00001.tar"]
    for shard, name in zip(whole.shards(), ["00003.tar", "00007.tar"], strict=True):
        ours, theirs = (whole.folder / shard.name).lstat(), (tars / name).stat()
        assert (ours.st_ino, ours.st_dev) == (theirs.st_ino, theirs.st_dev)


def test_every_sample_of_a_tar_ends_with_its_own_key_and_fate_in_the_table(whole: Dataset) -> None:
    for shard, samples in zip(whole.shards(), (FIRST, SECOND), strict=True):
        table = table_of(whole, shard)
        assert [(row["key"], row["error_message"] or "") for row in table] == [(key, fate) for key, _, fate in samples]
    assert whole.manifest.preparation.fates == Counter(fate or "success" for _, _, fate in FIRST + SECOND)
    first = table_of(whole, whole.shards()[0])[0]
    assert (first["url"], first["caption"], first["sha256"]) == ("http://x/0.jpg", "one", hashlib.sha256(picture(0)).hexdigest())


def test_the_index_has_what_stays_and_reads_the_bytes_of_the_tar(whole: Dataset) -> None:
    kept = [(key, members) for key, members, fate in FIRST + SECOND if not fate]
    index = whole.index("train")
    assert list(index.keys) == [key for key, _ in kept]
    assert list(index.captions) == [[members["txt"].decode()] for _, members in kept]
    assert list(index.concepts) == ["dog"] + [""] * (len(kept) - 1)
    assert pictures_of(whole) == [
        next(content for extension, content in members.items() if extension not in {"txt", "json"}) for _, members in kept]
    assert verify(whole) == verify(whole, fast=True) == []


def test_img2datasets_own_shard_is_adopted_with_its_keys_captions_and_columns(tmp_path: Path) -> None:
    dataset = imported(tmp_path / "data", [THEIRS / "00000.tar"], Spec(input=ADOPT.replace(keep=("similarity",))))
    assert (dataset.folder / "train/00000.tar").samefile(THEIRS / "00000.tar")
    rows = {row["key"]: row for row in parquet.read_table(THEIRS / "00000.parquet").to_pylist() if row["status"] == "success"}
    samples = list(read_shard(THEIRS / "00000.tar"))
    index = dataset.index("train")
    assert list(index.keys) == [sample.key for sample in samples]
    assert rows.keys() == {sample.key for sample in samples}
    for number, sample in enumerate(samples):
        assert index.read_image(number) == sample.members["jpg"]
        width, height, captions = index.values(number, ["width", "height", "captions"])
        row = rows[sample.key]
        assert (width, height, captions) == (row["width"], row["height"], [row["caption"]])
    assert {row["key"]: row["similarity"] for row in table_of(dataset, dataset.shards()[0])} == {
        key: None if row["similarity"] is None else str(row["similarity"]) for key, row in rows.items()}
    assert verify(dataset) == []


def test_a_dropped_duplicate_leaves_the_index_as_if_it_had_never_been_in_it_and_no_picture_is_read_for_that(
        spec: Spec, tars: Path, whole: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(rewrite, "read_shard")
    dataset = imported(tmp_path / "data", [tars], spec)
    assert dataset.root == whole.root
    assert dataset.shards()[1].count == 2
    never = imported(tmp_path / "never", [tars / "00007.tar"], spec, skip=(0, 3)).shards()[0]
    assert never.index_sha256 == dataset.shards()[1].index_sha256
    assert not (dataset.folder / rewrite.STAGING).exists()


def test_batches_are_those_of_shards_that_were_copied(toy_dataset: Dataset, tmp_path: Path) -> None:
    copying = Spec(input=InputConfig(kind="shards"), image=ImageConfig(format="png"), samples_per_shard=64, filter=FilterConfig(duplicates=False),
                   tokenizer=toy_dataset.tokenizer_file)
    keyed = imported(tmp_path / "keyed", [toy_dataset.folder / "train"], copying)
    copied = imported(tmp_path / "copied", [keyed.folder / "train"], copying)
    adopted = imported(tmp_path / "adopted", [keyed.folder / "train"], Spec(input=ADOPT, filter=copying.filter, tokenizer=copying.tokenizer))
    assert copied.shards()[0].index_sha256 == adopted.shards()[0].index_sha256
    assert copied.root != adopted.root
    loaders = [loader_of(dataset, toy_run(dataset)) for dataset in (copied, adopted)]
    for _ in range(6):
        steps = [loader.next_step() for loader in loaders]
        assert_equal(*steps)


def test_several_hands_give_the_same_root_and_finishing_twice_does(spec: Spec, tars: Path, whole: Dataset, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as threads:
        assert imported(tmp_path / "data", [tars], spec, run=threads.map).root == whole.root
    assert imported(tmp_path / "data", [tars], spec).root == whole.root


def test_a_tar_may_go_to_a_split_of_its_own(spec: Spec, tars: Path, tmp_path: Path) -> None:
    dataset = imported(tmp_path / "data", [tars / "00003.tar", Path(f"val={tars}/00007.tar")], spec)
    assert (dataset.folder / "val/00000.tar").samefile(tars / "00007.tar")
    assert list(dataset.index("val").keys) == ["000001", "last"]


@pytest.mark.slow
def test_killed_before_any_change_of_the_disk_and_begun_again_it_has_the_same_root(tmp_path: Path) -> None:
    paths = [write_tar(tmp_path / "a.tar", SECOND[:2]), write_tar(tmp_path / "b.tar", SECOND)]
    undisturbed = imported(tmp_path / "undisturbed", paths, Spec(input=ADOPT))
    names = {path.relative_to(undisturbed.folder) for path in undisturbed.folder.rglob("*")}
    hashes = [hashlib.sha256(path.read_bytes()).digest() for path in paths]
    for number in count():
        folder = tmp_path / str(number)
        is_killed = is_killed_before_change(number, lambda: imported(folder, paths, Spec(input=ADOPT)))  # noqa: B023 - called at once
        assert imported(folder, paths, Spec(input=ADOPT)).root == undisturbed.root
        assert {path.relative_to(folder) for path in folder.rglob("*")} == names
        shutil.rmtree(folder)
        if not is_killed:
            break
    assert number > 25
    assert [hashlib.sha256(path.read_bytes()).digest() for path in paths] == hashes


def test_where_the_file_system_gives_no_second_name_links_are_symbolic_and_that_is_said_once(
        spec: Spec, tars: Path, whole: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    dataset = imported(tmp_path / "data", [tars], spec)
    assert (dataset.folder / "train/00001.tar").readlink() == tars / "00007.tar"
    assert capsys.readouterr().err.count("symbolic links, because the file system gives them no second name; keep what was imported") == 1
    assert dataset.root == whole.root
    assert verify(dataset) == []


def test_a_byte_that_changes_behind_the_link_is_found_by_name(spec: Spec, tars: Path, tmp_path: Path) -> None:
    original = tmp_path / "other.tar"
    shutil.copy(tars / "00003.tar", original)
    dataset = imported(tmp_path / "data", [original], spec)
    place = map_index(dataset.folder, dataset.shards()[0]).column("image_offset")[2].as_py() + 5000
    with original.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))
    (line,) = verify(dataset)
    assert line.startswith("shard train/00000.tar has the sha256 ")
    with pytest.raises(DataError, match="sample png-as-jpg is not the picture that the index states"):
        dataset.index("train").read_image(2)


def test_a_tar_that_cannot_be_linked_again_stays_where_a_shard_loses_duplicates(spec: Spec, tars: Path, tmp_path: Path,
                                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    folder, inputs = tmp_path / "data", open_inputs(spec, [tars])
    folder.mkdir()
    works = plan_work(spec, inputs)
    for work in works:
        prepare_shard(folder, spec, inputs, work, attempt=0)

    def refused(_link: Path, _file: Path) -> None:
        raise PermissionError("hard links to somebody else's files are not allowed")

    monkeypatch.setattr(Path, "hardlink_to", refused)
    entries = [read_committed_shard(folder, work.name) for work in works]
    dataset = finish(folder, spec, inputs, [entry for entry in entries if entry])
    assert not any((folder / shard.name).is_symlink() for shard in dataset.shards())
    assert not verify(dataset)


def test_a_tar_that_is_exchanged_while_it_is_imported_is_refused(spec: Spec, tmp_path: Path) -> None:
    original = write_tar(tmp_path / "a.tar", SECOND)
    inputs = open_inputs(spec, [original])

    def exchange(_row: int, stage: str) -> None:
        if stage == "write":
            original.unlink()
            write_tar(original, SECOND * 9)

    with pytest.raises(DataError, match=r"a\.tar has \d+ bytes and had \d+; a tar must not change while it is imported"):
        prepare_shard(tmp_path / "data", spec, inputs, plan_work(spec, inputs)[0], attempt=0, beat=exchange)
    assert read_committed_shard(tmp_path / "data", "train/00000.tar") is None


def test_copies_that_only_look_alike_are_found_by_decoding(tmp_path: Path) -> None:
    drawn(2).resize((320, 240)).save(tmp_path / "smaller.jpg", quality=92)
    samples = [("one", {"jpg": picture(2), "txt": b"one"}, ""),
               ("two", {"jpg": (tmp_path / "smaller.jpg").read_bytes(), "txt": b"two"}, "near_duplicate"),
               ("cut", {"jpg": picture(3)[:9000], "txt": b"half"}, "damaged")]
    dataset = imported(tmp_path / "data", [write_tar(tmp_path / "a.tar", samples)], Spec(input=ADOPT, filter=FilterConfig(near_duplicates=True)))
    assert [row["error_message"] or "" for row in table_of(dataset, dataset.shards()[0])] == [fate for *_, fate in samples]
    (tmp_path / "sums.txt").write_text(f"{index_columns(dataset.folder, dataset.shards()[0], ['phash'])[0][0]:016x}\n")
    spec = Spec(input=ADOPT, filter=FilterConfig(forbidden=tmp_path / "sums.txt"))
    assert imported(tmp_path / "other", [tmp_path / "a.tar"], spec).manifest.preparation.fates == {"damaged": 1, "forbidden": 2}


def test_subsets_and_other_shards_are_made_of_it_as_of_any_dataset(whole: Dataset, tmp_path: Path) -> None:
    kept = list(whole.index("train").keys)
    subset = filter_dataset(whole, tmp_path / "subset", where=["width >= 1"])
    assert list(subset.index("train").keys) == kept
    assert verify(subset) == []
    other = reshard(whole, tmp_path / "other", samples_per_shard=4)
    assert [sample.key for entry in other.shards() for sample in read_shard(other.folder / entry.name)] == list(other.index("train").keys) == kept
    assert pictures_of(other) == pictures_of(whole)
    assert [one.extension for one in list_members(other.folder / "train/00000.tar") if one.key == "a/b@2"] == ["jpeg", "txt"]
    assert verify(other) == []
    with pytest.raises(DataError, match="has the key 'last' twice, and a shard cannot"):
        reshard(whole, tmp_path / "both", samples_per_shard=6)


@pytest.mark.slow
def test_scores_are_of_the_samples_that_stay_and_the_tars_stay_linked(whole: Dataset, tars: Path, tmp_path: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, test_score.NAME, test_score.TINY)
    weights = test_score.write_weights(tmp_path / "weights.pt", seed=0)
    scored = open_dataset(score(whole, tmp_path / "scored", model=test_score.NAME, pretrained=str(weights), device="cpu").folder)
    assert test_score.scores_of(scored, "train") == pytest.approx(test_score.their_scores(whole, "train", weights), abs=1e-5)
    assert (scored.folder / "train/00000.tar").samefile(tars / "00003.tar")
    assert verify(scored) == []


@pytest.mark.slow
@pytest.mark.skipif(not (find_spec("s3fs") and find_spec("moto")), reason="needs s3fs and moto: pip install flm_scale[dev]")
def test_an_object_store_takes_it_as_any_dataset(whole: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_s3() as port:
        for name, value in (("AWS_ACCESS_KEY_ID", "somebody"), ("AWS_SECRET_ACCESS_KEY", "a-secret"), ("AWS_DEFAULT_REGION", "us-east-1"),
                            ("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}"), ("FLM_CACHE", str(tmp_path / "cache"))):
            monkeypatch.setenv(name, value)
        store = open_store(port)
        store.mkdir("bucket")
        store.put(str(whole.folder), "bucket/data", recursive=True)
        far = open_dataset("s3://bucket/data", manifest_hash=whole.root)
        assert verify(far) == []
        assert pictures_of(far) == pictures_of(whole)
        store.clear_instance_cache()


def test_only_an_imported_or_filtered_dataset_may_have_tars_of_more_samples(whole: Dataset) -> None:
    assert whole.manifest.is_subset
    steps = {by: Derivation(parent="", by=by, values={}) for by in ("score", "reshard", "filter")}  # type: ignore[arg-type]
    for makers, is_subset in ((["score"], True), (["reshard"], False), (["reshard", "filter"], True), (["filter", "reshard", "score"], False)):
        assert whole.manifest.model_copy(update={"derivations": [steps[by] for by in makers]}).is_subset is is_subset
    copied = whole.manifest.preparation.model_copy(update={"spec": {}})
    as_copied = Dataset(whole.folder, whole.manifest.model_copy(update={"preparation": copied}), whole.shards())
    assert any("samples; 4 are expected" in line for line in verify(as_copied))


def test_a_tar_that_is_doubtful_as_a_whole_is_refused_by_name_when_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pickle.tar").write_bytes(hostile.shard(hostile.member("0001.pickle", b"x")))
    with pytest.raises(ShardError, match=r"pickle\.tar: member '0001\.pickle' .*run code"):
        open_inputs(Spec(input=ADOPT), [tmp_path / "pickle.tar"])
    monkeypatch.setattr(inputs_module, "MAX_SAMPLES", 3)
    with pytest.raises(DataError, match=r"a\.tar has 4 samples; a shard holds 3 at most; write new ones: flm data prepare"):
        open_inputs(Spec(input=ADOPT), [write_tar(tmp_path / "a.tar", SECOND)])


def test_values_that_would_make_pictures_or_shards_are_refused_and_stand_nowhere(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"input\.adopt keeps tars as they are, and input\.kind table has none"):
        InputConfig(adopt=True)
    with pytest.raises(ConfigError, match=r"image\.size \(64\), samples_per_shard \(5\): tars are kept as they are"):
        Spec(input=ADOPT, image=ImageConfig(size=64), samples_per_shard=5)
    decisive = Spec(input=ADOPT).decisive()
    assert decisive["image"].keys() == {"max_pixels", "max_bytes", "min_side", "max_aspect"}
    assert "samples_per_shard" not in decisive
    assert "adopt" not in Spec().decisive()["input"]
    assert main(["data", "import", str(tmp_path), "--output", str(tmp_path / "out"), "--image.quality", "80"]) == 2
    assert capsys.readouterr().err.startswith("flm: image.quality (80): tars are kept as they are (input.adopt)")
    assert main(["data", "import", "--output", str(tmp_path / "out")]) == 2
    assert "no tar is named" in capsys.readouterr().err
    assert main(["data", "plan", "--input", str(tmp_path), "--input.kind", "shards", "--input.adopt"]) == 2
    assert "input.adopt writes no picture" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_decodes_nothing_names_no_decoder(whole: Dataset, spec: Spec) -> None:
    assert finish_module.library_versions(Spec(input=ADOPT)).keys() == {"pyarrow", "unicode"}
    assert "simplejpeg" in whole.manifest.preparation.versions  # a list of forbidden pictures may be of perceptual hashes
    assert pa.__version__ == whole.manifest.preparation.versions["pyarrow"]


@pytest.mark.slow
def test_the_command_imports_with_a_fleet_and_every_other_command_takes_it(spec: Spec, whole: Dataset, tars: Path, tmp_path: Path,
                                                                          capsys: pytest.CaptureFixture[str]) -> None:
    there, folder = shutil.copytree(tars, tmp_path / "there"), tmp_path / "data"
    words = ["data", "import", str(there), "--output", str(folder), "--workers", "2", "--image.min-side", "70", "--filter.where", "LICENSE!=closed",
             "--filter.forbidden", str(spec.filter.forbidden)]
    assert main(words) == 0
    dataset = open_dataset(folder)
    assert (folder / "train/00001.tar").samefile(there / "00007.tar")
    assert [shard.sha256 for shard in dataset.shards()] == [shard.sha256 for shard in whole.shards()]
    assert [shard.index_sha256 for shard in dataset.shards()] == [shard.index_sha256 for shard in whole.shards()]
    assert dataset.manifest.preparation == whole.manifest.preparation.model_copy(update={
        "inputs": [entry.model_copy(update={"path": "there"}) for entry in whole.manifest.preparation.inputs]})
    capsys.readouterr()
    assert main(["data", "retry", str(folder), "--failed"]) == 2
    assert "no row was lost to anything that can be fetched again (nothing was)" in capsys.readouterr().err
    assert main(["data", "status", str(folder)]) == 0
    assert main(["tokenizer", "train", str(folder), "--vocab-size", "40"]) == 0
    root = open_dataset(folder).root
    assert main(["data", "verify", str(folder)]) == 0
    (folder / "index/train/00001.arrow").unlink()
    shutil.copy(folder / "train/00000.tar", tmp_path / "copy.tar")
    (tmp_path / "copy.tar").replace(folder / "train/00000.tar")
    with (folder / "train/00000.tar").open("r+b") as file:  # no longer the original
        file.write(b"\xff")
    assert main(["data", "repair", str(folder), "--workers", "1"]) == 0
    assert open_dataset(folder).root == root
    assert (folder / "train/00000.tar").samefile(there / "00003.tar")
    times = (there / "00003.tar").stat()
    with (there / "00003.tar").open("r+b") as file:
        file.seek(2000)
        file.write(b"\xff")
    os.utime(there / "00003.tar", ns=(times.st_atime_ns, times.st_mtime_ns))  # a disk that rots changes no time
    capsys.readouterr()
    assert main(["data", "verify", str(folder)]) == 2
    assert "shard train/00000.tar has the sha256 " in capsys.readouterr().err
    assert main(["data", "repair", str(folder)]) == 2
    assert f"shard train/00000.tar is {there / '00003.tar'}, which has the sha256 " in (said := capsys.readouterr().err)
    assert "restore that file, or import what is there now into another --output" in said
