"""What was handed over, opened: files of one kind end to end, as rows that can be read from any place.

`open_inputs` reads everything once, for the hashes that the dataset keeps; an Input is then sent to the workers.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flm_scale.data.prepare.annotations import list_files, open_listed
from flm_scale.data.prepare.rows import MAX_CAPTIONS, Kind, Part, Row, as_value, json_kinds, make_row
from flm_scale.data.prepare.spec import Spec
from flm_scale.data.prepare.tables import open_table
from flm_scale.data.shards import Adopted
from flm_scale.data.tar import MAX_SAMPLES, Member, list_members, read_json
from flm_scale.errors import ConfigError, DataError

SUFFIXES = {"table": (".parquet", ".csv", ".tsv"), "shards": (".tar",), "coco": (".json",), "visual_genome": (".json",), "sbu": (".json",)}
PICTURES = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class Input:
    """One of the paths handed over."""

    split: str
    path: Path
    sha256: str
    """Of the file; of a folder, that of its sorted listing with sizes and hashes."""
    parts: tuple[Part, ...]

    @property
    def rows(self) -> int:
        """Of all parts."""
        return sum(part.rows for part in self.parts)

    @property
    def kinds(self) -> Mapping[str, Kind]:
        """What the kept columns are: a number only where every part says so."""
        kinds: dict[str, Kind] = {}
        for part in self.parts:
            for name, kind in part.kinds.items():
                kinds[name] = kind if kinds.get(name, kind) == kind else "str" if "str" in (kind, kinds[name]) else "float"
        return kinds

    def tar_at(self, row: int) -> Adopted:
        """Return the tar that a row of kind shards is in."""
        for part in self.parts:
            if row < part.rows:
                break
            row -= part.rows
        assert isinstance(part, TarPart)
        return Adopted(part.path, part.bytes, part.sha256)

    def read(self, first: int, stop: int) -> Iterator[Row]:
        """Yield rows [first, stop), across parts. Raises DataError for a part that is refused."""
        for part in self.parts:
            if first < min(stop, part.rows):
                yield from part.read(max(first, 0), min(stop, part.rows))
            first, stop = first - part.rows, stop - part.rows


def open_inputs(spec: Spec, paths: Sequence[Path], *, progress: Callable[[str], None] = lambda _: None) -> list[Input]:
    """Open every path, in the order given, and read all bytes for their hashes.

    paths: each PATH, which goes to spec.split, or SPLIT=PATH (./a=b is a path).   progress: is told each file that is done.
    Raises DataError for what is refused, ConfigError for columns that the kind has not.
    """
    if not paths:
        raise ConfigError("no input is named; add --input PATH")
    if spec.kept_columns and spec.input.kind not in ("table", "shards", "folder"):
        raise ConfigError(f"input.keep and filter.where name columns ({', '.join(spec.kept_columns)}); input.kind {spec.input.kind} has none; "
                          "clear them")
    inputs = [_open_input(spec, *_split_and_path(spec, path), progress) for path in paths]
    if not sum(opened.rows for opened in inputs):
        raise DataError(f"{', '.join(map(str, paths))} holds no rows; name files with rows")
    return inputs


def _split_and_path(spec: Spec, path: Path) -> tuple[str, Path]:
    named = re.fullmatch(r"([a-z0-9_]+)=(.+)", str(path), re.DOTALL)
    return (named[1], Path(named[2]).resolve()) if named else (spec.split, path.resolve())


def _open_input(spec: Spec, split: str, path: Path, progress: Callable[[str], None]) -> Input:
    kind = spec.input.kind
    if not path.exists():
        raise DataError(f"input {path} (of the split {split}) does not exist; correct the path")
    if kind == "folder" and not path.is_dir():
        raise DataError(f"input {path} is no folder; input.kind folder reads folders of pictures: name one, or set input.kind")
    names = list_files(path) if path.is_dir() else [""]
    if path.is_dir() and kind != "folder":
        names = [name for name in names if name.endswith(SUFFIXES[kind])]
        if not names:
            raise DataError(f"input {path} holds no {' or '.join(SUFFIXES[kind])} file; correct the path, or set input.kind")
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        hashes = list(threads.map(partial(_size_and_sha256, progress), [path / name for name in names]))
        parts = [open_listed(path, spec)] if kind == "folder" else list(
            threads.map(partial(_open_part, spec), [path / name for name in names], [sha256 for _, sha256 in hashes]))
    if not path.is_dir():
        return Input(split, path, hashes[0][1], tuple(parts))
    listing = hashlib.sha256()
    for name, (size, sha256) in zip(names, hashes, strict=True):
        listing.update(os.fsencode(name) + f" {size} {sha256}\n".encode())
    return Input(split, path, listing.hexdigest(), tuple(parts))


def _open_part(spec: Spec, path: Path, sha256: str) -> Part:
    if spec.input.kind == "table":
        return open_table(path, spec)
    return open_tar(path, spec, sha256) if spec.input.kind == "shards" else open_listed(path, spec)


def _size_and_sha256(progress: Callable[[str], None], path: Path) -> tuple[int, str]:
    try:
        with path.open("rb") as stream:
            found = os.fstat(stream.fileno()).st_size, hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"input {path} cannot be read ({error.strerror}); correct the path or its rights") from error
    progress(str(path))
    return found


@dataclass(frozen=True)
class TarPart:
    """One shard of img2dataset or webdataset, by strangers. A run of rows costs its own content and the headers before it."""

    path: Path
    sha256: str
    """When it was opened: the tar of an adopted shard must still have it."""
    rows: int
    bytes: int
    spec: Spec

    @property
    def kinds(self) -> Mapping[str, Kind]:
        """What its JSON can promise."""
        return json_kinds(self.spec)

    def read(self, first: int, stop: int) -> Iterator[Row]:
        """Yield rows [first, stop). Raises ShardError."""
        number, sample = -1, list[Member]()
        with self.path.open("rb") as stream:
            for member in list_members(stream, expected_bytes=self.bytes):
                if not sample or member.key != sample[0].key:
                    if first <= number < stop:
                        yield self._row(sample, stream.fileno())
                    if (number := number + 1) >= stop:
                        return
                    sample = []
                sample.append(member)
            if first <= number < stop:
                yield self._row(sample, stream.fileno())

    def _row(self, members: list[Member], file: int) -> Row:
        name, key = f"{self.path.name}/{members[0].key}", members[0].key if self.spec.input.adopt else ""
        nothing = make_row(self.spec, name, [])._replace(columns=dict.fromkeys(self.kinds), key=key)
        rejected = next((member.rejected for member in members if member.rejected), "")
        if key and sum(member.extension in PICTURES for member in members) > 1:
            rejected = rejected or "two_images"  # the tar goes on to hold both, and other readers may take either
        if rejected:
            return nothing._replace(fate=rejected)
        content = {member.extension: os.pread(file, member.size, member.offset) for member in members}
        try:
            fields = read_json(content["json"])[0] if "json" in content else {}
        except DataError:
            return nothing._replace(fate="bad_json")
        texts = fields.get("captions")
        captions = texts[:MAX_CAPTIONS] if isinstance(texts, list) and texts else [content.get("txt", b"")]
        url = fields.get("url")
        row = make_row(self.spec, url if isinstance(url, str) else name, [text for text in captions if isinstance(text, bytes | str)], fields,
                       columns={column: as_value(fields.get(column), kind) for column, kind in self.kinds.items()})
        picture = next((member for extension in PICTURES for member in members if member.extension == extension), None)
        if not picture or not picture.size:
            return row._replace(image=b"", fate=row.fate or "no_image", key=key)
        return row._replace(image=content[picture.extension], key=key, offset=picture.offset)


def open_tar(path: Path, spec: Spec, sha256: str) -> TarPart:
    """Walk all headers, strictly. Raises ShardError, and DataError for a tar of too many samples to adopt."""
    rows, key = 0, None
    for member in list_members(path):
        rows += member.key != key
        key = member.key
    if spec.input.adopt and rows > MAX_SAMPLES:
        raise DataError(f"shard {path} has {rows} samples; a shard holds {MAX_SAMPLES} at most; write new ones: flm data prepare --input.kind shards")
    return TarPart(path, sha256, rows, path.stat().st_size, spec)
