"""The same samples in shards of another size, in the same order or shuffled as a whole: members are copied as they are, byte for byte.

Which sample comes where is worked out as it is asked for, so memory holds the index of one new shard, and a killed command goes on at any shard.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from flm_scale.data.derive import Advance, Task, derive, in_order
from flm_scale.data.index import Index, ShardCache, map_index, write_arrow
from flm_scale.data.manifest import Derivation, Shard, index_name, replaced
from flm_scale.data.order import keyed_integers, keyed_number
from flm_scale.data.shards import Dataset, commit_shard
from flm_scale.data.storage import file_sha256
from flm_scale.data.tar import BLOCK, MAX_SAMPLE_BYTES, MAX_SAMPLES, RECORD, list_members
from flm_scale.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow as pa

ROUNDS = 8
READ_AROUND = 2**14
"""Bytes beside the picture that the other members of a sample seldom exceed: most samples are one read."""
READERS = 16
"""Samples that are read at once: what waits is the disk or the network."""


def reshard(dataset: Dataset, out: Path, *, samples_per_shard: int, seed: int | None = None) -> Dataset:
    """Write the samples of each split into shards of `samples_per_shard`, the last one smaller.

    seed: shuffles all samples of a split; None keeps their order. Tables of input rows stay behind: they are of the old shards. Raises DataError for
    a sample that is not what the index states, and where a key would stand twice in a shard.
    """
    if not 1 <= samples_per_shard <= MAX_SAMPLES:
        raise ConfigError(f"--samples-per-shard ({samples_per_shard}) must be 1 to {MAX_SAMPLES}")
    tasks: dict[str, list[Task]] = {}
    for split in dataset.splits:
        samples, total = Samples(dataset, split), dataset.manifest.splits[split].images
        ranges = [range(first, min(first + samples_per_shard, total)) for first in range(0, total, samples_per_shard)]
        tasks[split] = [Task(f"{split}/{number:05d}.tar", len(places),
                             partial(_write_shard, out, f"{split}/{number:05d}.tar", samples, places, seed))
                        for number, places in enumerate(ranges)]
    values = {"samples_per_shard": samples_per_shard, "seed": seed}
    return derive(dataset, out, Derivation(parent=dataset.root, by="reshard", values=values), tasks)


def shuffled(places: np.ndarray, count: int, *, key: str) -> np.ndarray:
    """Return the numbers that stand at some places of a random order of [0, count), without making the order.

    A Feistel network permutes the next power of four; what falls beyond `count` goes through it again until it falls below. Source: Black and
    Rogaway, Ciphers with Arbitrary Finite Domains, 2002, Sec. 3 and 4.
    """
    bits = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    numbers, todo = places.astype(np.int64), np.arange(len(places))
    while len(todo):
        left, right = numbers[todo] >> bits, numbers[todo] & (2**bits - 1)
        for turn in range(ROUNDS):
            left, right = right, left ^ keyed_integers(right, np.array(2**bits), key=keyed_number(key, turn))
        numbers[todo] = (left << bits) | right
        todo = todo[numbers[todo] >= count]
    return numbers


class Copy(NamedTuple):
    """A sample as it lies in its tar."""

    blocks: bytes
    """Headers and contents of all its members."""
    picture: int
    """Where the picture begins in them."""
    row: dict[str, Any]
    """Of the index."""


class Samples:
    """The samples of a split, each read as it is asked for."""

    def __init__(self, dataset: Dataset, split: str) -> None:
        self.folder, self.split, self._shards = dataset.writable_folder, split, dataset.shards(split)
        self._index = Index(dataset.folder, self._shards)
        self._entries = ShardCache(self._shards.counts, self._shards.__getitem__)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._entries)

    @cached_property
    def schema(self) -> "pa.Schema":
        """Of the indexes; those of shards without a picture have no optional columns."""
        return map_index(self.folder, next(shard for shard in self._shards if shard.count)).schema

    def __getitem__(self, number: int) -> Copy:
        """Return a sample. Raises DataError when its tar does not hold the picture that the index states, where it states it."""
        row = dict(zip(self.schema.names, self._index.values(number, self.schema.names), strict=True))
        shard, place = self._entries.find(number)
        # A sample's members lie around its picture, and behind the picture before.
        start = _end(*self._index.values(number - 1, ["image_offset", "image_bytes"])) if place else 0
        file = self.folder / self._entries.of_shard(shard).name
        with _opened(file, buffering=row["image_bytes"] + READ_AROUND) as stream:
            first, end = _place_of(stream, row["key"], max(start, 0))
            stream.seek(first)
            blocks, picture = stream.read(end - first), row["image_offset"] - first
        if hashlib.sha256(blocks[max(picture, 0):picture + row["image_bytes"]]).hexdigest() != row["sha256"]:
            raise DataError(f"shard {file}: sample {row['key']} is not the picture that the index states (sha256 {row['sha256'][:12]}); build the "
                            "dataset again or restore the shard")
        return Copy(blocks, picture, row)


def _opened(file: Path, *, buffering: int) -> BinaryIO:
    try:
        return file.open("rb", buffering=min(max(buffering, 2), MAX_SAMPLE_BYTES))
    except OSError as error:
        raise DataError(f"shard {file} cannot be read ({error.strerror}); restore the file") from error


def _place_of(stream: BinaryIO, key: str, start: int) -> tuple[int, int]:
    """Return where the first header of a sample is and its last member ends; the same twice when it is not there. start: of a header before it."""
    stream.seek(start)
    first, end = start, 0
    for member in list_members(stream):
        behind = start + _end(member.offset, member.size)
        if member.key == key and not member.rejected:
            end = behind
        elif end:
            break
        else:
            first = behind
    return first, max(first, end)


def _end(offset: int, size: int) -> int:
    """Return where a member ends whose content is there, with what fills its last block."""
    return offset + size + -size % BLOCK


def _write_shard(out: Path, name: str, samples: Samples, places: range, seed: int | None, advance: Advance) -> tuple[Shard, dict[str, int]]:
    import pyarrow as pa

    numbers = np.arange(places.start, places.stop)
    if seed is not None:
        numbers = shuffled(numbers, len(samples), key=f"reshard/{seed}/{samples.split}")
    rows: dict[str, dict[str, Any]] = {}
    digest, size = hashlib.sha256(), 0
    with ThreadPoolExecutor(READERS) as pool, replaced(out / name) as part, part.open("wb") as stream:
        for blocks, picture, row in in_order(pool, samples.__getitem__, numbers.tolist(), ahead=2 * READERS):
            if row["key"] in rows:
                raise DataError(f"dataset {samples.folder} has the key '{row['key']}' twice, and a shard cannot; choose other --samples-per-shard")
            rows[row["key"]] = {**row, "image_offset": size + picture}
            size += stream.write(blocks)
            digest.update(blocks)
            advance(1)
        end = bytes(2 * BLOCK + -(size + 2 * BLOCK) % RECORD)
        size += stream.write(end)
        digest.update(end)
    with replaced(out / index_name(name)) as part:
        write_arrow(part, pa.RecordBatch.from_pylist(list(rows.values()), schema=samples.schema))
        entry = Shard(name=name, count=len(rows), captions=sum(len(row["captions"]) for row in rows.values()), bytes=size,
                      sha256=digest.hexdigest(), index_bytes=part.stat().st_size, index_sha256=file_sha256(part))
    commit_shard(out, entry, {"counts": {}})
    return entry, {}
