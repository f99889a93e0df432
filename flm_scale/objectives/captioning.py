"""What a frozen language model says behind a picture: a prompt is read, and what follows it is predicted from the left (arXiv 2310.03291).

A caption follows the one prompt of the run; an answer follows its own question.
"""

from dataclasses import replace

import numpy as np

from flm_scale.batch import Example, Term
from flm_scale.objectives.ar import causal_example


class Captioning:
    """The language model's own loss on the caption and its end; the prompt in front is read alone."""

    parts = ("forward", "eos")
    terms = (Term(1.0, ("forward", "eos")),)
    num_streams = 1
    has_queries = False
    generates = True

    def __init__(self, prompt: np.ndarray) -> None:
        """prompt: its tokens, without any at its beginning or end."""
        self.prompt = prompt
        self.num_added = len(prompt)

    def num_views(self, length: int) -> int:  # noqa: ARG002 - one, however long
        """Return 1: the caption goes into the batch once."""
        return 1

    def corrupt(self, ids: np.ndarray, rng: np.random.Generator) -> list[Example]:  # noqa: ARG002 - nothing is hidden at random
        """Return the prompt and the caption, with targets x1..xn and EOS."""
        return self.likelihood(ids)

    def whole(self, ids: np.ndarray) -> Example:
        """Return the same without targets; its EOS row has read everything."""
        prompted = self._prompted(ids)
        return causal_example(prompted, self.parts, pooled_row=len(prompted) - 1)

    def likelihood(self, ids: np.ndarray) -> list[Example]:
        """Return the one view whose losses add up to the exact negative log-likelihood."""
        return [continuation(self._prompted(ids), self.parts, num_read=1 + len(self.prompt))]

    def _prompted(self, ids: np.ndarray) -> np.ndarray:
        """Return the first token, the prompt, the caption and EOS."""
        prompted: np.ndarray = np.concatenate([ids[:1], self.prompt.astype(ids.dtype), ids[1:]])
        return prompted


class Answering:
    """An Objective whose captions are questions: `ids` are those of a question and its answer, and behind them how many of these are only read."""

    parts, terms = Captioning.parts, Captioning.terms
    num_streams = 1
    has_queries = False
    generates = True
    num_added = 0

    def num_views(self, length: int) -> int:  # noqa: ARG002 - one, however long
        """Return 1: a question goes into the batch once."""
        return 1

    def corrupt(self, ids: np.ndarray, rng: np.random.Generator) -> list[Example]:  # noqa: ARG002 - nothing is hidden at random
        """Return question and answer, with the answer and EOS as targets."""
        return self.likelihood(ids)

    def whole(self, ids: np.ndarray) -> Example:
        """Return the same without targets; its EOS row has read everything."""
        return causal_example(ids[:-1], self.parts, pooled_row=len(ids) - 2)

    def likelihood(self, ids: np.ndarray) -> list[Example]:
        """Return the one view whose losses add up to the answer's exact negative log-likelihood."""
        return [continuation(ids[:-1], self.parts, num_read=int(ids[-1]))]


def continuation(ids: np.ndarray, parts: tuple[str, ...], *, num_read: int) -> Example:
    """Return a text read from the left, of which all but the first `num_read` tokens are targets."""
    causal, asked = causal_example(ids, parts), slice(num_read - 1, None)
    return replace(causal, target_rows=causal.target_rows[asked], target_ids=causal.target_ids[asked], target_parts=causal.target_parts[asked])
