"""`flm checkpoint diff`: what two checkpoints have otherwise, whatever layouts wrote them. One weight of each is in memory at a time."""

import json
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flm_scale.checkpoint.reader import Checkpoint, first_of
from flm_scale.checkpoint.weights import checkpoint_at, flat_values

LARGEST_SHOWN = 10
HOW_WRITTEN = ("layout", "versions", "parallel", "log", "data.workers", "data.feeder", "data.feeders", "data.feeder_labels", "data.ray_address")
"""Values, of the run and of state.json, that say how a checkpoint was written and not what is in it."""


class Difference(NamedTuple):
    """Between two tensors of the same shape."""

    name: str
    largest: float
    """Of any value; not a number where either has one that is none."""
    relative: float
    """Norm of the difference over the first one's norm."""


def diff_checkpoints(first: Path, second: Path) -> bool:
    """Print what two checkpoints (folders, or run directories for their latest good) have otherwise, and return whether they hold the same.

    The same: run values, step, place in the data, and every weight and moment to the bit. The layout that wrote them is told and does not count.
    Raises CheckpointError when there is none, or a damaged one.
    """
    one, other = checkpoint_at(first), checkpoint_at(second)
    print(f"{one.folder}  and  {other.folder}")
    same = _diff_values("run", json.loads(one.run_json), json.loads(other.run_json))
    same &= _diff_values("state", one.state, other.state)
    for kind in sorted({*one.kinds, *other.kinds}, key=[*one.kinds, *other.kinds].index):
        same &= _diff_kind(kind, one, other)
    return same


def _diff_values(what: str, one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Print the values that are not alike, and return whether all are that say what is in a checkpoint."""
    here, there = flat_values(one), flat_values(other)
    same = True
    for path in {**here, **there}:
        if here.get(path) != there.get(path):
            how = f"{path}.".startswith(tuple(f"{written}." for written in HOW_WRITTEN))
            print(f"{'written' if how else what:8} {path}: {here.get(path, 'absent')} and {there.get(path, 'absent')}")
            same &= how
    return same


def _diff_kind(kind: str, one: Checkpoint, other: Checkpoint) -> bool:
    """Print how the weights, or the moments of a kind, differ, and return whether they do not."""
    here, there = one.names(kind), other.names(kind)
    shared = [name for name, shape in here.items() if there.get(name) == shape]
    apart = {"only in the first": sorted(here.keys() - there.keys()), "only in the second": sorted(there.keys() - here.keys()),
             "of other shapes": sorted(here.keys() & there.keys() - set(shared))}
    differ = sorted(filter(None, (_difference(kind, name, one, other) for name in shared)), key=lambda found: (isnan(found.largest), found.largest),
                    reverse=True)
    largest = f", the largest by {differ[0].largest:.3g} in {differ[0].name}" if differ else ""
    odd = "".join(f"; {len(names)} {what}: {first_of(names)}" for what, names in apart.items() if names)
    print(f"{kind:11} {len(here.keys() | there.keys())} tensors: {len(shared) - len(differ)} equal to the bit, {len(differ)} differ{largest}{odd}")
    for found in differ[:LARGEST_SHOWN]:
        print(f"    {found.largest:10.3g} at most, {found.relative:8.2g} of its norm   {found.name}")
    return not differ and here == there


def _difference(kind: str, name: str, one: Checkpoint, other: Checkpoint) -> Difference | None:
    """Return how far two tensors are apart; None when they are equal to the bit."""
    here, there = one.weight(name, kind)[:], other.weight(name, kind)[:]
    if torch.equal(here.view(torch.int32), there.view(torch.int32)):
        return None
    norm = torch.linalg.vector_norm(here, dtype=torch.float64)
    apart = here.sub_(there)
    return Difference(name, float(apart.abs().max()), float(torch.linalg.vector_norm(apart, dtype=torch.float64) / norm))
