"""Pictures in folders and what is said about them: captions beside them, and the annotation files of COCO, Visual Genome and SBU.

All captions of a picture are one row. A file is read as a stream and kept as columns in memory, in each process that reads rows; what travels is its
name.
"""

import csv
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from flm_scale.data.prepare.rows import MAX_CAPTIONS, MAX_TEXT_BYTES, Kind, Row, TableError, as_value, find_image, json_kinds, make_row, quoted
from flm_scale.data.prepare.spec import Spec
from flm_scale.data.tar import read_json
from flm_scale.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow as pa

PICTURES, CLIPS = frozenset({".jpg", ".jpeg", ".png", ".webp"}), frozenset({".mp4"})
LISTINGS = ("metadata.jsonl", "captions.csv", "captions.txt")
FILE_COLUMNS, CAPTION_COLUMNS = ("file_name", "image", "file", "filename"), ("text", "caption", "captions")
ASKED = ("questions", "answers")
VISUAL_GENOME_FOLDERS = ("", "VG_100K", "VG_100K_2")
ROWS_AT_ONCE = 10_000
BLANKS = re.compile(r"[ \t\r\n]*")
READ_CHARACTERS, MAX_ELEMENT = 1024**2, 64 * 1024**2


class Said(NamedTuple):
    """What a listing or an annotation file says of a picture."""

    name: str
    """Or its address."""
    captions: list[str] | None
    """None where they are in a file beside it."""
    about: Mapping[str, Any] = {}
    """Questions, answers, concept and kept columns, as they came."""


@dataclass(frozen=True)
class ListedPart:
    """A folder of pictures, or an annotation file."""

    path: Path
    spec: Spec
    rows: int = -1

    @cached_property
    def kinds(self) -> Mapping[str, Kind]:
        """What a folder's listing can promise; annotation files have no columns."""
        return json_kinds(self.spec) if self.spec.input.kind == "folder" else {}

    def counted(self) -> "ListedPart":
        """Read the listing and return the part with its number of rows. Raises TableError."""
        return ListedPart(self.path, self.spec, len(self._listing))

    def read(self, first: int, stop: int) -> Iterator[Row]:
        """Yield rows [first, stop). Raises TableError when the listing has another length than when it was counted."""
        if len(self._listing) != self.rows:
            raise TableError(f"{self.path} has {len(self._listing)} rows; it had {self.rows}; it must not change meanwhile", reason="rows")
        in_folder = self.spec.input.kind == "folder"
        for start in range(first, stop, ROWS_AT_ONCE):
            chunk = self._listing.slice(start, min(stop - start, ROWS_AT_ONCE)).to_pydict()
            for name, captions, about in zip(chunk["name"], chunk["captions"], chunk["about"], strict=True):
                if not in_folder:
                    yield make_row(self.spec, name, captions)
                    continue
                image = find_image(self.path, os.fsdecode(name))
                try:
                    fields = read_json(about)[0]
                except DataError:
                    yield make_row(self.spec, name, [])._replace(fate="bad_json")
                    continue
                row = make_row(self.spec, name, captions if captions is not None else _captions_beside(image), fields,
                               columns={column: as_value(fields.get(column), kind) for column, kind in self.kinds.items()})
                yield row._replace(image=image, fate=row.fate or ("" if image else "bad_path"))

    def __getstate__(self) -> dict[str, Any]:
        """Leave the listing behind: another process reads its own."""
        return {"path": self.path, "spec": self.spec, "rows": self.rows}

    @cached_property
    def _listing(self) -> "pa.Table":
        """Columns `name`, `captions` and `about` (JSON), as bytes: what is no UTF-8 is one row's fate."""
        import pyarrow as pa

        schema = pa.schema([("name", pa.binary()), ("captions", pa.list_(pa.binary())), ("about", pa.binary())])
        read = READERS[self.spec.input.kind]
        try:
            said = iter(read(self.path, self.spec))
            chunks = []
            while chunk := list(islice(said, ROWS_AT_ONCE)):
                names = [_raw(one.name) for one in chunk]
                captions = [None if one.captions is None else [_raw(text) for text in one.captions] for one in chunk]
                about = [json.dumps(dict(one.about)).encode() for one in chunk]
                chunks.append(pa.table({"name": names, "captions": captions, "about": about}, schema=schema))
            return pa.concat_tables(chunks) if chunks else schema.empty_table()
        except (OSError, ValueError, TypeError, LookupError, AttributeError, csv.Error, MemoryError, RecursionError) as error:
            raise TableError(f"{self.path} cannot be read as {self.spec.input.kind} ({type(error).__name__}: {quoted(error)}); "
                             "fetch or write it again, or set input.kind", reason="unreadable") from error


def open_listed(path: Path, spec: Spec) -> ListedPart:
    """Open a folder or an annotation file. Raises TableError, and ConfigError where its pictures cannot be found."""
    if spec.input.kind == "visual_genome" and not spec.input.images:
        raise ConfigError("input.images must name the folder with VG_100K and VG_100K_2: Visual Genome's regions have no addresses")
    return ListedPart(path, spec).counted()


def _folder(folder: Path, spec: Spec) -> Iterable[Said]:
    """List the folder: by a listing in it, or else every picture, or clip, whose captions are read with its row."""
    for name in LISTINGS:
        if (file := folder / name).is_file():
            return _grouped(_json_lines(file, spec) if file.suffix == ".jsonl" else _csv_lines(file, spec))
    if spec.kept_columns:
        raise ConfigError(f"input.keep and filter.where name columns ({', '.join(spec.kept_columns)}); input {folder} has no "
                          f"{' or '.join(LISTINGS)} that holds them; clear them, or write one")
    if not spec.input.clips:
        return (Said(path, None) for path in list_files(folder) if Path(path).suffix.lower() in PICTURES)
    files = [Path(path) for path in list_files(folder)]
    framed = {path.parent for path in files if path.suffix.lower() in PICTURES} - {Path()}
    return (Said(str(path), None) for path in sorted({path for path in files if path.suffix.lower() in CLIPS} | framed, key=os.fsencode))


def list_files(folder: Path) -> list[str]:
    """Return the relative paths of all plain files below a folder, sorted by their bytes; links to folders are not followed."""
    found = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return sorted((str(path.relative_to(folder)) for path in found if path.is_file()), key=os.fsencode)


def _captions_beside(image: Path | None) -> list[bytes | str | None]:
    """Return the lines of KEY.txt beside KEY.jpg, or beside the folder KEY of frames; none where there is no such file."""
    file = (image.with_name(f"{image.name}.txt") if image.is_dir() else image.with_suffix(".txt")) if image else None
    try:
        if file is None or not stat.S_ISREG(file.stat().st_mode):
            return []
        with file.open("rb") as stream:
            lines = stream.read(MAX_TEXT_BYTES * 4 + 1).splitlines()
    except OSError:
        return []
    return [*lines[:MAX_CAPTIONS]]


def _json_lines(file: Path, spec: Spec) -> Iterator[Said]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                fields = json.loads(line)
                name, captions = _named(fields, FILE_COLUMNS), _named(fields, CAPTION_COLUMNS)
                if not isinstance(name, str):
                    raise ValueError(f"line {number} has none of the fields {', '.join(FILE_COLUMNS)}")
                yield Said(name, [captions] if isinstance(captions, str) else list(captions or []),
                           {field: fields[field] for field in (*ASKED, "concept", *spec.kept_columns) if field in fields})


def _csv_lines(file: Path, spec: Spec) -> Iterator[Said]:
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        for fields in csv.DictReader(stream):
            name = _named(fields, FILE_COLUMNS)
            if name is None:
                raise ValueError(f"it has none of the columns {', '.join(FILE_COLUMNS)}")
            yield Said(name, [_named(fields, CAPTION_COLUMNS) or ""], {field: fields.get(field) for field in spec.kept_columns})


def _named(fields: Mapping[str, Any], names: Iterable[str]) -> Any:  # noqa: ANN401 - a value of somebody's JSON
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _grouped(said: Iterable[Said]) -> Iterable[Said]:
    """Put what is said of one picture together, where it was first named: captions and questions add up, of all else the first counts."""
    groups: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for name, captions, more in said:
        known, about = groups.setdefault(name, ([], {}))
        known.extend(captions or [])
        both = [[fields.get(field) or [] for field in ASKED] for fields in (about, more)]
        fits = all(isinstance(questions, list) and isinstance(answers, list) and len(questions) == len(answers) for questions, answers in both)
        asked = [first + further for first, further in zip(*both, strict=True)] if fits else [[""], []]  # two wrongs must not come out even
        about.update({**more, **about, **dict(zip(ASKED, asked, strict=True))})
    return (Said(name, captions, about) for name, (captions, about) in groups.items())


def _coco(file: Path, spec: Spec) -> Iterator[Said]:
    """Read {"images": [{id, file_name, coco_url}], "annotations": [{image_id, caption}]}; pictures come in the order of `images`."""
    field = "file_name" if spec.input.images else "coco_url"
    names = {image["id"]: str(image[field]) for image in _elements(file, "images")}
    captions: dict[Any, list[str]] = {number: [] for number in names}
    for annotation in _elements(file, "annotations"):
        captions[annotation["image_id"]].append(str(annotation["caption"]))
    return (Said(name, captions[number]) for number, name in names.items())


def _visual_genome(file: Path, spec: Spec) -> Iterator[Said]:
    """Read region_descriptions.json, [{id, regions: [{phrase}]}]: each phrase is a caption of its picture."""
    for entry in _elements(file):
        names = [f"{folder}/{int(entry['id'])}.jpg".lstrip("/") for folder in VISUAL_GENOME_FOLDERS]
        name = next((name for name in names if (spec.input.images or Path()).joinpath(name).is_file()), names[0])
        yield Said(name, [str(region["phrase"]) for region in entry["regions"]])


def _sbu(file: Path, spec: Spec) -> Iterator[Said]:  # noqa: ARG001 - a reader like the others
    """Read {"image_urls": [...], "captions": [...]}, the authors' form, or [[picture, caption], ...], in which others pass it on."""
    with file.open("rb") as stream:
        as_lists = stream.read(200).lstrip()[:1] == b"{"
    pairs = (zip(_elements(file, "image_urls"), _elements(file, "captions"), strict=True) if as_lists
             else ((entry[0], entry[1]) for entry in _elements(file)))
    for url, caption in pairs:
        yield Said(str(url), [str(caption)])


def _elements(file: Path, field: str = "") -> Iterator[Any]:
    """Yield the elements of a JSON file that is a list, or of one list in an object, whatever the file's size. Raises ValueError."""
    with file.open(encoding="utf-8", newline="") as stream:
        text = _Json(stream)
        if not field:
            yield from text.elements()
        else:
            text.expect("{")
            while text.peek() != "}":
                name = text.value()
                text.expect(":")
                values = text.elements() if text.peek() == "[" else [text.value()]
                for value in values:
                    if name == field:
                        yield value
                if text.peek() != "}":
                    text.expect(",")
            text.expect("}")
        if text.peek():
            raise ValueError("more behind its end")


class _Json:
    """JSON that is read as it is needed. Python's decoder limits depth by itself; one element may have MAX_ELEMENT characters."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._text, self._at = stream, "", 0
        self._decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """Return the next character that is no blank; nothing at the end."""
        while True:
            self._at = BLANKS.match(self._text, self._at).end()  # type: ignore[union-attr]  # no blanks match too
            if self._at < len(self._text) or not self._read_more():
                return self._text[self._at:self._at + 1]

    def expect(self, character: str) -> None:
        """Pass over one character."""
        if (found := self.peek()) != character:
            raise ValueError(f"{found!r} where {character!r} is expected")
        self._at += 1

    def value(self) -> Any:  # noqa: ANN401 - any JSON
        """Return the next value."""
        self.peek()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except ValueError:
                if len(self._text) - self._at > MAX_ELEMENT or not self._read_more():
                    raise
            else:
                if end < len(self._text) or not self._read_more():  # a number may go on
                    self._at = end
                    return value

    def elements(self) -> Iterator[Any]:
        """Yield the values of a list."""
        self.expect("[")
        while self.peek() != "]":
            yield self.value()
            if self.peek() != "]":
                self.expect(",")
        self.expect("]")

    def _read_more(self) -> bool:
        """Read as much again as is left, so that a long value is tried a few times only."""
        left = self._text[self._at:]
        more = self._stream.read(max(READ_CHARACTERS, len(left)))
        self._text, self._at = left + more, 0
        return bool(more)


def _raw(text: str) -> bytes:
    """Return bytes that are UTF-8 only where the text was: half characters of JSON and foreign bytes of CSV and file names stay wrong."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


READERS: dict[str, Callable[[Path, Spec], Iterable[Said]]] = {
    "folder": _folder, "coco": _coco, "visual_genome": _visual_genome, "sbu": _sbu}
