"""Behind the last shard: duplicates across all of them go, and the dataset is sealed.

Which sample is a duplicate is decided from the shards' tables, where those that went before still stand with their hashes. So a killed `finish` is
simply begun again: it decides the same, and a shard that was done already is left alone.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unicodedata import unidata_version

import numpy as np
from numpy.typing import NDArray

from flm_scale.data.images import codec_versions
from flm_scale.data.manifest import Shard, replaced, stats_name
from flm_scale.data.prepare.inputs import Input
from flm_scale.data.prepare.rewrite import STAGING, read_samples, read_table, rewrite_shard, settle
from flm_scale.data.prepare.spec import Spec
from flm_scale.data.shards import TOKENIZER, Dataset, Sample, seal_dataset
from flm_scale.data.sidecars import give_tokenizer, read_sidecar, write_sidecar
from flm_scale.data.tokens import Tokenizer
from flm_scale.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

Runner = Callable[[Callable[..., Shard], Iterable[tuple[Shard, Mapping[int, str]]]], Iterable[Shard]]
# The order of places in the input; a place is shard << ROW_BITS | row.
ROW_BITS = 32
SAMPLES_PER_BUCKET, MAX_BUCKETS = 4_000_000, 128
RECORD = np.dtype([("hash", "<u8", 2), ("place", "<u8")])
DUPLICATE_FATES = ("duplicate", "near_duplicate")
TABLE_COLUMNS = ["status", "error_message", "url", "caption", "sha256", "phash"]
README = """# {name}

{kept:,} of {rows:,} rows stayed. Prepared from {inputs} by `flm data prepare`; dataset.json holds every setting and the hash of every file.

| what became of a row | rows |
|---|---|
{fates}
"""


class Duplicates(NamedTuple):
    """Samples that go, in the order of the input."""

    places: NDArray[np.uint64]
    """[duplicates] shard << 32 | row."""
    near: NDArray[np.bool_]
    """[duplicates] whether it is only alike."""

    def of_shard(self, number: int) -> dict[int, str]:
        """Return the fate of each row of a shard that goes."""
        low, high = np.searchsorted(self.places, [np.uint64(number << ROW_BITS), np.uint64((number + 1) << ROW_BITS)])
        rows = self.places[low:high] & np.uint64(2**ROW_BITS - 1)
        return {int(row): DUPLICATE_FATES[int(near)] for row, near in zip(rows, self.near[low:high], strict=True)}


def finish(folder: Path, spec: Spec, inputs: Sequence[Input], shards: Sequence[Shard], *, run: Runner = map,
           progress: Callable[[str], None] = lambda _: None) -> Dataset:
    """Drop duplicates, write the token ids and seal the dataset; may be killed and called again.

    shards: every shard of the plan, in order, complete on disk.   run: like map, in order; a fleet's does the shards on many hosts.   progress: is
    told each shard twice, when it is looked at and when it is done, and what is sorted in between.   Raises DataError.
    """
    settle(folder)
    duplicates = find_duplicates(folder, spec, shards, progress=progress)
    if spec.tokenizer:
        with replaced(folder / TOKENIZER) as part:
            shutil.copyfile(spec.tokenizer, part)
    tokenizer = folder / TOKENIZER if (folder / TOKENIZER).exists() else None  # the spec's, or one that was trained since
    entries, fates = [], Counter[str]()
    for entry in run(partial(close_shard, folder, tokenizer), ((shard, duplicates.of_shard(number)) for number, shard in enumerate(shards))):
        progress(entry.name)
        entries.append(entry)
        fates.update(json.loads((folder / stats_name(entry.name)).read_bytes())["status_dict"])
    shutil.rmtree(folder / STAGING, ignore_errors=True)
    given = [{"path": opened.path.name, "split": opened.split, "sha256": opened.sha256, "rows": opened.rows} for opened in inputs]
    preparation = {"spec": spec.decisive(), "spec_hash": spec.hash, "inputs": given, "fates": dict(sorted(fates.items())),
                   "versions": library_versions(spec)}
    lines = "\n".join(f"| {fate} | {count:,} |" for fate, count in fates.most_common())
    readme = spec.readme.read_text(encoding="utf-8") if spec.readme else README.format(
        name=spec.name, kept=fates["success"], rows=fates.total(), fates=lines, inputs=", ".join(opened.path.name for opened in inputs))
    splits = {split: list(of_split) for split, of_split in groupby(entries, key=lambda entry: entry.split)}  # a plan has them together
    dataset = seal_dataset(folder, name=spec.name, sources=[source.model_dump() for source in spec.sources], splits=splits,
                           preparation=preparation, readme=readme)
    if tokenizer:
        give_tokenizer(dataset)
    if spec.input.adopt and any((folder / entry.name).is_symlink() for entry in entries):
        print(f"{folder}: its tars are symbolic links, because the file system gives them no second name; keep what was imported", file=sys.stderr)
    return dataset


def library_versions(spec: Spec) -> dict[str, str]:
    """Return what decides bytes beside the spec."""
    libraries = ["pyarrow", *([] if spec.input.adopt else ["webdataset"]), *(["py3langid"] if spec.text.languages else []),
                 *(["open_clip_torch"] if spec.score.pretrained else []), *(["av"] if spec.input.clips else [])]
    are_decoded = not spec.input.adopt or spec.filter.near_duplicates or spec.filter.forbidden or spec.score.pretrained
    return (codec_versions() if are_decoded else {}) | {name: version(name) for name in libraries} | {"unicode": unidata_version}


def find_duplicates(folder: Path, spec: Spec, shards: Sequence[Shard], *, progress: Callable[[str], None] = lambda _: None) -> Duplicates:
    """Return every sample that equals an earlier one, by the sha256 of its original bytes, by web address and caption, or by perceptual hash.

    Hashes go to files below `folder` by their value (72 bytes a sample on disk at most), and each file is sorted by itself: 400 million samples take
    100 files a rule, and sorting one 226 MB (measured) of memory. An earlier sample counts whether or not it goes itself.
    """
    rules = [*(["sha256", "row"] if spec.filter.duplicates else []), *(["phash"] if spec.filter.near_duplicates else [])]
    buckets = min(MAX_BUCKETS, 1 + sum(shard.count for shard in shards) // SAMPLES_PER_BUCKET)
    places = {False: [np.empty(0, np.uint64)], True: [np.empty(0, np.uint64)]}  # by whether they are only alike
    if rules:
        (folder / STAGING).mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder / STAGING) as scratch:
            _spill(folder, shards, {rule: [Path(scratch, f"{rule}-{bucket}") for bucket in range(buckets)] for rule in rules}, progress)
            for file in sorted(Path(scratch).iterdir()):
                progress(file.name)
                places[file.name.startswith("phash")].append(_later_ones(np.fromfile(file, RECORD)))
    same = np.unique(np.concatenate(places[False]))
    alike = np.setdiff1d(np.concatenate(places[True]), same)
    order = np.argsort(np.concatenate([same, alike]))
    return Duplicates(np.concatenate([same, alike])[order], np.repeat([False, True], [len(same), len(alike)])[order])


def _spill(folder: Path, shards: Sequence[Shard], files: Mapping[str, Sequence[Path]], progress: Callable[[str], None]) -> None:
    """Write (hash, place) of all samples, those dropped before too, to the files of each rule."""
    with ExitStack() as stack:
        streams = {rule: [stack.enter_context(file.open("wb")) for file in paths] for rule, paths in files.items()}
        for number, shard in enumerate(shards):
            progress(shard.name)
            columns = read_table(folder, shard, TABLE_COLUMNS).to_pydict()
            rows = [row for row, status in enumerate(columns["status"]) if status == "success" or columns["error_message"][row] in DUPLICATE_FATES]
            for rule, outs in streams.items():
                records = np.zeros(len(rows), RECORD)
                records["hash"] = np.frombuffer(b"".join(_hash(rule, columns, row) for row in rows), "<u8").reshape(-1, 2)
                records["place"] = (number << ROW_BITS) + np.array(rows, np.uint64)
                bucket = records["hash"][:, 0] % np.uint64(len(outs))
                for at, out in enumerate(outs):
                    records[bucket == at].tofile(out)


def _hash(rule: str, columns: Mapping[str, Sequence[Any]], row: int) -> bytes:
    """Return 16 bytes that equal samples have in common."""
    if rule == "sha256" or (rule == "row" and "://" not in (columns["url"][row] or "")):  # a file's name is no address
        return bytes.fromhex(columns["sha256"][row])[:16]
    text = columns["phash"][row].to_bytes(8, "little") if rule == "phash" else f"{columns['url'][row]}\0{columns['caption'][row]}".encode()
    return hashlib.blake2b(text, digest_size=16).digest()


def _later_ones(records: NDArray[np.void]) -> NDArray[np.uint64]:
    """Return the places of all but the first of each hash."""
    order = np.lexsort((records["place"], records["hash"][:, 0], records["hash"][:, 1]))
    hashes = records["hash"][order]
    later: NDArray[np.uint64] = records["place"][order][1:][(hashes[1:] == hashes[:-1]).all(axis=1)]
    return later


def close_shard(folder: Path, tokenizer: Path | None, task: tuple[Shard, Mapping[int, str]], *, attempt: int = 0) -> Shard:
    """Drop duplicates (row of the table: fate) from one shard and write its token ids; may be killed and done again. Return its entry."""
    entry = drop_duplicates(folder, *task)
    if tokenizer:
        words = Tokenizer(tokenizer)
        try:
            read_sidecar(folder, entry, words)
        except DataError:
            write_sidecar(folder, entry, words, attempt=attempt)
    return entry


def drop_duplicates(folder: Path, shard: Shard, fates: Mapping[int, str]) -> Shard:
    """Take samples, named by their row in the table, out of a shard: those that stay keep their bytes. Return its entry.

    A shard that has lost them already is left as it is, and whoever is killed in between is finished by `settle`.
    """
    messages = read_table(folder, shard, ["error_message"])["error_message"].to_pylist() if fates else []
    if all(messages[row] == fate for row, fate in fates.items()):
        return shard
    return rewrite_without(folder, shard, fates, samples=read_samples(folder, shard), table=read_table(folder, shard))


def rewrite_without(folder: Path, shard: Shard, fates: Mapping[int, str], *, samples: Iterable[Sample], table: "pa.Table") -> Shard:
    """Write a shard anew, of its samples and its table, without the samples of some rows, which get these fates; return its entry."""
    import pyarrow as pa

    keys, statuses, messages = (table[name].to_pylist() for name in ("key", "status", "error_message"))
    gone = {keys[row] for row in fates}
    for row, fate in fates.items():
        statuses[row], messages[row] = "filtered", fate
    for name, values in (("status", statuses), ("error_message", messages)):
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, pa.string()))
    stats = json.loads((folder / stats_name(shard.name)).read_bytes())
    counts = Counter(message or "success" for message in messages)
    stats |= {"successes": counts["success"], "filtered": statuses.count("filtered"), "status_dict": dict(sorted(counts.items()))}
    left = (sample for sample in samples if sample.key not in gone)
    return rewrite_shard(folder, shard.name, left, table=lambda: table, stats=lambda: stats)
