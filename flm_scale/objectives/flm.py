"""Free Language Modeling (arXiv 2303.14038; docs/flm.md): encode the caption once from each side, then hide a span per target.

Positions: 0 is BOS, 1..n the content, n+1 EOS. The forward stream's row i has read 0..i and predicts token i+1; the reverse
stream's row i has read i..n+1 and predicts token i-1; the query of token j reads forward rows before its span and reverse rows
after it, and predicts token j. BOS and EOS are never hidden, so no query is ever blind.
"""

import numpy as np

from flm_scale.batch import Example, Term
from flm_scale.config import FlmConfig
from flm_scale.objectives.ar import NO_QUERY, causal_example


class Flm:
    """Every content token is predicted three times: from its left, from its right, and from both sides of its span."""

    parts = ("reconstruction", "forward", "eos", "reverse")
    num_streams = 2
    has_queries = True
    generates = True
    num_added = 0

    def __init__(self, config: FlmConfig) -> None:
        self.corruption_rate, self.draw_rate = config.corruption_rate, config.draw_rate
        self.terms = (Term(1.0, ("reconstruction",)),
                      Term(config.forward_weight, ("forward", "eos")),
                      Term(config.reverse_weight, ("reverse",)))

    def num_views(self, length: int) -> int:  # noqa: ARG002 - one, however long
        """Return 1: the caption goes into the batch once."""
        return 1

    def corrupt(self, ids: np.ndarray, rng: np.random.Generator) -> list[Example]:
        """Return the caption with a query and a span for each content token, and targets on all three kinds of rows."""
        length, content = len(ids), np.arange(1, len(ids) - 1, dtype=np.int32)
        rate = rng.uniform(0, self.corruption_rate) if self.draw_rate else self.corruption_rate
        span_first, span_last = draw_spans(len(content), rate=rate, rng=rng)
        forward_rows, reverse_rows = np.arange(length - 1), length + np.arange(2, length)
        query_rows = 2 * length + np.arange(len(content))
        sizes = [len(content), length - 2, 1, length - 2]
        return [self._example(
            ids, content, span_first, span_last,
            target_rows=np.concatenate([query_rows, forward_rows, reverse_rows]).astype(np.int32),
            target_ids=np.concatenate([ids[1:-1], ids[1:], ids[1:-1]]),
            target_parts=np.repeat(np.arange(4, dtype=np.int32), sizes))]

    def whole(self, ids: np.ndarray) -> Example:
        """Return the caption with one query, at position 0, that reads both streams whole."""
        end = np.array([len(ids)], np.int32)
        return self._example(ids, np.zeros(1, np.int32), end, np.array([-1], np.int32),
                             target_rows=NO_QUERY, target_ids=NO_QUERY, target_parts=NO_QUERY, pooled_row=2 * len(ids))

    def likelihood(self, ids: np.ndarray) -> list[Example]:
        """Return the forward stream alone: its losses add up to the exact negative log-likelihood."""
        return [causal_example(ids, self.parts)]

    def _example(self, ids: np.ndarray, queries: np.ndarray, span_first: np.ndarray, span_last: np.ndarray, *, target_rows: np.ndarray,
                 target_ids: np.ndarray, target_parts: np.ndarray, pooled_row: int = -1) -> Example:
        positions = np.arange(len(ids), dtype=np.int32)
        first = np.stack([np.zeros_like(positions), positions])
        last = np.stack([positions, np.full_like(positions, len(ids) - 1)])
        return Example(ids, first, last, queries, span_first, span_last, target_rows, target_ids, target_parts, pooled_row)


def draw_spans(num_content: int, *, rate: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw for each content position j = 1..n a span [lo, hi] with 1 <= lo <= j <= hi <= n (docs/flm.md, Spans).

    The length is drawn first (1 + Binomial(n-1, p), mean max(1, n * rate)), the position second, and a span that would leave the
    caption is shifted, never cut: so the realised rate equals the requested one at every position, the edges too.
    """
    n = num_content
    p = 0.0 if n == 1 else min(max((n * rate - 1) / (n - 1), 0.0), 1.0)
    extra = rng.binomial(n - 1, p, size=n)
    left = (extra + rng.integers(0, 2, size=n)) // 2
    lo = np.clip(np.arange(1, n + 1) - left, 1, n - extra)
    return lo.astype(np.int32), (lo + extra).astype(np.int32)
