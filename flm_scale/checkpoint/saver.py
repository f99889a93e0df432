"""Saving beside training: what a checkpoint holds is copied at once, and written by a thread while training goes on."""

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from flm_scale.checkpoint.store import begin, commit, partial_folder, prune, write_rank
from flm_scale.errors import CheckpointError
from flm_scale.model.parts import Piece
from flm_scale.parallel.processes import any_rank, place


class Saver:
    """Writes a run's checkpoints, one at a time. `save` and `finish` are collective.

    Takes as much of the host's memory as the pieces it saves, for their copy. A save that fails says so on standard error, and checkpoints
    before it stay as they are.
    """

    def __init__(self, run_dir: Path, *, device: torch.device, keep_last: int, keep_every: int, timeout_seconds: float) -> None:
        """device: that the processes talk over.   keep_last, keep_every: as in store.prune.   timeout_seconds: for a rank that does not write."""
        self.run_dir, self.device, self.timeout_seconds = run_dir, device, timeout_seconds
        self.prune = partial(prune, run_dir, keep_last=keep_last, keep_every=keep_every)
        self.rank, self.num_ranks = place()
        self._copies: list[Tensor] = []
        # One thread, so that rank 0 seals what it has written itself.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._folder = run_dir
        self._write: Future[bool] | None = None
        self._commit: Future[bool] | None = None
        self._give_up, self._is_saved = Event(), True

    def save(self, *, step: int, pieces: Sequence[Piece], rank_state: Mapping[str, Any], run_json: str, state: Mapping[str, Any]) -> None:
        """Copy the pieces and have them written; waits first until the save before has ended."""
        self.finish()
        self._folder, self._is_saved = partial_folder(self.run_dir, step=step), False
        if any_rank(self.rank == 0 and not _goes_well(step, lambda: begin(self.run_dir, step=step)), self.device):
            return
        copies, self._give_up = self._copy(pieces), Event()
        write = partial(write_rank, self._folder, rank=self.rank, pieces=copies, state=rank_state)
        self._write = self._pool.submit(_goes_well, step, write)
        if self.rank == 0:
            seal = partial(commit, self._folder, num_ranks=self.num_ranks, run_json=run_json, state=state, timeout_seconds=self.timeout_seconds,
                           give_up=self._give_up)
            self._commit = self._pool.submit(self._seal, step, self._write, seal)

    def finish(self) -> bool:
        """Wait until the last save has ended on all ranks, and return whether it is whole."""
        if self._write is None:
            return self._is_saved
        if any_rank(not self._write.result(), self.device):
            self._give_up.set()
        self._is_saved = not any_rank(self._commit is not None and not self._commit.result(), self.device)
        self._write = self._commit = None
        return self._is_saved

    def close(self) -> None:
        """Let what is being written be written, as far as this rank alone can see to it."""
        if self._write is not None and not self._write.result():
            self._give_up.set()
        self._pool.shutdown()

    def _seal(self, step: int, write: Future[bool], seal: Callable[[], object]) -> bool:
        if not (write.result() and _goes_well(step, seal)):
            shutil.rmtree(self._folder, ignore_errors=True)  # what filled the disk must not keep it full
            return False
        _goes_well(step, self.prune)
        return True

    def _copy(self, pieces: Sequence[Piece]) -> list[Piece]:
        sizes = [piece.values.numel() for piece in pieces]
        if [len(copy) for copy in self._copies] != sizes:
            self._copies = list(torch.empty(sum(sizes), pin_memory=self.device.type == "cuda").split(sizes))
        for copy, piece in zip(self._copies, pieces, strict=True):
            copy.copy_(piece.values, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return [replace(piece, values=copy) for copy, piece in zip(self._copies, pieces, strict=True)]


def _goes_well(step: int, work: Callable[[], object]) -> bool:
    try:
        work()
    except CheckpointError as error:
        print(f"flm: saving step {step}: {error}", file=sys.stderr, flush=True)
        return False
    return True
