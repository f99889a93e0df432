"""What was handed over, opened: files of one kind end to end, as rows that can be read from any place.

`open_inputs` reads everything once, for the hashes that the dataset keeps; an Input is then sent to the workers.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

from flm_scale.data.prepare.annotations import list_files, open_listed
from flm_scale.data.prepare.rows import MAX_CAPTIONS, Kind, Part, Row, as_value, json_kinds, make_row
from flm_scale.data.prepare.seen import Look, Seen
from flm_scale.data.prepare.spec import Spec
from flm_scale.data.prepare.tables import open_table
from flm_scale.data.shards import Adopted
from flm_scale.data.tar import MAX_SAMPLES, Member, list_members, read_json
from flm_scale.errors import ConfigError, DataError

SUFFIXES = {"table": (".parquet", ".csv", ".tsv"), "shards": (".tar",), "coco": (".json",), "visual_genome": (".json",), "sbu": (".json",)}
PICTURES, CLIPS = ("jpg", "jpeg", "png", "webp"), ("mp4",)


@dataclass(frozen=True)
class Input:
    """One of the paths handed over."""

    split: str
    path: Path
    sha256: str
    """Of the file; of a folder, that of its sorted listing with sizes and hashes."""
    parts: tuple[Part, ...]
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    """What the kept columns are, the same for all inputs: a number only where every part of every one says so."""

    @property
    def rows(self) -> int:
        """Of all parts."""
        return sum(part.rows for part in self.parts)

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


def open_inputs(spec: Spec, paths: Sequence[Path], *, seen: Seen | None = None, progress: Callable[[str], None] = lambda _: None) -> list[Input]:
    """Open every path, in the order given, and read all bytes for their hashes.

    paths: each PATH, which goes to spec.split, or SPLIT=PATH (./a=b is a path).   seen: knows files already.   progress: is told each file.
    Raises DataError for what is refused, ConfigError for columns that the kind has not.
    """
    if not paths:
        raise ConfigError("no input is named; add --input PATH")
    if spec.kept_columns and spec.input.kind not in ("table", "shards", "folder"):
        raise ConfigError(f"input.keep and filter.where name columns ({', '.join(spec.kept_columns)}); input.kind {spec.input.kind} has none; "
                          "clear them")
    inputs = [_open_input(spec, *_split_and_path(spec, path), seen or Seen(), progress) for path in paths]
    if not sum(opened.rows for opened in inputs):
        raise DataError(f"{', '.join(map(str, paths))} holds no rows; name files with rows")
    kinds: dict[str, Kind] = {}
    for name, kind in (item for opened in inputs for part in opened.parts for item in part.kinds.items()):
        kinds[name] = kind if kinds.get(name, kind) == kind else "str" if "str" in (kind, kinds[name]) else "float"
    return [replace(opened, kinds=kinds) for opened in inputs]


def _split_and_path(spec: Spec, path: Path) -> tuple[str, Path]:
    named = re.fullmatch(r"([a-z0-9_]+)=(.+)", str(path), re.DOTALL)
    return (named[1], Path(named[2]).resolve()) if named else (spec.split, path.resolve())


def _open_input(spec: Spec, split: str, path: Path, seen: Seen, progress: Callable[[str], None]) -> Input:
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
        files, looks = [path / name for name in names], list[Look]()
        for file, look in zip(files, threads.map(partial(seen.look, is_tar=kind == "shards"), files), strict=True):
            looks.append(look)
            progress(str(file))
        parts = [open_listed(path, spec)] if kind == "folder" else list(threads.map(partial(_open_part, spec), files, looks))
    if not path.is_dir():
        return Input(split, path, looks[0].sha256, tuple(parts))
    listing = hashlib.sha256()
    for name, look in zip(names, looks, strict=True):
        listing.update(os.fsencode(name) + f" {look.size} {look.sha256}\n".encode())
    return Input(split, path, listing.hexdigest(), tuple(parts))


def _open_part(spec: Spec, path: Path, look: Look) -> Part:
    if spec.input.kind == "table":
        return open_table(path, spec)
    if spec.input.kind != "shards":
        return open_listed(path, spec)
    if spec.input.adopt and look.rows > MAX_SAMPLES:
        raise DataError(f"shard {path} has {look.rows} samples; a shard holds {MAX_SAMPLES} at most; write new ones: "
                        "flm data prepare --input.kind shards")
    return TarPart(path, look.sha256, look.rows, look.size, spec)


@dataclass(frozen=True)
class TarPart:
    """One shard of img2dataset or webdataset, by strangers. A run of rows costs its own content and the headers before it."""

    path: Path
    sha256: str
    """When it was opened: the tar of an adopted shard must still have it."""
    rows: int
    bytes: int
    spec: Spec

    @cached_property
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
        nothing = make_row(self.spec, name, [])._replace(key=key)
        rejected = next((member.rejected for member in members if member.rejected), "")
        wanted = CLIPS if self.spec.input.clips else PICTURES
        if key and sum(member.extension in {*PICTURES, *CLIPS} for member in members) > 1:
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
        picture = next((member for extension in wanted for member in members if member.extension == extension), None)
        if not picture or not picture.size:
            return row._replace(image=b"", fate=row.fate or "no_image", key=key)
        return row._replace(image=content[picture.extension], key=key, offset=picture.offset)
