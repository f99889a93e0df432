"""PrefixLM: the caption's beginning sees itself whole, the rest is predicted from the left (docs/flm.md; SimVLM, arXiv 2108.10904)."""

from dataclasses import replace

import numpy as np

from flm_scale.batch import Example, Term
from flm_scale.config import PrefixLmConfig
from flm_scale.objectives.ar import causal_example


class PrefixLm:
    """Predicts the last max(1, round(rate * n)) of n content tokens, and EOS."""

    parts = ("forward", "eos")
    terms = (Term(1.0, ("forward", "eos")),)
    num_streams = 1
    has_queries = False
    generates = True
    num_added = 0

    def __init__(self, config: PrefixLmConfig) -> None:
        self.target_rate, self.draw_rate = config.target_rate, config.draw_rate

    def num_views(self, length: int) -> int:  # noqa: ARG002 - one, however long
        """Return 1: the caption goes into the batch once."""
        return 1

    def corrupt(self, ids: np.ndarray, rng: np.random.Generator) -> list[Example]:
        """Return the caption with a prefix of BOS and n - m content tokens, and the other m and EOS as targets."""
        rate = rng.uniform(0, self.target_rate) if self.draw_rate else self.target_rate
        num_content = len(ids) - 2
        prefix = 1 + num_content - max(1, round(rate * num_content))
        causal = causal_example(ids, self.parts)
        last = np.maximum(causal.last, np.int32(prefix - 1))
        kept = slice(prefix - 1, None)
        return [replace(causal, last=last, target_rows=causal.target_rows[kept], target_ids=causal.target_ids[kept],
                        target_parts=causal.target_parts[kept])]

    def whole(self, ids: np.ndarray) -> Example:
        """Return the caption as one prefix; its BOS row has read everything."""
        causal = causal_example(ids, self.parts, pooled_row=0)
        return replace(causal, last=np.full_like(causal.last, len(ids) - 1))

    def likelihood(self, ids: np.ndarray) -> list[Example]:
        """Return the view whose prefix is BOS alone: its losses add up to the exact negative log-likelihood."""
        return [causal_example(ids, self.parts)]
