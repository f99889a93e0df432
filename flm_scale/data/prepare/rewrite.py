"""A prepared shard that is replaced by another one, and what is needed for that: its samples and its table read back.

A kill at any moment leaves the old shard, the new one, or parts of both that `settle` makes the new one: what stays is never fetched again.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flm_scale.data.index import index_columns, map_index
from flm_scale.data.manifest import Shard, stats_name
from flm_scale.data.prepare.ledger import FOLDER
from flm_scale.data.prepare.rows import quoted
from flm_scale.data.prepare.seen import Seen
from flm_scale.data.shards import Adopted, Place, Sample, read_committed_shard, write_shard
from flm_scale.data.storage import file_sha256
from flm_scale.data.tar import read_json, read_shard
from flm_scale.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

STAGING = "unfinished_rewrites"


def rewrite_shard(folder: Path, name: str, samples: Iterable[Sample], *, table: "Callable[[], pa.Table]",
                  stats: Callable[[], Mapping[str, Any]]) -> Shard:
    """Do what `write_shard` does, in place of the shard of that name, which may be read for it; return the new entry.

    An adopted tar stays; only what stands beside it is another.
    """
    (folder / STAGING).mkdir(exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=folder / STAGING))
    before = _read_stats(folder, name)
    adopted = Adopted(folder / name, before["shard"]["bytes"], before["shard"]["sha256"]) if "adopted" in before else None
    entry = write_shard(staging, name, samples, table=table, stats=stats, adopted=adopted)
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
        place = folder / path.relative_to(staging)
        if not (place.exists() and path.samefile(place)):  # an adopted tar stays, whichever way it was linked again
            path.replace(place)
    shutil.rmtree(staging)


def read_samples(folder: Path, shard: Shard) -> Iterator[Sample]:
    """Read a shard of ours back, picture by picture; of an adopted one its index alone, because pictures stay where they are."""
    own = ["key", "captions", "questions", "answers", "concept", "width", "height"]
    optional = [name for name in map_index(folder, shard).schema.names if name not in {*own, *Place._fields}]
    rows = (dict(zip([*own, *optional], row, strict=True)) for row in zip(*index_columns(folder, shard, [*own, *optional]), strict=True))
    said: Iterator[dict[str, Any]] = ({name: of[name] for name in own} | {"columns": {name: of[name] for name in optional}} for of in rows)
    if "adopted" in _read_stats(folder, shard.name):
        for about, place in zip(said, map(Place, *index_columns(folder, shard, Place._fields)), strict=True):
            yield Sample(image=b"", image_format="jpg", place=place, **about)
        return
    for about, sample in zip(said, read_shard(folder / shard.name, expected_bytes=shard.bytes, expected_count=shard.count), strict=True):
        extras = read_json(sample.members.pop("json"))[0]
        sample.members.pop("txt")
        (about["image_format"], about["image"]), = sample.members.items()
        yield Sample(extras={name: value for name, value in extras.items() if name not in {*own, "sha256"}}, **about)


def read_table(folder: Path, shard: Shard, columns: list[str] | None = None) -> "pa.Table":
    """Read the table of a prepared shard. Raises DataError."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(folder / shard.table_name) as file:
            return file.read(columns=columns)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{folder / shard.table_name} cannot be read ({quoted(error)}); repair the dataset") from error


def altered_tars(folder: Path) -> list[str]:
    """Return a line for each adopted tar that is gone, or another one by now, where it was found."""
    lines, seen = [], Seen(folder / FOLDER / "inputs.seen")
    for stats in sorted(folder.glob("*/[!.]*_stats.json")):
        name = f"{stats.parent.name}/{stats.name.removesuffix('_stats.json')}.tar"
        try:
            found = _read_stats(folder, name)
            tar, before = found["adopted"], found["shard"]["sha256"]
        except (ValueError, KeyError):  # damaged: the shard is made again
            continue
        try:
            now = seen.look(Path(tar), is_tar=True).sha256
            problem = f"has the sha256 {now[:12]} and had {before[:12]} when it was imported" if now != before else ""
        except DataError as error:
            problem = f"is refused ({error})"
        lines += [f"shard {name} is {tar}, which {problem}"] if problem else []
    return lines


def _read_stats(folder: Path, name: str) -> dict[str, Any]:
    stats: dict[str, Any] = json.loads((folder / stats_name(name)).read_bytes())
    return stats


def is_whole(folder: Path, name: str) -> bool:
    """Hash a committed shard's files; one that is not what it states is no longer committed then."""
    shard = read_committed_shard(folder, name)
    for file, _, sha256 in shard.files if shard else ():
        if file_sha256(folder / file) != sha256:
            (folder / stats_name(name)).unlink()
            return False
    return shard is not None
