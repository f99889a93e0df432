"""Folders, annotation files and shards as inputs: pictures with all that is said of them, and nothing from outside the folder."""

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from flm_scale.cli import main
from flm_scale.data.prepare import annotations
from flm_scale.data.prepare import rows as rows_module
from flm_scale.data.prepare.inputs import Input, open_inputs
from flm_scale.data.prepare.rows import Row, TableError
from flm_scale.data.prepare.spec import FilterConfig, InputConfig, Spec
from flm_scale.data.shards import write_shard
from flm_scale.data.tar import ShardError
from flm_scale.errors import ConfigError, DataError
from tests.conftest import drawn_sample
from tests.data.hostile import GOOD, LAST, member, shard
from tests.data.prepare.pictures import picture


def rows(given: Input) -> list[Row]:
    """All rows, as another process reads them."""
    return list(pickle.loads(pickle.dumps(given)).read(0, given.rows))


def said(given: Input) -> list[tuple[str, list[str], str]]:
    return [(row.url, row.captions, row.fate) for row in rows(given)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures, one of them in a folder of its own."""
    inside = tmp_path / "pictures"
    for name in ("a.jpg", "b.PNG", "sub/c.webp"):
        (inside / name).parent.mkdir(parents=True, exist_ok=True)
        (inside / name).write_bytes(picture(0, width=20, height=10))
    return inside


def open_one(path: Path, kind: Any, images: Path | None = None) -> Input:
    return open_inputs(Spec(input=InputConfig(kind=kind, images=images)), [path])[0]


def test_a_folder_gives_each_picture_with_the_lines_of_the_text_beside_it(folder: Path) -> None:
    (folder / "a.txt").write_text("one\n\ntwo\none\n")
    (folder / "b.txt").write_bytes(b"\xff\xfe")
    (folder / "notes.md").write_text("not a picture")
    given = open_one(folder, "folder")
    assert said(given) == [("a.jpg", ["one", "two"], ""), ("b.PNG", ["\ufffd\ufffd"], "bad_text"), ("sub/c.webp", [], "no_caption")]
    assert [row.image for row in rows(given)] == [folder / "a.jpg", folder / "b.PNG", folder / "sub/c.webp"]


@pytest.mark.parametrize(("name", "content"), [
    ("metadata.jsonl", '{"image": "b.PNG", "text": "b"}\n{"image": "a.jpg", "text": ["one", "two"]}\n{"image": "b.PNG", "caption": "again"}\n'),
    ("captions.csv", 'image,caption\nb.PNG,b\na.jpg,one\na.jpg,two\nb.PNG,again\n'),
])
def test_a_listing_in_a_folder_says_which_pictures_and_groups_what_is_said_of_one(name: str, content: str, folder: Path) -> None:
    (folder / name).write_text(content)
    assert said(open_one(folder, "folder")) == [("b.PNG", ["b", "again"], ""), ("a.jpg", ["one", "two"], "")]


OF_FOLDERS = Spec(input=InputConfig(kind="folder"))


def listed(folder: Path, *lines: dict[str, Any], spec: Spec = OF_FOLDERS) -> list[Row]:
    """Rows of a folder whose metadata.jsonl has these lines."""
    (folder / "metadata.jsonl").write_text("".join(json.dumps({"file_name": "a.jpg", **line}) + "\n" for line in lines))
    return rows(open_inputs(spec, [folder])[0])


def test_a_listing_may_hold_questions_with_answers_and_a_concept_and_a_row_that_does_needs_no_caption(folder: Path) -> None:
    (row,) = listed(folder, {"questions": ["what\nis it?", "is it red?"], "answers": ["a dog", "no"], "concept": " dog"})
    assert (row.captions, row.questions, row.answers, row.concept, row.fate) == ([], ("what is it?", "is it red?"), ("a dog", "no"), "dog", "")
    (row,) = listed(folder, {"captions": ["one", "two"], "questions": ["q"], "answers": ["x"], "concept": "c"},
                    {"captions": ["three"], "questions": ["r"], "answers": ["y"], "concept": "d"})
    assert (row.captions, row.questions, row.answers, row.concept) == (["one", "two", "three"], ("q", "r"), ("x", "y"), "c")


@pytest.mark.parametrize("lines", [
    [{"questions": ["q", "r"], "answers": ["x"]}], [{"questions": "q", "answers": "x"}], [{"answers": ["x"]}],
    [{"questions": {"q": 1}, "answers": {"x": 1}}],
    [{"questions": ["q", "r"], "answers": ["x"]}, {"questions": ["q"], "answers": ["x", "y"]}],  # as many in all
])
def test_questions_and_answers_that_do_not_pair_reject_their_row(lines: list[dict[str, Any]], folder: Path) -> None:
    (row,) = listed(folder, {"captions": ["good"]}, *lines)
    assert row.fate == "bad_questions"


def test_a_question_goes_where_it_or_its_answer_is_empty_damaged_or_no_text_or_one_too_many(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = listed(folder, {"questions": ["q", " ", "r", 3, "s", "t"], "answers": ["x", "x", "", "x", "x" * 65_537, "y"], "concept": 7})
    assert (row.questions, row.answers, row.concept, row.fate) == (("q", "t"), ("x", "y"), "", "")
    (row,) = listed(folder, {"questions": ["q"], "answers": [None]})
    assert row.fate == "no_caption"
    (row,) = listed(folder, {"questions": ["\ud800"], "answers": ["x"]})
    assert row.fate == "bad_json"
    monkeypatch.setattr(rows_module, "MAX_CAPTIONS", 2)
    (row,) = listed(folder, {"questions": ["q", "r", "s"], "answers": ["x", "y", "z"]})
    assert row.questions == ("q", "r")


def test_other_fields_of_a_listing_go_along_and_conditions_compare_them(folder: Path) -> None:
    spec = Spec(input=InputConfig(kind="folder", keep=("license",)), filter=FilterConfig(where=("score>=0.5",)))
    (row,) = listed(folder, {"text": "x", "license": "MIT", "score": 0.7}, spec=spec)
    assert row.columns == {"license": "MIT", "score": 0.7}
    (folder / "metadata.jsonl").unlink()
    (folder / "captions.csv").write_text("image,caption,license,score\na.jpg,x,MIT,0.7\n")
    assert rows(open_inputs(spec, [folder])[0]) == [row]
    (folder / "captions.csv").unlink()
    with pytest.raises(ConfigError, match=r"name columns \(license, score\); input .* has no metadata\.jsonl or "):
        open_inputs(spec, [folder])


def test_an_input_may_name_its_split(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    (folder.parent / "a=b").symlink_to(folder)
    found = open_inputs(OF_FOLDERS, [Path("pictures"), Path("val=pictures"), Path(f"val={folder}"), folder.parent / "a=b"])
    assert [(given.split, given.path) for given in found] == [("train", folder), ("val", folder), ("val", folder), ("train", folder)]
    with pytest.raises(DataError, match=r"none \(of the split test\) does not exist"):
        open_inputs(OF_FOLDERS, [Path("test=none")])


def test_inputs_may_be_named_together_or_each_behind_its_own_option(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--input", f"train={folder}", "val=none"], ["--input", f"train={folder}", "--input", "val=none"],
                  ["--input", "val=none", "--input", f"train={folder}"]):
        assert main(["data", "prepare", "--input.kind", "folder", "--output", str(tmp_path / "out"), *words]) == 2
        assert "none (of the split val) does not exist" in capsys.readouterr().err
    assert main(["data", "prepare", "--output", str(tmp_path / "out")]) == 2
    assert "no input is named; add --input PATH" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "link.jpg", "http://example.com/..", "\0"])
def test_a_name_that_leads_out_of_the_folder_is_a_bad_path(name: str, folder: Path) -> None:
    (folder.parent / "secret.jpg").write_bytes(b"secret")
    (folder / "link.jpg").symlink_to("/etc/passwd")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
    (row,) = rows(open_one(folder, "folder"))
    assert (row.fate, row.image) == ("bad_path", None)


def test_a_folder_with_a_pipe_and_a_link_in_a_circle_does_not_hang(folder: Path) -> None:
    os.mkfifo(folder / "pipe.jpg")
    os.mkfifo(folder / "a.txt")
    (folder / "circle").symlink_to(folder)
    assert [url for url, *_ in said(open_one(folder, "folder"))] == ["a.jpg", "b.PNG", "sub/c.webp"]


def test_coco_groups_captions_by_picture_in_the_order_of_its_pictures(folder: Path) -> None:
    file = folder.parent / "captions.json"
    file.write_text(json.dumps({
        "info": {"images": [1]},
        "images": [{"id": 9, "file_name": "b.PNG", "coco_url": "http://x/b"}, {"id": 4, "file_name": "a.jpg", "coco_url": "http://x/a"}],
        "licenses": [], "annotations": [{"image_id": 4, "caption": "one"}, {"image_id": 9, "caption": "b"}, {"image_id": 4, "caption": "two"}]}))
    assert said(open_one(file, "coco")) == [("http://x/b", ["b"], ""), ("http://x/a", ["one", "two"], "")]
    assert [row.image for row in rows(open_one(file, "coco", images=folder))] == [folder / "b.PNG", folder / "a.jpg"]


def test_visual_genome_gives_every_phrase_of_a_picture_wherever_the_picture_is(folder: Path) -> None:
    (folder / "VG_100K_2").mkdir()
    (folder / "VG_100K_2/7.jpg").write_bytes(picture(1))
    (folder / "3.jpg").write_bytes(picture(2))
    file = folder.parent / "region_descriptions.json"
    file.write_text(json.dumps([{"id": 7, "regions": [{"phrase": "a dog", "x": 1}, {"phrase": "grass"}]}, {"id": 3, "regions": []}]))
    given = open_one(file, "visual_genome", images=folder)
    assert said(given) == [("VG_100K_2/7.jpg", ["a dog", "grass"], ""), ("3.jpg", [], "no_caption")]
    assert rows(given)[0].image == folder / "VG_100K_2/7.jpg"
    with pytest.raises(ConfigError, match=r"input\.images must name the folder with VG_100K"):
        open_one(file, "visual_genome")


@pytest.mark.parametrize("content", [{"user_ids": ["x", "y"], "image_urls": ["http://f/a.jpg", "http://f/b%2ePNG?x=1"], "captions": ["one", "two"]},
                                     [["http://f/a.jpg", "one"], ["http://f/b%2ePNG?x=1", "two"]]])
def test_sbu_comes_as_its_authors_wrote_it_or_as_pairs(content: object, folder: Path) -> None:
    file = folder.parent / "sbu.json"
    file.write_text(json.dumps(content))
    assert said(open_one(file, "sbu")) == [("http://f/a.jpg", ["one"], ""), ("http://f/b%2ePNG?x=1", ["two"], "")]
    assert [row.image for row in rows(open_one(file, "sbu", images=folder))] == [folder / "a.jpg", folder / "b.PNG"]


def test_an_annotation_file_is_read_in_pieces_of_any_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [[f"http://f/{number}.jpg", f"caption {number} \u2713 \"quoted\" [1] {{}}"] for number in range(200)]
    file = folder.parent / "sbu.json"
    file.write_text(json.dumps(pairs, indent=1))
    for size in (1, 2, 7, 100):
        monkeypatch.setattr(annotations, "READ_CHARACTERS", size)
        assert [[url, caption] for url, (caption,), _ in said(open_one(file, "sbu"))] == pairs


@pytest.mark.parametrize("content", ["[", "[1", '[["a","b"]] x', '[["a","b"] ["c","d"]]', '[["a"]]', "", "{}{}"])
def test_an_annotation_file_that_is_damaged_is_refused_as_a_whole(content: str, tmp_path: Path) -> None:
    (tmp_path / "sbu.json").write_text(content)
    with pytest.raises(TableError, match=r"sbu\.json cannot be read as sbu"):
        open_one(tmp_path / "sbu.json", "sbu")


def test_shards_give_their_samples_end_to_end_with_their_json(tmp_path: Path) -> None:
    samples = [drawn_sample(number, color="red", shape="circle") for number in range(5)]
    for name in ("in/00000.tar", "in/00001.tar"):
        write_shard(tmp_path, name, samples)
    given = open_one(tmp_path / "in", "shards")
    found = rows(given)
    assert [row.captions for row in found] == [sample.captions for sample in samples] * 2
    assert [row.image for row in found] == [sample.image for sample in samples] * 2
    assert [(row.questions, row.answers, row.concept) for row in found] == [
        (tuple(sample.questions), tuple(sample.answers), sample.concept) for sample in samples] * 2
    assert found[7].url == "00001.tar/000002"
    for first in range(10):
        for stop in range(first, 11):
            assert list(given.read(first, stop)) == found[first:stop]


def test_what_is_wrong_with_a_sample_of_a_shard_is_its_fate_and_a_doubtful_shard_is_refused(tmp_path: Path) -> None:
    middle = [member("0001.txt", b"words"), member("0002.jpg"), member("0002.mp3"), member("0003.jpg"), member("0003.json", b"{"),
              member("0004.jpg"), member("0004.json", b'{"caption": "x", "similarity": NaN}'), member("0004.txt", b"words"),
              member("0005.jpg"), member("0005.json", b'{"captions": ["a", 3, "b"], "url": "http://x", "similarity": 0.5}')]
    (tmp_path / "00000.tar").write_bytes(shard(*middle))
    spec = Spec(input=InputConfig(kind="shards"), filter=FilterConfig(where=("similarity>=0.3",)))
    found = rows(open_inputs(spec, [tmp_path / "00000.tar"])[0])
    assert [(row.url.removeprefix("00000.tar/"), row.captions, row.fate) for row in found] == [
        ("0000", ["words"], ""), ("0001", ["words"], "no_image"), ("0002", [], "extension"), ("0003", [], "bad_json"), ("0004", ["words"], ""),
        ("http://x", ["a", "b"], ""), ("0009", ["x"], "")]
    assert [row.columns.get("similarity") for row in found] == [None] * 5 + [0.5, None]
    (tmp_path / "00001.tar").write_bytes(GOOD + LAST)
    with pytest.raises(ShardError, match=r"00001\.tar"):
        open_inputs(spec, [tmp_path])


def test_an_inputs_hash_is_of_all_its_bytes_and_names(folder: Path) -> None:
    (folder / "a.txt").write_text("one")
    before = open_one(folder, "folder").sha256
    assert open_one(folder, "folder").sha256 == before
    for change in (lambda: (folder / "a.txt").write_text("two"), lambda: (folder / "a.txt").rename(folder / "c.txt")):
        change()
        now = open_one(folder, "folder").sha256
        assert now != before
        before = now
    file = folder.parent / "table.csv"
    file.write_text("url,caption\nu,x\n")
    assert open_one(file, "table").sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_inputs_that_are_none_are_refused_with_what_to_do(folder: Path) -> None:
    (folder.parent / "empty.csv").write_text("url,caption\n")
    for path, kind, message in ((folder / "none", "table", "does not exist"), (folder, "table", r"holds no \.parquet or \.csv or \.tsv file"),
                                (folder / "a.jpg", "folder", "is no folder"), (folder.parent / "empty.csv", "table", "holds no rows")):
        with pytest.raises(DataError, match=message):
            open_one(path, kind)
    with pytest.raises(ConfigError, match=r"name columns \(similarity\); input\.kind coco has none"):
        open_inputs(Spec(input=InputConfig(kind="coco"), filter=FilterConfig(where=("similarity>1",))), [folder])
