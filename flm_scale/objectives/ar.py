"""Autoregressive language modelling: row i sees positions 0..i and predicts token i+1 (docs/flm.md, Layout: the forward stream alone)."""

import numpy as np

from flm_scale.batch import Example, Term

NO_QUERY = np.empty(0, np.int32)


class Ar:
    """The forward stream alone."""

    parts = ("forward", "eos")
    terms = (Term(1.0, ("forward", "eos")),)
    num_streams = 1
    has_queries = False
    generates = True
    num_added = 0

    def num_views(self, length: int) -> int:  # noqa: ARG002 - one, however long
        """Return 1: the caption goes into the batch once."""
        return 1

    def corrupt(self, ids: np.ndarray, rng: np.random.Generator) -> list[Example]:  # noqa: ARG002 - nothing is hidden at random
        """Return the caption with targets x1..xn and EOS."""
        return [causal_example(ids, self.parts)]

    def whole(self, ids: np.ndarray) -> Example:
        """Return the caption without targets; its EOS row has read everything."""
        return causal_example(ids, self.parts, pooled_row=len(ids) - 1)

    def likelihood(self, ids: np.ndarray) -> list[Example]:
        """Return the one view whose losses add up to the exact negative log-likelihood."""
        return [causal_example(ids, self.parts)]


def causal_example(ids: np.ndarray, parts: tuple[str, ...], *, pooled_row: int = -1) -> Example:
    """Return a caption read from the left, every next token a target, for any objective with parts 'forward' and 'eos'."""
    positions = np.arange(len(ids), dtype=np.int32)
    target_parts = np.full(len(ids) - 1, parts.index("forward"), np.int32)
    target_parts[-1] = parts.index("eos")
    return Example(ids, first=np.zeros_like(positions)[None], last=positions[None],
                   queries=NO_QUERY, span_first=NO_QUERY, span_last=NO_QUERY,
                   target_rows=positions[:-1], target_ids=ids[1:], target_parts=target_parts, pooled_row=pooled_row)
