"""No objective sees what it must predict: by gradient, on the real model, for every pair of a target and a token.

A caption without repeated tokens ties each position to one row of the embedding table, so the gradient of a target's loss with respect
to that row says whether the model looked at that position.
"""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flm_scale.batch import Example
from flm_scale.config import FlmConfig, MlmConfig, PrefixLmConfig, Run
from flm_scale.data.pack import pack
from flm_scale.model.assemble import VisionLanguageModel, build_model
from flm_scale.objectives.objective import Objective
from tests.synthetic import MASK_ID, OBJECTIVES, caption_ids, objective_of, random_pixels, tiny_run

LONGEST = 12


def visible_tokens(objective: Objective, example: Example, target: int) -> set[int]:
    """The dependency matrix of docs/flm.md, written down anew from the definitions: positions that may be seen for a target."""
    length, row = example.length, int(example.target_rows[target])
    part = objective.parts[int(example.target_parts[target])]
    if part == "reconstruction":
        query = row - 2 * length
        lo, hi = int(example.span_first[query]), int(example.span_last[query])
        return {i for i in range(length) if i < lo or i > hi}
    if part == "reverse":
        return set(range(row - length, length))
    if part == "masked":
        return {i for i in range(length) if example.ids[i] != MASK_ID}
    prefix = 1 + int(example.last[0][0]) if not objective.has_queries else 1
    return set(range(max(row + 1, prefix)))


def seen_tokens(model: VisionLanguageModel, example: Example, pixels: np.ndarray, ids: np.ndarray) -> Iterator[set[int]]:
    """For each target, the positions whose true token has an influence."""
    state = pack([[example]], pixels)
    loss, _ = model(state)
    table = model.layers["text_entry"].tokens.weight
    for target_loss in loss:
        (gradient,) = torch.autograd.grad(target_loss, table, retain_graph=True)
        yield {position for position, token in enumerate(ids) if gradient[token].abs().max() > 0}


MODELS: dict[tuple[str, str], tuple[Run, VisionLanguageModel]] = {}


def model_of(kind: str, norm: str, dtype: torch.dtype) -> tuple[Run, VisionLanguageModel]:
    if (kind, norm) not in MODELS:
        run = tiny_run(kind)
        run = run.replace(text=run.text.replace(norm=norm))
        MODELS[kind, norm] = run, build_model(run, objective_of(run))
    run, model = MODELS[kind, norm]
    return run, model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("kind", OBJECTIVES)
@given(n=st.integers(1, LONGEST), rate=st.floats(0, 1), seed=st.integers(0, 10_000))
@settings(max_examples=12)
def test_a_target_is_predicted_from_exactly_what_its_dependency_row_shows(
        kind: str, norm: str, dtype: torch.dtype, n: int, rate: float, seed: int) -> None:
    """Hidden tokens have exactly zero gradient, shown ones a gradient; nothing is ever not-a-number."""
    configs = {"flm": FlmConfig(corruption_rate=rate), "mlm": MlmConfig(mask_rate=max(rate, 0.01)), "ar": OBJECTIVES["ar"],
               "prefix_lm": PrefixLmConfig(target_rate=max(rate, 0.01))}
    run, model = model_of(kind, norm, dtype)
    objective = objective_of(run.replace(objective=configs[kind]))
    rng = np.random.default_rng(seed)
    ids = caption_ids(n, rng)
    for example in objective.corrupt(ids, rng):
        for target, seen in enumerate(seen_tokens(model, example, random_pixels(1, rng), ids)):
            visible = visible_tokens(objective, example, target)
            assert seen <= visible
            if dtype == torch.float32:
                assert seen == visible


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_every_target_looks_at_the_image(kind: str) -> None:
    """Also a reconstruction whose span hides the whole caption: it is then a prediction from the image alone."""
    run, model = model_of(kind, "pre", torch.float32)
    rng = np.random.default_rng(0)
    configs = {"flm": FlmConfig(corruption_rate=1.0), "mlm": MlmConfig(mask_rate=1.0)}
    objective = objective_of(run.replace(objective=configs.get(kind, run.objective)))
    state = pack([objective.corrupt(caption_ids(6, rng), rng)], random_pixels(1, rng))
    loss, _ = model(state)
    patches = model.layers["vision_entry"].patches.weight
    for target_loss in loss:
        (gradient,) = torch.autograd.grad(target_loss, patches, retain_graph=True)
        assert gradient.abs().max() > 0
