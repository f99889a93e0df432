"""A dataset on disk: tar shards as img2dataset writes them, an index beside each, one manifest. The only door to webdataset.

`write_shard` turns samples into a tar, its index and, where it was prepared, img2dataset's table and counts; `seal_dataset` states them all in
shards.parquet and dataset.json, which comes last, so that a killed build never looks complete. The same samples give the same bytes.
`open_dataset` checks all of it before the first step.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from flm_scale.data.index import Index, write_index
from flm_scale.data.manifest import (
    DATASET,
    FORMAT_1,
    SHARDS,
    Derivation,
    Manifest,
    Preparation,
    Shard,
    Shards,
    Split,
    TokenizerEntry,
    index_name,
    linked,
    replaced,
    stats_name,
)
from flm_scale.data.sources import Source
from flm_scale.data.storage import Url, file_sha256, local_copy, locate, sizes_of
from flm_scale.data.tar import list_members
from flm_scale.data.tokens import tokenizer_fingerprint
from flm_scale.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

SAMPLES_PER_SHARD = 1000
SIZED_AT_ONCE = 4096
"""Files whose sizes are asked for together."""
HASHED_ON_OPEN_BYTES = 2 * 1024**3  # up to here reading everything takes seconds
UNFINISHED, TOKENIZER, TOKENS = ".unfinished", "tokenizer.model", "tokens"
PICTURES = frozenset({"jpg", "jpeg", "png", "webp", "mp4"})  # we write no .jpeg, and read it in others' tars


class Place(NamedTuple):
    """Where a tar that stays as it is holds a picture."""

    image_offset: int
    image_bytes: int
    sha256: str


@dataclass(frozen=True)
class Sample:
    """One picture, or clip, with everything that is said about it."""

    key: str
    image: bytes
    image_format: Literal["jpg", "png", "webp", "mp4"]
    captions: list[str]
    questions: list[str]
    answers: list[str]
    concept: str
    """What is shown, in a normal form: pictures of one concept are positives of each other. Empty when unknown."""
    width: int
    height: int
    extras: Mapping[str, Any] = field(default_factory=dict)
    """More JSON fields for the shard (source, licence, ...); training does not read them."""
    columns: Mapping[str, int | float | str] = field(default_factory=dict)
    """More columns for the index, the same in every sample of a shard: original_width, original_height, original_sha256, phash, of clips frames
    and seconds, and scores."""
    place: Place | None = None
    """In an adopted tar; `image` does not count then, nor its format, and may be empty."""


class Adopted(NamedTuple):
    """A tar that is there already, by anybody, and becomes a shard's as it is."""

    path: Path
    bytes: int
    sha256: str


def write_shard(folder: Path, name: str, samples: Iterable[Sample], *, table: "Callable[[], pa.Table] | None" = None,
                stats: Callable[[], Mapping[str, Any]] | None = None, attempt: int = 0, adopted: Adopted | None = None) -> Shard:
    """Write samples, in the order given, as one shard, and return its entry. One picture is held at a time.

    name: "train/00000.tar".   table: called when all samples are written, for the shard's table of input rows.   stats: likewise, for its counts and
    times, written last.   attempt: stands in temporary names: two writers of the same samples do not meet, and give the same bytes.
    adopted: holds the samples, at their places, and maybe others; it is linked.
    Raises DataError when two samples share a key, or a key is more than letters, digits, '-' and '_'; when an adopted tar has another size.
    """
    from pyarrow import parquet

    rows: list[dict[str, Any]] = []
    if adopted:
        rows += [{**_said_of(sample), **_place_of(sample)._asdict(), **sample.columns} for sample in samples]
        linked(adopted.path, folder / name, attempt)
        size, sha256 = (folder / name).stat().st_size, adopted.sha256
        if size != adopted.bytes:
            raise DataError(f"shard {adopted.path} has {size} bytes and had {adopted.bytes}; a tar must not change while it is imported")
    else:
        with replaced(folder / name, attempt) as part:
            _write_tar(part, samples, rows)
            pictures = (member for member in list_members(part) if member.extension in PICTURES)  # places are read back, not calculated
            for row, picture in zip(rows, pictures, strict=True):
                row |= {"image_offset": picture.offset, "image_bytes": picture.size}
            size, sha256 = part.stat().st_size, file_sha256(part)
    with replaced(folder / index_name(name), attempt) as part:
        write_index(part, rows, rows[0]["columns"] if rows else ())
        entry = Shard(name=name, count=len(rows), captions=sum(len(row["captions"]) for row in rows), bytes=size, sha256=sha256,
                      index_bytes=part.stat().st_size, index_sha256=file_sha256(part))
    if table:
        with replaced(folder / entry.table_name, attempt) as part:
            parquet.write_table(table(), part)
            entry = entry.model_copy(update={"table_bytes": part.stat().st_size, "table_sha256": file_sha256(part)})
    if stats:
        commit_shard(folder, entry, stats(), attempt=attempt)
    return entry


def commit_shard(folder: Path, entry: Shard, stats: Mapping[str, Any], *, attempt: int = 0) -> None:
    """Write a shard's counts and times, the last of its files: from now on it is complete."""
    with replaced(folder / stats_name(entry.name), attempt) as part:
        part.write_text(json.dumps({**stats, "shard": entry.model_dump()}, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_committed_shard(folder: Path, name: str) -> Shard | None:
    """Return the entry of a prepared shard that is complete: its counts are there, and its files have the sizes that they tell."""
    try:
        entry = Shard.model_validate(json.loads((folder / stats_name(name)).read_bytes())["shard"])
        complete = entry.name == name and all((folder / file).stat().st_size == size for file, size, _ in entry.files)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return entry if complete else None


def seal_dataset(folder: Path, *, name: str, sources: Sequence[Mapping[str, str]], splits: Mapping[str, Sequence[Shard]],
                 preparation: Mapping[str, Any] | None = None, derivations: Sequence[Derivation] = (), readme: str) -> "Dataset":
    """State the shards of each split, in order, as a dataset: writes shards.parquet, README.md and dataset.json.

    preparation: the fields of `Preparation`. What killed writers left is removed: none may be at work any more.
    """
    for part in folder.rglob(".*.part"):
        part.unlink()
    shards = Shards.of(chain.from_iterable(splits.values()))
    digest = shards.write(folder)
    (folder / "README.md").write_text(readme, encoding="utf-8")
    manifest = Manifest(name=name, sources=[Source(**source) for source in sources], shards_sha256=digest,
                        splits={split: Split.of(shards.of_split(split)) for split in splits},
                        preparation=Preparation.model_validate(preparation) if preparation else None, derivations=list(derivations))
    return Dataset(folder, manifest.write(folder), shards)


def write_dataset(folder: Path, *, name: str, sources: Sequence[Mapping[str, str]], splits: Mapping[str, Iterable[Sample]],
                  readme: str, overwrite: bool = False) -> "Dataset":
    """Write samples, in the order given, as a new dataset.

    Raises DataError when the folder holds anything but an unfinished build of ours (`overwrite` also replaces a dataset), when two
    samples share a key, and when a key is more than letters, digits, '-' and '_'.
    """
    make_room(folder, overwrite=overwrite)
    keys: set[str] = set()

    def with_fresh_keys(samples: Iterable[Sample]) -> Iterator[Sample]:
        for sample in samples:
            if sample.key in keys:
                raise _unusable_key(folder, sample.key)
            keys.add(sample.key)
            yield sample

    entries: dict[str, list[Shard]] = {}
    for split, samples in splits.items():
        entries[split], rest = [], with_fresh_keys(samples)
        for first in rest:
            chunk = chain([first], islice(rest, SAMPLES_PER_SHARD - 1))
            entries[split].append(write_shard(folder, f"{split}/{len(entries[split]):05d}.tar", chunk))
    dataset = seal_dataset(folder, name=name, sources=sources, splits=entries, readme=readme)
    (folder / UNFINISHED).unlink()
    return dataset


def check_room(folder: Path, *, overwrite: bool = False) -> None:
    """Raise DataError unless `write_dataset` may write here."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file; choose a folder")
    present = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if present & {DATASET, FORMAT_1} and not overwrite:
        raise DataError(f"{folder} holds another dataset; choose an empty folder, or overwrite it")
    if present and not present & {DATASET, FORMAT_1, UNFINISHED}:
        raise DataError(f"{folder} holds files that are not a dataset's ({min(present)}); choose an empty folder")


def make_room(folder: Path, *, overwrite: bool) -> None:
    """Leave the folder empty but for the mark that says: everything in here is ours to clear."""
    check_room(folder, overwrite=overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / UNFINISHED).touch()
    for manifest in (DATASET, FORMAT_1):
        (folder / manifest).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != UNFINISHED:
            path.unlink()


def _write_tar(part: Path, samples: Iterable[Sample], rows: list[dict[str, Any]]) -> None:
    """Write the samples and add what is known of each, without its picture, to `rows`."""
    import webdataset

    keys: set[str] = set()
    with part.open("wb") as stream, webdataset.TarWriter(stream, encoder=False, mtime=0) as writer:
        for sample in samples:
            if sample.key in keys or not re.fullmatch(r"[A-Za-z0-9_-]+", sample.key):
                raise _unusable_key(part.parent, sample.key)
            keys.add(sample.key)
            row = _said_of(sample) | {"sha256": hashlib.sha256(sample.image).hexdigest()}
            about = {name: value for name, value in row.items() if name != "columns"} | dict(sample.extras)
            writer.write({"__key__": sample.key, sample.image_format: sample.image, "txt": (sample.captions or [""])[0].encode(),
                          "json": json.dumps(about, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()})
            assert not rows or rows[0]["columns"].keys() == sample.columns.keys(), "samples of a shard have the same columns"
            rows.append({**row, **sample.columns})


def _said_of(sample: Sample) -> dict[str, Any]:
    return {name: value for name, value in vars(sample).items() if name not in {"image", "image_format", "extras", "place"}}


def _place_of(sample: Sample) -> Place:
    assert sample.place, "samples of an adopted tar have their places in it"
    return sample.place


def _unusable_key(folder: Path, key: str) -> DataError:
    return DataError(f"{folder}: sample key '{key}' is taken or has other characters than A-Z a-z 0-9 - _; rename it")


class Dataset:
    """An opened dataset."""

    def __init__(self, folder: Path | Url, manifest: Manifest, shards: Shards) -> None:
        self.folder, self.manifest, self._shards = folder, manifest, shards

    @property
    def root(self) -> str:
        """Hash of the whole content: pictures, words, splits and tokenizer."""
        return self.manifest.root

    @property
    def name(self) -> str:
        """What the dataset is called."""
        return self.manifest.name

    @property
    def tokenizer_fingerprint(self) -> str:
        """Fingerprint of the dataset's tokenizer; empty while it has none."""
        return self.manifest.tokenizer.fingerprint if self.manifest.tokenizer else ""

    @property
    def tokenizer_file(self) -> Path:
        """Where the tokenizer is, or belongs; its copy when the dataset lies elsewhere."""
        return local_copy(self.folder / TOKENIZER)

    @property
    def writable_folder(self) -> Path:
        """The dataset's folder. Raises DataError when it lies elsewhere."""
        if isinstance(self.folder, Url):
            raise DataError(f"dataset {self.folder} can be read there but not written to; change it in a folder on disk and copy that there")
        return self.folder

    @property
    def splits(self) -> list[str]:
        """Names of the splits, sorted."""
        return sorted(self.manifest.splits)

    def shards(self, *splits: str) -> Shards:
        """Return the shards of some splits, one split behind the other; without a name, of all. Raises DataError when there is none of that name."""
        for split in splits:
            if split not in self.manifest.splits:
                raise DataError(f"{self.folder} has no split '{split}'; choose one of {', '.join(self.splits)}")
        return self._shards.of_split(*splits) if splits else self._shards

    def index(self, *splits: str) -> Index:
        """Return the columns of some splits, one split behind the other. Raises DataError when there is none of that name."""
        return Index(self.folder, self.shards(*splits))

    def drop_tokenizer(self) -> None:
        """Register none, before tokenizer.model is replaced: a kill between the two files must leave a dataset that opens.

        Its token ids go, those by language models' tokenizers stay.
        """
        if self.tokenizer_fingerprint:
            shutil.rmtree(self.writable_folder / TOKENS / self.tokenizer_fingerprint[:8], ignore_errors=True)
        self.manifest = self.manifest.model_copy(update={"tokenizer": None}).write(self.writable_folder)

    def set_tokenizer(self, fingerprint: str, vocab_size: int) -> None:
        """Register the file tokenizer.model, whose token ids are there; the dataset gets a new root."""
        entry = TokenizerEntry(fingerprint=fingerprint, vocab_size=vocab_size)
        self.manifest = self.manifest.model_copy(update={"tokenizer": entry}).write(self.writable_folder)


def open_dataset(folder: Path | str, *, manifest_hash: str = "", tokenizer_hash: str = "") -> Dataset:
    """Open a dataset and check what is cheap: on disk every size, and every byte when it is below 2 GiB (else `verify` does).

    folder: or the URL of one; its files are checked as they are read.   manifest_hash, tokenizer_hash: what the caller expects; empty expects
    nothing. Raises DataError with the first problem and the number of all, StorageError when a file that lies elsewhere cannot be had.
    """
    dataset = open_unchecked(folder)
    folder, manifest = dataset.folder, dataset.manifest
    if manifest_hash and manifest_hash != manifest.root:
        raise DataError(f"dataset {folder} has the root {manifest.root}; the run expects {manifest_hash}; point data.path at the run's "
                        "dataset, or clear data.manifest_hash to train on this one")
    if tokenizer_hash and tokenizer_hash != dataset.tokenizer_fingerprint:
        found = dataset.tokenizer_fingerprint or "(none)"
        raise DataError(f"dataset {folder} has the tokenizer {found}; the run expects {tokenizer_hash}; "
                        "point data.path at the run's dataset, or clear data.tokenizer_hash to train anew")
    total = sum(int(dataset.shards().numbers(column).sum()) for column in ("bytes", "index_bytes", "table_bytes"))
    is_far = isinstance(folder, Url)
    if problems := list(_tokenizer_problems(dataset) if is_far else file_problems(dataset, hashes=total < HASHED_ON_OPEN_BYTES)):
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise DataError(f"dataset {folder}: {problems[0]}{more}; build the dataset again or restore the files")
    return dataset


def open_unchecked(folder: Path | str) -> Dataset:
    """Open a dataset whose files are checked afterwards: dataset.json and shards.parquet alone are read. Raises as `open_dataset`."""
    folder = locate(folder)
    if isinstance(folder, Path) and not (folder / DATASET).is_file():
        raise _no_dataset(folder)
    manifest = Manifest.read(folder)
    dataset = Dataset(folder, manifest, Shards.read(folder, manifest.shards_sha256))
    for split, stated in manifest.splits.items():
        if (counted := Split.of(dataset.shards(split))) != stated:
            raise DataError(f"dataset {folder}: {SHARDS} has {counted.images} images in {counted.shards} shards of '{split}'; {DATASET} states "
                            f"{stated.images} in {stated.shards}; build the dataset again")
    return dataset


def _no_dataset(folder: Path) -> DataError:
    if (folder / FORMAT_1).exists():
        return DataError(f"dataset {folder} is of format 1 ({FORMAT_1}), which this version does not read; build it again: "
                         f"flm data demo {folder} --overwrite")
    present = "holds an unfinished build" if (folder / UNFINISHED).exists() else f"has no {DATASET}"
    state = present if folder.exists() else "does not exist"
    return DataError(f"dataset {folder} {state}; make one with `flm data demo {folder}`, or set data.path")


def file_problems(dataset: Dataset, *, hashes: bool) -> Iterator[str]:
    """Yield a line for each file that is missing or of another size, or other bytes, than the dataset states."""
    stated = (file for shard in dataset.shards() for file in shard.files)
    while some := list(islice(stated, SIZED_AT_ONCE)):
        files = [dataset.folder / name for name, _, _ in some]
        for file, actual, (name, size, sha256) in zip(files, sizes_of(files), some, strict=True):
            if actual is None:
                yield f"shard {name} is missing"
            elif actual != size:
                yield f"shard {name} has {actual} bytes; the manifest states {size}"
            elif hashes and (digest := file_sha256(file)) != sha256:
                yield f"shard {name} has the sha256 {digest[:12]}; the manifest states {sha256[:12]}"
    yield from _tokenizer_problems(dataset)


def _tokenizer_problems(dataset: Dataset) -> Iterator[str]:
    if dataset.tokenizer_fingerprint:
        try:
            fingerprint = tokenizer_fingerprint(dataset.tokenizer_file.read_bytes())
        except OSError:
            yield f"{TOKENIZER} is missing"
            return
        if fingerprint != dataset.tokenizer_fingerprint:
            yield f"{TOKENIZER} has the fingerprint {fingerprint[:12]}; the manifest states {dataset.tokenizer_fingerprint[:12]}"
