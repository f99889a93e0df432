"""Lets copies drift apart by one bit, and cuts checkpoints ahead of time, on layouts of this launch's processes; started by a launcher.

usage: python -m tests.distributed.drift_worker OUT_FOLDER
"""

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flm_scale.checkpoint.convert import reshard
from flm_scale.checkpoint.reader import Checkpoint
from flm_scale.checkpoint.store import begin, commit, open_checkpoint, partial_folder, write_rank
from flm_scale.config import ParallelConfig, Run
from flm_scale.engine.base import Engine
from flm_scale.observe.cost import shape_of
from flm_scale.observe.layer_cost import stage_bounds
from flm_scale.parallel.mesh import Layout
from flm_scale.train import build_engine
from tests.distributed.worker import close_groups
from tests.synthetic import objective_of, random_batch, tiny_run

STEP = 2
# By number of processes: (tensor, pipe, ZeRO stage, precision).
LAYOUTS = {
    2: [(2, 1, 1, "fp32"), (1, 2, 1, "fp32"), (1, 2, 1, "bf16"), (1, 1, 1, "bf16"), (1, 1, 0, "fp32"), (2, 1, 3, "fp32")],
    4: [(2, 2, 1, "fp32")]}


def tied_run(tensor: int, pipe: int, zero: int, precision: str) -> Run:
    """61 tokens cannot be halved, so shards are filled up; three of the optimizer's groups are cut at odd places."""
    run = tiny_run(precision=precision, parallel=ParallelConfig(engine="deepspeed", tensor=tensor, pipe=pipe, zero=zero))
    return run.replace(text=run.text.replace(tied=True, vocab_size=61))


def folder_name(size: int, cut: tuple[int, int, int, str]) -> str:
    return f"{size}-{'-'.join(map(str, cut))}"


def bounds_of(run: Run) -> list[int]:
    return stage_bounds(run, shape_of(run.vision))


def save(engine: Engine, run: Run, run_dir: Path) -> Checkpoint:
    if engine.rank == 0:
        begin(run_dir, step=STEP)
    dist.barrier()
    write_rank(partial_folder(run_dir, step=STEP), rank=engine.rank, pieces=engine.saved_pieces(), state={"torch": "00"})
    if engine.rank == 0:
        commit(partial_folder(run_dir, step=STEP), num_ranks=engine.layout.size, run_json=run.model_dump_json(), state={"loader": {}},
               timeout_seconds=60)
    dist.barrier()
    return open_checkpoint(run_dir / "checkpoints" / f"step-{STEP:06d}", full=True)


class Watched(Mapping[Path, Any]):
    """A checkpoint's open files, and the names of those of which a value was read."""

    def __init__(self, files: Mapping[Path, Any]) -> None:
        self.files, self.read = files, set[str]()

    def __getitem__(self, path: Path) -> Any:
        self.read.add(path.name)
        return self.files[path]

    def __iter__(self) -> Iterator[Path]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def files_read(checkpoint: Checkpoint, action: Callable[[], object]) -> list[str]:
    """Return the names of the files that an action reads values from."""
    checkpoint.names()
    watched = Watched(checkpoint._files)
    vars(checkpoint)["_files"] = watched
    action()
    return sorted(watched.read)


def next_up(values: Tensor, undo: bool) -> None:
    """Move the first value by one unit in the last place."""
    bits = values.view(-1)[:1].view(torch.int32 if values.dtype == torch.float32 else torch.int16)
    bits += -1 if undo else 1


def said_when_drifted(engine: Engine, values: Tensor | None) -> str:
    """Return what saving says on this rank when values (of one rank alone; None elsewhere) are off by one bit."""
    if values is not None:
        next_up(values, undo=False)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        engine.saved_pieces()
    if values is not None:
        next_up(values, undo=True)
    return said.getvalue()


def find(engine: Any, name: str, kind: str = "weight") -> Tensor:
    """Return the live values of a piece, first one whose name ends so."""
    return next(piece.values for piece in engine.pieces() if piece.name.endswith(name) and piece.kind == kind)


def drifts(engine: Any, cut: tuple[int, int, int, str]) -> dict[str, str]:
    """What saving says on this rank, by what has drifted on the last rank."""
    tensor, pipe, zero, _ = cut
    last = engine.rank == engine.layout.size - 1
    said = {"nothing": said_when_drifted(engine, None)}
    if tensor > 1 and pipe == 1:
        for kind in ("weight", "exp_avg_sq"):
            said[f"norm {kind}"] = said_when_drifted(engine, find(engine, "head.norm.weight", kind) if last else None)
        said["bias"] = said_when_drifted(engine, find(engine, "vision_0.block.mlp.c_proj.bias") if last else None)
        said["shard"] = said_when_drifted(engine, find(engine, "text_entry.tokens.weight") if last else None)
    if pipe > 1:
        said["table"] = said_when_drifted(engine, engine.layers["head"].decoder.weight.data if last else None)
    if zero == 0:
        said["replica"] = said_when_drifted(engine, find(engine, "head.norm.weight", "exp_avg") if last else None)
    return said


def main(out: Path) -> None:
    size = int(os.environ["WORLD_SIZE"])
    for cut in LAYOUTS[size]:
        run, run_dir = tied_run(*cut), out / folder_name(size, cut)
        engine = build_engine(run, objective_of(run))
        for step in range(STEP):
            batches = [random_batch(run, seed=10 * step + i) for i in range(run.batch.micro_batches)]
            engine.train_step(batches[engine.data_index :: engine.layout.data], step=step)
        save(engine, run, run_dir)
        found: dict[str, Any] = {"said": drifts(engine, cut)}
        close_groups()
        whole, again = out / f"{run_dir.name}-whole", out / f"{run_dir.name}-again"
        if engine.rank == 0:
            reshard(run_dir, whole, Layout(1, 1, 1), step=None, bounds_of=bounds_of, workers=2)
            reshard(whole, again, engine.layout if cut[2] else Layout(*cut[:2], 1), step=STEP, bounds_of=bounds_of, workers=2)
        dist.barrier()
        checkpoint = open_checkpoint(again / "checkpoints" / f"step-{STEP:06d}", full=True)
        built: list[Engine] = []
        found["built from"] = files_read(checkpoint, lambda: built.append(build_engine(run, objective_of(run), checkpoint)))  # noqa: B023 - at once
        found["resumed from"] = files_read(checkpoint, lambda: built[0].resume(checkpoint.fill, updates=STEP))  # noqa: B023 - at once
        built.clear()
        close_groups()
        (out / f"{run_dir.name}-rank{engine.rank}.json").write_text(json.dumps(found))
        del engine


if __name__ == "__main__":
    main(Path(sys.argv[1]))
