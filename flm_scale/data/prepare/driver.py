"""The driver of a preparation: inputs and a spec in, a dataset out, by a fleet of workers that may die at any time, as may the driver.

What is done is told by the shards on disk alone: a driver starts from what it finds there, and makes what is missing. Everything in a dataset's
folder comes from one spec and one input, which it remembers in ledger/preparation.json; others are refused with the difference.
"""

import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

from rich.console import Console

from flm_scale.data.actors import cluster_gpus
from flm_scale.data.manifest import DATASET, Shard, stats_name
from flm_scale.data.prepare.finish import finish
from flm_scale.data.prepare.fleet import Event, Fleet, FleetError, FleetOptions, ray_session
from flm_scale.data.prepare.inputs import Input, open_inputs
from flm_scale.data.prepare.ledger import FOLDER, Ledger, locked, read_ledger, write_json
from flm_scale.data.prepare.rewrite import is_whole, settle, settle_shard
from flm_scale.data.prepare.scores import MakeScorer, is_scored, score_shard
from flm_scale.data.prepare.seen import Seen
from flm_scale.data.prepare.spec import Spec, difference
from flm_scale.data.prepare.stages import Work, plan_work, prepare_shard
from flm_scale.data.prepare.status import Display, Meter, State, write_status
from flm_scale.data.prepare.worker import Work as Doing
from flm_scale.data.shards import TOKENIZER, Dataset, open_dataset, read_committed_shard
from flm_scale.errors import ConfigError, DataError

STATUS_SECONDS = 2.0
RISKY_STAGES = frozenset({"decode"})  # of prepare_shard
GIVEN_UP_IN_A_ROW = 10
"""Shards in quarantine, and none done in between, end the preparation: a full disk is no shard's own fault."""
READ_AT_ONCE, READ_TOGETHER = 16, 256  # small files of a shared file system: threads, and files for each at a time
WORDS = {"done": "committed", "given_up": "quarantined"}
"""What the ledger calls the fleet's events."""


class Plan(NamedTuple):
    """A preparation whose folder this process holds."""

    folder: Path
    spec: Spec
    inputs: Sequence[Input]
    works: Sequence[Work]
    options: FleetOptions
    scorer: MakeScorer | None


class _Phase(NamedTuple):
    """One thing that the fleet does to shards, and by whom."""

    state: Literal["running", "scoring"]
    doing: Doing[Work]
    options: FleetOptions
    on_gpus: bool = False


def prepare(inputs: Sequence[Path], folder: Path, spec: Spec, options: FleetOptions, *, scorer: MakeScorer | None = None) -> bool:
    """Make the dataset, or what is missing of it. False when shards are in quarantine, which are then named.

    scorer: makes what workers score with; needed where spec.score asks for scores.
    Raises ConfigError when the folder belongs to another spec or input, DataError when another driver is at work there.
    """
    with opened(inputs, folder, spec, options, scorer=scorer) as plan:
        committed = committed_shards(plan)
        todo = [work for work in plan.works if work.name not in committed]
        print(f"{plan.folder}: {len(plan.works):,} shards of {sum(entry.rows for entry in plan.inputs):,} rows, {len(committed):,} of them done",
              file=sys.stderr)
        return work_through(plan, todo, partial(prepare_shard, plan.folder, plan.spec, plan.inputs), committed)


def remembered(folder: Path) -> tuple[Spec, list[Path]]:
    """Return the spec and the input paths that a folder was begun with. Raises DataError when nothing was prepared there."""
    file = folder / FOLDER / "preparation.json"
    try:
        content = json.loads(file.read_bytes())
        paths = [Path(f"{entry['split']}={entry['path']}") for entry in content["inputs"]]
        return Spec.model_validate_json(json.dumps(content["spec"])), paths
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder} was not prepared ({file} cannot be read); begin with: flm data prepare --input X --output {folder}") from error


@contextmanager
def opened(inputs: Sequence[Path], folder: Path, spec: Spec, options: FleetOptions, *, scorer: MakeScorer | None,
           afresh: bool = False) -> Iterator[Plan]:
    """Hold the folder, and open the inputs; what a killed driver left half done there is brought to its end.

    afresh: read inputs that have their old size and time of change, too.
    """
    folder, spec = folder.resolve(), spec.anchored()
    try:
        if not (folder / FOLDER).exists() and folder.exists() and any(folder.iterdir()):
            raise DataError(f"{folder} holds files that no preparation has made; choose an empty folder for --output")
        with locked(folder), stopped_by_signals():
            seen = folder / FOLDER / "inputs.seen"
            if afresh:
                seen.unlink(missing_ok=True)
            found = read_inputs(spec, inputs, Seen(seen))
            if around := next((entry.path for entry in found if folder.is_relative_to(entry.path) and not entry.path.is_relative_to(folder)), None):
                raise ConfigError(f"--output {folder} lies in --input {around} and would become a part of it; choose another --output")
            _remember(folder / FOLDER / "preparation.json", spec, found)
            settle(folder)
            yield Plan(folder, spec, found, plan_work(spec, found), options, scorer)
    except OSError as error:
        raise DataError(f"{error.filename or folder}: {error.strerror or error}; put that right and start the same command again") from error


def read_inputs(spec: Spec, paths: Sequence[Path], seen: Seen) -> list[Input]:
    """Open the inputs, and say what the user should know of them."""
    if spec.input.warning:
        print(f"flm: {spec.input.warning}", file=sys.stderr)
    with Console(stderr=True).status("the inputs are read") as line:
        return open_inputs(spec, paths, seen=seen, progress=lambda name: line.update(f"the inputs are read: {name}"))


def _remember(file: Path, spec: Spec, inputs: Sequence[Input]) -> None:
    """Note spec and inputs at the first start; refuse others at every later one."""
    # Through JSON, so that both sides of the comparison are what JSON knows.
    now = json.loads(json.dumps({"spec": spec.model_dump(mode="json"), "decisive": spec.decisive(),
                                 "inputs": [{"split": entry.split, "path": str(entry.path), "sha256": entry.sha256, "rows": entry.rows}
                                            for entry in inputs]}))
    if file.exists():
        try:
            before = json.loads(file.read_bytes())
        except ValueError as error:
            raise DataError(f"{file} is damaged ({error}); restore it, or choose another --output") from error
        if lines := difference(before["decisive"], now["decisive"]):
            raise ConfigError(f"{file.parent.parent} has another spec: {'; '.join(lines)}; give the old values, or choose another --output")
        was, is_now = ([(entry["split"], entry["sha256"], entry["rows"]) for entry in content["inputs"]] for content in (before, now))
        if was != is_now:
            differ = [entry["path"] for entry, here in zip(now["inputs"], is_now, strict=True) if here not in was] or ["their number or order"]
            raise ConfigError(f"{file.parent.parent} has other inputs ({len(was)} with {sum(rows for *_, rows in was):,} rows; what differs: "
                              f"{', '.join(differ)}); restore them, or choose another --output")
    write_json(file, now)  # paths, and values that decide nothing, may have changed


def committed_shards(plan: Plan) -> dict[str, Shard]:
    """Return the shards that are whole on disk."""

    def read(first: int) -> list[Shard]:
        found = (read_committed_shard(plan.folder, work.name) for work in plan.works[first : first + READ_TOGETHER])
        return [shard for shard in found if shard]

    with ThreadPoolExecutor(READ_AT_ONCE) as pool:
        return {shard.name: shard for some in pool.map(read, range(0, len(plan.works), READ_TOGETHER)) for shard in some}


def work_through(plan: Plan, todo: Sequence[Work], doing: Doing[Work], committed: Mapping[str, Shard]) -> bool:
    """Let the fleet do something to shards and score them, and seal the dataset when all are whole; False when some are in quarantine."""
    with ray_session(plan.options) if todo else nullcontext():
        meter = _follow_all(plan, _Phase("running", doing, plan.options), todo, committed)
        if plan.spec.score.pretrained and not meter.quarantined:
            meter = _score(plan)
        for shard, reason in meter.quarantined.items():
            print(f"flm: shard {shard} is in quarantine: {reason}", file=sys.stderr)
        if meter.quarantined:
            print(f"flm: {len(meter.quarantined)} of {len(plan.works)} shards are missing; to try them again: flm data repair {plan.folder}",
                  file=sys.stderr)
            return False
        _seal_and_tell(plan, meter)
    return True


def _follow_all(plan: Plan, phase: _Phase, todo: Sequence[Work], done: Mapping[str, Shard]) -> Meter:
    """Bring a phase to its end.   done: the shards that it has nothing to do with any more."""
    attempts, reports = _history(plan, done)
    meter = Meter({work.name: work.stop - work.first for work in plan.works}, done={name: reports[name] for name in done if name in reports})
    while todo:
        with _status_at_the_end(plan.folder, meter):
            raced = _follow(plan, phase, todo, attempts, meter)
        # Two workers at one shard may have met servers that answered unlike, and left files of both.
        todo = [work for work in todo if work.name in raced and not is_whole(plan.folder, work.name)]
        attempts = _history(plan, {})[0] if todo else attempts
    return meter


def _score(plan: Plan) -> Meter:
    """Have all shards scored that are not, by GPUs where the cluster has some."""
    assert plan.scorer, "a spec with scores goes with a scorer"
    committed = committed_shards(plan)
    with ThreadPoolExecutor(READ_AT_ONCE) as pool:
        is_done = dict(zip(committed, pool.map(partial(is_scored, plan.folder), committed.values()), strict=True))
    done = {name: shard for name, shard in committed.items() if is_done[name]}
    todo = [work for work in plan.works if work.name not in done]
    # Nothing is started twice: the slower rewrite would take the quicker one's counts away. A batch of a large model takes a core many minutes.
    options = replace(plan.options, straggler_seconds=float("inf"), row_seconds=float("inf"))
    with ray_session(options) if todo else nullcontext():
        device = _device(options.gpu_workers) if todo else "cpu"
        doing = partial(score_shard, plan.folder, plan.spec.score.minimum, plan.scorer(plan.spec.score, device))
        if todo:
            print(f"{plan.folder}: {len(todo):,} of {len(plan.works):,} shards are scored, on {device}", file=sys.stderr)
        return _follow_all(plan, _Phase("scoring", doing, options, on_gpus=device == "cuda"), todo, done)


def _device(gpu_workers: int | None) -> Literal["cpu", "cuda"]:
    """Return what to score on, in the cluster that is joined. Raises ConfigError when it has none of the GPUs asked for."""
    gpus = cluster_gpus()
    if gpu_workers and not gpus:
        raise ConfigError(f"--gpu-workers ({gpu_workers}): the Ray cluster has no GPU; leave it out to score on CPUs")
    return "cuda" if gpus and gpu_workers != 0 else "cpu"


def _seal_and_tell(plan: Plan, meter: Meter) -> None:
    """State the dataset, and say what it has come to."""
    told = 0.0

    def alive() -> None:
        nonlocal told
        if time.monotonic() - told > STATUS_SECONDS:
            told = time.monotonic()
            write_status(plan.folder, meter.status("sealing"))

    alive()
    dataset = _seal(plan, committed_shards(plan), _history(plan, {})[0], alive)
    kept, prepared = int(dataset.shards().counts.sum()), dataset.manifest.preparation
    write_status(plan.folder, replace(meter.status("done"), kept=kept, fates=prepared.fates if prepared else {}))
    print(f"{plan.folder}: {kept:,} samples in {len(plan.works):,} shards ({dataset.root[:12]}); "
          f"flm data verify {plan.folder} reads every byte again")


@contextmanager
def _status_at_the_end(folder: Path, meter: Meter) -> Iterator[None]:
    state: State = "stopped"
    try:
        yield
        state = "failed" if meter.quarantined else "sealing"
    finally:
        write_status(folder, meter.status(state))


def _follow(plan: Plan, phase: _Phase, todo: Sequence[Work], attempts: Mapping[str, int], meter: Meter) -> set[str]:
    """Run the fleet to the end, count and write down what happens, and show how it goes; return shards that two workers were at."""
    shown, given_up_in_a_row, raced = 0.0, 0, set[str]()
    with _fleet(plan, phase.doing, phase.options, on_gpus=phase.on_gpus) as fleet, closing(Ledger(plan.folder)) as ledger, Display() as display:
        for event in fleet.run(todo, first_attempt=lambda work: attempts.get(work.name, 0)):
            if event:
                meter.take(event)
                _note(plan.folder, ledger, event)
                raced |= {event.task.name} if event.kind == "killed" else set()
                given_up_in_a_row = 0 if event.kind == "done" else given_up_in_a_row + (event.kind == "given_up")
                if given_up_in_a_row >= GIVEN_UP_IN_A_ROW:
                    raise FleetError(f"{given_up_in_a_row} shards in a row came to nothing, the last by: {event.reason}; put that right and start "
                                     "the same command again")
            if time.monotonic() - shown > STATUS_SECONDS:
                shown = time.monotonic()
                status = meter.status(phase.state, fleet)
                write_status(plan.folder, status)
                display.show(status)
    return raced


def _fleet(plan: Plan, doing: Doing[Any], options: FleetOptions, *, on_gpus: bool = False) -> Fleet[Any]:
    notes = plan.folder / FOLDER / "beats"
    shutil.rmtree(notes, ignore_errors=True)
    return Fleet(doing, options, folder=notes, risky_stages=RISKY_STAGES, on_gpus=on_gpus)


def _note(folder: Path, ledger: Ledger, event: Event[Work]) -> None:
    """Write an event down, and a shard's place in quarantine."""
    ledger.write(WORDS.get(event.kind, event.kind), shard=event.task.name, attempt=event.attempt, node=event.node, seconds=round(event.seconds, 3),
                 **({"reason": event.reason} if event.reason else {}), **({"report": event.result} if event.result else {}))
    file = folder / "quarantine" / f"{event.task.name.replace('/', '-')}.json"
    if event.kind == "given_up":
        file.parent.mkdir(exist_ok=True)
        write_json(file, {"shard": event.task.name, "reason": event.reason, "attempt": event.attempt, "node": event.node})
    elif event.kind == "done":
        file.unlink(missing_ok=True)


def _history(plan: Plan, committed: Mapping[str, Shard]) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """Return each shard's first free attempt number, and the reports of those that are whole."""
    attempts, reports = dict[str, int](), dict[str, dict[str, Any]]()
    for line in read_ledger(plan.folder):
        attempts[line["shard"]] = max(attempts.get(line["shard"], 0), line["attempt"] + 1)
        if line["event"] == "committed":
            reports[line["shard"]] = line["report"]
    for work in plan.works:
        if work.name in committed and work.name not in reports:  # its driver was killed before it heard of it
            stats = json.loads((plan.folder / stats_name(work.name)).read_bytes())
            reports[work.name] = {"name": work.name, "count": committed[work.name].count, "rows": work.stop - work.first, "bytes_in": 0,
                                  "bytes_out": 0, "fates": stats["status_dict"], "seconds": stats["seconds"]}
    return attempts, reports


def _seal(plan: Plan, shards: Mapping[str, Shard], attempts: Mapping[str, int], alive: Callable[[], None]) -> Dataset:
    """Drop duplicates among shards and state the dataset, unless that is done.   alive: called again and again."""
    entries, wants_tokenizer = [shards[work.name] for work in plan.works], plan.spec.tokenizer or (plan.folder / TOKENIZER).exists()
    if (plan.folder / DATASET).exists():
        with suppress(DataError):  # what it states is not what is there
            dataset = open_dataset(plan.folder)
            if list(dataset.shards()) == entries and (dataset.tokenizer_fingerprint or not wants_tokenizer):
                return dataset
        (plan.folder / DATASET).unlink()
    with Console(stderr=True).status("duplicates are looked for") as line:

        def progress(name: str) -> None:
            alive()
            line.update(f"duplicates are looked for, and dropped: {name}")

        return finish(plan.folder, plan.spec, plan.inputs, entries, run=partial(_close_all, plan, attempts, alive), progress=progress)


class _Closing(NamedTuple):
    """A shard that loses duplicates, or gets token ids."""

    shard: Shard
    fates: Mapping[int, str]

    @property
    def name(self) -> str:
        return self.shard.name


def _close(folder: Path, function: Callable[..., Shard], task: _Closing, *, attempt: int, skip: object,  # noqa: ARG001
           beat: Callable[[int, str], None]) -> dict[str, Any]:
    beat(0, "close")
    # A killed attempt may have moved its shard halfway.
    return function((settle_shard(folder, task.name) or task.shard, task.fates), attempt=attempt).model_dump()


def _close_all(plan: Plan, attempts: Mapping[str, int], alive: Callable[[], None], function: Callable[..., Shard],
               tasks: Iterable[tuple[Shard, Mapping[int, str]]]) -> Iterator[Shard]:
    """Be `finish`'s map: the fleet does the shards that have something to be done; the others are as they are."""
    done = dict[str, Shard]()  # in the order of the shards

    def closings() -> Iterator[_Closing]:
        for shard, fates in tasks:
            done[shard.name] = shard
            if fates or (plan.folder / TOKENIZER).exists():
                yield _Closing(shard, fates)

    source = closings()
    if (first := next(source, None)) is not None:
        # Nothing is started twice: a slower rewrite would take the quicker one's counts away.
        options = replace(plan.options, straggler_seconds=float("inf"), row_seconds=float("inf"))
        with _fleet(plan, partial(_close, plan.folder, function), options) as fleet:
            for event in fleet.run(chain([first], source), first_attempt=lambda task: attempts.get(task.name, 0)):
                if event and event.kind == "done":
                    done[event.task.name] = Shard(**event.result)
                elif event and event.kind == "given_up":
                    raise FleetError(f"shard {event.task.name} cannot be closed: {event.reason}; put that right and start the same command again")
                alive()
    yield from done.values()


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the driver in order: workers are killed, what they have not finished is as if it had not begun."""

    received: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        raise SystemExit

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except SystemExit:
        print("\nflm: stopped; the same command goes on from the shards that are done", file=sys.stderr)
        # Where the signal meets Ray at work, Ray raises an exit of its own instead, with code 1.
        raise SystemExit(128 + received[0] if received else 1) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
