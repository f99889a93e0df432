"""From the pieces that one layout wrote to those that another one holds: a rank's file of pieces, and the arithmetic between cuts.

A weight that is cut along `dim` is a matrix here: a row for each index of the dimensions before `dim`, everything else in columns. A
shard is a band of its columns, and a piece is a run of the band's values, row by row. A weight [2, 5] cut along dim 1 into two bands of
width 3, of which the second holds 2 columns and is filled up:

    0 1 2 3 4      0 1 2   3 4 .
    5 6 7 8 9      5 6 7   8 9 .      The four values of the second shard from start 1 on are 4 . 8 9
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from math import prod
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flm_scale.model.parts import Piece, Shard


@dataclass(frozen=True)
class StoredPiece:
    """Where a piece of a checkpoint is."""

    path: Path
    key: str
    shape: tuple[int, ...]
    shard: Shard | None
    start: int
    count: int


class Band(NamedTuple):
    """Columns of a weight, seen as a matrix."""

    num_rows: int
    width: int
    """Columns of the shard, filled-up ones included."""
    held: int
    """Columns that the weight has, too."""
    first: int
    """The weight's column that is the band's first."""
    stride: int
    """Columns of the weight."""


class Block(NamedTuple):
    """Part of a run: a stretch of one row of a band, or some whole rows."""

    begin: int
    end: int
    """Places within the flattened shard."""
    size: tuple[int, int]
    """Rows, and columns of each that the weight has; the columns behind them are filled up."""
    place: int
    """Of the first value within the flattened weight."""


def encode_pieces(pieces: Sequence[Piece], values_of: Callable[[Piece], Tensor] = attrgetter("values")) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file: 1-D float32 tensors `kind/name`, and in the metadata what each is a piece of.

    values_of: called when a piece's turn has come, so that pieces on the meta device get their values then.
    Written here and not by the library, which would first copy all pieces of a GPU into the host's memory; here it is one at a time.
    """
    header: dict[str, Any] = {}
    places: dict[str, Any] = {}
    offset = 0
    for piece in pieces:
        key = f"{piece.kind}/{piece.name}"
        assert key not in header, f"two pieces of {key} in one file"
        assert piece.values.dtype == torch.float32, f"{key} is {piece.values.dtype}"
        header[key] = {"dtype": "F32", "shape": [piece.values.numel()], "data_offsets": [offset, offset := offset + 4 * piece.values.numel()]}
        places[key] = {"shape": piece.shape, "shard": piece.shard and astuple(piece.shard), "start": piece.start}
    text = json.dumps({"__metadata__": {"pieces": json.dumps(places)}} | header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for piece in pieces:
        yield values_of(piece).detach().cpu().contiguous().view(torch.uint8).numpy().data


def stored_pieces(path: Path, file: Any) -> list[StoredPiece]:  # noqa: ANN401 - safetensors' open file
    """List what is in a file that `encode_pieces` made."""
    places = json.loads(file.metadata()["pieces"])
    return [StoredPiece(path, key, shape=tuple(place["shape"]), shard=place["shard"] and Shard(*place["shard"]), start=place["start"],
                        count=file.get_slice(key).get_shape()[0]) for key, place in places.items()]


def read_piece(piece: Piece, stored: Sequence[StoredPiece], files: Mapping[Path, Any]) -> Tensor | None:
    """Return the values of a piece, zero where the shard is filled up; None when the stored pieces do not have all of them.

    stored: of the same weight, cut in any way.   Reads no more than what is needed when the cut is the same, or both are along dim 0.
    Takes memory for the rows of the weight that the piece touches.
    """
    begin, end = piece.start, piece.start + piece.values.numel()
    # Pieces of the very same shard are pieces of a whole of its shape.
    same = [replace(one, shard=None) for one in stored if (one.shape, one.shard) == (piece.shape, piece.shard)]
    values = _read_run(band_of(piece.shape, None if same else piece.shard), begin, end, same or stored, files)
    if values is not None:
        for block in blocks_of(band_of(piece.shape, piece.shard), begin, end):
            values[block.begin - begin: block.end - begin].view(block.size[0], -1)[:, block.size[1]:] = 0
    return values


def band_of(shape: Sequence[int], shard: Shard | None) -> Band:
    """Return which columns of its weight a shard of this shape is."""
    if shard is None:
        return Band(num_rows=1, width=prod(shape), held=prod(shape), first=0, stride=prod(shape))
    inner = prod(shape[shard.dim + 1:])
    width, stride, first = shape[shard.dim] * inner, shard.size * inner, shard.start * inner
    return Band(prod(shape[: shard.dim]), width, held=max(min(width, stride - first), 0), first=first, stride=stride)


def blocks_of(band: Band, begin: int, end: int) -> Iterator[Block]:
    """Cut a run of a shard into at most three blocks: the rest of a row, whole rows, the beginning of a row."""
    while begin < end:
        row, column = divmod(begin, band.width)
        rows = max((end - begin) // band.width, 1) if column == 0 else 1
        stop = min(begin - column + rows * band.width, end)
        columns = max(min((stop - begin) // rows, band.held - column), 0)
        yield Block(begin, stop, (rows, columns), place=row * band.stride + band.first + column)
        begin = stop


def _read_run(band: Band, begin: int, end: int, stored: Sequence[StoredPiece], files: Mapping[Path, Any]) -> Tensor | None:
    """Collect a run's values by way of a window: the stretch of the flattened weight that they lie in."""
    real = [block for block in blocks_of(band, begin, end) if block.size[1]]
    low = min((block.place for block in real), default=0)
    high = max((block.place + (block.size[0] - 1) * band.stride + block.size[1] for block in real), default=0)
    # Bands with several rows are read by whole rows, so the window has whole rows of the widest such matrix.
    step = max((other.stride for one in stored if (other := band_of(one.shape, one.shard)).num_rows > 1), default=1)
    low, high = low - low % step, high + -high % step
    window, is_read = torch.zeros(high - low), torch.zeros(high - low, dtype=torch.bool)
    for one in stored:
        _read_into(window, is_read, low, one, files)
    values = torch.zeros(end - begin)
    for block in real:
        where = block.size, (band.stride, 1), block.place - low
        if not is_read.as_strided(*where).all():
            return None
        values[block.begin - begin: block.end - begin].view(block.size[0], -1)[:, : block.size[1]] = window.as_strided(*where)
    return values


def _read_into(window: Tensor, is_read: Tensor, low: int, one: StoredPiece, files: Mapping[Path, Any]) -> None:
    """Read what of a stored piece lies in the window, which begins at place `low` of the flattened weight."""
    band, high = band_of(one.shape, one.shard), low + len(window)
    if band.num_rows == 1:
        begin, end = low - band.first, high - band.first
    else:
        begin, end = low // band.stride * band.width, high // band.stride * band.width
    begin, end = max(begin, one.start), min(end, one.start + one.count)
    if begin >= end:
        return
    values = files[one.path].get_slice(one.key)[begin - one.start: end - one.start]
    for block in blocks_of(band, begin, end):
        if block.size[1]:
            where = block.size, (band.stride, 1), block.place - low
            window.as_strided(*where).copy_(values[block.begin - begin: block.end - begin].view(block.size[0], -1)[:, : block.size[1]])
            is_read.as_strided(*where).fill_(True)
