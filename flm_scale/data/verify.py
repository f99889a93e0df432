"""Whether a dataset on disk is what it states: every file, every place in every tar, every token id."""

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

from flm_scale.data.index import map_index, read_index
from flm_scale.data.manifest import Shard
from flm_scale.data.shards import PICTURES, Dataset, file_problems
from flm_scale.data.sidecars import TokenIds
from flm_scale.data.storage import open_stream
from flm_scale.data.tar import list_members
from flm_scale.data.tokens import Tokenizer
from flm_scale.errors import DataError


def verify(dataset: Dataset, *, fast: bool = False) -> list[str]:
    """Return a line for each file that is not what the dataset states; where there is none, for each tar, index or sidecar that contradicts another.

    fast: compare sizes and read the heads of files alone.
    """
    if problems := list(file_problems(dataset, hashes=not fast)):
        return problems
    contradictions = (_contradiction(dataset, shard, fast=fast) for shard in dataset.shards())
    return [line for line in chain(contradictions, _token_problems(dataset, fast=fast)) if line]


def _contradiction(dataset: Dataset, shard: Shard, *, fast: bool) -> str:
    """Hashes say that files are as their author left them, not that they are a shard and its index."""
    folder, is_subset = dataset.folder, dataset.manifest.is_subset
    try:
        if fast:
            map_index(folder, shard)
            return ""
        index = read_index(folder, shard)
        stated = list(zip(*(index.column(name).to_pylist() for name in ("key", "image_offset", "image_bytes")), strict=True))
        file = folder / shard.name
        with nullcontext(file) if isinstance(file, Path) else open_stream(file) as source:
            members = list_members(source, expected_bytes=shard.bytes, expected_count=None if is_subset else shard.count)
            held = [(member.key, member.offset, member.size) for member in members if member.extension in PICTURES]
        if is_subset:  # the filtered dataset has the tars of the whole one
            kept = set(stated)
            held = [place for place in held if place in kept]
    except DataError as error:
        return str(error)
    return "" if held == stated else f"shard {shard.name} holds other keys or places than its index states"


def _token_problems(dataset: Dataset, *, fast: bool) -> Iterator[str]:
    """Yield a line for each split, and each shard, whose token ids cannot be used."""
    if not dataset.tokenizer_fingerprint:
        return
    tokenizer = Tokenizer(dataset.tokenizer_file)
    for split in dataset.splits:
        try:
            tokens = TokenIds(dataset, split, tokenizer)
            for number in range(0 if fast else len(tokens.shards)):
                tokens.read_shard(number)
        except DataError as error:
            yield str(error)
