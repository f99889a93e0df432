"""What an objective offers, and the choice of one from its section of the Run."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from flm_scale.batch import Example, Term
from flm_scale.config import ArConfig, CaptioningConfig, FlmConfig, MlmConfig, PrefixLmConfig


@runtime_checkable
class Objective(Protocol):
    """A pretraining task. Everything random comes from the generator that the loader keys by seed, epoch and sample."""

    num_streams: int
    has_queries: bool
    """Whether the model needs a reconstructor."""
    generates: bool
    """Whether a stream was trained to continue a caption from the left."""
    num_added: int
    """Tokens that `corrupt` puts into each view beside the caption's own."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the loss parts; `Example.target_parts` holds indices into it."""
        ...

    @property
    def terms(self) -> tuple[Term, ...]:
        """How the parts make up the loss."""
        ...

    def num_views(self, length: int) -> int:
        """Return how many views `corrupt` makes of a caption of `length` tokens, for the packing plan."""
        ...

    def corrupt(self, ids: np.ndarray, rng: np.random.Generator) -> list[Example]:
        """Return the views of the caption `ids` [length] (BOS ... EOS) that go into the batch; one, or one a pass."""
        ...

    def whole(self, ids: np.ndarray) -> Example:
        """Return the caption with nothing hidden and a pooled row, for heads of downstream tasks."""
        ...

    def likelihood(self, ids: np.ndarray) -> list[Example]:
        """Return views whose target losses add up to the caption's negative log-likelihood, exact or pseudo."""
        ...


def build_objective(config: FlmConfig | MlmConfig | ArConfig | PrefixLmConfig | CaptioningConfig, *, mask_id: int,
                    prompt: Sequence[int] = ()) -> Objective:
    """Return the objective of a Run.

    mask_id: the tokenizer's mask token, which only MLM uses.   prompt: token ids of a captioning objective's prompt.
    """
    from flm_scale.objectives.ar import Ar
    from flm_scale.objectives.captioning import Captioning
    from flm_scale.objectives.flm import Flm
    from flm_scale.objectives.mlm import Mlm
    from flm_scale.objectives.prefix_lm import PrefixLm

    match config:
        case FlmConfig():
            return Flm(config)
        case MlmConfig():
            return Mlm(config, mask_id=mask_id)
        case ArConfig():
            return Ar()
        case PrefixLmConfig():
            return PrefixLm(config)
        case CaptioningConfig():
            return Captioning(np.array(prompt, np.int32))
