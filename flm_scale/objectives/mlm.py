"""Masked language modelling: hidden tokens are replaced by the mask token, every row sees the whole caption (docs/flm.md).

Two ways to predict less than is hidden, at the same corruption, make the prediction-rate sweep of the FLM paper (its Fig. 1a):
keep labels on a share of the hidden tokens, or split them over several passes that each hide only their own.
"""

import numpy as np

from flm_scale.batch import Example, Term
from flm_scale.config import MlmConfig
from flm_scale.objectives.ar import NO_QUERY


class Mlm:
    """Hides exactly max(1, round(mask_rate * n)) of n content tokens and predicts them."""

    parts = ("masked",)
    terms = (Term(1.0, ("masked",)),)
    num_streams = 1
    has_queries = False
    generates = False
    num_added = 0

    def __init__(self, config: MlmConfig, *, mask_id: int) -> None:
        self.config, self.mask_id = config, mask_id

    def num_views(self, length: int) -> int:
        """Return the number of passes, or of hidden tokens where those are fewer."""
        return min(self.config.passes, self._num_hidden(length))

    def corrupt(self, ids: np.ndarray, rng: np.random.Generator) -> list[Example]:
        """Return one masked view a pass; passes that got no token to hide are left out."""
        hidden = 1 + rng.permutation(len(ids) - 2)[: self._num_hidden(len(ids))]
        views = []
        for group in np.array_split(hidden, self.num_views(len(ids))):
            # Rounded at random, so that the mean share is exact for groups of any size.
            num_predicted = int(len(group) * self.config.predicted_share + rng.random())
            views.append(self._masked(ids, hidden=group, predicted=group[:num_predicted]))
        return views

    def whole(self, ids: np.ndarray) -> Example:
        """Return the caption without a mask; its BOS row has read everything."""
        return self._masked(ids, hidden=NO_QUERY, predicted=NO_QUERY, pooled_row=0)

    def likelihood(self, ids: np.ndarray) -> list[Example]:
        """Return n views that hide one token each: their losses add up to the pseudo-likelihood (arXiv 1910.14659, Sec. 2)."""
        return [self._masked(ids, hidden=np.array([j]), predicted=np.array([j])) for j in range(1, len(ids) - 1)]

    def _num_hidden(self, length: int) -> int:
        return max(1, round(self.config.mask_rate * (length - 2)))

    def _masked(self, ids: np.ndarray, *, hidden: np.ndarray, predicted: np.ndarray, pooled_row: int = -1) -> Example:
        inputs = ids.copy()
        inputs[hidden] = self.mask_id
        predicted = np.sort(predicted).astype(np.int32)
        rows = np.zeros((1, len(ids)), np.int32)
        return Example(inputs, first=rows, last=rows + len(ids) - 1, queries=NO_QUERY, span_first=NO_QUERY, span_last=NO_QUERY,
                       target_rows=predicted, target_ids=ids[predicted], target_parts=np.zeros_like(predicted), pooled_row=pooled_row)
