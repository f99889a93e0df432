"""What can be done again to a prepared dataset: fetch what failed, make what is damaged. Neither touches what is good."""

import sys
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flm_scale.data.manifest import Shard
from flm_scale.data.prepare.driver import committed_shards, opened, remembered, work_through
from flm_scale.data.prepare.fleet import FleetOptions
from flm_scale.data.prepare.inputs import Input
from flm_scale.data.prepare.rewrite import altered_tars, is_whole, read_table, settle_shard
from flm_scale.data.prepare.scores import MakeScorer
from flm_scale.data.prepare.spec import Spec
from flm_scale.data.prepare.stages import Work, prepare_shard
from flm_scale.errors import DataError, UserError, did_you_mean


def retry(folder: Path, *, reason: str, options: FleetOptions, scorer: MakeScorer | None = None) -> bool:
    """Fetch rows again that could not be fetched, all or those lost to a reason; False when a shard came to nothing.

    scorer: as for `prepare`. Raises DataError when the dataset is not whole, or nothing was lost to that reason.
    """
    spec, inputs = remembered(folder)
    # Nothing is started twice: the slower one would take the quicker one's counts away.
    with opened(inputs, folder, spec, replace(options, straggler_seconds=float("inf")), scorer=scorer) as plan:
        committed = committed_shards(plan)
        if len(committed) < len(plan.works):
            raise DataError(f"{folder}: {len(plan.works) - len(committed)} of {len(plan.works)} shards are missing; first: flm data repair {folder}")
        lost = {name: _lost(plan.folder, shard) for name, shard in committed.items()}
        found = sum(lost.values(), Counter[str]())
        fates = frozenset({reason} if reason else found)
        todo = [work for work in plan.works if fates & lost[work.name].keys()]
        if not todo:
            raise DataError(f"{folder}: no row was lost to {reason or 'anything that can be fetched again'}{did_you_mean(reason, found)} "
                            f"({', '.join(f'{fate} {count}' for fate, count in found.most_common()) or 'nothing was'})")
        print(f"{folder}: rows of {len(todo):,} of {len(plan.works):,} shards are fetched again", file=sys.stderr)
        again = {work.name for work in todo}
        return work_through(plan, todo, partial(_retry_shard, plan.folder, plan.spec, plan.inputs, fates),
                            {name: shard for name, shard in committed.items() if name not in again})


def _lost(folder: Path, shard: Shard) -> Counter[str]:
    """Return how many rows of a shard could not be fetched, by their fate."""
    columns = read_table(folder, shard, ["status", "error_message"]).to_pydict()
    return Counter(fate for status, fate in zip(columns["status"], columns["error_message"], strict=True) if status == "failed_to_download")


def _retry_shard(folder: Path, spec: Spec, inputs: Sequence[Input], fates: Collection[str], work: Work, *, attempt: int, skip: Collection[int],
                 beat: Callable[[int, str], None]) -> dict[str, Any]:
    # A killed attempt may have moved its shard halfway; without the old one all of it would be fetched again.
    if not settle_shard(folder, work.name):
        raise DataError(f"shard {work.name} is not whole; first: flm data repair {folder}")
    return prepare_shard(folder, spec, inputs, work, attempt=attempt, skip=skip, retry=fates, beat=beat)


def repair(folder: Path, *, options: FleetOptions, scorer: MakeScorer | None = None) -> bool:
    """Make damaged and missing shards again and seal the dataset; False when a shard came to nothing.

    scorer: as for `prepare`. Raises DataError for adopted tars that were altered: they are somebody else's.
    """
    spec, inputs = remembered(folder)
    try:
        return _repair(folder, spec, inputs, options, scorer)
    except UserError as error:
        if not (altered := altered_tars(folder) if spec.input.adopt else []):
            raise
        more = f" (and {len(altered) - 1} more)" if len(altered) > 1 else ""
        raise DataError(f"{folder}: {altered[0]}{more}; restore that file, or import what is there now into another --output") from error


def _repair(folder: Path, spec: Spec, inputs: Sequence[Path], options: FleetOptions, scorer: MakeScorer | None) -> bool:
    with opened(inputs, folder, spec, options, scorer=scorer, afresh=spec.input.adopt) as plan:  # a tar may have rotted under its old time
        committed = committed_shards(plan)
        for name in [name for name in committed if not is_whole(plan.folder, name)]:
            print(f"flm: shard {name} is damaged and made again", file=sys.stderr)
            del committed[name]
        todo = [work for work in plan.works if work.name not in committed]
        print(f"{folder}: {len(todo):,} of {len(plan.works):,} shards are made again", file=sys.stderr)
        return work_through(plan, todo, partial(prepare_shard, plan.folder, plan.spec, plan.inputs), committed)
