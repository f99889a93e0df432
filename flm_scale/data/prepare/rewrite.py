"""A prepared shard that is replaced by another one, and what is needed for that: its samples and its table read back.

A kill at any moment leaves the old shard, the new one, or parts of both that `settle` makes the new one: what stays is never fetched again.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flm_scale.data.index import index_columns, map_index
from flm_scale.data.manifest import Shard, stats_name
from flm_scale.data.prepare.rows import quoted
from flm_scale.data.shards import Sample, read_committed_shard, write_shard
from flm_scale.data.storage import file_sha256
from flm_scale.data.tar import read_json, read_shard
from flm_scale.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

STAGING = "unfinished_rewrites"


def rewrite_shard(folder: Path, name: str, samples: Iterable[Sample], *, table: "Callable[[], pa.Table]",
                  stats: Callable[[], Mapping[str, Any]]) -> Shard:
    """Do what `write_shard` does, in place of the shard of that name, which may be read for it; return the new entry."""
    (folder / STAGING).mkdir(exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=folder / STAGING))
    entry = write_shard(staging, name, samples, table=table, stats=stats)
    (folder / stats_name(name)).unlink(missing_ok=True)  # from here on the shard is not complete, until the new one is in place
    _move(staging, folder)
    return entry


def settle(folder: Path) -> None:
    """Bring to an end what a killed rewrite has left. Call it before shards are looked at, while none is rewritten: it saves a shard from being
    prepared again."""
    for stats in list((folder / STAGING).glob("*/*/[!.]*_stats.json")):
        settle_shard(folder, f"{stats.parent.name}/{stats.name.removesuffix('_stats.json')}.tar")
    shutil.rmtree(folder / STAGING, ignore_errors=True)


def settle_shard(folder: Path, name: str) -> Shard | None:
    """Do that for one shard, while others may be rewritten, and return its entry if it is whole now."""
    for stats in list((folder / STAGING).glob(f"*/{stats_name(name)}")):
        if read_committed_shard(folder, name) is None:
            _move(stats.parents[1], folder)
    return read_committed_shard(folder, name)


def _move(staging: Path, folder: Path) -> None:
    """Put a rewritten shard in place, its counts last."""
    files = [path for path in staging.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: path.name.endswith("_stats.json")):
        path.replace(folder / path.relative_to(staging))
    shutil.rmtree(staging)


def read_samples(folder: Path, shard: Shard) -> Iterator[Sample]:
    """Read a shard of ours back, picture by picture."""
    own = ["key", "captions", "questions", "answers", "concept", "width", "height"]
    optional = [name for name in map_index(folder, shard).schema.names if name not in {*own, "image_offset", "image_bytes", "sha256"}]
    columns = index_columns(folder, shard, [*own, *optional])
    for sample, *values in zip(read_shard(folder / shard.name, expected_bytes=shard.bytes, expected_count=shard.count), *columns, strict=True):
        of = dict(zip([*own, *optional], values, strict=True))
        extras = read_json(sample.members.pop("json"))[0]
        sample.members.pop("txt")
        (image_format, image), = sample.members.items()
        yield Sample(image=image, image_format=image_format, columns={name: of[name] for name in optional},
                     extras={name: value for name, value in extras.items() if name not in {*own, "sha256"}}, **{name: of[name] for name in own})


def read_table(folder: Path, shard: Shard, columns: list[str] | None = None) -> "pa.Table":
    """Read the table of a prepared shard. Raises DataError."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(folder / shard.table_name) as file:
            return file.read(columns=columns)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{folder / shard.table_name} cannot be read ({quoted(error)}); repair the dataset") from error


def is_whole(folder: Path, name: str) -> bool:
    """Hash a committed shard's files; one that is not what it states is no longer committed then."""
    shard = read_committed_shard(folder, name)
    for file, _, sha256 in shard.files if shard else ():
        if file_sha256(folder / file) != sha256:
            (folder / stats_name(name)).unlink()
            return False
    return shard is not None
