"""Tables of addresses and captions by strangers: parquet, CSV and TSV, any run of rows for little more than reading that run.

A table that cannot be trusted is refused as a whole: damaged or lying footers, missing or ambiguous columns, types that are no text or number,
encryption, dictionaries that would expand beyond all bounds. Parts travel to worker processes: they hold places, never rows.
"""

import csv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flm_scale.data.prepare.rows import Kind, Row, TableError, as_value, compared_columns, find_columns, json_kinds, make_row, quoted
from flm_scale.data.prepare.spec import Spec

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import parquet

BATCH_ROWS, BATCH_BYTES = 1024, 64 * 1024**2
MAX_DICTIONARY_ENTRY = 1024**2
MAX_THRIFT = 100_000_000  # bytes and elements of a parquet footer
MAX_LINE = 1024**2
OFFSET_EVERY = 1000  # rows of a CSV


def open_table(path: Path, spec: Spec) -> "ParquetPart | CsvPart":
    """Open one file by its name's ending and check what can be checked without reading its rows. Raises TableError."""
    if path.suffix == ".parquet":
        return _open_parquet(path, spec)
    if path.suffix in (".csv", ".tsv", ".txt"):
        return _open_csv(path, spec)
    reason = "compressed" if path.suffix in (".gz", ".bz2", ".xz", ".zst", ".zip") else "unreadable"
    raise TableError(f"table {path} is no .parquet, .csv or .tsv file; {'unpack' if reason == 'compressed' else 'convert'} it first", reason=reason)


@dataclass(frozen=True)
class ParquetPart:
    """One parquet file. A run of rows costs its row groups up to the run's end; memory is bounded by batches."""

    path: Path
    rows: int
    spec: Spec
    found: Mapping[str, str]
    """The file's name of each column that the spec names."""
    kinds: Mapping[str, Kind]

    def read(self, first: int, stop: int) -> Iterator[Row]:
        """Yield rows [first, stop). Raises TableError where the file does not hold what it states."""
        wanted, delivered = self.spec.input.columns, first
        for columns in _batches(self.path, list(dict.fromkeys(self.found.values())), first, stop):
            of = {name: columns[column] for name, column in self.found.items()}
            for at in range(len(of[wanted.url])):
                delivered += 1
                captions = [text for name in wanted.captions for text in (of[name][at] if isinstance(of[name][at], list) else [of[name][at]])]
                sha256, md5 = (_hexadecimal(of, name, at) for name in (wanted.sha256, wanted.md5))
                yield make_row(self.spec, of[wanted.url][at], captions, sha256=sha256, md5=md5,
                               columns={name: as_value(of[name][at], kind) for name, kind in self.kinds.items()})
        if delivered != stop:
            raise TableError(f"table {self.path} ends after {delivered} rows; its footer states {self.rows}; fetch or write it again", reason="rows")


def _hexadecimal(columns: Mapping[str, list[Any]], name: str, at: int) -> str:
    return str(as_value(columns[name][at], "str") or "").strip() if name else ""


def _open_parquet(path: Path, spec: Spec) -> ParquetPart:
    with _parquet_errors(path), _parquet_file(path) as file:
        schema, footer = file.schema_arrow, file.metadata
        groups = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
        if min(groups, default=0) < 0 or sum(groups) != footer.num_rows:
            raise TableError(f"table {path} states {footer.num_rows} rows, and {sum(groups)} in its row groups; fetch or write it again",
                             reason="rows")
        found = find_columns(path, spec, schema.names)
        wanted = spec.input.columns
        kinds: dict[str, Kind] = {}
        for name, column in found.items():
            kind = _parquet_kind(path, column, schema.field(column).type, lists=name in wanted.captions)
            if name in (wanted.url, *wanted.captions, wanted.sha256, wanted.md5) and kind != "str":
                raise TableError(f"table {path}: column '{quoted(column)}' holds {quoted(schema.field(column).type)}, not texts; name another one",
                                 reason="type")
            if name in spec.kept_columns:
                kinds[name] = "float" if name in compared_columns(spec) else kind
        return ParquetPart(path, footer.num_rows, spec, found, kinds)


def _parquet_kind(path: Path, column: str, kind: "pa.DataType", *, lists: bool) -> Kind:
    """Say what a column holds. Raises TableError for what is neither text nor number."""
    from pyarrow import types

    value = kind.value_type if types.is_dictionary(kind) or (lists and (types.is_list(kind) or types.is_large_list(kind))) else kind
    if types.is_string(value) or types.is_binary(value) or types.is_large_string(value) or types.is_large_binary(value):
        return "str"
    if types.is_uint64(value):
        return "str"  # may be more than the int64 of our tables holds
    if types.is_integer(value) or types.is_boolean(value):
        return "int"
    if types.is_floating(value):
        return "float"
    raise TableError(f"table {path}: column '{quoted(column)}' has the type {quoted(kind)}; only texts and numbers are read: name another column, "
                     "or convert it", reason="type")


def _batches(path: Path, names: list[str], first: int, stop: int) -> Iterator[dict[str, list[Any]]]:
    """Yield columns of rows [first, stop), texts as bytes, with at most about BATCH_BYTES of text at a time."""
    at = 0  # row number of the next batch
    with _parquet_errors(path), _parquet_file(path) as file:
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if at + size <= first or at >= stop:
                at += size
                continue
            end, rows = at + size, _rows_at_once(path, names, group)
            for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=names):
                low, high = max(first - at, 0), min(stop - at, len(batch))
                at += len(batch)
                if low < high:
                    yield {name: _values(batch.column(name).slice(low, high - low)) for name in names}
                if at >= stop:
                    break
            else:
                if at != end:
                    raise TableError(f"table {path}: row group {group} holds {at - end + size} rows, not {size}; fetch or write it again",
                                     reason="rows")


def _values(column: "pa.Array") -> list[Any]:
    """Return Python values, texts undecoded: what is not UTF-8 is one row's fate."""
    import pyarrow as pa
    from pyarrow import types

    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if types.is_string(column.type) or types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    elif types.is_list(column.type) or types.is_large_list(column.type):
        column = column.cast(pa.large_list(pa.large_binary()))
    return list(column.to_pylist())


def _rows_at_once(path: Path, names: list[str], group: int) -> int:
    """Look at the dictionaries of a row group first: one long entry, named by a million rows, takes a few bytes there and terabytes unfolded."""
    from pyarrow import compute, types

    longest = 1
    with _parquet_file(path) as file:
        leaves = [file.schema.column(number).path for number in range(len(file.schema))]
    with _parquet_file(path, read_dictionary=[leaf for leaf in leaves if leaf.partition(".")[0] in names]) as file:
        for batch in file.iter_batches(batch_size=1, row_groups=[group], columns=names):
            for column in batch.columns:
                values = column.values if types.is_list(column.type) or types.is_large_list(column.type) else column
                if types.is_dictionary(values.type) and types.is_binary(values.dictionary.type) | types.is_string(values.dictionary.type):
                    longest = max(longest, compute.max(compute.binary_length(values.dictionary)).as_py() or 1)
            break
    if longest > MAX_DICTIONARY_ENTRY:
        raise TableError(f"table {path}: row group {group} has a dictionary with a text of {longest} bytes; {MAX_DICTIONARY_ENTRY} are allowed; "
                         "drop that row", reason="too_large")
    return max(1, min(BATCH_ROWS, BATCH_BYTES // longest))


def _parquet_file(path: Path, read_dictionary: list[str] | None = None) -> "parquet.ParquetFile":
    from pyarrow import parquet

    return parquet.ParquetFile(path, read_dictionary=read_dictionary, pre_buffer=False, buffer_size=65_536,
                               thrift_string_size_limit=MAX_THRIFT, thrift_container_size_limit=MAX_THRIFT)


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file makes pyarrow raise into a TableError."""
    import pyarrow as pa

    try:
        yield
    except TableError:
        raise
    except (pa.ArrowException, OSError, ValueError, LookupError, MemoryError, OverflowError, TypeError) as error:
        what = quoted(error)
        reason = "too_large" if isinstance(error, MemoryError) else "encrypted" if "encrypt" in what.lower() else "unreadable"
        raise TableError(f"table {path} cannot be read ({what}); fetch or write it again", reason=reason) from error


@dataclass(frozen=True)
class CsvPart:
    """One CSV or TSV file, with the places of every so many rows. A TSV has no quotes: a tab ends a field, a line a row."""

    path: Path
    rows: int
    spec: Spec
    names: tuple[str, ...]
    found: Mapping[str, str]
    offsets: NDArray[np.int64] = field(repr=False)

    @cached_property
    def kinds(self) -> Mapping[str, Kind]:
        """Texts, but for what conditions compare."""
        return json_kinds(self.spec)

    def read(self, first: int, stop: int) -> Iterator[Row]:
        """Yield rows [first, stop). Raises TableError when the file was cut since it was opened."""
        start = first // OFFSET_EVERY
        number = start * OFFSET_EVERY
        if first < stop:
            for _, fields in _records(self.path, int(self.offsets[start])):
                if number >= first:
                    yield self._row(fields)
                number += 1
                if number == stop:
                    return
            raise TableError(f"table {self.path} ends after {number} rows; it had {self.rows}; it must not change meanwhile", reason="rows")

    def _row(self, fields: list[str]) -> Row:
        if len(fields) != len(self.names):
            return make_row(self.spec, "", [])._replace(fate="bad_row")
        of = dict(zip(self.names, fields, strict=True))
        wanted = self.spec.input.columns
        hashes = {role: _hexadecimal({name: [of[self.found[name]]]}, name, 0) for role in ("sha256", "md5") if (name := getattr(wanted, role))}
        return make_row(self.spec, of[self.found[wanted.url]], [of[self.found[name]] for name in wanted.captions], **hashes,
                        columns={name: as_value(of[self.found[name]] or None, kind) for name, kind in self.kinds.items()})


def _open_csv(path: Path, spec: Spec) -> CsvPart:
    """Read the file once, for the number of rows and their places."""
    header, offset, places, rows = spec.input.columns.header, 0, [], -1
    names: tuple[str, ...] = ()
    for offset, fields in _records(path, 0):
        if rows < 0:
            names = tuple(fields)
            is_header = not header or header[0].lower() in (name.strip().lower() for name in fields)
            if is_header:
                rows = 0
                continue
            names, rows = header, 0
        if rows % OFFSET_EVERY == 0:
            places.append(offset)
        rows += 1
    if rows < 0:
        raise TableError(f"table {path} is empty; fetch or write it again", reason="columns")
    return CsvPart(path, rows, spec, names, find_columns(path, spec, names), np.array(places, np.int64))


def _records(path: Path, offset: int) -> Iterator[tuple[int, list[str]]]:
    """Yield (place, fields) of every row from a place on; no fields for what is no row. Blank lines are none."""
    lines = _Lines(path, offset)
    with lines.file:
        reader = csv.reader(lines, dialect="excel") if path.suffix == ".csv" else csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        while True:
            place = lines.offset
            try:
                fields = next(reader)
                if not fields:
                    continue
            except StopIteration:
                return
            except csv.Error:  # a quote that is never closed, mostly: the reader gives up on a field of 128 KiB and goes on with the next line
                fields = []
            yield place, fields


class _Lines:
    """Lines of text with the place of the next one; bytes that are not UTF-8 travel as surrogates."""

    def __init__(self, path: Path, offset: int) -> None:
        try:
            self.file = path.open("rb")
        except OSError as error:
            raise TableError(f"table {path} cannot be read ({error.strerror}); correct the path", reason="unreadable") from error
        self.path, self.offset = path, offset
        self.file.seek(offset)

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self.file.readline(MAX_LINE + 1)
        if len(line) > MAX_LINE:
            raise TableError(f"table {self.path} has a line of more than {MAX_LINE} bytes at byte {self.offset}; is it a table?", reason="too_large")
        if not line:
            raise StopIteration
        start = 3 if self.offset == 0 and line.startswith(b"\xef\xbb\xbf") else 0
        self.offset += len(line)
        return line[start:].decode("utf-8", "surrogateescape")
