"""A prepared dataset on disk: tar shards as img2dataset writes them, an index beside each, one manifest. The only door to webdataset.

`write_dataset` turns samples into DIR/SPLIT/00000.tar and .parquet; the same samples give the same bytes, and manifest.json comes last,
so that a killed build never looks complete. `open_dataset` checks all of it before the first step. Reading goes through the index's
offsets, never through a tar parser, and never unpickles anything.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flm_scale.data.tar import list_members
from flm_scale.data.tokens import tokenizer_fingerprint
from flm_scale.errors import DataError

SAMPLES_PER_SHARD = 1000
HASHED_ON_OPEN_BYTES = 2 * 1024**3  # up to here reading everything takes seconds
MAX_OPEN_SHARDS = 256  # well below the usual limit of 1024 open files a process
MANIFEST, UNFINISHED, TOKENIZER = "manifest.json", ".unfinished", "tokenizer.model"


@dataclass(frozen=True)
class Sample:
    """One picture with everything that is said about it."""

    key: str
    image: bytes
    image_format: Literal["png", "jpg"]
    captions: list[str]
    questions: list[str]
    answers: list[str]
    concept: str
    """What is shown, in a normal form: pictures of one concept are positives of each other. Empty when unknown."""
    width: int
    height: int
    extras: Mapping[str, Any] = field(default_factory=dict)
    """More JSON fields for the shard (source, licence, ...); training does not read them."""


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Source(_Entry):
    """A package that the pictures or words come from."""

    package: str
    version: str
    sha256: str
    license: str


class Shard(_Entry):
    """One tar and its index."""

    name: str = Field(pattern=r"^[a-z0-9_]+/\d{5}\.tar$")
    count: int
    bytes: int
    sha256: str
    index_bytes: int
    index_sha256: str

    @property
    def index_name(self) -> str:
        """Path of the index, relative to the dataset."""
        return self.name.removesuffix(".tar") + ".parquet"


class Split(_Entry):
    """Totals and shards of train, val or test."""

    images: int
    captions: int
    shards: list[Shard]


class TokenizerEntry(_Entry):
    """The tokenizer that belongs to the dataset."""

    file: Literal["tokenizer.model"] = "tokenizer.model"
    fingerprint: str
    vocab_size: int


class Manifest(_Entry):
    """Everything that decides what the dataset says; `root` is the hash of the rest."""

    format: Literal[1] = 1
    name: str
    sources: list[Source]
    splits: dict[str, Split]
    tokenizer: TokenizerEntry | None = None
    root: str = ""

    def computed_root(self) -> str:
        """Return the sha256 of the canonical JSON of everything except `root`."""
        content = self.model_dump(exclude={"root"})
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def write(self, folder: Path) -> "Manifest":
        """Write manifest.json in one step, with its root; return what was written."""
        final = self.model_copy(update={"root": self.computed_root()})
        part = folder / (MANIFEST + ".part")
        part.write_text(json.dumps(final.model_dump(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
        part.replace(folder / MANIFEST)
        return final


class Index:
    """The columns of one split, in shard order; pictures are read by offset. Cheap to send to the loader's processes."""

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        """Read the split's parquet files. Raises DataError when one is no index of ours."""
        self._paths = [folder / shard.name for shard in shards]
        self._open_files: dict[int, int] = {}
        self.keys: list[str] = []
        self.captions: list[list[str]] = []
        self.questions: list[list[str]] = []
        self.answers: list[list[str]] = []
        self.concepts: list[str] = []
        self._places: list[tuple[int, int, int, str]] = []  # shard, offset, bytes, sha256
        for number, shard in enumerate(shards):
            table = _read_index(folder, shard)
            self.keys += table["key"]
            self.captions += table["captions"]
            self.questions += table["questions"]
            self.answers += table["answers"]
            self.concepts += table["concept"]
            self._places += zip([number] * shard.count, table["image_offset"], table["image_bytes"], table["sha256"], strict=True)

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.keys)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the file descriptors behind: they mean nothing in another process."""
        return {**self.__dict__, "_open_files": {}}

    def read_image(self, number: int) -> bytes:
        """Return the encoded picture. Raises DataError when its bytes are not those of the manifest."""
        shard, offset, size, sha256 = self._places[number]
        try:
            data = os.pread(self._descriptor(shard), size, offset)
        except OSError as error:
            raise DataError(f"shard {self._paths[shard]}: sample {self.keys[number]} cannot be read ({error}); restore the file") from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DataError(f"shard {self._paths[shard]}: sample {self.keys[number]} is not the picture that the index states "
                            f"(sha256 {sha256[:12]}); build the dataset again or restore the shard")
        return data

    def _descriptor(self, shard: int) -> int:
        """Open once. A fork may share descriptors: pread moves no file position."""
        if shard not in self._open_files:
            if len(self._open_files) == MAX_OPEN_SHARDS:
                os.close(self._open_files.pop(next(iter(self._open_files))))
            self._open_files[shard] = os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        return self._open_files[shard]

    def __del__(self) -> None:
        """Give the descriptors back."""
        for descriptor in getattr(self, "_open_files", {}).values():
            os.close(descriptor)


class Dataset:
    """An opened dataset."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest

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
        """Where the tokenizer is, or belongs."""
        return self.folder / TOKENIZER

    @property
    def splits(self) -> list[str]:
        """Names of the splits, sorted."""
        return sorted(self.manifest.splits)

    def index(self, split: str) -> Index:
        """Load the columns of a split. Raises DataError when there is none of that name."""
        if split not in self.manifest.splits:
            raise DataError(f"{self.folder} has no split '{split}'; choose one of {', '.join(self.splits)}")
        return Index(self.folder, self.manifest.splits[split].shards)

    def drop_tokenizer(self) -> None:
        """Register none, before tokenizer.model is replaced: a kill between the two files must leave a dataset that opens."""
        self.manifest = self.manifest.model_copy(update={"tokenizer": None}).write(self.folder)

    def set_tokenizer(self, fingerprint: str, vocab_size: int) -> None:
        """Register the file tokenizer.model; the dataset gets a new root."""
        entry = TokenizerEntry(fingerprint=fingerprint, vocab_size=vocab_size)
        self.manifest = self.manifest.model_copy(update={"tokenizer": entry}).write(self.folder)


def write_dataset(folder: Path, *, name: str, sources: Sequence[Mapping[str, str]], splits: Mapping[str, Iterable[Sample]],
                  readme: str, overwrite: bool = False) -> Dataset:
    """Write samples, in the order given, as a new dataset.

    Raises DataError when the folder holds anything but an unfinished build of ours (`overwrite` also replaces a dataset), when two
    samples share a key, and when a key is more than letters, digits, '-' and '_'.
    """
    _make_room(folder, overwrite=overwrite)
    (folder / "README.md").write_text(readme, encoding="utf-8")
    keys: set[str] = set()
    entries = {}
    for split, samples in splits.items():
        (folder / split).mkdir()
        shards: list[Shard] = []
        rest, captions = iter(samples), 0
        while chunk := list(islice(rest, SAMPLES_PER_SHARD)):
            for sample in chunk:
                if sample.key in keys or not re.fullmatch(r"[A-Za-z0-9_-]+", sample.key):
                    raise DataError(f"{folder}: sample key '{sample.key}' is taken or has other characters than A-Z a-z 0-9 - _; rename it")
                keys.add(sample.key)
            shards.append(_write_shard(folder, f"{split}/{len(shards):05d}.tar", chunk))
            captions += sum(len(sample.captions) for sample in chunk)
        entries[split] = Split(images=sum(shard.count for shard in shards), captions=captions, shards=shards)
    manifest = Manifest(name=name, sources=[Source(**source) for source in sources], splits=entries).write(folder)
    (folder / UNFINISHED).unlink()
    return Dataset(folder, manifest)


def check_room(folder: Path, *, overwrite: bool = False) -> None:
    """Raise DataError unless `write_dataset` may write here."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file; choose a folder")
    present = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if MANIFEST in present and not overwrite:
        raise DataError(f"{folder} holds another dataset; choose an empty folder, or overwrite it")
    if present and not present & {MANIFEST, UNFINISHED}:
        raise DataError(f"{folder} holds files that are not a dataset's ({min(present)}); choose an empty folder")


def _make_room(folder: Path, *, overwrite: bool) -> None:
    """Leave the folder empty but for the mark that says: everything in here is ours to clear."""
    check_room(folder, overwrite=overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / UNFINISHED).touch()
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != UNFINISHED:
            path.unlink()


def _write_shard(folder: Path, name: str, samples: Sequence[Sample]) -> Shard:
    """Write one tar and its index under temporary names, then rename both."""
    import pyarrow as pa
    import webdataset
    from pyarrow import parquet

    tar, index = folder / name, folder / (name.removesuffix(".tar") + ".parquet")
    tar_part, index_part = tar.with_name(tar.name + ".part"), index.with_name(index.name + ".part")
    hashes = [hashlib.sha256(sample.image).hexdigest() for sample in samples]
    with tar_part.open("wb") as stream, webdataset.TarWriter(stream, encoder=False, mtime=0) as writer:
        for sample, sha256 in zip(samples, hashes, strict=True):
            about = {"key": sample.key, "captions": sample.captions, "questions": sample.questions, "answers": sample.answers,
                     "concept": sample.concept, "width": sample.width, "height": sample.height, "sha256": sha256, **sample.extras}
            writer.write({"__key__": sample.key, sample.image_format: sample.image, "txt": (sample.captions or [""])[0].encode(),
                          "json": json.dumps(about, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()})
    pictures = [member for member in list_members(tar_part) if member.extension in {"png", "jpg"}]  # places are read back, not calculated
    rows = [vars(sample) | {"image_offset": picture.offset, "image_bytes": picture.size, "sha256": sha256}
            for sample, picture, sha256 in zip(samples, pictures, hashes, strict=True)]
    parquet.write_table(pa.Table.from_pylist(rows, schema=_index_schema()), index_part)
    tar_part.replace(tar)
    index_part.replace(index)
    return Shard(name=name, count=len(samples), bytes=tar.stat().st_size, sha256=_file_sha256(tar),
                 index_bytes=index.stat().st_size, index_sha256=_file_sha256(index))


def _index_schema() -> object:
    import pyarrow as pa

    text, texts, place, side = pa.string(), pa.list_(pa.string()), pa.int64(), pa.int32()
    return pa.schema([("key", text), ("captions", texts), ("questions", texts), ("answers", texts), ("concept", text), ("image_offset", place),
                      ("image_bytes", place), ("sha256", text), ("width", side), ("height", side)])


def _read_index(folder: Path, shard: Shard) -> dict[str, list[Any]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(folder / shard.index_name) as file:
            if file.schema_arrow.equals(_index_schema()) and file.metadata.num_rows == shard.count:
                return dict(file.read().to_pydict())
        problem = f"it does not hold the columns of {shard.count} samples"
    except (pa.ArrowException, OSError, ValueError) as error:
        problem = str(error).partition("\n")[0]
    raise DataError(f"index {shard.index_name} of {folder} cannot be read ({problem}); build the dataset again or restore the file")


def open_dataset(folder: Path, *, manifest_hash: str = "", tokenizer_hash: str = "") -> Dataset:
    """Open a dataset and check what is cheap: every size, and every byte when it is below 2 GiB (else `verify` does).

    manifest_hash, tokenizer_hash: what the caller expects; empty expects nothing. Raises DataError with the first problem and the number
    of all.
    """
    manifest = _read_manifest(folder)
    if manifest_hash and manifest_hash != manifest.root:
        raise DataError(f"dataset {folder} has the root {manifest.root}; the run expects {manifest_hash}; point data.path at the run's "
                        "dataset, or clear data.manifest_hash to train on this one")
    dataset = Dataset(folder, manifest)
    if tokenizer_hash and tokenizer_hash != dataset.tokenizer_fingerprint:
        found = dataset.tokenizer_fingerprint or "(none)"
        raise DataError(f"dataset {folder} has the tokenizer {found}; the run expects {tokenizer_hash}; "
                        "point data.path at the run's dataset, or clear data.tokenizer_hash to train anew")
    total = sum(shard.bytes + shard.index_bytes for split in manifest.splits.values() for shard in split.shards)
    if problems := list(_problems(dataset, hashes=total < HASHED_ON_OPEN_BYTES)):
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise DataError(f"dataset {folder}: {problems[0]}{more}; build the dataset again or restore the files")
    return dataset


def verify(dataset: Dataset) -> list[str]:
    """Read every byte; return one line for each file that is not what the manifest states, or else for each tar that is not what its index states."""
    if problems := list(_problems(dataset, hashes=True)):
        return problems
    return [line for split in dataset.manifest.splits.values() for shard in split.shards if (line := _contradiction(dataset.folder, shard))]


def _contradiction(folder: Path, shard: Shard) -> str:
    """Hashes say that files are as their author left them, not that they are a shard and its index."""
    try:
        members = list_members(folder / shard.name, expected_bytes=shard.bytes, expected_count=shard.count)
        held = [(member.key, member.offset, member.size) for member in members if member.extension in {"png", "jpg"}]
        index = _read_index(folder, shard)
    except DataError as error:
        return str(error)
    stated = list(zip(index["key"], index["image_offset"], index["image_bytes"], strict=True))
    return "" if held == stated else f"shard {shard.name} holds other keys or places than its index states"


def _read_manifest(folder: Path) -> Manifest:
    file = folder / MANIFEST
    if not file.is_file():
        present = "holds an unfinished build" if (folder / UNFINISHED).exists() else "has no manifest.json"
        state = present if folder.exists() else "does not exist"
        raise DataError(f"dataset {folder} {state}; make one with `flm data demo {folder}`, or set data.path")
    try:
        manifest = Manifest.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(f"{file}: {where}: {first['msg']}; build the dataset again or restore the file") from error
    if manifest.root != manifest.computed_root():
        raise DataError(f"{file} states the root {manifest.root}; its content gives {manifest.computed_root()}; it was changed by hand: "
                        "restore it or build the dataset again")
    return manifest


def _problems(dataset: Dataset, *, hashes: bool) -> Iterator[str]:
    for split in dataset.manifest.splits.values():
        for shard in split.shards:
            for name, size, sha256 in ((shard.name, shard.bytes, shard.sha256), (shard.index_name, shard.index_bytes, shard.index_sha256)):
                file = dataset.folder / name
                if not file.is_file():
                    yield f"shard {name} is missing"
                elif (actual := file.stat().st_size) != size:
                    yield f"shard {name} has {actual} bytes; the manifest states {size}"
                elif hashes and (found := _file_sha256(file)) != sha256:
                    yield f"shard {name} has the sha256 {found[:12]}; the manifest states {sha256[:12]}"
    if dataset.tokenizer_fingerprint:
        file = dataset.tokenizer_file
        if not file.is_file():
            yield f"{TOKENIZER} is missing"
        elif (found := tokenizer_fingerprint(file.read_bytes())) != dataset.tokenizer_fingerprint:
            yield f"{TOKENIZER} has the fingerprint {found[:12]}; the manifest states {dataset.tokenizer_fingerprint[:12]}"


def _file_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
