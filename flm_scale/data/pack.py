"""Examples and pictures become a State: captions end to end, without padding, and the index tensors that lead to padded views.

Captions of one image stand together, so that the image's rows are looked at by one block of text rows.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from flm_scale.batch import IGNORED, Example, State


def pack(images: Sequence[Sequence[Example]], pixels: np.ndarray) -> State:
    """Return the packed state.

    images: the caption views of each image, at least one each, all with the same number of streams.   pixels: uint8 [N, 3, height, width], of clips
    [N, F, 3, height, width].
    """
    examples = list(chain.from_iterable(images))
    lengths = np.array([example.length for example in examples])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    num_queries = np.array([len(example.queries) for example in examples])
    query_starts = np.concatenate([[0], np.cumsum(num_queries)])
    num_streams, num_tokens = len(examples[0].first), int(starts[-1])

    def packed_rows(example: Example, caption: int, rows: np.ndarray) -> np.ndarray:
        """Source rows of one caption to rows of the packed state. Two streams of 3 tokens, packed second after 4: 4 -> T + 4 + 1."""
        stream, position = np.divmod(rows, example.length)
        in_stream = stream * num_tokens + starts[caption] + position
        query = num_streams * num_tokens + query_starts[caption] + rows - num_streams * example.length
        packed: np.ndarray = np.where(stream < num_streams, in_stream, query)
        return packed

    captions_per_image = np.array([len(views) for views in images])
    image_starts = starts[np.concatenate([[0], np.cumsum(captions_per_image)])]
    slots, places = padded_view(starts)
    image_slots, image_places = padded_view(image_starts)
    query_slots, query_places = padded_view(query_starts)
    unmerged = torch.empty(len(images), 0, dtype=torch.int64)

    def join(name: str) -> np.ndarray:
        return np.concatenate([getattr(example, name) for example in examples], axis=-1)

    return State(
        rows=torch.from_numpy(pixels), ids=_ints(join("ids")), first=_ints(join("first")), last=_ints(join("last")),
        # Rows that only fill up a caption (the padded layout) are seen by none, so the last position seen is the caption's end.
        lengths=_ints(np.array([example.last.max() + 1 for example in examples])),
        slots=_ints(slots), places=_ints(places), image_slots=_ints(image_slots), image_places=_ints(image_places),
        queries=_ints(np.concatenate([starts[c] + example.queries for c, example in enumerate(examples)])),
        query_slots=_ints(query_slots), query_places=_ints(query_places), span_first=_ints(join("span_first")), span_last=_ints(join("span_last")),
        target_rows=_ints(np.concatenate([packed_rows(example, c, example.target_rows) for c, example in enumerate(examples)])),
        target_ids=_ints(join("target_ids")), target_parts=_ints(join("target_parts")),
        pooled_rows=_ints(np.concatenate([packed_rows(example, c, np.array([example.pooled_row]))
                                          for c, example in enumerate(examples) if example.pooled_row >= 0] or [np.empty(0)])),
        sizes=unmerged, merge_slots=unmerged)


def padded_view(starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (slots [groups, longest], places [rows]) of groups of rows that begin at starts[:-1] and end at starts[-1].

    Groups of 2 and 1 rows: slots [[0, 1], [2, 2]], places [0, 1, 2]. A place without a row repeats its group's first row.
    """
    sizes = np.diff(starts)
    longest = int(sizes.max(initial=0))
    offsets = np.arange(longest)
    first = np.minimum(starts[:-1], max(int(starts[-1]) - 1, 0))
    slots = np.where(offsets < sizes[:, None], starts[:-1, None] + offsets, first[:, None])
    group = np.repeat(np.arange(len(sizes)), sizes)
    return slots, group * longest + np.arange(int(starts[-1])) - starts[group]


def without_targets(example: Example) -> Example:
    """Return the example with nothing to predict, for a picture that could not be read."""
    nothing = np.empty(0, np.int32)
    return replace(example, target_rows=nothing, target_ids=nothing, target_parts=nothing)


def pad_example(example: Example, *, length: int) -> Example:
    """Return the example as published code lays it out: filled up to `length`, a query and a target on every row.

    The filled-up targets have part IGNORED. It exists to be compared with: the benchmark times it, a test holds packing against it.
    """
    num_streams, extra = len(example.first), length - example.length
    fill = np.zeros((num_streams, extra), np.int32)
    stream_rows = np.arange(num_streams * length)
    stream, position = np.divmod(example.target_rows, example.length)
    target_rows = np.where(stream < num_streams, stream * length + position, example.target_rows - num_streams * example.length
                           + num_streams * length)
    queries, span_first, span_last = example.queries, example.span_first, example.span_last
    if len(queries):
        others = np.setdiff1d(np.arange(length, dtype=np.int32), queries)
        queries = np.concatenate([queries, others])
        span_first = np.concatenate([span_first, np.ones_like(others)])
        span_last = np.concatenate([span_last, np.full_like(others, example.length)])
    unused = np.setdiff1d(np.concatenate([stream_rows, num_streams * length + np.arange(len(queries))]), target_rows)
    return Example(
        ids=np.concatenate([example.ids, np.zeros(extra, example.ids.dtype)]),
        first=np.concatenate([example.first, fill], axis=1), last=np.concatenate([example.last, fill], axis=1),
        queries=queries, span_first=span_first, span_last=span_last,
        target_rows=np.concatenate([target_rows, unused]),
        target_ids=np.concatenate([example.target_ids, np.zeros(len(unused), example.target_ids.dtype)]),
        target_parts=np.concatenate([example.target_parts, np.full(len(unused), IGNORED)]))


def _ints(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
