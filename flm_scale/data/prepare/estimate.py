"""What a preparation would come to, from some rows that are prepared, and scored, in earnest and thrown away."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

from flm_scale.data.prepare.driver import RISKY_STAGES, read_inputs, stopped_by_signals
from flm_scale.data.prepare.fleet import Fleet, FleetOptions, ray_session
from flm_scale.data.prepare.scores import MakeScorer, score_shard
from flm_scale.data.prepare.seen import Seen
from flm_scale.data.prepare.spec import Spec
from flm_scale.data.prepare.stages import Work, plan_work, prepare_shard
from flm_scale.data.prepare.worker import Work as Doing
from flm_scale.errors import ConfigError, DataError


def print_plan(inputs: Sequence[Path], spec: Spec, *, rows: int, options: FleetOptions, scorer: MakeScorer | None = None) -> None:
    """Prepare some rows from the middle of the input and throw them away; print what all of them would come to."""
    if rows < 1:
        raise ConfigError(f"--rows ({rows}) must be at least 1")
    found, spec = read_inputs(spec, inputs, Seen(hashed=False)), spec.anchored()
    works, total = plan_work(spec, found), sum(entry.rows for entry in found)
    source = max(range(len(found)), key=lambda number: found[number].rows)
    first = max(0, (found[source].rows - rows) // 2)
    sample = Work(spec.split, 0, source, first, min(first + rows, found[source].rows))
    alone, ends = replace(options, workers=1, ray_address="local", labels=(), row_seconds=float("inf")), []  # the folder is this machine's alone
    with tempfile.TemporaryDirectory() as folder, stopped_by_signals(), ray_session(alone):
        doings: list[Doing[Work]] = [partial(prepare_shard, Path(folder), spec, found)]
        if spec.score.pretrained and scorer:
            doings.append(partial(score_shard, Path(folder), spec.score.minimum, scorer(spec.score, "cpu")))
        for doing in doings:
            with Fleet(doing, alone, folder=Path(folder, "beats"), risky_stages=RISKY_STAGES) as fleet:
                ends += [event for event in fleet.run([sample]) if event][-1:]
            if ends[-1].kind != "done":
                raise DataError(f"rows {sample.first} to {sample.stop} of {found[source].path} cannot be prepared: {ends[-1].reason}")
    report, seconds = {**ends[-1].result, "bytes_in": ends[0].result["bytes_in"]}, sum(end.seconds for end in ends)
    share = total / report["rows"]
    print(f"{total:,} rows in {len(works):,} shards of {spec.samples_per_shard:,} rows")
    print(f"of {report['rows']:,} rows from the middle: kept {report['count'] / report['rows']:.1%}, " + ", ".join(
        f"{fate} {count / report['rows']:.1%}" for fate, count in sorted(report["fates"].items(), key=lambda item: -item[1]) if fate != "success"))
    print(f"about {report['count'] * share:,.0f} samples, {report['bytes_in'] * share / 1e9:,.2f} GB in, "
          f"{report['bytes_out'] * share / 1e9:,.2f} GB out")
    print(f"about {timedelta(seconds=round(seconds * share / max(options.workers, 1)))} on {max(options.workers, 1)} worker(s) of this kind: "
          f"{report['rows'] / seconds:,.1f} rows/s each, {'scored on CPUs, ' * (len(ends) - 1)}duplicates not looked for")
