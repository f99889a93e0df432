"""What is known of each picture of a split, without opening a tar: Arrow files, one a shard, mapped into memory as they are asked for.

Nothing of a split is held: a column answers for one picture, or goes through all, and processes of a loader are sent paths. Pictures are read
from the tar at the place that the index states, and their hash is checked. Files by strangers are checked item by item as they are read.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from flm_scale.data.manifest import Shard, Shards
from flm_scale.data.order import CHUNK
from flm_scale.data.storage import Range, Url, forget_range, in_background, keep_range, local_copy, read_kept, read_ranges
from flm_scale.data.tar import MAX_SAMPLE_BYTES
from flm_scale.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

Item = TypeVar("Item")

MAX_OPEN_SHARDS = 128
"""Tars of an index that are open at once: a mixture of some datasets stays below the usual limit of 1024 open files a process."""
FETCHED_AT_ONCE = 16
"""Files that are copied at once when a micro-batch needs several that lie elsewhere."""
MAX_MAPPED = 256
"""Arrow files of an index, or of its tokens, that are mapped at once, as many as a window of the order has chunks. They hold no file open."""
CHUNKS_KNOWN = 4096
"""Chunks whose names and places are kept in memory: those of some windows."""


def map_arrow(file: Path) -> "pa.RecordBatch":
    """Map an Arrow file of one batch. Raises OSError or an Arrow exception. All of a dataset's Arrow files are opened here."""
    import pyarrow as pa

    with pa.memory_map(str(file)) as source:
        reader = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(use_threads=False))
        if reader.num_record_batches != 1:
            raise pa.ArrowInvalid(f"it holds {reader.num_record_batches} batches instead of one")
        return reader.get_batch(0)


def write_arrow(file: Path, batch: "pa.RecordBatch") -> None:
    """Write an Arrow file of one batch; the same batch gives the same bytes."""
    import pyarrow as pa

    with file.open("wb") as stream, pa.ipc.new_file(stream, batch.schema) as writer:
        writer.write_batch(batch)


def write_index(file: Path, rows: Sequence[Mapping[str, Any]], columns: Iterable[str]) -> None:
    """Write the index of a shard: a row a picture. columns: the optional ones that the rows have."""
    import pyarrow as pa

    write_arrow(file, pa.RecordBatch.from_pylist(list(rows), schema=_schema(columns)))


def map_index(folder: Path | Url, shard: Shard) -> "pa.RecordBatch":
    """Map the index of a shard. Raises DataError when it is no index of that many pictures."""
    import pyarrow as pa

    try:
        batch = map_arrow(local_copy(folder / shard.index_name, sha256=shard.index_sha256))
        if batch.schema.equals(_schema(batch.schema.names[len(_schema().names):])) and batch.num_rows == shard.count:
            batch.validate()
            return batch
        problem = f"it does not hold the columns of {shard.count} samples"
    except (pa.ArrowException, OSError) as error:
        problem = str(error).partition("\n")[0]
    raise _unreadable(folder, shard, problem)


def read_index(folder: Path | Url, shard: Shard) -> "pa.RecordBatch":
    """Map the index of a shard and look at every value: offsets of a stranger's file may lead anywhere. Raises DataError."""
    import pyarrow as pa

    batch = map_index(folder, shard)
    try:
        for column in batch.columns:
            _checked(column)
    except pa.ArrowException as error:
        raise _unreadable(folder, shard, str(error).partition("\n")[0]) from error
    return batch


def index_columns(folder: Path | Url, shard: Shard, names: Sequence[str]) -> list[list[Any]]:
    """Return whole columns of a shard's index; of a shard without a picture, which has no optional ones, empty ones. Raises DataError."""
    import pyarrow as pa

    batch = map_index(folder, shard)
    try:
        return [_checked(batch.column(name)).to_pylist() if batch.num_rows else [] for name in names]
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise _unreadable(folder, shard, str(error).partition("\n")[0]) from error


def _checked(values: "pa.Array") -> "pa.Array":
    """Return values that can be read: the offsets of a stranger's file may lead anywhere. Raises an Arrow exception."""
    import pyarrow as pa

    values.validate(full=True)
    if values.null_count or (pa.types.is_list(values.type) and values.flatten().null_count):
        raise pa.ArrowInvalid("a value is missing")
    return values


def _schema(columns: Iterable[str] = ()) -> "pa.Schema":
    import pyarrow as pa

    text, texts, place, side = pa.string(), pa.list_(pa.string()), pa.int64(), pa.int32()
    optional = {"original_width": side, "original_height": side, "original_sha256": text, "phash": pa.uint64(), "frames": side}
    return pa.schema([("key", text), ("captions", texts), ("questions", texts), ("answers", texts), ("concept", text), ("image_offset", place),
                      ("image_bytes", place), ("sha256", text), ("width", side), ("height", side),
                      *((name, optional.get(name, pa.float32())) for name in columns)])


def _unreadable(folder: Path | Url, shard: Shard, problem: str) -> DataError:
    return DataError(f"index {shard.index_name} of {folder} cannot be read ({problem}); build the dataset again or restore the file")


class ShardCache(Generic[Item]):
    """Something made of each shard of a split when it is first asked for; the last MAX_MAPPED are kept."""

    def __init__(self, counts: np.ndarray, make: Callable[[int], Item]) -> None:
        """counts: pictures of each shard.   make: called with the shard's number."""
        self.ends = np.cumsum(counts)
        self.of_shard = lru_cache(maxsize=MAX_MAPPED)(make)

    def __len__(self) -> int:
        """Return the number of pictures."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def find(self, number: int) -> tuple[int, int]:
        """Return the shard of a picture of the split, and its row there."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard = int(np.searchsorted(self.ends, number, side="right"))
        return shard, number - (int(self.ends[shard - 1]) if shard else 0)


    def fetch(self, numbers: Iterable[int]) -> None:
        """Make what is missing for some pictures, of several shards at once: where files must be copied first, nearly all of it is waiting."""
        wanted = sorted({self.find(number)[0] for number in numbers})
        rest, misses = iter(wanted), self.of_shard.cache_info().misses
        for shard in rest:  # threads cost more than looking up what is there
            self.of_shard(shard)
            if self.of_shard.cache_info().misses > misses:
                break
        else:
            return
        for part in [in_background(lambda: deque(map(self.of_shard, rest), maxlen=0)) for _ in wanted[:FETCHED_AT_ONCE]]:
            part.result()


def _chunk_name(shards: Shards, batches: "ShardCache[pa.RecordBatch]", first: int) -> str:
    """Say which bytes of which shard a chunk is: the same for every dataset that has the index."""
    shard, row = batches.find(first)
    return hashlib.sha256(f"{shards[shard].index_sha256} {row}".encode()).hexdigest()


def _chunk_offset(batches: "ShardCache[pa.RecordBatch]", first: int) -> int:
    """Return where a chunk begins in its shard."""
    shard, row = batches.find(first)
    return batches.of_shard(shard).column("image_offset")[row].as_py() or 0


class Column(Generic[Item]):
    """One column of a split: an item a picture, read as it is asked for."""

    def __init__(self, index: "Index", name: str) -> None:
        self._index, self._name = index, name

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self._index)

    def __getitem__(self, number: int) -> Item:
        """Return a picture's."""
        item: Item = self._index.values(number, [self._name])[0]
        return item

    def __iter__(self) -> Iterator[Item]:
        """Go through the split, holding a shard's at a time."""
        for shard in self._index.shards:
            yield from index_columns(self._index.folder, shard, [self._name])[0]


class Index:
    """The columns and pictures of some shards. Cheap to make and to send to the loader's processes."""

    def __init__(self, folder: Path | Url, shards: Shards) -> None:
        """folder: of the dataset. Nothing is read yet."""
        self.folder, self.shards = folder, shards
        self._batches = ShardCache(shards.counts, lambda number: map_index(folder, shards[number]))
        self._paths = ShardCache(shards.counts, lambda number: folder / shards[number].name)
        self._chunk_name = lru_cache(maxsize=CHUNKS_KNOWN)(partial(_chunk_name, shards, self._batches))
        self._chunk_offset = lru_cache(maxsize=CHUNKS_KNOWN)(partial(_chunk_offset, self._batches))
        self._open_files: dict[Path, int] = {}
        self._fetched: dict[int, bytes] = {}

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self._batches)

    def __reduce__(self) -> tuple[type["Index"], tuple[Path | Url, Shards]]:
        """Leave maps and file descriptors behind: they mean nothing in another process."""
        return Index, (self.folder, self.shards)

    @property
    def holds_clips(self) -> bool:
        """Whether the samples are clips: their number of frames stands beside them. Raises DataError when the index cannot be read."""
        filled = np.flatnonzero(self.shards.counts)  # an empty shard's index has no such column
        return len(filled) > 0 and "frames" in self._batches.of_shard(int(filled[0])).schema.names

    @property
    def keys(self) -> Column[str]:
        """Key of each picture."""
        return Column(self, "key")

    @property
    def captions(self) -> Column[list[str]]:
        """Captions of each picture."""
        return Column(self, "captions")

    @property
    def questions(self) -> Column[list[str]]:
        """Questions about each picture."""
        return Column(self, "questions")

    @property
    def answers(self) -> Column[list[str]]:
        """Answer to each of the questions."""
        return Column(self, "answers")

    @property
    def concepts(self) -> Column[str]:
        """What each picture shows, in a normal form; empty when unknown."""
        return Column(self, "concept")

    def values(self, number: int, names: Sequence[str]) -> list[Any]:
        """Return some columns' items of one picture. Raises DataError when the index lies."""
        import pyarrow as pa

        shard, row = self._batches.find(number)
        batch = self._batches.of_shard(shard)
        try:
            return [_checked(batch.column(name).slice(row, 1))[0].as_py() for name in names]
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise _unreadable(self.folder, self.shards[shard], str(error).partition("\n")[0]) from error

    def fetch(self, numbers: Sequence[int]) -> None:
        """Have the pictures that will be asked for next read all at once, and their indexes copied, where they lie elsewhere.

        What `keep_chunk` has kept is read from there. On disk there is nothing to gain. Raises StorageError when they cannot be had.
        """
        if isinstance(self.folder, Path):
            return
        missing = [number for number in numbers if number not in self._fetched]
        self._batches.fetch(missing)
        ranges = {}
        for number, first in zip(missing, self.chunks(missing), strict=True):
            with suppress(DataError):  # raised again when this one is asked for
                _, path, offset, size, _ = self._place(number)
                kept = read_kept(self._chunk_name(first), max(offset - self._chunk_offset(first), 0), size)
                if kept:
                    self._fetched[number] = kept
                else:
                    ranges[number] = Range(Url(path), offset, size)
        self._fetched.update(zip(ranges, read_ranges(list(ranges.values())), strict=True))

    def chunks(self, numbers: Sequence[int]) -> list[int]:
        """Return for each picture the first one of its chunk, as order.py cuts them."""
        images, ends = np.asarray(numbers, np.int64), self._batches.ends
        shards = np.searchsorted(ends, images, side="right")
        begins = np.where(shards, ends[shards - 1], 0)
        firsts: list[int] = (images - (images - begins) % CHUNK).tolist()
        return firsts

    def keep_chunk(self, first: int, *, least_share: float) -> None:
        """Have the chunk that begins with a picture read as one range and kept on this machine, for all its processes.

        least_share: of the range's bytes that must be pictures of this index, or it is left: a subset's tars hold others, too.
        """
        with suppress(DataError):  # raised again when its pictures are asked for
            shard, row = self._batches.find(first)
            offsets, sizes = self._numbers(shard, row, ["image_offset", "image_bytes"])
            begin, end = int(offsets[0]), int(offsets[-1] + sizes[-1])
            if 0 <= begin < end <= begin + sizes.sum() / least_share:
                keep_range(Range(Url(self._paths.of_shard(shard)), begin, end - begin), self._chunk_name(first))

    def forget_chunk(self, first: int) -> None:
        """Remove what `keep_chunk` has kept."""
        forget_range(self._chunk_name(first))

    def _numbers(self, shard: int, row: int, names: Sequence[str]) -> list[np.ndarray]:
        """Return columns of numbers of a chunk."""
        import pyarrow as pa

        batch = self._batches.of_shard(shard)
        try:
            return [_checked(batch.column(name).slice(row, CHUNK)).to_numpy() for name in names]
        except pa.ArrowException as error:
            raise _unreadable(self.folder, self.shards[shard], str(error).partition("\n")[0]) from error

    def _place(self, number: int) -> tuple[str, Path | Url, int, int, str]:
        """Return key, shard, offset, size and sha256 of a picture."""
        key, offset, size, sha256 = self.values(number, ["key", "image_offset", "image_bytes", "sha256"])
        return key, self._paths.of_shard(self._paths.find(number)[0]), max(offset, 0), min(max(size, 0), MAX_SAMPLE_BYTES), sha256

    def read_image(self, number: int) -> bytes:
        """Return the encoded picture. Raises DataError when its bytes are not those of the index, StorageError when they cannot be had."""
        key, path, offset, size, sha256 = self._place(number)
        try:
            if isinstance(path, Url):
                data = self._fetched.pop(number, b"")
                if hashlib.sha256(data).hexdigest() == sha256:
                    return data
                (data,) = read_ranges([Range(path, offset, size)])  # not fetched, or from a chunk that a crash has damaged here
            else:
                data = os.pread(self._descriptor(path), size, offset)
        except OSError as error:
            raise DataError(f"shard {path}: sample {key} cannot be read ({error}); restore the file") from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DataError(f"shard {path}: sample {key} is not the picture that the index states "
                            f"(sha256 {sha256[:12]}); build the dataset again or restore the shard")
        return data

    def _descriptor(self, shard: Path) -> int:
        """Open once. A fork may share descriptors: pread moves no file position."""
        if shard not in self._open_files:
            if len(self._open_files) == MAX_OPEN_SHARDS:
                os.close(self._open_files.pop(next(iter(self._open_files))))
            self._open_files[shard] = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
        return self._open_files[shard]

    def __del__(self) -> None:
        """Give the descriptors back."""
        for descriptor in getattr(self, "_open_files", {}).values():
            os.close(descriptor)
