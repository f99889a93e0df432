"""Token ids beside the shards: written when a dataset gets its tokenizer, or for a language model that is to read its captions; mapped into memory by
the loader, so that nothing is encoded at a start. Each tokenizer has a folder of its own.

    tokens/<first 8 of the fingerprint>/train/00000.arrow   a row a picture: the ids of its captions with content, BOS to EOS, never cut
    tokens/<first 8 of the fingerprint>/train.lengths.u16   [captions] how long each is, of all shards; what the order plans with
    tokens/<first 8 of the fingerprint>/train.starts.i64    [images + 1] where each picture's captions begin there; not where each has one
    tokens/<first 8 of the fingerprint>/train.json          what both are of; written last

A sidecar is bound to the tokenizer (fingerprint, and the canary of the library that cut), to the index whose captions it holds, and to its own
content; all is checked when it is mapped. None of it is part of the dataset's root: it follows from what is.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, overload

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from flm_scale.data.index import ShardCache, index_columns, map_arrow, write_arrow
from flm_scale.data.manifest import Shard, Shards, replaced
from flm_scale.data.order import BLOCK
from flm_scale.data.shards import TOKENS, Dataset
from flm_scale.data.storage import Url, local_copy, read_bytes
from flm_scale.data.tokens import AnyTokenizer, Tokenizer
from flm_scale.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

LONGEST = 65535
"""Greater lengths are stated as this: no run takes captions of that length whole."""
MEANING = {"tokenizer": "tokenizer", "canary": "way to cut (canary)", "index": "captions (index)", "shards": "shards (shards.parquet)"}
"""In words, what token ids are bound to."""


class Ids(NamedTuple):
    """The captions of a shard, as views of its mapped sidecar."""

    ids: np.ndarray
    """All captions' ids, one behind the other."""
    bounds: np.ndarray
    """[captions + 1] where each begins."""
    starts: np.ndarray
    """[pictures + 1] where each picture's captions begin in `bounds`."""

    @classmethod
    def of(cls, column: "pa.ListArray") -> "Ids":
        """Return views of a column of lists of lists."""
        return cls(*(values.to_numpy() for values in (column.values.values, column.values.offsets, column.offsets)))

    @property
    def column(self) -> "pa.ListArray":
        """The same as a column: a list a picture, of a list a caption."""
        import pyarrow as pa

        return pa.ListArray.from_arrays(self.starts, pa.ListArray.from_arrays(self.bounds, self.ids))

    def take(self, pictures: np.ndarray) -> "Ids":
        """Return the captions of some of the pictures."""
        return Ids.of(self.column.take(pictures))

    @property
    def content(self) -> str:
        """Hash of all three."""
        return hashlib.sha256(b"".join(part.tobytes() for part in self)).hexdigest()

    @property
    def lengths(self) -> np.ndarray:
        """[captions] tokens of each, BOS and EOS too."""
        lengths: np.ndarray = np.minimum(np.diff(self.bounds), LONGEST)
        return lengths

    def are_captions(self, vocab_size: int) -> bool:
        """Return whether every caption has content, and every id is the vocabulary's."""
        return bool(self.lengths.min(initial=3) >= 3 and self.ids.max(initial=0) < vocab_size)


class Joined(BaseModel):
    """What the lengths of a split are of."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    tokenizer: str
    canary: str
    shards: str
    """sha256 of shards.parquet."""
    images: int
    captions: int
    is_one_each: bool
    """Every picture has one caption, and there is no file of starts."""


@overload
def folder_of(folder: Path, fingerprint: str) -> Path: ...
@overload
def folder_of(folder: Path | Url, fingerprint: str) -> Path | Url: ...
def folder_of(folder: Path | Url, fingerprint: str) -> Path | Url:
    """Return where a dataset's token ids of one tokenizer lie."""
    return folder / TOKENS / fingerprint[:8]


class TokenIds:
    """The token ids of a split's captions with content, an item a picture; mapped shard by shard as they are asked for."""

    def __init__(self, dataset: Dataset, split: str, tokenizer: AnyTokenizer, max_length: int = LONGEST) -> None:
        """max_length: longer captions are cut and keep their EOS.

        Raises DataError when there are no ids, or they are not of this dataset and tokenizer as this process cuts.
        """
        self.dataset, self.split, self.tokenizer, self.max_length = dataset, split, tokenizer, max_length
        self.shards = dataset.shards(split)
        self._ids = ShardCache(self.shards.counts, self.read_shard)
        joined = _read_joined(dataset, split, tokenizer)
        folder = folder_of(dataset.folder, tokenizer.fingerprint)
        self.lengths = _map_numbers(dataset, tokenizer, folder / f"{split}.lengths.u16", np.uint16, joined.captions)
        """[captions] of the whole split, uncut, mapped."""
        self.starts = None if joined.is_one_each else _map_numbers(dataset, tokenizer, folder / f"{split}.starts.i64", np.int64, joined.images + 1)
        """[images + 1] where each picture's captions begin among them, mapped; None for one caption a picture."""
        if not _can_be_planned(self.lengths, self.starts):
            raise _unusable(dataset.folder, tokenizer, f"the lengths of '{split}' are not those of captions")

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self._ids)

    def __getitem__(self, image: int) -> list[np.ndarray]:
        """Return the ids, BOS to EOS, of each of a picture's captions."""
        shard, row = self._ids.find(image)
        ids, bounds, starts = self._ids.of_shard(shard)
        captions = (ids[bounds[caption]:bounds[caption + 1]].astype(np.int32) for caption in range(starts[row], starts[row + 1]))
        return [ids if len(ids) <= self.max_length else np.append(ids[:self.max_length - 1], ids[-1]) for ids in captions]

    def fetch(self, images: Iterable[int]) -> None:
        """Have the ids of the pictures that will be asked for next copied, where they lie elsewhere."""
        if isinstance(self.dataset.folder, Url):
            self._ids.fetch(images)

    def __reduce__(self) -> tuple[type["TokenIds"], tuple[Dataset, str, AnyTokenizer, int]]:
        """Leave the maps behind."""
        return TokenIds, (self.dataset, self.split, self.tokenizer, self.max_length)

    def read_shard(self, number: int) -> Ids:
        """Map a shard's. Raises DataError when they are not what they state, or not of the lengths that the order plans with."""
        shard = self.shards[number]
        found = read_sidecar(self.dataset.folder, shard, self.tokenizer)
        images = slice(*(int(end) for end in (self._ids.ends[number] - shard.count, self._ids.ends[number] + 1)))
        starts = np.arange(images.start, images.stop) if self.starts is None else self.starts[images]
        planned = self.lengths[starts[0]:starts[-1]]
        if np.array_equal(starts - starts[0], found.starts) and np.array_equal(planned, found.lengths):
            return found
        raise _unusable(self.dataset.folder, self.tokenizer, f"token ids of {shard.name} are of other lengths than {self.split}.lengths.u16 states")


def write_sidecar(folder: Path, shard: Shard, tokenizer: AnyTokenizer, *, threads: int = 1, attempt: int = 0) -> None:
    """Encode the captions of a shard; the same bytes whoever does it. Captions without content are left out.

    folder: of the dataset.   threads: that encode.   attempt: as of `write_shard`.
    """
    (captions,) = index_columns(folder, shard, ["captions"])
    encoded = iter(tokenizer.encode_all(list(chain.from_iterable(captions)), threads=threads))
    kept = [[ids for ids in islice(encoded, len(texts)) if len(ids) > 2] for texts in captions]
    flat = list(chain.from_iterable(kept))
    ids = np.fromiter(chain.from_iterable(flat), np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32, sum(map(len, flat)))
    bounds, starts = (np.cumsum([0, *map(len, parts)]).astype(np.int32) for parts in (flat, kept))
    write_ids(folder, shard, tokenizer, Ids(ids, bounds, starts), attempt=attempt)


def write_ids(folder: Path, shard: Shard, tokenizer: AnyTokenizer, ids: Ids, *, attempt: int = 0) -> None:
    """Write ids as the sidecar of a shard, whose captions they must be."""
    import pyarrow as pa

    metadata = {**_binding(shard, tokenizer), "content": ids.content}
    with replaced(folder_of(folder, tokenizer.fingerprint) / shard.sidecar_name, attempt) as part:
        write_arrow(part, pa.RecordBatch.from_arrays([ids.column], schema=pa.schema([("ids", ids.column.type)], metadata=metadata)))


def read_sidecar(folder: Path | Url, shard: Shard, tokenizer: AnyTokenizer) -> Ids:
    """Map the token ids of a shard. Raises DataError when they are of another tokenizer or index, missing or damaged."""
    import pyarrow as pa

    file = folder_of(folder, tokenizer.fingerprint) / shard.sidecar_name
    try:
        batch = map_arrow(local_copy(file))
        stated = {key.decode(): value.decode() for key, value in (batch.schema.metadata or {}).items()}
        _check_binding(folder, tokenizer, file, stated, _binding(shard, tokenizer))
        if batch.num_rows == shard.count and batch.schema.types in [[pa.list_(pa.list_(kind))] for kind in (pa.uint16(), pa.uint32())]:
            batch.validate(full=True)
            found = Ids.of(batch.column(0))
            if found.content == stated.get("content") and found.are_captions(tokenizer.vocab_size):
                return found
        problem = "they are not what they state"
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        problem = str(error).partition("\n")[0]
    raise _unusable(folder, tokenizer, f"token ids {file.relative_to(folder)} cannot be read ({problem})")


def give_tokenizer(dataset: Dataset) -> Tokenizer:
    """Write the token ids of the file tokenizer.model, and only then register it: a kill in between leaves a dataset that opens."""
    tokenizer = Tokenizer(dataset.tokenizer_file)
    write_sidecars(dataset, tokenizer)
    dataset.set_tokenizer(tokenizer.fingerprint, tokenizer.vocab_size)
    return tokenizer


def write_sidecars(dataset: Dataset, tokenizer: AnyTokenizer, *, workers: int = os.cpu_count() or 1) -> dict[str, int]:
    """Write the token ids of all shards, but for those that are there, and the lengths of each split; return the captions of each split.

    May be killed and run again.   workers: threads that encode.
    """
    from rich.console import Console
    from rich.progress import track

    console, folder, captions = Console(stderr=True), dataset.writable_folder, dict[str, int]()
    for split in dataset.splits:
        shards = dataset.shards(split)

        def ids_of_all(shards: Shards = shards, split: str = split) -> Iterator[Ids]:
            for shard in track(shards, total=len(shards), description=f"tokens of {split}", transient=True, console=console,
                               disable=not console.is_terminal):
                try:
                    yield read_sidecar(folder, shard, tokenizer)
                except DataError:
                    write_sidecar(folder, shard, tokenizer, threads=workers)
                    yield read_sidecar(folder, shard, tokenizer)

        captions[split] = _join(dataset, split, tokenizer, ids_of_all())
    return captions


def _join(dataset: Dataset, split: str, tokenizer: AnyTokenizer, ids_of_all: Iterable[Ids]) -> int:
    """Write the lengths of a split and where its pictures' captions begin, the statement of what they are last; return the number of captions."""
    folder = folder_of(dataset.writable_folder, tokenizer.fingerprint)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.json").unlink(missing_ok=True)
    images, captions, is_one_each = 0, 0, True
    with ExitStack() as stack:
        parts = [stack.enter_context(replaced(folder / f"{split}.{name}")) for name in ("lengths.u16", "starts.i64")]
        lengths, starts = (stack.enter_context(part.open("wb")) for part in parts)
        starts.write(np.zeros(1, "<i8").tobytes())
        for ids in ids_of_all:
            lengths.write(ids.lengths.astype("<u2").tobytes())
            starts.write((captions + ids.starts[1:].astype("<i8")).tobytes())
            images, captions = images + len(ids.starts) - 1, captions + len(ids.bounds) - 1
            is_one_each = is_one_each and bool((np.diff(ids.starts) == 1).all())
    if is_one_each:
        (folder / f"{split}.starts.i64").unlink()
    joined = Joined(tokenizer=tokenizer.fingerprint, canary=tokenizer.canary, shards=dataset.manifest.shards_sha256, images=images, captions=captions,
                    is_one_each=is_one_each)
    with replaced(folder / f"{split}.json") as part:
        part.write_text(joined.model_dump_json(indent=1) + "\n")
    return captions


def _read_joined(dataset: Dataset, split: str, tokenizer: AnyTokenizer) -> Joined:
    file = folder_of(dataset.folder, tokenizer.fingerprint) / f"{split}.json"
    try:
        joined = Joined.model_validate_json(read_bytes(file))
    except FileNotFoundError as error:
        others = [] if isinstance(dataset.folder, Url) else sorted(other.parent.name for other in (dataset.folder / TOKENS).glob(f"*/{split}.json"))
        raise DataError(f"dataset {dataset.folder} has no token ids of '{split}' by the tokenizer {tokenizer.fingerprint[:12]} (there is: "
                        f"{', '.join(others) or 'none'}); write them: flm tokenizer encode {dataset.folder}{tokenizer.option}") from error
    except (OSError, ValidationError) as error:
        raise _unusable(dataset.folder, tokenizer, f"{file.relative_to(dataset.folder)} is damaged") from error
    expected = {"tokenizer": tokenizer.fingerprint, "canary": tokenizer.canary, "shards": dataset.manifest.shards_sha256}
    _check_binding(dataset.folder, tokenizer, file, joined.model_dump(), expected)
    images = dataset.manifest.splits[split].images
    if joined.images != images or (joined.is_one_each and joined.captions != images):
        raise _unusable(dataset.folder, tokenizer, f"{file.relative_to(dataset.folder)} has {joined.images} images and {joined.captions} captions; "
                                                   f"the split has {images} images")
    return joined


def _map_numbers(dataset: Dataset, tokenizer: AnyTokenizer, file: Path | Url, kind: type[np.unsignedinteger | np.signedinteger],
                 count: int) -> np.ndarray:
    """Map a file of nothing but numbers."""
    try:
        copy = local_copy(file)
        size, expected = copy.stat().st_size, count * np.dtype(kind).itemsize
        if size == expected:
            return np.asarray(np.memmap(copy, np.dtype(kind).newbyteorder("<"), "r")) if count else np.zeros(0, kind)
        problem = f"{size} bytes; {expected} are stated"
    except OSError as error:
        problem = str(error)
    raise _unusable(dataset.folder, tokenizer, f"{file.relative_to(dataset.folder)} cannot be read ({problem})")


def _can_be_planned(lengths: np.ndarray, starts: np.ndarray | None) -> bool:
    """Return whether an order can be made of them. Whether they are those of the token ids is seen when these are mapped."""
    if lengths.min(initial=3) < 3:
        return False
    if starts is None:
        return True
    rises = all((np.diff(starts[begin:begin + BLOCK + 1]) >= 0).all() for begin in range(0, len(starts), BLOCK))
    return bool(rises and starts[0] == 0 and starts[-1] == len(lengths))


def _binding(shard: Shard, tokenizer: AnyTokenizer) -> dict[str, str]:
    """Return what the token ids of a shard follow from."""
    return {"tokenizer": tokenizer.fingerprint, "canary": tokenizer.canary, "index": shard.index_sha256}


def _check_binding(folder: Path | Url, tokenizer: AnyTokenizer, file: Path | Url, stated: Mapping[str, object], expected: Mapping[str, str]) -> None:
    for name, value in expected.items():
        if stated.get(name) != value:
            raise _unusable(folder, tokenizer, f"token ids {file.relative_to(folder)} are of the {MEANING[name]} {str(stated.get(name))[:12]}; "
                                               f"the dataset and this process have {value[:12]}")


def _unusable(folder: Path | Url, tokenizer: AnyTokenizer, what: str) -> DataError:
    return DataError(f"dataset {folder}: {what}; write them again: flm tokenizer encode {folder}{tokenizer.option}")
