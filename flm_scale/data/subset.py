"""Which samples of a dataset are kept: by the numbers of its index, by the captions, by a list of keys. No picture is read or written."""

import operator
import re
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flm_scale.data.derive import Advance, Rewriter, Task, derive
from flm_scale.data.index import read_index
from flm_scale.data.manifest import Derivation, Shard
from flm_scale.data.shards import Dataset
from flm_scale.data.storage import file_sha256
from flm_scale.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa

RELATIONS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "<=": operator.le, ">=": operator.ge, "==": operator.eq, "!=": operator.ne, "<": operator.lt, ">": operator.gt}
CONDITION = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*)\s*(<=|>=|==|!=|<|>)\s*([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*")
UID = re.compile(r"[0-9a-f]{32}")
UIDS = np.dtype([("f0", "<u8"), ("f1", "<u8")])
"""DataComp's subset files: the two halves of each uid, sorted."""
CHECKED_AT_ONCE = 2**22
Test = Callable[["pa.RecordBatch"], np.ndarray]
"""Takes an index and says of each sample whether it is kept. Raises ConfigError for a column that is not there."""


def filter_dataset(dataset: Dataset, out: Path, *, where: Sequence[str] = (), keys: Path | None = None, captions_at_least: int = 0) -> Dataset:
    """Make a dataset of the samples that meet all conditions: tars are linked, indexes written anew, token ids cut.

    where: comparisons of a number of the index, such as "clip_score >= 0.28".   keys: a file of them, as `read_keys` reads it.
    Raises ConfigError for a condition that cannot be understood and when there is none; DataError for a file of keys that is none.
    """
    tests = dict(map(parse_condition, where))
    if captions_at_least:
        tests[f"captions >= {captions_at_least}"] = lambda batch: np.diff(batch.column("captions").offsets.to_numpy()) >= captions_at_least
    if keys:
        tests["keys"] = read_keys(keys)
    if not tests:
        raise ConfigError("flm data filter: say which samples to keep: --where, --keys or --captions-at-least")
    values: dict[str, Any] = {"all_of": sorted(tests)}
    if keys:
        values["keys_sha256"] = file_sha256(keys)
    rewriter = Rewriter(dataset, out)
    tasks = {split: [Task(shard.name, shard.count, partial(_filter_shard, rewriter, shard, tests)) for shard in dataset.shards(split)]
             for split in dataset.splits}
    return derive(dataset, out, Derivation(parent=dataset.root, by="filter", values=values), tasks)


def _filter_shard(rewriter: Rewriter, shard: Shard, tests: dict[str, Test], advance: Advance) -> tuple[Shard | None, dict[str, int]]:
    import pyarrow as pa

    if not shard.count:  # its index has no optional columns
        return None, dict.fromkeys(tests, 0)
    batch = read_index(rewriter.parent.folder, shard)
    try:
        found = {name: test(batch) for name, test in tests.items()}
    except ConfigError as error:
        raise ConfigError(f"index {shard.index_name} of {rewriter.parent.folder}: {error}") from error
    rows = np.flatnonzero(np.logical_and.reduce(list(found.values())))
    counts = {name: int(is_kept.sum()) for name, is_kept in found.items()}
    entry = rewriter.write(shard, batch.take(pa.array(rows)), rows=rows, counts=counts) if len(rows) else None
    advance(shard.count)
    return entry, counts


def parse_condition(text: str) -> tuple[str, Test]:
    """Return "column relation number" in its normal form, and the test that it is. A score that is no number (NaN) meets none but `!=`."""
    match = CONDITION.fullmatch(text)
    try:
        column, relation, number = match.groups() if match else ("", "", "")
        value = int(number) if re.fullmatch(r"[-+]?\d+", number) else float(number)
    except ValueError as error:
        raise ConfigError(f"--where '{text}' is no condition; write a column of numbers, one of {' '.join(RELATIONS)}, and a number: "
                          "--where 'clip_score >= 0.28'") from error

    def test(batch: "pa.RecordBatch") -> np.ndarray:
        import pyarrow as pa

        numbers = [field.name for field in batch.schema if pa.types.is_integer(field.type) or pa.types.is_floating(field.type)]
        if column not in numbers:
            raise ConfigError(f"no column of numbers '{column}'{did_you_mean(column, numbers)} (there is: {', '.join(numbers)})")
        return RELATIONS[relation](batch.column(column).to_numpy(zero_copy_only=False), value)

    return f"{column} {relation} {value}", test


def read_keys(file: Path) -> Test:
    """Return the test whether a sample's key is in a file: text, a key a line; or a .npy of uids as DataComp's, where keys are 32 hex digits.

    A text is held in memory, about 100 bytes a key; uids are mapped. Raises DataError when the file cannot be read or holds something else.
    """
    try:
        if file.suffix != ".npy":
            names = frozenset(file.read_text(encoding="utf-8").split())
            return lambda batch: _are_in(names, batch)
        uids = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"--keys {file} cannot be read ({error}); give a text with a key a line, or a .npy of sorted uids") from error
    if not isinstance(uids, np.ndarray) or uids.dtype != UIDS or uids.ndim != 1:
        found = f"{uids.dtype} {uids.shape}" if isinstance(uids, np.ndarray) else "several arrays"
        raise DataError(f"--keys {file} holds {found}; DataComp's subset files hold pairs of u8, sorted")
    for first in range(0, len(uids), CHECKED_AT_ONCE):
        part = uids[first:first + CHECKED_AT_ONCE + 1]
        if _are_before(part[1:], part[:-1]).any():
            raise DataError(f"--keys {file} is not sorted, so uids are not found in it; sort it: np.save(FILE, np.sort(np.load(FILE)))")
    return lambda batch: _are_uids_in(uids, batch)


def _are_in(names: Collection[str], batch: "pa.RecordBatch") -> np.ndarray:
    return np.array([key in names for key in batch.column("key").to_pylist()], bool)


def _are_before(uids: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Compare pair by pair."""
    before: np.ndarray = (uids["f0"] < others["f0"]) | ((uids["f0"] == others["f0"]) & (uids["f1"] < others["f1"]))
    return before


def _are_uids_in(uids: np.ndarray, batch: "pa.RecordBatch") -> np.ndarray:
    """Look all keys of a shard up at once, halving: numpy's own search would copy the mapped file, or compare pairs one by one."""
    keys = batch.column("key").to_pylist()
    if odd := next((key for key in keys if not UID.fullmatch(key)), None):
        raise ConfigError(f"key '{odd}' is no uid of 32 hex digits; give --keys as a text with a key a line")
    wanted = np.array([(int(key[:16], 16), int(key[16:], 16)) for key in keys], UIDS)
    low, high = np.zeros(len(keys), np.int64), np.full(len(keys), len(uids))
    while (searching := low < high).any():
        middle = (low + high) // 2
        there = uids[np.minimum(middle, len(uids) - 1)]
        is_before = searching & _are_before(there, wanted)
        low, high = np.where(is_before, middle + 1, low), np.where(is_before | ~searching, high, middle)
    found: np.ndarray = (low < len(uids)) & (uids[np.minimum(low, len(uids) - 1)] == wanted) if len(uids) else np.zeros(len(keys), bool)
    return found
