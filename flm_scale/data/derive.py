"""A dataset made of a finished one, which stays as it is: a subset (subset.py), other shards (reshard.py), a column more (flm_scale/score.py).

Made shard by shard, so that a killed command goes on where it was: a shard is there when its counts are, and the folder's mark says what is being
made in it. The same parent and values give the same root.
"""

import fcntl
import json
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from flm_scale.data.index import write_arrow
from flm_scale.data.manifest import DATASET, Derivation, Manifest, Shard, linked, replaced, stats_name
from flm_scale.data.shards import UNFINISHED, Dataset, check_room, commit_shard, open_dataset, read_committed_shard, seal_dataset
from flm_scale.data.sidecars import give_tokenizer, read_sidecar, write_ids
from flm_scale.data.storage import file_sha256
from flm_scale.data.tokens import Tokenizer
from flm_scale.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

Item = TypeVar("Item")
Result = TypeVar("Result")

LINE_SECONDS, LIVE_SECONDS = 10.0, 0.2
Advance = Callable[[int], None]
"""Told of so many more images that are done."""


class Task(NamedTuple):
    """A shard to be made."""

    name: str
    images: int
    """Of the parent, that it goes through."""
    make: Callable[[Advance], tuple[Shard | None, Mapping[str, int]]]
    """Writes and commits it, and returns its entry and what is counted; no entry where nothing is left of it."""


def derive(parent: Dataset, folder: Path, step: Derivation, tasks: Mapping[str, Sequence[Task]]) -> Dataset:
    """Make the shards of each split that are not there yet, and seal them with the parent's name, sources and tokenizer.

    step: without counts. A dataset that is there already, of the same parent and values, is left alone. Raises DataError when the folder holds
    anything else, and when no sample is left.
    """
    if _holds(folder, step):
        print(f"{folder}: is there already, of this dataset and these values", file=sys.stderr)
        return open_dataset(folder)
    shards: dict[str, list[Shard]] = {}
    counts: Counter[str] = Counter()
    with _begun(folder, step):
        with _progress(sum(task.images for of_split in tasks.values() for task in of_split)) as (advance, skip):
            for split, of_split in tasks.items():
                shards[split] = []
                for task in of_split:
                    if entry := read_committed_shard(folder, task.name):
                        counted = json.loads((folder / stats_name(task.name)).read_bytes())["counts"]
                        skip(task.images)
                    else:
                        entry, counted = task.make(advance)
                    counts.update(counted)
                    shards[split] += [entry] if entry else []
        if not any(shard.count for of_split in shards.values() for shard in of_split):
            raise DataError(f"{folder}: no sample is left ({_in_words(counts)}); ask for less")
        return _seal(parent, folder, step.model_copy(update={"counts": dict(counts)}), shards)


class Rewriter:
    """Gives shards of the parent other indexes in another dataset: their tars and tables are linked, their token ids cut."""

    def __init__(self, parent: Dataset, folder: Path) -> None:
        self.parent, self.folder = parent, folder
        self._tokenizer = Tokenizer(parent.tokenizer_file) if parent.tokenizer_fingerprint else None

    def write(self, shard: Shard, batch: "pa.RecordBatch", *, counts: Mapping[str, int], rows: np.ndarray | None = None) -> Shard:
        """Commit a shard and return its entry. batch: its index.   rows: of the parent's index that are in it, in order; None for all."""
        for name in [shard.name, shard.table_name] if shard.table_sha256 else [shard.name]:
            linked(self.parent.writable_folder / name, self.folder / name)
        captions = int(np.diff(batch.column("captions").offsets.to_numpy()).sum())
        with replaced(self.folder / shard.index_name) as part:
            write_arrow(part, batch)
            entry = shard.model_copy(update={"count": batch.num_rows, "captions": captions, "index_bytes": part.stat().st_size,
                                             "index_sha256": file_sha256(part)})
        if self._tokenizer:
            ids = read_sidecar(self.parent.folder, shard, self._tokenizer)
            write_ids(self.folder, entry, self._tokenizer, ids if rows is None else ids.take(rows))
        commit_shard(self.folder, entry, {"counts": dict(counts)})
        return entry


def in_order(pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], *, ahead: int) -> Iterator[Result]:
    """Yield what a pool makes of each item, in order, with so many under way or waiting: results are not piled up."""
    rest = iter(items)
    under_way = deque(pool.submit(work, item) for item in islice(rest, ahead))
    while under_way:
        yield under_way.popleft().result()
        under_way.extend(pool.submit(work, item) for item in islice(rest, 1))


def _holds(folder: Path, step: Derivation) -> bool:
    """Return whether the dataset is there and whole."""
    if not (folder / DATASET).is_file() or (folder / UNFINISHED).exists():
        return False
    return [made.model_copy(update={"counts": {}}) for made in Manifest.read(folder).derivations[-1:]] == [step]


@contextmanager
def _begun(folder: Path, step: Derivation) -> Iterator[None]:
    """Hold a folder that is empty, or was begun for the same; the mark goes when the dataset is whole."""
    mark = folder / UNFINISHED
    if not mark.exists():
        if (folder / DATASET).exists():
            raise DataError(f"{folder} holds another dataset; choose another --out")
        check_room(folder)
        folder.mkdir(parents=True, exist_ok=True)
    with mark.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{folder}: another process is making this dataset; wait for it, or choose another --out") from error
        file.seek(0)
        wanted, begun = step.model_dump_json(), file.read()
        if begun not in {wanted, ""} or (not begun and any(path != mark for path in folder.iterdir())):
            raise DataError(f"{folder} holds an unfinished build of something else ({begun or 'not of this command'}); remove it, or choose another "
                            "--out")
        if not begun:
            file.write(wanted)
            file.flush()
        try:
            yield
        except BaseException:
            if list(folder.iterdir()) == [mark]:  # it would only be in the way of the next try
                mark.unlink()
            raise
        mark.unlink()


def _seal(parent: Dataset, folder: Path, step: Derivation, shards: Mapping[str, Sequence[Shard]]) -> Dataset:
    manifest, about = parent.manifest, parent.writable_folder / "README.md"
    made = f"Made by `flm data {step.by}` from the dataset with the root {step.parent}: {json.dumps(step.values, sort_keys=True)}."
    readme = f"{about.read_text(encoding='utf-8').rstrip() if about.is_file() else manifest.name}\n\n{made}\n"
    dataset = seal_dataset(
        folder, name=manifest.name, sources=[source.model_dump() for source in manifest.sources], splits=shards,
        preparation=manifest.preparation.model_dump() if manifest.preparation else None, derivations=[*manifest.derivations, step], readme=readme)
    if manifest.tokenizer:
        with replaced(dataset.tokenizer_file) as part:
            shutil.copyfile(parent.tokenizer_file, part)
        give_tokenizer(dataset)
    if any((folder / shard.name).is_symlink() for of_split in shards.values() for shard in of_split):
        print(f"{folder}: its tars are symbolic links, because the file system gives them no second name; keep {parent.folder}", file=sys.stderr)
    print(f"{folder}: {sum(split.images for split in dataset.manifest.splits.values()):,} samples in {len(dataset.shards()):,} shards "
          f"({dataset.root[:12]}){'; ' if step.counts else ''}{_in_words(step.counts)}")
    return dataset


def _in_words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items())


@contextmanager
def _progress(total: int) -> Iterator[tuple[Advance, Advance]]:
    """Give two functions that are told of images: done now, and done by an earlier start. A live line on a terminal, else one every ten seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True)
    pause = LIVE_SECONDS if console.is_terminal else LINE_SECONDS
    started = shown = time.monotonic()
    here = earlier = 0
    with Progress(BarColumn(bar_width=20), TextColumn("{task.fields[line]}", markup=False), console=console, transient=True,
                  disable=not console.is_terminal) as live:
        bar = live.add_task("", total=total, line="first shard ...")

        def advance(images: int) -> None:
            nonlocal here, shown
            here += images
            if (now := time.monotonic()) - shown < pause:
                return
            shown, rate = now, here / (now - started)
            left = timedelta(seconds=round((total - here - earlier) / rate))
            line = f"{here + earlier:,}/{total:,} images  {rate:,.0f} images/s  {left} left"
            live.update(bar, completed=here + earlier, line=line)
            if not console.is_terminal:
                print(line, file=sys.stderr, flush=True)

        def skip(images: int) -> None:
            nonlocal earlier
            earlier += images

        yield advance, skip
