"""Kills -9 `flm train` on real processes, lets it go on, and compares it with a run that nobody killed.

A kill comes at a named place, just before something that the process is about to do, or at a moment by the clock.
"""

import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from flm_scale.checkpoint import store
from flm_scale.cli import main
from flm_scale.engine import deepspeed
from flm_scale.guard import Guard
from tests.distributed.launch import Launch
from tests.test_resume import course, saved_steps

STEPS, EVERY = 22, 2
"""Of a run, and of its saves. The first kill is in step 12 at the latest, so 10 steps follow it."""
LAST_KILL = 12
TIMEOUT = 300.0
"""Seconds for one start, on a machine with much else to do."""
ENGINES = (deepspeed.PlainDeepSpeedEngine, deepspeed.PipelineDeepSpeedEngine)

# Before which change of the disk, by Python's name for it and the path; {step} is what is being saved, {old} what falls out by it.
CHANGES = {
    "before the folder": ("os.mkdir", "checkpoints/.step-{step:06d}.partial"),
    "between shard files": ("open", "checkpoints/.step-{step:06d}.partial/rank-{rank:05d}.json"),
    "before the entry": ("os.rename", "checkpoints/.step-{step:06d}.partial/rank-{rank:05d}.entry"),
    "before the manifest": ("open", "checkpoints/.step-{step:06d}.partial/manifest.json"),
    "before the rename": ("os.rename", "checkpoints/step-{step:06d}"),
    "before the pointer": ("os.rename", "checkpoints/latest"),
    "while an old one goes": ("os.rename", "checkpoints/.step-{old:06d}.trash"),
}
PLACES = ("in a step", "while copying", "in a shard file", *CHANGES)
BY_ANY_RANK = ("in a step", "while copying", "in a shard file", "between shard files", "before the entry")
"""The other places are rank 0's."""


class Layout(NamedTuple):
    """How the killed run is cut."""

    tensor: int
    pipe: int
    data: int
    zero: int

    @property
    def size(self) -> int:
        return self.tensor * self.pipe * self.data

    def __str__(self) -> str:
        return f"{self.tensor}{self.pipe}{self.data}-zero{self.zero}"


class Kill(NamedTuple):
    """Who ends where."""

    place: str
    step: int
    rank: int
    everybody: bool
    """All ranks at that very moment; otherwise this one, and the others soon after."""


def words(data: Path, run_dir: Path, layout: Layout, *more: str) -> list[str]:
    return ["train", "debug", "--data.path", str(data), "--run-dir", str(run_dir), "--text.vocab-size", "200", "--steps", str(STEPS),
            "--log.save-every-steps", str(EVERY), "--parallel.engine", "deepspeed", "--parallel.tensor", str(layout.tensor),
            "--parallel.pipe", str(layout.pipe), "--parallel.zero", str(layout.zero), *more]


def be_flm(arguments: list[str], notes: Path, kill: Kill | None) -> int:
    """What each process does: be `flm`, note the samples that it trains on, and end where it is told to."""
    rank = int(os.environ["RANK"])
    (notes / f"{rank}.pid").write_text(str(os.getpid()))
    note_samples(notes / f"{rank}.jsonl")
    if kill and kill.rank == rank:
        run_dir = Path(arguments[arguments.index("--run-dir") + 1])
        aim(kill, run_dir, lambda: end(notes, everybody=kill.everybody))
    return main(arguments)


def end(notes: Path, *, everybody: bool) -> None:
    if everybody:
        for path in notes.glob("*.pid"):
            if path.stem != os.environ["RANK"]:
                os.kill(int(path.read_text()), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def before_calls_of(owner: Any, name: str, look: Callable[..., None]) -> None:
    """Let a function look at its arguments before each call of another one."""
    proceed = getattr(owner, name)

    @wraps(proceed)
    def look_and_proceed(*args: Any, **more: Any) -> Any:
        look(*args, **more)
        return proceed(*args, **more)

    setattr(owner, name, look_and_proceed)


def in_nth_list(number: int, owner: Any, name: str, end: Callable[[], None]) -> None:
    """Let the process end when somebody has taken half of what the number-th call of a function returned."""
    made, numbers = getattr(owner, name), itertools.count(1)

    class Half(list):
        def __iter__(self) -> Iterator[Any]:
            yield from itertools.islice(super().__iter__(), len(self) // 2)
            end()

    setattr(owner, name, lambda *args: Half(made(*args)) if next(numbers) == number else made(*args))


def note_samples(path: Path) -> None:
    log = path.open("a", buffering=1)
    for engine in ENGINES:
        before_calls_of(engine, "train_step", lambda _, batches, *, step, **__: log.write(
            json.dumps({"step": step + 1, "time": time.time(), "keys": [batch.keys for batch in batches]}) + "\n"))


def aim(kill: Kill, run_dir: Path, end: Callable[[], None]) -> None:
    """Let this process come to its end at the place. Saving may run in a thread of its own."""
    steps = [0]

    def judged(*_: object) -> None:
        if steps[-1] == kill.step:
            end()

    match kill.place:
        case "in a step":  # between the gradients and the update
            for engine in ENGINES:
                before_calls_of(engine, "train_step", lambda *_, step, **__: steps.append(step + 1))
            before_calls_of(Guard, "takes", judged)
        case "while copying":
            for engine in ENGINES:
                in_nth_list(kill.step // EVERY, engine, "saved_pieces", end)
        case "in a shard file":
            in_nth_list(kill.step // EVERY, store, "encode_pieces", end)
        case place:
            event, path = CHANGES[place]
            path = str(run_dir / path.format(step=kill.step, rank=kill.rank, old=kill.step - 2 * EVERY))
            has_name = run_dir / f"checkpoints/step-{kill.step:06d}"

            def watch(happens: str, args: tuple[Any, ...]) -> None:
                if happens == event and str(args[event == "os.rename"]) == path and (place != "before the pointer" or has_name.exists()):
                    end()

            sys.addaudithook(watch)


class Reference(NamedTuple):
    """A run that nobody killed."""

    run_dir: Path
    samples: dict[tuple[int, int], Any]
    """The keys of each micro-batch, by rank and step."""
    seconds: float
    """From the start to the step in which the first kill comes at the latest."""


class Outcome(NamedTuple):
    """What became of a run that was killed."""

    places: list[str]
    """Where it was, at each kill."""
    problem: str
    """Empty when it went on like the reference."""


def whole_run(data: Path, folder: Path, layout: Layout) -> Reference:
    notes, started = folder / "notes", time.time()
    notes.mkdir(parents=True)
    with Launch(be_flm, words(data, folder / "run", layout), notes, None, processes=layout.size, folder=folder / "said") as launch:
        assert launch.wait(TIMEOUT) == [0] * layout.size, launch.said()
    lines = samples_in(notes)
    seconds = next(line["time"] for rank, line in lines if rank == 0 and line["step"] == LAST_KILL) - started
    return Reference(folder / "run", {(rank, line["step"]): line["keys"] for rank, line in lines}, seconds)


def trial(data: Path, folder: Path, layout: Layout, reference: Reference, *, kills: Sequence[Kill | float], chance: Random) -> Outcome:
    """Start a run, kill it as often as said, each time in the start that follows, and let the last start go on to the end.

    kills: a number is a moment, in seconds behind the start, when one rank or all are killed from outside.
    """
    run_dir, places = folder / "run", list[str]()
    for number, kill in enumerate((*kills, None)):
        notes, aimed = folder / f"notes-{number}", kill if isinstance(kill, Kill) else None
        notes.mkdir(parents=True)
        again = () if number == 0 else ("--resume",) if saved_steps(run_dir) and chance.random() < 0.5 else ("--requeued",)
        with Launch(be_flm, words(data, run_dir, layout, *again), notes, aimed, processes=layout.size, folder=folder / f"said-{number}") as launch:
            if isinstance(kill, float):
                time.sleep(kill)
                for process in launch.processes if chance.random() < 0.5 else [chance.choice(launch.processes)]:
                    process.kill()
            try:
                codes = launch.wait(TIMEOUT, patience=chance.uniform(0, 1))
            except TimeoutError as error:
                return Outcome(places, f"start {number} hangs: {error}")
        if not any(codes):
            break
        if kill is None or -signal.SIGKILL not in codes:
            return Outcome(places, f"start {number} ends with {codes}: {launch.said()}")
        places.append(aimed.place if aimed else whereabouts(run_dir, notes))
    if aimed:
        return Outcome(places, f"{aimed} was never there")
    samples = [line for notes in folder.glob("notes-*") for line in samples_in(notes)]
    return Outcome(places, "; ".join(differences(run_dir, reference, samples)))


def samples_in(notes: Path) -> list[tuple[int, dict[str, Any]]]:
    """What each rank, by its number, noted; a line that was cut off is left out."""
    return [(int(path.stem), json.loads(line)) for path in notes.glob("*.jsonl") for line in path.read_text().splitlines(keepends=True)
            if line.endswith("\n")]


def whereabouts(run_dir: Path, notes: Path) -> str:
    if not any(path.stat().st_size for path in notes.glob("*.jsonl")):
        return "at its start"
    return "in a save" if list((run_dir / "checkpoints").glob(".step-*.partial")) else "between saves"


def differences(run_dir: Path, reference: Reference, samples: list[tuple[int, dict[str, Any]]]) -> Iterator[str]:
    """Say how a run is other than the reference: losses, the samples of each step, weights and moments, files. To the bit."""
    if course(run_dir) != course(reference.run_dir):
        yield "other losses"
    if {(rank, line["step"]) for rank, line in samples} != reference.samples.keys():
        yield "not all steps"
    if any(line["keys"] != reference.samples.get((rank, line["step"])) for rank, line in samples):
        yield "other samples"
    manifest = Path("checkpoints", f"step-{STEPS:06d}", "manifest.json")
    if (run_dir / manifest).read_bytes() != (reference.run_dir / manifest).read_bytes():
        files, others = (json.loads((folder / manifest).read_text())["files"] for folder in (run_dir, reference.run_dir))
        yield f"other bytes in {', '.join(name for name in files if files[name] != others.get(name))}"
    if (left := names_in(run_dir / "checkpoints")) != names_in(reference.run_dir / "checkpoints"):
        yield f"other files are left: {left}"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
