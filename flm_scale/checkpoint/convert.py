"""`flm checkpoint reshard`: writes a checkpoint anew, its files cut the way the processes of another layout will read them.

Any layout reads any checkpoint, but each process then reads a little of every file. Behind this it finds its moments and float32 weights in
one file, one after another. The files are those that the layout itself would save, under ZeRO 1 or 2 where it has several replicas.
Pieces stay on the meta device until they are written, so that memory holds a weight or two a thread and never the state.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from flm_scale.checkpoint.reader import Checkpoint, first_of
from flm_scale.checkpoint.store import begin, commit, folders_of, write_rank
from flm_scale.checkpoint.weights import checkpoint_at
from flm_scale.config import Run
from flm_scale.errors import CheckpointError, ConfigError
from flm_scale.model.assemble import is_pretrained, is_table, is_tied, tie
from flm_scale.model.outline import named_outline
from flm_scale.model.parts import Piece, shard_of
from flm_scale.objectives.objective import build_objective
from flm_scale.parallel.mesh import Layout


def reshard(source: Path, out: Path, layout: Layout, *, step: int | None, bounds_of: Callable[[Run], Sequence[int]], workers: int) -> Path:
    """Write a run's checkpoint (of a step, or the latest good one) into a new run directory, cut for a layout, and return its folder.

    bounds_of: gives the stages of a run (observe.layer_cost.stage_bounds).   workers: ranks written at once, in threads.
    All of it or nothing is written. Raises ConfigError when the layout does not go with the model or `out` holds something already;
    CheckpointError when the checkpoint is damaged or not of the model that it names, or the disk refuses.
    """
    if out.exists() and (not out.is_dir() or folders_of(out) or {path.name for path in out.iterdir()} - {"checkpoints"}):
        raise ConfigError(f"{out}: is not empty; choose another --out")
    checkpoint = checkpoint_at(source, step)
    run = Run.model_validate_json(checkpoint.run_json)
    run = run.replace(parallel=run.parallel.replace(engine="deepspeed", zero=1, template="", tensor=layout.tensor, pipe=layout.pipe))
    ranks = rank_pieces(run, layout, bounds=bounds_of(run), checkpoint=checkpoint)
    partial = begin(out, step=checkpoint.step)
    try:
        _write(checkpoint, partial, ranks, workers=workers)
        folder = commit(partial, num_ranks=layout.size, run_json=checkpoint.run_json, timeout_seconds=60, state=checkpoint.state | {
            "layout": f"tensor {layout.tensor}, pipe {layout.pipe}, data {layout.data}, resharded"})
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    try:
        (out / "run.json").write_text(checkpoint.run_json + "\n")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise CheckpointError(f"{out}: cannot be written ({error.strerror}); nothing is left there; make room") from error
    return folder


def rank_pieces(run: Run, layout: Layout, *, bounds: Sequence[int], checkpoint: Checkpoint) -> list[list[Piece]]:
    """Return what each rank of a layout saves, on the meta device: weights, and the moments that the checkpoint has of them.

    run: of this layout's tensor and pipe. What several ranks hold alike is the first one's.
    Raises CheckpointError when the checkpoint has weights that the model has not; those that it lacks are found when they are read.
    """
    kinds = {kind: checkpoint.names(kind).keys() for kind in checkpoint.kinds}
    layers = named_outline(run, build_objective(run.objective, mask_id=0))
    ranks: list[list[Piece]] = [[] for _ in range(layout.size)]
    for stage, (first, last) in enumerate(pairwise(bounds)):
        held = dict(list(layers.items())[first:last])
        if is_tied(run):
            tie(held)
        for data_index in range(layout.data):
            for name, parameter, start, end in replica_share(run, held, index=data_index, count=layout.data):
                shard = shard_of(parameter)
                if hasattr(parameter, "tied_to"):
                    continue
                for tensor_index in range(layout.tensor if shard else 1):
                    mine = ranks[layout.rank(stage=stage, data_index=data_index, tensor_index=tensor_index)]
                    mine += [Piece(name, kind, tuple(parameter.shape), shard and replace(shard, index=tensor_index), start,
                                   torch.empty(end - start, device="meta"))
                             for kind, names in kinds.items() if kind == "weight" or name in names]
    unknown = kinds["weight"] - {piece.name for pieces in ranks for piece in pieces}
    if unknown:
        raise CheckpointError(f"{checkpoint.folder}: has weights that the model of its own run.json has not: {first_of(sorted(unknown))}; use "
                              "the program that wrote it")
    return ranks


def replica_share(run: Run, layers: dict[str, nn.Module], *, index: int, count: int) -> Iterator[tuple[str, Tensor, int, int]]:
    """Yield (name, weight, first value, end) of what a replica updates: an even share of each of the optimizer's groups, laid end to end.

    As ZeRO 1 and 2 cut them (DeepSpeed's zero/stage_1_and_2.py). Frozen weights are the first replica's; a language model's are nobody's.
    """
    weights = {name: parameter for name, parameter in nn.ModuleDict(layers).named_parameters() if not hasattr(parameter, "is_elsewhere")}
    group_of = {name: (parameter.requires_grad, is_pretrained(run, name), is_table(getattr(parameter, "tied_to", name), parameter))
                for name, parameter in weights.items()}
    totals, before = Counter[tuple[bool, ...]](), Counter[tuple[bool, ...]]()
    for name, parameter in weights.items():
        totals[group_of[name]] += parameter.numel()
    for name, parameter in weights.items():
        group = group_of[name]
        # DeepSpeed fills every share up to an even number.
        share = -(-totals[group] // (2 * count)) * 2 if parameter.requires_grad else totals[group]
        start, end = max(index * share - before[group], 0), min((index + 1) * share - before[group], parameter.numel())
        before[group] += parameter.numel()
        if start < end:
            yield name, parameter, start, end


def _write(checkpoint: Checkpoint, partial: Path, ranks: Sequence[Sequence[Piece]], *, workers: int) -> None:
    """Write every rank's files, several at once, and tell how far it is."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    def values_of(piece: Piece) -> Tensor:
        values = torch.empty(piece.values.numel())
        checkpoint.fill([replace(piece, values=values)])
        progress.advance(task, values.nbytes)
        return values

    def write(rank: int) -> None:
        # Nothing of ours draws from the generators in it, so that a rank that was not there may have any rank's.
        write_rank(partial, rank=rank, pieces=ranks[rank], state=checkpoint.rank_state(rank % checkpoint.num_ranks), values_of=values_of)

    columns = TextColumn("{task.fields[ranks]} ranks written"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress, ThreadPoolExecutor(workers) as pool:
        task = progress.add_task("", total=4 * sum(piece.values.numel() for pieces in ranks for piece in pieces), ranks=f"0/{len(ranks)}")
        try:
            for number, written in enumerate([pool.submit(write, rank) for rank in range(len(ranks))], start=1):
                written.result()
                progress.update(task, ranks=f"{number}/{len(ranks)}")
        finally:
            pool.shutdown(cancel_futures=True)
