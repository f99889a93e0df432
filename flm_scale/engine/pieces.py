"""What a checkpoint holds of an engine: runs of float32 weights and of AdamW's moments, as views of the live state."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from flm_scale.model.parts import Piece, shard_of
from flm_scale.parallel.processes import gather, place

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's, by the names that torch and DeepSpeed give them."""

VALUES_PER_CHUNK = 1 << 18
"""Values whose 64-bit products exist at once in a checksum."""


class Share(NamedTuple):
    """Which values of a weight a process holds in float32, and where."""

    master: Tensor
    """What the optimizer knows: the weight itself, a copy, or a flat buffer of many weights."""
    shape: Sequence[int]
    """Of this process's shard of the weight."""
    start: int
    """Place of the first value in the flattened shard."""
    offset: int
    """Place of the first value in the flattened master."""
    size: int


def whole_share(master: Tensor) -> Share:
    """Return the share of a process that holds all of its shard."""
    return Share(master, master.shape, 0, 0, master.numel())


def pieces_of(name: str, parameter: Tensor, share: Share, moments: Mapping[str, Tensor]) -> Iterator[Piece]:
    """Yield the pieces of one weight: of itself, and of each moment. moments: float32, of the master's shape."""
    for kind, held in {"weight": share.master, **moments}.items():
        values = held.detach().view(-1)[share.offset : share.offset + share.size]
        yield Piece(name, kind, tuple(share.shape), shard_of(parameter), share.start, values)


def moments_of(optimizer: Optimizer, master: Tensor) -> dict[str, Tensor]:
    """Return the optimizer's moments of a weight, made if it has taken no step yet; SGD has none."""
    if isinstance(optimizer, SGD):
        return {}
    state = optimizer.state[master]
    if not state:
        # DeepSpeed's counts steps in an int, torch's in a tensor, which the fused kernel wants on the weight's device.
        state["step"] = torch.zeros((), device=master.device if optimizer.defaults.get("fused") else None) if isinstance(optimizer, AdamW) else 0
        state |= {moment: torch.zeros_like(master, memory_format=torch.preserve_format) for moment in MOMENTS}
    return {moment: state[moment] for moment in MOMENTS}


def set_steps_taken(optimizer: Optimizer, updates: int) -> None:
    """Let the optimizer's bias correction go on behind so many updates."""
    for state in optimizer.state.values():
        state["step"] = torch.full_like(state["step"], updates) if isinstance(state["step"], Tensor) else updates


def checksums(tensors: Sequence[Tensor]) -> Tensor:
    """Return 64 bits of each tensor (float32 or bf16), int64 [tensors], that follow from all its bits and their places.

    One value that changes, by however little, always changes them: its odd factor has an inverse among the 64-bit integers.
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.int64)
    low, high, device = -(1 << 63), (1 << 63) - 1, tensors[0].device
    size = min(VALUES_PER_CHUNK, max(tensor.numel() for tensor in tensors))
    # The same on every process. Drawn, because small factors would let neighbours that drift in opposite ways cancel out.
    factors = torch.randint(low, high, (size,), generator=torch.Generator().manual_seed(0)).bitwise_or_(1).to(device)
    sums = torch.zeros(len(tensors), dtype=torch.int64, device=device)
    for index, tensor in enumerate(tensors):
        bits = tensor.detach().flatten().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)
        for chunk in bits.split(size):
            # The factor 3 tells chunks apart.
            sums[index] = 3 * sums[index] + (chunk.long().mul_(factors[: len(chunk)])).sum()
    return sums


def drifted(held: Mapping[str, Tensor], group: dist.ProcessGroup | None, device: torch.device) -> list[str]:
    """Return the names of the tensors that the processes of a group should hold alike and do not; one collective of the group, for all of them.

    device: one that the group sends from; the tensors may be on another one.
    """
    if not held:
        return []
    sums = checksums(list(held.values()))
    # The largest of all, and the smallest: no integer's complement is out of range, as its negative may be.
    extremes = torch.stack([sums, ~sums]).to(device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    differ = (extremes[0] != ~extremes[1]).tolist()
    return [name for name, differs in zip(held, differ, strict=True) if differs]


def tell_drift(found: Sequence[str]) -> None:
    """Say on rank 0 what has drifted apart, on whatever rank it was found; collective over all."""
    names = sorted({name for some in gather(found) for name in some})
    if names and place()[0] == 0:
        print(f"flm: what several processes must hold alike has drifted apart: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}; one copy is "
              "saved, and a resumed run makes all from it; if it happens again, look for a device that computes or remembers wrongly",
              file=sys.stderr)
