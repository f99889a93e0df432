"""Tables: any run of rows is the same as that part of the whole, and nothing is refused without its name. Hostile ones: hostile_tables.py."""

import pickle
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from flm_scale.data.prepare import tables
from flm_scale.data.prepare.rows import Row, TableError
from flm_scale.data.prepare.spec import FilterConfig, InputConfig, Preset, Spec
from flm_scale.data.prepare.tables import open_table

NUM_ROWS = 2345
SPEC = Spec(filter=FilterConfig(where=("similarity>=0.3",)), input=InputConfig(keep=("LICENSE", "height")))
COLUMNS: dict[str, list[Any]] = {
    "url": [f"http://example.com/{number}.jpg" for number in range(NUM_ROWS)],
    "caption": [f'a "big" picture, number {number}\nof many ✓' if number % 7 else "" for number in range(NUM_ROWS)],
    "similarity": [number / NUM_ROWS if number % 5 else None for number in range(NUM_ROWS)],
    "LICENSE": ["?"] * NUM_ROWS,
    "height": list(range(NUM_ROWS)),
}


@pytest.fixture(scope="module", params=["parquet", "csv", "tsv"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("table") / f"table.{request.param}"
    if request.param == "parquet":
        parquet.write_table(pa.table(COLUMNS), path, row_group_size=1000)
    else:
        in_csv, in_tsv = lambda text: '"' + text.replace('"', '""') + '"', lambda text: text.replace("\n", " ")
        quoted, blank = (in_csv, ",") if request.param == "csv" else (in_tsv, "\t")
        rows = zip(*COLUMNS.values(), strict=True)
        lines = [blank.join(quoted("" if value is None else str(value)) for value in row) for row in (COLUMNS, *rows)]
        path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_a_table_gives_every_row_with_its_columns(file: Path) -> None:
    part = open_table(file, SPEC)
    rows = list(part.read(0, part.rows))
    assert len(rows) == part.rows == NUM_ROWS
    assert [row.url for row in rows] == COLUMNS["url"]
    assert [row.fate for row in rows] == ["" if caption else "no_caption" for caption in COLUMNS["caption"]]
    wanted = COLUMNS["caption"][1].replace("\n", " ") if file.suffix == ".tsv" else COLUMNS["caption"][1]
    assert rows[1].captions == [wanted]
    assert [row.columns["similarity"] for row in rows] == COLUMNS["similarity"]
    is_typed = file.suffix == ".parquet"
    assert part.kinds == {"LICENSE": "str", "height": "int" if is_typed else "str", "similarity": "float"}
    assert rows[8].columns == {"LICENSE": "?", "height": 8 if is_typed else "8", "similarity": 8 / NUM_ROWS}


@given(data=st.data())
def test_any_run_of_rows_is_that_part_of_the_whole_in_another_process_too(data: st.DataObject, file: Path) -> None:
    part = open_table(file, SPEC)
    first = data.draw(st.integers(0, NUM_ROWS))
    stop = data.draw(st.integers(first, NUM_ROWS))
    assert [row.url for row in pickle.loads(pickle.dumps(part)).read(first, stop)] == COLUMNS["url"][first:stop]


def test_rows_at_the_end_of_a_csv_are_read_without_those_before(tmp_path: Path) -> None:
    """The 300 last of 60,000 cost less than a twentieth of all."""
    (tmp_path / "large.csv").write_text("url,caption\n" + "http://example.com/picture.jpg,a picture of something\n" * 60_000)
    part = open_table(tmp_path / "large.csv", Spec())
    seconds = []
    for first in (0, part.rows - 300):
        started = time.perf_counter()
        assert sum(1 for _ in part.read(first, part.rows)) == part.rows - first
        seconds.append(time.perf_counter() - started)
    assert seconds[1] < seconds[0] / 20


@pytest.mark.parametrize(("preset", "columns", "row"), [
    ("laion", {"URL": ["u"], "TEXT": ["t"]}, ("u", ["t"])),
    ("re-laion", {"URL": ["u"], "Caption": ["t"]}, ("u", ["t"])),
    ("laion-coco", {"URL": ["u"], "TEXT": ["not this"], "top_caption": ["b"], "all_captions": [["a", "b", "c"]]}, ("u", ["b", "a", "c"])),
    ("datacomp", {"uid": ["0"], "url": ["u"], "text": ["t"], "sha256": ["ab" * 32]}, ("u", ["t"])),
    ("coyo", {"id": [1], "url": ["u"], "text": ["t"]}, ("u", ["t"])),
])
def test_presets_read_the_tables_as_they_are_published(preset: Preset, columns: dict[str, list[Any]], row: tuple[str, list[str]],
                                                       tmp_path: Path) -> None:
    parquet.write_table(pa.table(columns), tmp_path / "part.parquet")
    (found,) = open_table(tmp_path / "part.parquet", Spec(input=InputConfig(preset=preset))).read(0, 1)
    assert (found.url, found.captions) == row
    assert found.sha256 == columns.get("sha256", [""])[0]


@pytest.mark.parametrize(("preset", "line"), [("cc3m", "a dog\thttp://x/1\n"), ("cc12m", "http://x/1\ta dog\n"),
                                              ("cc12m", "url\tcaption\nhttp://x/1\ta dog\n"), ("img2dataset", "\ufeffcaption\turl\na dog\thttp://x/1\n")])
def test_conceptual_captions_come_with_or_without_a_line_of_names(preset: Preset, line: str, tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text(line, encoding="utf-8")
    part = open_table(tmp_path / "train.tsv", Spec(input=InputConfig(preset=preset)))
    assert list(part.read(0, part.rows)) == [Row("http://x/1", ["a dog"])]


def test_a_missing_column_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"url": ["u"], "captions": ["t"]}), tmp_path / "part.parquet")
    message = r"part\.parquet has no column 'caption'; did you mean 'captions'\? \(it has url, captions\); set input\.preset"
    with pytest.raises(TableError, match=message):
        open_table(tmp_path / "part.parquet", Spec())


@pytest.mark.parametrize(("name", "reason"), [("part.csv.gz", "compressed"), ("part.xlsx", "unreadable"), ("part.parquet", "unreadable")])
def test_files_of_other_kinds_and_none_are_refused(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(TableError) as refused:
        open_table(tmp_path / name, Spec())
    assert refused.value.reason == reason


def test_a_file_that_got_shorter_meanwhile_is_refused(file: Path, tmp_path: Path) -> None:
    copy = tmp_path / file.name
    copy.write_bytes(file.read_bytes())
    part = open_table(copy, SPEC)
    if file.suffix == ".parquet":
        parquet.write_table(pa.table(COLUMNS).slice(0, 2000), copy)
    else:
        copy.write_bytes(file.read_bytes()[:50_000])
    with pytest.raises(TableError) as refused:
        list(part.read(0, part.rows))
    assert refused.value.reason == "rows"


def test_long_texts_are_unfolded_few_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet.write_table(pa.table({"url": ["u"] * 5000, "caption": ["x" * 30_000] * 5000}), tmp_path / "long.parquet")
    sizes = []

    def watched(column: pa.Array) -> list[Any]:
        sizes.append(column.nbytes)
        return values(column)

    values = tables._values
    monkeypatch.setattr(tables, "_values", watched)
    monkeypatch.setattr(tables, "BATCH_BYTES", 1_000_000)
    part = open_table(tmp_path / "long.parquet", Spec())
    assert sum(row.captions == ["x" * 30_000] for row in part.read(0, 5000)) == 5000
    assert max(sizes) < 1_100_000
