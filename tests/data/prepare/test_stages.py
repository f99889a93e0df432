"""One shard prepared from a server that gives good pictures and everything else: every row's fate, what is kept, and the same bytes each time."""

import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from flm_scale.data.index import index_columns
from flm_scale.data.manifest import Shard, stats_name
from flm_scale.data.prepare import stages
from flm_scale.data.prepare.fetch import is_public
from flm_scale.data.prepare.inputs import Input, open_inputs
from flm_scale.data.prepare.rewrite import STAGING
from flm_scale.data.prepare.spec import FetchConfig, FilterConfig, ImageConfig, InputConfig, Spec, TextConfig
from flm_scale.data.prepare.stages import Work, plan_work, prepare_shard
from flm_scale.data.shards import read_committed_shard
from flm_scale.data.tar import read_json, read_shard
from tests.data.hostile import encoded, png
from tests.data.prepare.pictures import picture
from tests.data.prepare.server import Server, answer, redirect

FORBIDDEN, MOVED = picture(77), picture(78)
GOOD = {f"/good/{number}.jpg": picture(number) for number in range(20)} | {
    "/good/20.png": picture(20, kind="PNG"), "/good/21.webp": picture(21, kind="WEBP"), "/good/small.jpg": picture(22, width=120, height=90)}
ANSWERS = {path: answer(content) for path, content in GOOD.items()} | {
    "/loop": redirect("/loop"), "/inward": redirect("http://169.254.169.254/latest"), "/500": answer(b"", status="500 Oops"),
    "/html": answer(b"<!doctype html><title>moved</title>"), "/gif": answer(encoded("GIF")), "/empty": answer(b""),
    "/cut": answer(picture(50)[:9000]), "/bomb": answer(png(30_000, 30_000, pixels=b"\0" * 3000)), "/huge": answer(bytes(3_000_000)),
    "/gzip": answer(gzip.compress(bytes(50_000_000)), "Content-Encoding: gzip"), "/opted-out": answer(picture(51), "X-Robots-Tag: noai"),
    "/early-close": answer(picture(52))[:4000], "/tiny": answer(picture(53, width=60, height=60)),
    "/strip": answer(picture(54, width=900, height=100)),
    "/forbidden": answer(FORBIDDEN), "/moved": answer(MOVED)}
ENDLESS = {"/slow": (b"HTTP/1.1 200 OK\r\nContent-Length: 50000\r\n\r\n", b"x", 0.1)}
# Path, caption, similarity, NSFW, and the fate. The slow one comes first, so that all others must wait for it.
ROWS: list[tuple[str | None, str | bytes | None, float | None, str | None, str]] = [
    ("/slow", "waits for ever", 0.5, "UNLIKELY", "timeout"),
    *((path, f"a picture at {path}", 0.5, "UNLIKELY", "success") for path in GOOD),
    ("/404", "gone", 0.5, "UNLIKELY", "http_404"), ("/500", "broken", 0.5, "UNLIKELY", "http_500"), ("/loop", "round", 0.5, "UNLIKELY", "redirects"),
    ("/inward", "inside", 0.5, "UNLIKELY", "private_address"), ("/html", "a page", 0.5, "UNLIKELY", "format"),
    ("/gif", "moves", 0.5, "UNLIKELY", "format"), ("/empty", "nothing", 0.5, "UNLIKELY", "format"), ("/cut", "half", 0.5, "UNLIKELY", "damaged"),
    ("/bomb", "a bomb", 0.5, "UNLIKELY", "pixels"), ("/huge", "too much", 0.5, "UNLIKELY", "too_large"),
    ("/gzip", "packed", 0.5, "UNLIKELY", "encoding"),
    ("/opted-out", "not for us", 0.5, "UNLIKELY", "opted_out"), ("/early-close", "stops", 0.5, "UNLIKELY", "truncated"),
    ("/tiny", "very small", 0.5, "UNLIKELY", "small"), ("/strip", "very long", 0.5, "UNLIKELY", "aspect"),
    ("/forbidden", "of an evaluation", 0.5, "UNLIKELY", "forbidden"), ("/moved", "other bytes now", 0.5, "UNLIKELY", "hash"),
    ("/good/0.jpg", "unlike", 0.1, "UNLIKELY", "column_similarity"), ("/good/0.jpg", "no score", None, "UNLIKELY", "column_similarity"),
    ("/good/0.jpg", "not safe", 0.5, "NSFW", "column_NSFW"), ("/good/0.jpg", "untagged", 0.5, None, "success"),
    ("/good/0.jpg", "x", 0.5, "UNLIKELY", "short_text"), ("/good/0.jpg", " \t ", 0.5, "UNLIKELY", "no_caption"),
    ("/good/0.jpg", None, 0.5, "UNLIKELY", "no_caption"), ("/good/0.jpg", b"\xff\xfe", 0.5, "UNLIKELY", "bad_text"),
    (None, "no address", 0.5, "UNLIKELY", "no_url"), ("file:///etc/passwd", "a file", 0.5, "UNLIKELY", "scheme"),
    ("/good/1.jpg", "one  more\ttime", 0.5, "UNLIKELY", "success"),
]
STATUS = {"success": "success"} | dict.fromkeys(("format", "damaged", "pixels"), "failed_to_resize") | dict.fromkeys(
    ("small", "aspect", "forbidden", "column_similarity", "column_NSFW", "short_text", "no_caption", "bad_text"), "filtered")
NEVER_ASKED = {"column_similarity", "column_NSFW", "short_text", "no_caption", "bad_text", "no_url", "scheme"}


@dataclass
class Prepared:
    """A folder, what was prepared into it and the report."""

    folder: Path
    spec: Spec
    inputs: list[Input]
    report: dict[str, Any]
    beats: list[tuple[int, str]]

    @property
    def shard(self) -> Shard:
        entry = read_committed_shard(self.folder, self.report["name"])
        assert entry
        return entry

    @property
    def table(self) -> list[dict[str, Any]]:
        return parquet.read_table(self.folder / self.shard.table_name).to_pylist()


def prepare(folder: Path, spec: Spec, inputs: list[Input], *, number: int = 0, skip: tuple[int, ...] = (), attempt: int = 0) -> Prepared:
    beats: list[tuple[int, str]] = []
    report = prepare_shard(folder, spec, inputs, plan_work(spec, inputs)[number], attempt=attempt, skip=skip,
                           beat=lambda row, stage: beats.append((row, stage)))
    return Prepared(folder, spec, inputs, report, beats)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Spec, list[Input]]]:
    """The table of ROWS, opened, while the server runs."""
    folder = tmp_path_factory.mktemp("asked")
    server = Server(ANSWERS, ENDLESS)
    urls = [path if path is None or "://" in path else server.url(path) for path, *_ in ROWS]
    captions = pa.array([text.encode() if isinstance(text, str) else text for _, text, *_ in ROWS], pa.binary()).view(pa.string())
    table = pa.table({"URL": urls, "TEXT": captions, "similarity": pa.array([row[2] for row in ROWS], pa.float64()), "NSFW": [row[3] for row in ROWS],
                      "md5": [hashlib.md5(b"as it was").hexdigest() if row[0] == "/moved" else None for row in ROWS]})
    parquet.write_table(table, folder / "part-0.parquet", row_group_size=17)
    (folder / "forbidden.txt").write_text(hashlib.sha256(FORBIDDEN).hexdigest() + "\n")
    spec = Spec(input=InputConfig(preset="laion", md5="md5"), text=TextConfig(min_characters=3), image=ImageConfig(min_side=70, max_aspect=3.0,
                                                                                                                max_bytes=2_000_000),
                fetch=FetchConfig(total_seconds=4.0, server_retries=0, allow_loopback=True),
                filter=FilterConfig(where=("similarity>=0.3", "NSFW!=NSFW"), forbidden=folder / "forbidden.txt"))
    yield spec, open_inputs(spec, [folder / "part-0.parquet"])
    server.stop()


@pytest.fixture(scope="module")
def prepared(asked: tuple[Spec, list[Input]], tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("prepared"), *asked)


def test_every_row_ends_with_its_own_fate(prepared: Prepared) -> None:
    found = {f"{row[0]} {row[1]!r}": entry["error_message"] or "success" for row, entry in zip(ROWS, prepared.table, strict=True)}
    assert found == {f"{row[0]} {row[1]!r}": row[4] for row in ROWS}
    assert prepared.report["fates"] == Counter(row[4] for row in ROWS)


def test_the_table_speaks_img2datasets_language(prepared: Prepared) -> None:
    table = prepared.table
    assert [row["status"] for row in table] == [STATUS.get(row[4], "failed_to_download") for row in ROWS]
    assert [row["key"] for row in table] == [f"{number:09d}" for number in range(len(ROWS))]
    first = next(row for row in table if row["status"] == "success")
    assert first["sha256"] == hashlib.sha256(GOOD["/good/0.jpg"]).hexdigest()
    assert (first["width"], first["height"], first["original_width"], first["original_height"]) == (341, 256, 400, 300)
    assert table[-1]["caption"] == "one  more\ttime"  # as it came
    assert (first["similarity"], first["NSFW"]) == (0.5, "UNLIKELY")
    stats = json.loads((prepared.folder / stats_name(prepared.shard.name)).read_bytes())
    assert stats["count"] == len(ROWS) == sum(stats[name] for name in ("successes", "failed_to_download", "failed_to_resize", "filtered"))
    assert stats["status_dict"] == prepared.report["fates"]


def test_what_is_kept_is_in_the_order_of_the_table_with_its_words_and_sizes(prepared: Prepared) -> None:
    wanted = [(f"{number:09d}", row) for number, row in enumerate(ROWS) if row[4] == "success"]
    samples = list(read_shard(prepared.folder / prepared.shard.name))
    assert [sample.key for sample in samples] == [key for key, _ in wanted]
    assert prepared.report["count"] == len(wanted) == prepared.shard.count
    assert samples[-1].members["txt"] == b"one more time"
    about, _ = read_json(samples[0].members["json"])
    assert about["url"].endswith("/good/0.jpg")
    assert about["similarity"] == 0.5
    names = ["key", "captions", "width", "height", "original_width", "original_sha256", "similarity"]
    key, captions, width, height, original, sha256, similarity = index_columns(prepared.folder, prepared.shard, names)
    assert key == [sample.key for sample in samples]
    assert captions[-1] == ["one more time"]
    assert {min(sides) for sides in zip(width, height, strict=True)} == {256, 90}
    assert (original[0], sha256[0], similarity[0]) == (400, hashlib.sha256(GOOD["/good/0.jpg"]).hexdigest(), 0.5)


def test_a_picture_that_needs_no_change_keeps_its_bytes_and_others_are_scaled_jpegs(prepared: Prepared, tmp_path: Path) -> None:
    samples = {sample.key: sample.members for sample in read_shard(prepared.folder / prepared.shard.name)}
    small = samples[f"{[row[0] for row in ROWS].index('/good/small.jpg'):09d}"]
    assert small["jpg"] == GOOD["/good/small.jpg"]
    for members in samples.values():
        (tmp_path / "one.jpg").write_bytes(members["jpg"])
        with Image.open(tmp_path / "one.jpg") as image:
            assert (image.format, min(image.size)) in {("JPEG", 256), ("JPEG", 90)}


@pytest.mark.slow
@pytest.mark.parametrize("concurrency", [1, 3])
def test_bytes_depend_neither_on_concurrency_nor_on_attempt_nor_on_how_much_may_wait(
        concurrency: int, asked: tuple[Spec, list[Input]], prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "HELD_BYTES", 20_000)  # a picture
    spec, inputs = asked
    again = prepare(tmp_path, spec.replace(fetch=spec.fetch.replace(concurrency=concurrency)), inputs, attempt=7)
    assert again.shard == prepared.shard
    assert {path.name for path in tmp_path.rglob("*")} == {path.name for path in prepared.folder.rglob("*")}  # no temporary file is left
    until_the_slow_one_ends = again.beats[:max(at for at, beat in enumerate(again.beats) if beat == (0, "fetch"))]
    assert sum(stage == "decode" for _, stage in until_the_slow_one_ends) <= 2 + concurrency


def test_a_row_that_killed_decoders_is_passed_over_and_the_rest_is_as_before(asked: tuple[Spec, list[Input]], prepared: Prepared,
                                                                            tmp_path: Path) -> None:
    again = prepare(tmp_path, *asked, skip=(3,))
    assert again.table[3]["error_message"] == "killed_worker"
    assert again.table[:3] + again.table[4:] == prepared.table[:3] + prepared.table[4:]
    assert (3, "decode") not in again.beats


def test_the_supervisor_hears_of_each_step_that_may_hang(prepared: Prepared) -> None:
    assert {row for row, stage in prepared.beats if stage == "decode"} >= {number for number, row in enumerate(ROWS) if row[4] == "success"}
    assert prepared.beats.count((0, "fetch")) >= 3  # every second while the slow one is waited for
    assert prepared.beats[-1][1] == "write"


def test_a_retry_does_rows_of_those_fates_again_and_fetches_no_other(asked: tuple[Spec, list[Input]], prepared: Prepared, tmp_path: Path) -> None:
    """Behind a server's bad day: what had succeeded is not asked for again, and the shard is as if the day had been good."""
    spec, inputs = asked
    folder = tmp_path / "data"
    bad_day = {path: answer(b"", status="503 Busy") for path in list(GOOD)[5:9]}
    server = Server(ANSWERS | bad_day, ENDLESS)
    here = [given_to(server, given, tmp_path, number) for number, given in enumerate(inputs)]
    first = prepare(folder, spec, here)
    assert first.report["fates"]["http_503"] == 4
    server.answers, before = ANSWERS, len(server.requests)
    again = prepare_shard(folder, spec, here, plan_work(spec, here)[0], attempt=1, retry={"http_503", "http_500"})
    assert len(server.requests) == before + 5
    server.stop()
    assert again["fates"] == prepared.report["fates"]
    assert [sample.members["jpg"] for sample in read_shard(folder / again["name"])] == [
        sample.members["jpg"] for sample in read_shard(prepared.folder / prepared.shard.name)]
    without_addresses = [[{**row, "url": None} for row in one.table] for one in (first, prepared)]
    assert without_addresses[0] == without_addresses[1]
    assert {path.name for path in folder.rglob("*")} == {path.name for path in prepared.folder.rglob("*")} | {STAGING}


def given_to(server: Server, given: Input, folder: Path, number: int) -> Input:
    """The same table with the addresses of another server."""
    table = parquet.read_table(given.path)
    urls = [url and re.sub(r"^http://127.0.0.1:\d+", f"http://127.0.0.1:{server.port}", url) for url in table["URL"].to_pylist()]
    parquet.write_table(table.set_column(table.schema.get_field_index("URL"), "URL", pa.array(urls)), folder / f"{number}.parquet")
    spec = given.parts[0].spec  # type: ignore[attr-defined]
    return open_inputs(spec, [folder / f"{number}.parquet"])[0]


def test_nothing_at_loopback_is_fetched_unless_that_is_allowed(asked: tuple[Spec, list[Input]], tmp_path: Path) -> None:
    assert not is_public("127.0.0.1")
    spec, inputs = asked
    report = prepare(tmp_path, spec.replace(fetch=spec.fetch.replace(allow_loopback=False)), inputs).report
    assert report["count"] == 0
    assert report["fates"]["private_address"] == sum(row[4] not in NEVER_ASKED for row in ROWS)


def test_a_hash_can_be_required_of_every_row(asked: tuple[Spec, list[Input]], tmp_path: Path) -> None:
    spec, inputs = asked
    fates = prepare(tmp_path, spec.replace(fetch=spec.fetch.replace(require_hash=True)), inputs).report["fates"]
    assert fates["hash"] == 1  # the only row that has one
    assert fates["no_hash"] == len(ROWS) - 1 - fates["no_caption"] - fates["bad_text"] - fates["no_url"]


def test_shards_are_prepared_from_shards_and_from_folders_too(prepared: Prepared, tmp_path: Path) -> None:
    spec = Spec(input=InputConfig(kind="shards", keep=("similarity",)), samples_per_shard=10)
    inputs = open_inputs(spec, [prepared.folder / "train"])
    reports = [prepare(tmp_path, spec, inputs, number=number).report for number in range(3)]
    assert [report["count"] for report in reports] == [10, 10, prepared.shard.count - 20]
    before = [sample.members["jpg"] for sample in read_shard(prepared.folder / prepared.shard.name)]
    after = [sample.members["jpg"] for report in reports for sample in read_shard(tmp_path / report["name"])]
    assert after == before  # nothing needed to change
    first = parquet.read_table(tmp_path / "train/00000.parquet").to_pylist()[0]
    assert (first["key"], first["url"][-11:], first["similarity"]) == ("000000", "/good/0.jpg", "0.5")


def test_pictures_of_a_table_are_read_from_a_folder_where_one_is_named(tmp_path: Path) -> None:
    images = tmp_path / "images"
    (images / "folder.jpg").mkdir(parents=True)
    for number in range(2):
        (images / f"{number}.jpg").write_bytes(picture(number))
    sums = ["", hashlib.sha256(b"another").hexdigest(), "", "", ""]
    (tmp_path / "table.csv").write_text("url,caption,sha256\n" + "\n".join(f"{name},a picture,{sha256}" for name, sha256 in zip(
        ("http://x/0.jpg", "1.jpg", "2.jpg", "folder.jpg", "../table.csv"), sums, strict=True)))
    spec = Spec(input=InputConfig(images=images, sha256="sha256"))
    table = prepare(tmp_path / "out", spec, open_inputs(spec, [tmp_path / "table.csv"])).table
    assert [row["error_message"] or "success" for row in table] == ["success", "hash", "missing", "unreadable", "bad_path"]


def test_what_readers_of_the_shard_would_reject_is_not_written_into_it(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Spec(input=InputConfig(kind="shards"))
    inputs = open_inputs(spec, [prepared.folder / "train"])
    for limit, fate in (("MAX_STORED_BYTES", "too_large"), ("MAX_ABOUT_BYTES", "long_text")):
        with monkeypatch.context() as patch:
            patch.setattr(stages, limit, 100)
            assert prepare(tmp_path / fate, spec, inputs).report["fates"] == {fate: prepared.shard.count}


def test_questions_answers_and_concept_come_into_the_shard_beside_or_without_captions(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    about: list[dict[str, Any]] = [
        {"captions": ["a dog"]}, {"questions": ["what is it?", "is it red?"], "answers": ["a dog", "no"], "concept": "dog"},
        {"captions": ["x"], "questions": ["what is it?"], "answers": ["a dog"]}, {"questions": ["why?"], "answers": []}]
    for number in range(len(about)):
        (folder / f"{number}.jpg").write_bytes(picture(number))
    (folder / "metadata.jsonl").write_text("".join(json.dumps({"file_name": f"{number}.jpg", **one}) + "\n" for number, one in enumerate(about)))
    spec = Spec(input=InputConfig(kind="folder"), text=TextConfig(min_characters=3))
    prepared = prepare(tmp_path / "out", spec, open_inputs(spec, [folder]))
    assert [row["error_message"] for row in prepared.table] == [None, None, None, "bad_questions"]
    assert [row["status"] for row in prepared.table][-1] == "filtered"
    assert list(zip(*index_columns(prepared.folder, prepared.shard, ["captions", "questions", "answers", "concept"]), strict=True)) == [
        (["a dog"], [], [], ""), ([], ["what is it?", "is it red?"], ["a dog", "no"], "dog"), ([], ["what is it?"], ["a dog"], "")]
    spec = Spec(input=InputConfig(kind="shards"))
    again = prepare(tmp_path / "again", spec, open_inputs(spec, [tmp_path / "out/train"]))
    assert index_columns(again.folder, again.shard, ["captions", "questions", "answers", "concept"]) == index_columns(
        prepared.folder, prepared.shard, ["captions", "questions", "answers", "concept"])


@given(st.lists(st.tuples(st.integers(0, 40), st.sampled_from(["train", "val"])), max_size=5), st.integers(1, 15))
def test_a_plan_covers_every_row_once_in_order_split_by_split_and_no_shard_has_two_inputs(inputs: list[tuple[int, str]], size: int) -> None:
    @dataclass
    class Given:
        rows: int
        split: str

    plan = plan_work(Spec(samples_per_shard=size), [Given(*one) for one in inputs])  # type: ignore[misc]
    splits = list(dict.fromkeys(split for _, split in inputs))
    assert [(work.split, work.source, row) for work in plan for row in range(work.first, work.stop)] == [
        (split, source, row) for split in splits for source, (count, of) in enumerate(inputs) if of == split for row in range(count)]
    for split in splits:
        numbers = [work.number for work in plan if work.split == split]
        assert numbers == list(range(len(numbers)))
    assert all(0 < work.stop - work.first <= size for work in plan)
    assert Work("train", 7, 0, 0, 1).name == "train/00007.tar"
