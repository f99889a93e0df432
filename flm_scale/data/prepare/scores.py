"""Between the last shard and the duplicates: every sample of a prepared shard gets a score, and those below the minimum go.

Which model says so is not known here: models lie above data, so the scorer is handed in (flm_scale/score.py). A shard with scores is told by the
column in its index. Its table keeps the scores of samples that went, too, and of those that were there when a retry brought more: nothing is
scored twice.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from flm_scale.data.index import index_columns, map_index
from flm_scale.data.manifest import Shard, stats_name
from flm_scale.data.prepare.finish import rewrite_without
from flm_scale.data.prepare.rewrite import read_samples, read_table, settle_shard
from flm_scale.data.prepare.spec import SCORE, ScoreConfig
from flm_scale.data.prepare.stages import Work
from flm_scale.errors import DataError


class Scorer(Protocol):
    """What a worker scores with."""

    def __call__(self, folder: Path, shard: Shard, numbers: Sequence[int]) -> Iterable[NDArray[np.float32]]:
        """Yield the scores of these samples of a shard, some at a time, in order; NaN where there is none."""


MakeScorer = Callable[[ScoreConfig, Literal["cpu", "cuda"]], Scorer]


def is_scored(folder: Path, shard: Shard) -> bool:
    """Return whether every sample of a shard has a score. Raises DataError when its index or table cannot be read."""
    # The index of an empty shard has no optional columns.
    return SCORE in (map_index(folder, shard).schema.names if shard.count else read_table(folder, shard).column_names)


def score_shard(folder: Path, minimum: float | None, scorer: Scorer, work: Work, *, attempt: int, skip: object,  # noqa: ARG001
                beat: Callable[[int, str], None]) -> dict[str, Any]:
    """Score one shard and drop what is below the minimum; return what the fleet counts. May be killed and done again. Raises DataError."""
    began = time.perf_counter()
    shard = settle_shard(folder, work.name)  # a killed attempt may have moved it halfway
    if not shard:
        raise DataError(f"shard {work.name} is not whole; first: flm data repair {folder}")
    bytes_in = shard.bytes
    if not is_scored(folder, shard):
        shard = _with_scores(folder, shard, minimum, scorer, beat)
    fates = json.loads((folder / stats_name(work.name)).read_bytes())["status_dict"]
    return {"name": work.name, "count": shard.count, "rows": work.stop - work.first, "bytes_in": bytes_in, "bytes_out": shard.bytes,
            "fates": fates, "seconds": {"score": round(time.perf_counter() - began, 3)}}


def _with_scores(folder: Path, shard: Shard, minimum: float | None, scorer: Scorer, beat: Callable[[int, str], None]) -> Shard:
    import pyarrow as pa

    table, (captions,) = read_table(folder, shard), index_columns(folder, shard, ["captions"])
    scores: list[Any] = table[SCORE].to_pylist() if SCORE in table.column_names else [None] * table.num_rows
    rows = [row for row, status in enumerate(table["status"].to_pylist()) if status == "success"]  # of the samples
    new = [number for number, row in enumerate(rows) if scores[row] is None]
    done = 0
    for some in scorer(folder, shard, new):
        for score in some.tolist():
            scores[rows[new[done]]] = score
            done += 1
        beat(rows[new[done - 1]], "score")
    assert done == len(new), "every sample has a score, or NaN"
    beat(rows[-1] if rows else 0, "write")
    # A picture with questions may have no caption, and then nothing is too little. NaN is not enough.
    fates = {row: SCORE for row, texts in zip(rows, captions, strict=True)
             if minimum is not None and texts and not np.float32(scores[row]) >= np.float32(minimum)}
    kept = table.drop_columns([SCORE] if SCORE in table.column_names else []).append_column(SCORE, pa.array(scores, pa.float32()))
    samples = (replace(sample, columns={**sample.columns, SCORE: scores[row]})
               for row, sample in zip(rows, read_samples(folder, shard), strict=True))
    return rewrite_without(folder, shard, fates, samples=samples, table=kept)
