"""What is in a checkpoint, for any layout. `store` finds a whole one and hands it out as a `Checkpoint`; `reshard` knows the cuts."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flm_scale.checkpoint.reshard import StoredPiece, read_piece, stored_pieces
from flm_scale.errors import CheckpointError
from flm_scale.model.parts import Piece, Shard, whole_shape


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole. Files are opened when something is read; then CheckpointError names one that has changed since."""

    folder: Path
    num_ranks: int

    @property
    def step(self) -> int:
        """How many steps were taken, whatever the folder is called."""
        return int(self.state["step"])

    @cached_property
    def state(self) -> dict[str, Any]:
        """Step, loader state, layout: what was given when it was committed."""
        return self._json("state.json")

    @cached_property
    def run_json(self) -> str:
        """The resolved Run."""
        return self._text("run.json")

    def rank_state(self, rank: int) -> dict[str, Any]:
        """Return what a rank, below num_ranks, wrote of its own."""
        return self._json(f"{rank_name(rank)}.json")

    @property
    def kinds(self) -> list[str]:
        """What there is of weights: `weight` itself, and the names of moments."""
        return sorted({kind for kind, _ in self._stored}, key=lambda kind: (kind != "weight", kind))

    def names(self, kind: str = "weight") -> dict[str, tuple[int, ...]]:
        """Return the shape of every whole weight (or of the moment `kind` of it) by name."""
        return {name: whole_shape(stored[0].shape, stored[0].shard) for (of, name), stored in self._stored.items() if of == kind}

    def weight(self, name: str, kind: str = "weight") -> "LazyWeight":
        """Return a whole weight that is read when it is indexed. Raises CheckpointError when there is none of that name."""
        stored = self._stored.get((kind, name))
        if not stored:
            raise CheckpointError(f"{self.folder}: '{kind}/{name}' is missing: a checkpoint of another model")
        return LazyWeight(self, name, kind, whole_shape(stored[0].shape, stored[0].shard), {(one.shape, one.shard) for one in stored if one.shard})

    def fill(self, pieces: Iterable[Piece]) -> None:
        """Copy into each piece's `values` what the checkpoint holds for it, in whatever layout it was written; filled-up rows get zeros.

        Takes memory for one whole weight at a time. What the checkpoint holds and nobody asks for is no error.
        Raises CheckpointError that names the first pieces that are missing or of another shape; the others are filled by then.
        """
        wrong = []
        for piece in pieces:
            key, shape = (piece.kind, piece.name), whole_shape(piece.shape, piece.shard)
            stored = self._stored.get(key, [])
            if shapes := {whole_shape(one.shape, one.shard) for one in stored} - {shape}:
                wrong.append(f"'{'/'.join(key)}' has another shape ({list(min(shapes))}, the model's is {list(shape)})")
            elif (values := read_piece(piece, stored, self._files)) is None:
                wrong.append(f"'{'/'.join(key)}' is missing{' in part' if stored else ''}")
            else:
                piece.values.copy_(values)
        if wrong:
            raise CheckpointError(f"{self.folder}: a checkpoint of another model: {first_of(wrong)}")

    @cached_property
    def _files(self) -> Mapping[Path, Any]:
        from safetensors import SafetensorError, safe_open

        files = {}
        for rank in range(self.num_ranks):
            path = self.folder / f"{rank_name(rank)}.safetensors"
            try:
                files[path] = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: cannot be read ({error}); use another step") from error
        return files

    @cached_property
    def _stored(self) -> dict[tuple[str, str], list[StoredPiece]]:
        found: dict[tuple[str, str], list[StoredPiece]] = {}
        for path, file in self._files.items():
            try:
                listed = stored_pieces(path, file)
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"{path}: is damaged; use another step") from error
            for one in listed:
                kind, _, name = one.key.partition("/")
                found.setdefault((kind, name), []).append(one)
        return found

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return dict(json.loads(self._text(name)))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{self.folder / name}: is damaged; use another step") from error

    def _text(self, name: str) -> str:
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{self.folder / name}: cannot be read ({error.strerror}); use another step") from error


@dataclass(frozen=True)
class LazyWeight:
    """A whole weight of a checkpoint. Each `weight[...]` keeps nothing and reads all of it, or one shard where just that was written."""

    checkpoint: Checkpoint
    name: str
    kind: str
    shape: tuple[int, ...]
    shards: Collection[tuple[tuple[int, ...], Shard]]
    """Shape and place of each shard that was written."""

    def __getitem__(self, index: Any) -> Tensor:  # noqa: ANN401 - whatever a tensor can be indexed with
        for shape, shard in self.shards:
            if isinstance(index, tuple) and index == shard.held:
                rows = index[shard.dim].stop - index[shard.dim].start
                return self._values(shape, shard).narrow(shard.dim, 0, rows)
        return self._values(self.shape, None)[index]

    def _values(self, shape: tuple[int, ...], shard: Shard | None) -> Tensor:
        values = torch.empty(torch.Size(shape).numel())
        self.checkpoint.fill([Piece(self.name, self.kind, shape, shard, 0, values)])
        return values.view(shape)


def rank_name(rank: int) -> str:
    """Return the beginning of the names of a rank's files."""
    return f"rank-{rank:05d}"


def first_of(problems: Sequence[str]) -> str:
    """Return the first three of a list of problems, in one line."""
    return f"{', '.join(problems[:3])}{' ...' if len(problems) > 3 else ''}"
