"""What a dataset says of itself: dataset.json, small at any size, and shards.parquet, a row a shard. One hash, the root, covers both.

Nothing that differs between two preparations of the same input stands here: no time, host, attempt, worker count or absolute path.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flm_scale.data.sources import Source
from flm_scale.data.storage import Url, read_bytes
from flm_scale.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

DATASET, SHARDS, FORMAT_1 = "dataset.json", "shards.parquet", "manifest.json"
NAME = r"^[a-z0-9_]+/\d{5,}\.tar$"


@contextmanager
def replaced(file: Path, attempt: int = 0) -> Iterator[Path]:
    """Make the folder and give a temporary name to write under; then the file is flushed to the disk, gets its own name in one step, and that is
    flushed too.

    attempt: stands in the temporary name, so that two writers of one file do not meet.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{attempt}.part")
    yield part
    _flush(part)
    part.replace(file)
    _flush(file.parent)


def linked(file: Path, link: Path, attempt: int = 0) -> None:
    """Make the folder and give a file another name in one step, or a symbolic one where the file system refuses.

    It does so across disks, and may for somebody else's file or too many names.   attempt: as of `replaced`.
    """
    link.parent.mkdir(parents=True, exist_ok=True)
    part = link.with_name(f".{link.name}.{attempt}.part")
    part.unlink(missing_ok=True)
    try:
        part.hardlink_to(file.resolve())
    except OSError:
        part.symlink_to(file.resolve())
    part.replace(link)
    part.unlink(missing_ok=True)  # of two names of one file, neither replaces the other
    _flush(link.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def index_name(shard: str) -> str:
    """Return the path of a shard's index, relative to the dataset. shard: "train/00000.tar"."""
    return f"index/{shard.removesuffix('.tar')}.arrow"


def stats_name(shard: str) -> str:
    """Return the path of a prepared shard's counts and times, relative to the dataset: the last of its files to be written."""
    return f"{shard.removesuffix('.tar')}_stats.json"


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Shard(_Entry):
    """One tar, its index and, where the shard was prepared, its table of all input rows."""

    name: str = Field(pattern=NAME)
    count: int = Field(ge=0)
    captions: int = Field(ge=0)
    bytes: int
    sha256: str
    index_bytes: int
    index_sha256: str
    table_bytes: int = 0
    table_sha256: str = ""

    @property
    def split(self) -> str:
        """Split that the shard is of."""
        return self.name.partition("/")[0]

    @property
    def index_name(self) -> str:
        """Path of the index, relative to the dataset."""
        return index_name(self.name)

    @property
    def table_name(self) -> str:
        """Path of the table, relative to the dataset."""
        return self.name.removesuffix(".tar") + ".parquet"

    @property
    def sidecar_name(self) -> str:
        """Path of the token ids, relative to the folder of one tokenizer's."""
        return self.name.removesuffix(".tar") + ".arrow"

    @property
    def files(self) -> list[tuple[str, int, str]]:
        """Path, bytes and sha256 of each file that the dataset's root covers."""
        files = [(self.name, self.bytes, self.sha256), (self.index_name, self.index_bytes, self.index_sha256)]
        return [*files, (self.table_name, self.table_bytes, self.table_sha256)] if self.table_sha256 else files


class Shards:
    """The entries of some shards, in order. They stay columns: as objects, those of LAION-2B would outweigh the rest of a start."""

    def __init__(self, table: "pa.Table") -> None:
        self._table = table.combine_chunks()

    @classmethod
    def of(cls, entries: Iterable[Shard]) -> "Shards":
        """Return the entries as columns."""
        import pyarrow as pa

        return cls(pa.Table.from_pylist([{"split": entry.split, **entry.model_dump()} for entry in entries], schema=_shards_schema()))

    def __len__(self) -> int:
        """Return the number of shards."""
        return int(self._table.num_rows)

    def __getitem__(self, number: int) -> Shard:
        """Return one entry."""
        return next(iter(Shards(self._table.slice(number, 1))))

    def __iter__(self) -> Iterator[Shard]:
        """Make the entries, some at a time."""
        for batch in self._table.to_batches(max_chunksize=4096):
            for row in batch.drop_columns(["split"]).to_pylist():
                yield Shard(**row)

    @property
    def counts(self) -> np.ndarray:
        """[shards] pictures of each."""
        return self.numbers("count")

    def numbers(self, column: str) -> np.ndarray:
        """[shards] a column of numbers."""
        values: np.ndarray = self._table[column].to_numpy()
        return values

    def of_split(self, *splits: str) -> "Shards":
        """Return the shards of some splits, one split behind the other."""
        import pyarrow as pa
        import pyarrow.compute as pc

        return Shards(pa.concat_tables([self._table.filter(pc.equal(self._table["split"], split)) for split in splits]))

    def write(self, folder: Path) -> str:
        """Write shards.parquet and return its sha256."""
        from pyarrow import parquet

        with replaced(folder / SHARDS) as part:
            parquet.write_table(self._table, part)
            return hashlib.sha256(part.read_bytes()).hexdigest()

    @classmethod
    def read(cls, folder: Path | Url, sha256: str) -> "Shards":
        """Read shards.parquet. Raises DataError when it is missing, has another hash or holds something else."""
        import pyarrow as pa
        import pyarrow.compute as pc
        from pyarrow import parquet

        file = folder / SHARDS
        try:
            data = read_bytes(file)
            found = hashlib.sha256(data).hexdigest()
            if found != sha256:
                raise DataError(f"{file} has the sha256 {found[:12]}; {DATASET} states {sha256[:12]}; restore the file or build the dataset again")
            with parquet.ParquetFile(pa.BufferReader(data)) as opened:
                if opened.schema_arrow.equals(_shards_schema()):
                    table = opened.read()
                    if pc.all(pc.match_substring_regex(table["name"], NAME), min_count=0).as_py() and not any(c.null_count for c in table.columns):
                        return cls(table)
            problem = "it does not hold the columns of shards, or names elsewhere than in the folder"
        except (pa.ArrowException, OSError, ValueError) as error:
            problem = str(error).partition("\n")[0]
        raise DataError(f"{file} cannot be read ({problem}); restore the file or build the dataset again")


class Split(_Entry):
    """Totals of train, val or test; bytes are those of its tars."""

    shards: int
    images: int
    captions: int
    bytes: int

    @classmethod
    def of(cls, shards: Shards) -> "Split":
        """Add up."""
        images, captions, size = (int(shards.numbers(column).sum()) for column in ("count", "captions", "bytes"))
        return cls(shards=len(shards), images=images, captions=captions, bytes=size)


class TokenizerEntry(_Entry):
    """The tokenizer that belongs to the dataset."""

    file: Literal["tokenizer.model"] = "tokenizer.model"
    fingerprint: str
    vocab_size: int


class InputEntry(_Entry):
    """A file or folder that was prepared."""

    path: str
    """As it was named, without the folders that it lies in."""
    split: str
    sha256: str
    rows: int


class Preparation(_Entry):
    """What `flm data prepare` was told, what it read and what became of every row of it."""

    spec: dict[str, Any]
    spec_hash: str
    inputs: list[InputEntry]
    fates: dict[str, int]
    versions: dict[str, str]
    """Of the libraries that decide bytes."""


class Derivation(_Entry):
    """How a dataset was made of another, which stays as it is."""

    parent: str
    """Root of the other."""
    by: Literal["filter", "reshard", "score"]
    values: dict[str, Any]
    """What was asked for; files by their hashes, not by their paths."""
    counts: dict[str, int] = {}
    """What came of it, such as how many samples meet each condition."""


class Manifest(_Entry):
    """dataset.json: everything that decides what the dataset says; `root` is the hash of the rest."""

    format: Literal[2] = 2
    name: str
    sources: list[Source]
    splits: dict[Annotated[str, Field(pattern=r"^[a-z0-9_]+$")], Split]
    tokenizer: TokenizerEntry | None = None
    preparation: Preparation | None = None
    derivations: list[Derivation] = []
    """From the dataset that was prepared to this one; empty for that one."""
    shards_sha256: str
    root: str = ""

    @property
    def is_subset(self) -> bool:
        """Whether tars may hold samples that their indexes leave out: the dataset was filtered or imported, and its tars not written anew since."""
        makers = [derivation.by for derivation in self.derivations if derivation.by != "score"]
        is_imported = bool(self.preparation and self.preparation.spec.get("input", {}).get("adopt"))
        return makers[-1] == "filter" if makers else is_imported

    def computed_root(self) -> str:
        """Return the sha256 of the canonical JSON of everything except `root`."""
        content = self.model_dump(exclude={"root"})
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()

    def write(self, folder: Path) -> "Manifest":
        """Write dataset.json in one step, with its root; return what was written."""
        final = self.model_copy(update={"root": self.computed_root()})
        with replaced(folder / DATASET) as part:
            part.write_text(json.dumps(final.model_dump(), indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
        return final

    @classmethod
    def read(cls, folder: Path | Url) -> "Manifest":
        """Read dataset.json. Raises DataError when there is none, or it is no manifest, or its content does not give its root."""
        file = folder / DATASET
        try:
            manifest = cls.model_validate_json(read_bytes(file))
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror or 'it is not there'}); restore the file or build the dataset again") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise DataError(f"{file}: {where}: {first['msg']}; build the dataset again or restore the file") from error
        if manifest.root != manifest.computed_root():
            raise DataError(f"{file} states the root {manifest.root}; its content gives {manifest.computed_root()}; it was changed by hand: "
                            "restore it or build the dataset again")
        return manifest


def _shards_schema() -> "pa.Schema":
    import pyarrow as pa

    numbers = {"count", "captions", "bytes", "index_bytes", "table_bytes"}
    return pa.schema([(name, pa.int64() if name in numbers else pa.string()) for name in ("split", *Shard.model_fields)])
