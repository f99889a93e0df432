"""The training loop. A Run names everything; here it is opened, put together and stepped through.

dataset -> tokenizer -> objective -> model -> engine -> loader; then for each step: take its micro-batches, train, log, and when it
is due validate and save. Every process of the launcher runs this same code; one of each model replica reads, rank 0 writes.
"""

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import torch

from flm_scale.batch import Batch, LossSums
from flm_scale.checkpoint.reader import Checkpoint
from flm_scale.checkpoint.saver import Saver
from flm_scale.checkpoint.store import folders_of, last_good_together
from flm_scale.checkpoint.weights import StartingWeights, find_checkpoint, open_weights
from flm_scale.config import Run, micro_steps
from flm_scale.config_lm import LanguageModelConfig
from flm_scale.data.loader import Loader, one_pass
from flm_scale.data.shards import Dataset
from flm_scale.engine.base import Engine, total_loss
from flm_scale.errors import BadStepError, CheckpointError, ConfigError, DataError, ToldElsewhereError, UserError
from flm_scale.guard import Guard
from flm_scale.model.assemble import account_for, assemble, layer_builders, open_language_model
from flm_scale.model.frozen_lm import FrozenLm
from flm_scale.model.parts import PlainParts
from flm_scale.model.pretrained import Account, PretrainedEncoder
from flm_scale.objectives.objective import Objective
from flm_scale.observe.cost import BatchShapes, forward_flops, shape_of, training_flops
from flm_scale.observe.heartbeat import Heartbeat
from flm_scale.observe.layer_cost import stage_bounds
from flm_scale.observe.metrics import MetricsLog
from flm_scale.observe.progress import Progress
from flm_scale.observe.rank_log import rank_log
from flm_scale.observe.throughput import Meter, peak_flops
from flm_scale.opening import objective_of, open_data, open_pretrained, pin
from flm_scale.parallel.mesh import find_layout, find_ranks
from flm_scale.parallel.processes import any_rank, gather, meet, place, together
from flm_scale.parallel.replica import ReplicaLoader
from flm_scale.run_dir import append_lines, is_of_this_job, open_run_dir

SHARE_IS_MEANINGFUL_FROM = 1000
"""Pictures read before their bad share is judged; until then the count is judged as if so many had been read."""
ONE_DAY = 86400.0
"""Seconds that ranks wait for each other where no stall ends the job sooner."""
BAD_STEPS_IN_A_ROW = 10
"""Skipped or rolled back, before the run ends all the same: something is wrong that passing over samples does not mend."""


def train(run: Run, run_dir: Path, *, overwrite: bool = False, resume: str | None = None, requeued: bool = False) -> None:
    """Train a run from its first step, or the one behind a checkpoint, to its last.

    resume: `latest`, a step or a checkpoint's folder (checkpoint.weights.find_checkpoint).   requeued: the same command ran before and may
    have left checkpoints, of which the latest good one is gone on behind.
    Raises UserError for what the user can put right: no dataset, sizes that do not fit it, an occupied run directory, a checkpoint that is
    damaged or of another run, a bad loss.
    """
    ranks, _ = find_ranks(os.environ)
    layout = find_layout(run.parallel, world_size=ranks.size)
    micro_steps(run.batch, data_parallel_size=layout.data)
    datasets, tokenizer = open_data(run)
    dataset = datasets[0]
    objective = objective_of(run, tokenizer)
    language_model = open_language_model(run, run.text, objective) if isinstance(run.text, LanguageModelConfig) else None
    run = pin(run, datasets, tokenizer, language_model)
    if run.log.validate_every_steps and not any(dataset.index(run.log.validation_split).captions):
        raise DataError(f"{run.data.path}: split '{run.log.validation_split}' has no caption to validate on; choose another "
                        "--log.validation-split, or --log.validate-every-steps 0")
    if resume is not None and overwrite:
        raise ConfigError("--resume goes on with a run and --overwrite replaces it; give one of them")
    meet(patience_seconds=2 * run.log.stall_timeout or ONE_DAY)
    if requeued and gather(is_of_this_job(run_dir))[0]:
        resume, overwrite = ("latest", False) if gather(folders_of(run_dir))[0] else (resume, True)
        if resume == "latest" and is_finished(run, run_dir):
            return
    checkpoint = together(lambda: find_checkpoint(run_dir, resume, run)) if resume is not None else None
    pretrained_text = together(lambda: open_pretrained(run, tokenizer)) if not checkpoint else None
    start = StartingWeights(together(lambda: open_weights(Path(run.init_from)))) if run.init_from and not checkpoint else None
    together(lambda: open_run_dir(run_dir, run, checkpoint, overwrite=overwrite) if ranks.rank == 0 else None)
    engine = build_engine(run, objective, checkpoint, pretrained_text=pretrained_text, language_model=language_model, start=start)
    started = {"init_from": start.account(dict(chain.from_iterable(asked.items() for asked in gather(start.asked))))} if start else {}
    if checkpoint:
        go_on(engine, checkpoint)

    def training_loader() -> Loader:
        return Loader(run, datasets, tokenizer, objective, rank=engine.data_index, size=layout.data,
                      state=checkpoint.state["loader"] if checkpoint else None)

    def validation_pass() -> Iterator[Batch]:
        yield from one_pass(run, dataset, run.log.validation_split, tokenizer, objective, rank=engine.data_index, size=layout.data)

    loader = ReplicaLoader(layout, rank=ranks.rank, build=training_loader, one_pass=validation_pass)

    # The recorder comes first: its live line belongs on the console and not into the log.
    with closing(Recorder(run, run_dir, engine, checkpoint)) as recorder, rank_log(run_dir, rank=ranks.rank) as log, \
            Heartbeat(run_dir, rank=ranks.rank, size=ranks.size, timeout_seconds=run.log.stall_timeout, log=log) as heartbeat, \
            sigterm_asks() as asked, \
            closing(Saver(run_dir, device=engine.device, keep_last=run.log.keep_last, keep_every=run.log.keep_every_steps,
                          timeout_seconds=run.log.stall_timeout or math.inf)) as saver:
        recorder.start()
        if engine.rank == 0:
            announce(run, run_dir, datasets, engine, checkpoint)
            if not checkpoint:
                write_accounts(run_dir, account_for(run, objective, pretrained_text) | started)
        Training(run, run_dir, engine, loader, objective, recorder, heartbeat, saver, checkpoint).go(asked)


def is_finished(run: Run, run_dir: Path) -> bool:
    """Return whether the run's last step is saved, and say so; collective."""
    finished = last_good_together(run_dir).step >= run.steps
    if finished and place()[0] == 0:
        print(f"flm: {run_dir} has all its {run.steps} steps; nothing is left to do", file=sys.stderr)
    return finished


def go_on(engine: Engine, checkpoint: Checkpoint) -> None:
    """Let an engine that was built with a checkpoint's weights go on behind it; collective."""
    engine.resume(checkpoint.fill, updates=checkpoint.state["updates"])
    if checkpoint.num_ranks == engine.layout.size:
        torch.set_rng_state(torch.frombuffer(bytearray.fromhex(checkpoint.rank_state(engine.rank)["torch"]), dtype=torch.uint8))


@dataclass
class Training:
    """A run on its way."""

    run: Run
    run_dir: Path
    engine: Engine
    loader: ReplicaLoader
    objective: Objective
    recorder: "Recorder"
    heartbeat: Heartbeat
    saver: Saver
    checkpoint: Checkpoint | None
    """That the run goes on behind."""

    def __post_init__(self) -> None:
        state: dict[str, Any] = self.checkpoint.state if self.checkpoint else {"step": 0, "updates": 0, "losses": []}
        self.first_step, self.updates = state["step"], state["updates"]
        self.guard = Guard(spike_factor=self.run.bad_step.spike_factor, losses=state["losses"])

    def go(self, asked: threading.Event) -> None:
        """Take every step of the run behind the first ones, or those until it is asked to stop."""
        for step in range(self.first_step, self.run.steps):
            self._step(step)
            stops = any_rank(asked.is_set(), self.engine.device)  # a signal reaches them at different moments
            if due(self.run.log.validate_every_steps, step + 1, self.run.steps) and not stops:
                self._validate(step)
            if due(self.run.log.save_every_steps, step + 1, step + 1 if stops else self.run.steps, always_last=True):
                self._save(step, is_last=stops or step + 1 == self.run.steps)
            if stops:
                if self.engine.rank == 0:
                    print(f"flm: stopped by SIGTERM after step {step + 1} of {self.run.steps}, saved; --resume goes on", file=sys.stderr)
                return

    def _step(self, step: int) -> None:
        started = time.perf_counter()
        self.heartbeat.beat(step + 1, "load" if self.loader.reads else "receive")
        batches = self.loader.next_step()
        waited = time.perf_counter() - started
        self.heartbeat.beat(step + 1, "train")
        try:
            self.recorder.count(batches)
        except DataError as error:  # on all ranks, because they count together
            self._end(error)
        result = self.engine.train_step(batches, step=step, takes=self.guard.takes)
        values = {"loss": result.loss, **part_values(self.objective, result.sums), "grad_norm": result.grad_norm, "lr": result.lr}
        self.recorder.step(step + 1, values | ({} if result.is_taken else {"skipped": 1.0}), seconds=time.perf_counter() - started, waited=waited)
        self.updates += result.is_taken
        if problem := self.guard.problem(result):
            self._pass_over(step, problem)

    def _pass_over(self, step: int, problem: str) -> None:
        """Do about a step whose update was not taken what the policy says. Raises BadStepError where that is to stop."""
        policy, where = self.run.bad_step.policy, f"step {step + 1}: {problem}"
        ends = policy == "stop" or self.guard.in_a_row > BAD_STEPS_IN_A_ROW
        first_lost = step
        if policy == "roll_back" and not ends:
            self.heartbeat.beat(step + 1, "save")
            self.saver.finish()
            try:
                good: Checkpoint | None = last_good_together(self.run_dir)
            except CheckpointError:
                good = self.checkpoint
            if good:
                self.engine.resume(good.fill, updates=good.state["updates"])
                self.guard.go_back(good.state["losses"])
                first_lost, self.updates = good.step, good.state["updates"]
            else:
                where, ends = f"{where}, and there is no checkpoint yet to roll back to", True
        if self.engine.rank == 0:
            lost = range(first_lost + 1, step + 2)
            lines = [{"step": number, "problem": problem if number == step + 1 else "", "policy": policy, "keys": keys}
                     for number, keys in zip(lost, self.loader.keys_of_last(len(lost)), strict=True)]
            append_lines(self.run_dir / "bad_steps.jsonl", lines)
        keys = f"sample keys are in {self.run_dir / 'bad_steps.jsonl'}"
        if ends:
            how = f" ({self.guard.in_a_row} bad steps in a row)" if self.guard.in_a_row > BAD_STEPS_IN_A_ROW else ""
            self._end(BadStepError(f"{where}; weights are as they were before it{how}; {keys}; look at these, lower optim.lr, raise warmup_steps, "
                                   "or pass over such steps with --bad-step.policy skip or roll_back"))
        if self.engine.rank == 0:
            done = ("the update is skipped" if policy == "skip" else
                    f"goes on with the weights of step {first_lost} and passes over the samples of steps {first_lost + 1} to {step + 1}")
            print(f"flm: {where}; {done}; {keys}", file=sys.stderr)

    def _end(self, error: UserError) -> NoReturn:
        """Raise what all ranks have met, on rank 0 to be said; what is being saved is saved first, before a launcher ends those that wait."""
        self.saver.finish()
        raise ToldElsewhereError(str(error)) if self.engine.rank else error

    def _validate(self, step: int) -> None:
        sums = self.engine.evaluate(self.heartbeat.along(step + 1, "validate", self.loader.one_pass()))
        self.recorder.validation(step + 1, {"loss": float(total_loss(sums, self.objective, sums.count)), **part_values(self.objective, sums)})

    def _save(self, step: int, *, is_last: bool) -> None:
        """Have a checkpoint written while training goes on; the last one is waited for."""
        started = time.perf_counter()
        self.heartbeat.beat(step + 1, "save")
        layout, parallel = self.engine.layout, self.run.parallel
        state = {"step": step + 1, "updates": self.updates, "losses": self.guard.losses, **self.recorder.state,
                 "layout": f"tensor {layout.tensor}, pipe {layout.pipe}, data {layout.data}, "
                           + (f"ZeRO {parallel.zero}" if parallel.engine == "deepspeed" else "local"),
                 "loader": self.loader.state if self.engine.rank == 0 else {},
                 "versions": {"flm_scale": version("flm_scale"), "torch": torch.__version__}}
        self.saver.save(step=step + 1, pieces=self.engine.saved_pieces(), rank_state=random_state(), run_json=self.run.model_dump_json(indent=2),
                        state=state)
        if is_last and not self.saver.finish():
            self._end(CheckpointError(f"{self.run_dir}: the last step, {step + 1}, could not be saved; make room and add --resume to train on from "
                                      "the checkpoint before it"))
        self.recorder.saved(step + 1, seconds=time.perf_counter() - started)


def random_state() -> dict[str, str]:
    """Return this process's generator of random numbers. Nothing of ours draws from it: all that is random is keyed by seed and name."""
    return {"torch": bytes(torch.get_rng_state()).hex()}


@contextmanager
def sigterm_asks() -> Iterator[threading.Event]:
    """Let SIGTERM set the event instead of ending the process. A thread, as Ray runs this in, can take no signals; there it stays unset."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda _signal, _frame: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def build_engine(run: Run, objective: Objective, checkpoint: Checkpoint | None = None, *, pretrained_text: PretrainedEncoder | None = None,
                 language_model: FrozenLm | None = None, start: StartingWeights | None = None) -> Engine:
    """Return the engine that the run names, around the run's model as it starts, or as it was saved.

    pretrained_text: what `open_pretrained` gave, which a run without a checkpoint starts from.   language_model: that is opened if it is none.
    start: weights of another run, likewise.   Raises ConfigError for several processes on the local one.
    """
    builders = partial(layer_builders, run, objective, pretrained_text=pretrained_text, language_model=language_model, start=start,
                       weight_of=checkpoint.weight if checkpoint else None)
    if run.parallel.engine == "deepspeed":
        from flm_scale.engine.deepspeed import PipelineDeepSpeedEngine, PlainDeepSpeedEngine

        if run.parallel.in_stages:
            return PipelineDeepSpeedEngine(run, objective, bounds=stage_bounds(run, shape_of(run.vision)), builders=builders)
        return PlainDeepSpeedEngine(run, objective, builders=builders)
    from flm_scale.engine.local import LocalEngine

    ranks, _ = find_ranks(os.environ)
    if ranks.size > 1:
        raise ConfigError(f"parallel.engine 'local' is one process, but the launcher started {ranks.size}; add --parallel.engine deepspeed")
    return LocalEngine(run, assemble(run, builders(PlainParts())), objective)


def part_values(objective: Objective, sums: LossSums) -> dict[str, float]:
    """Return loss and accuracy of each part that had targets."""
    values: dict[str, float] = {}
    for part, loss, correct, count in zip(objective.parts, sums.loss.tolist(), sums.correct.tolist(), sums.count.tolist(), strict=True):
        if count:
            values |= {f"loss/{part}": loss / count, f"accuracy/{part}": correct / count}
    return values


def due(every: int, step: int, last: int, *, always_last: bool = False) -> bool:
    """Return whether something that happens every so many steps (0: never) happens after this step; if at all, then also at the end."""
    return (every > 0 and (step % every == 0 or step == last)) or (always_last and step == last)


class Recorder:
    """Keeps count of what a run did and tells: metrics.jsonl, TensorBoard, the live line. Only rank 0 tells, and who reads names bad pictures."""

    def __init__(self, run: Run, run_dir: Path, engine: Engine, checkpoint: Checkpoint | None = None) -> None:
        """checkpoint: that the run goes on behind."""
        self.run, self.engine, self.first_step = run, engine, checkpoint.step if checkpoint else 0
        self.vision = shape_of(run.vision)
        peak = run.log.peak_tflops * 1e12 or peak_flops(engine.device, run.precision)
        self.meter = Meter(peak_flops=peak, world_size=engine.layout.size)
        before: dict[str, float] = checkpoint.state if checkpoint else {"images": 0.0, "bad_images": 0.0}
        self.images, self.bad_images = before["images"], before["bad_images"]
        self.names_bad_images = engine.rank == engine.layout.reader(engine.rank)
        tells = engine.rank == 0
        self.log = MetricsLog(run_dir, first_step=self.first_step + 1) if tells else None
        self.progress = Progress(run.steps, self.first_step + 1, sys.stderr) if tells else None

    @property
    def state(self) -> dict[str, float]:
        """What has been counted so far, over all ranks, for a resumed run to count on from."""
        return {"images": self.images, "bad_images": self.bad_images}

    def start(self) -> None:
        """Record what does not change."""
        if self.log and self.first_step == 0:
            self.log.log(0, {"parameters": self.engine.num_weights})

    def count(self, batches: list[Batch]) -> None:
        """Count what all ranks read for a step; name bad pictures, and raise DataError when there are too many."""
        bad_keys = [key for batch in batches for key in batch.bad_keys]
        flops = sum(training_flops(self.run, forward_flops(self.run, BatchShapes.of(batch.state), self.vision)) for batch in batches)
        pairs, tokens, flops, images, bad = self.engine.sum_over_ranks([
            float(sum(batch.num_captions for batch in batches)), float(sum(batch.num_tokens for batch in batches)), flops,
            float(sum(len(batch.keys) for batch in batches)), float(len(bad_keys))])
        self.meter.add(pairs=pairs, tokens=tokens, flops=flops)
        self.images, self.bad_images = self.images + images, self.bad_images + bad
        if bad_keys and self.names_bad_images:
            print(f"flm: {len(bad_keys)} picture(s) left out, not readable: {', '.join(bad_keys)}", file=sys.stderr)
        share = self.run.data.max_bad_share
        if self.bad_images > share * max(self.images, SHARE_IS_MEANINGFUL_FROM):
            raise DataError(f"{self.run.data.path}: {self.bad_images:.0f} of {self.images:.0f} pictures read so far cannot be decoded, more than "
                            f"data.max_bad_share ({share}); check the shards with flm data verify, or raise the limit")

    def step(self, step: int, values: dict[str, float], *, seconds: float, waited: float) -> None:
        """Record a training step."""
        line = values | self.meter.finish_step(seconds=seconds, data_wait_s=waited) | {"bad_images": self.bad_images}
        if self.log and self.progress:
            self.log.log(step, line)
            self.progress.update(step, line)

    def validation(self, step: int, values: dict[str, float]) -> None:
        """Record a validation."""
        if self.log:
            self.log.log(step, {f"validation/{name}": value for name, value in values.items()})

    def saved(self, step: int, *, seconds: float) -> None:
        """Record how long training waited for a save."""
        if self.log:
            self.log.log(step, {"save_wait_s": seconds})

    def close(self) -> None:
        """Close the files, give the terminal back."""
        if self.log and self.progress:
            self.progress.close()
            self.log.close()


def announce(run: Run, run_dir: Path, datasets: Sequence[Dataset], engine: Engine, checkpoint: Checkpoint | None) -> None:
    """Say what will be done."""
    layout, parallel = engine.layout, run.parallel
    how = f"deepspeed ZeRO {parallel.zero}" if parallel.engine == "deepspeed" else "local"
    if layout.size > layout.data:
        how += f", tensor {layout.tensor} x pipe {layout.pipe} x data {layout.data}"
    print(f"flm: {run.name}: {run.objective.kind}, {engine.num_weights / 1e6:.1f} M weights, {run.steps} steps of {run.batch.micro_batches} "
          f"micro-batches on {layout.size} process(es), {how}, {run.precision}; data "
          + ", ".join(f"{dataset.name} {dataset.root[:12]}" for dataset in datasets) + f"; writes {run_dir}"
          + (f"; goes on behind {checkpoint.folder}" if checkpoint else ""),
          file=sys.stderr)


def write_accounts(run_dir: Path, accounts: dict[str, Account]) -> None:
    """Say what became of the pretrained files, in a line each, and tensor by tensor in RUN/pretrained.json."""
    for side, account in accounts.items():
        print(f"flm: {side} weights {account.summary()}", file=sys.stderr)
    if accounts:
        (run_dir / "pretrained.json").write_text(json.dumps({side: account.as_json() for side, account in accounts.items()}, indent=2) + "\n")
