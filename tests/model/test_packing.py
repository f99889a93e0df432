"""The fast layouts against the dull ones: packed and padded, stacked and separate, grouped and single. Values and gradients."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from flm_scale.batch import Example, State
from flm_scale.data.pack import pack, pad_example
from flm_scale.engine.base import score, total_loss
from flm_scale.model import parts
from flm_scale.model.assemble import VisionLanguageModel, build_model
from flm_scale.model.parts import Decoder
from flm_scale.objectives.ar import NO_QUERY
from tests.synthetic import OBJECTIVES, caption_ids, objective_of, random_examples, random_pixels, tiny_run


def loss_and_gradients(model: VisionLanguageModel, state: State, objective: object, counts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    sums = score(model, state, objective)
    total_loss(sums, objective, counts).backward()
    return sums.loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(left: tuple[Tensor, dict[str, Tensor]], right: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(left[0], right[0], rtol=1e-5, atol=1e-6)
    assert left[1].keys() == right[1].keys()
    scale = max(float(gradient.norm()) for gradient in left[1].values())
    for name, gradient in left[1].items():
        difference = float((gradient - right[1][name]).norm())
        assert difference <= 1e-5 * max(float(gradient.norm()), 0.01 * scale), name


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_packed_equals_padded(kind: str, norm: str) -> None:
    run = tiny_run(kind)
    run = run.replace(text=run.text.replace(norm=norm))
    objective, rng = objective_of(run), np.random.default_rng(0)
    examples = random_examples(objective, rng, captions_per_image=[1, 3, 2])
    pixels = random_pixels(3, rng)
    packed = pack(examples, pixels)
    padded = pack([[pad_example(example, length=run.text.max_length) for example in views] for views in examples], pixels)
    assert len(padded.ids) == run.text.max_length * len(padded.lengths)
    model = build_model(run, objective)
    counts = torch.bincount(packed.target_parts, minlength=len(objective.parts))
    assert_same(loss_and_gradients(model, packed, objective, counts), loss_and_gradients(model, padded, objective, counts))


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_grouped_captions_equal_one_image_per_caption(kind: str) -> None:
    run = tiny_run(kind)
    objective, rng = objective_of(run), np.random.default_rng(1)
    examples = random_examples(objective, rng, captions_per_image=[3, 1, 2])
    pixels = random_pixels(3, rng)
    grouped = pack(examples, pixels)
    single = pack([[example] for views in examples for example in views],
                  np.concatenate([np.repeat(pixels[i:i + 1], len(views), axis=0) for i, views in enumerate(examples)]))
    model = build_model(run, objective)
    counts = torch.bincount(grouped.target_parts, minlength=len(objective.parts))
    assert_same(loss_and_gradients(model, grouped, objective, counts), loss_and_gradients(model, single, objective, counts))


def one_stream(example: Example, stream: int) -> Example:
    """The example with one of its two streams and no query."""
    rows = slice(stream * example.length, (stream + 1) * example.length)
    mine = (example.target_rows >= rows.start) & (example.target_rows < rows.stop)
    return replace(example, first=example.first[stream:stream + 1], last=example.last[stream:stream + 1],
                   queries=NO_QUERY, span_first=NO_QUERY, span_last=NO_QUERY, target_rows=example.target_rows[mine] - rows.start,
                   target_ids=example.target_ids[mine], target_parts=example.target_parts[mine])


def test_stacked_streams_equal_separate_streams() -> None:
    """One call for both streams gives each stream's rows and the sum of both gradients."""
    run = tiny_run("flm")
    objective, rng = objective_of(run), np.random.default_rng(2)
    examples = random_examples(objective, rng, captions_per_image=[2, 1])
    pixels = random_pixels(2, rng)
    model = build_model(run, objective)
    # The vector that tells the streams apart is not the point here, and a single stream always takes the first.
    torch.nn.init.zeros_(model.layers["fusion_entry"].kinds.weight)
    model.layers["fusion_entry"].kinds.requires_grad_(requires_grad=False)
    without_queries = [[replace(e, queries=NO_QUERY, span_first=NO_QUERY, span_last=NO_QUERY,
                                **{n: getattr(e, n)[e.target_rows < 2 * e.length] for n in ("target_ids", "target_parts", "target_rows")})
                        for e in views] for views in examples]
    stacked = pack(without_queries, pixels)
    counts = torch.bincount(stacked.target_parts, minlength=len(objective.parts))
    both = loss_and_gradients(model, stacked, objective, counts)
    loss, gradients = torch.zeros_like(both[0]), dict[str, Tensor]()
    for stream in (0, 1):
        part_loss, part_gradients = loss_and_gradients(
            model, pack([[one_stream(e, stream) for e in views] for views in without_queries], pixels), objective, counts)
        loss += part_loss
        gradients = {name: gradients.get(name, 0) + gradient for name, gradient in part_gradients.items()}
    assert_same(both, (loss, gradients))


def test_reverse_stream_equals_the_forward_stream_on_the_reversed_caption() -> None:
    """Same weights, same positions, mirrored masks (t4): only the order of the tokens and of the position vectors is turned round."""
    run = tiny_run("flm")
    objective, rng = objective_of(run), np.random.default_rng(3)
    ids = caption_ids(7, rng)
    (example,) = objective.corrupt(ids, rng)
    pixels = random_pixels(1, rng)
    model = build_model(run, objective)
    torch.nn.init.zeros_(model.layers["fusion_entry"].kinds.weight)
    reverse = model.trunk(pack([[one_stream(example, 1)]], pixels)).rows[: len(ids)]
    turned = replace(one_stream(example, 0), ids=ids[::-1].copy())
    positions = model.layers["text_entry"].positions.weight
    with torch.no_grad():
        positions[: len(ids)] = positions[: len(ids)].flip(0)
    forward = model.trunk(pack([[turned]], pixels)).rows[: len(ids)].flip(0)
    torch.testing.assert_close(reverse, forward, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_chunked_loss_equals_plain_loss(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "TARGETS_PER_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    rows, targets = torch.randn(40, 16, generator=generator, requires_grad=True), torch.randint(0, 30, (40,), generator=generator)
    upstream = torch.rand(40, generator=generator)
    decoder = Decoder(16, 30)
    torch.nn.init.normal_(decoder.weight, generator=generator)
    torch.nn.init.normal_(decoder.bias, generator=generator)
    loss, correct = decoder(rows, targets)
    got = torch.autograd.grad((loss * upstream).sum(), [rows, decoder.weight, decoder.bias])
    logits = decoder.logits(rows)
    plain = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    want = torch.autograd.grad((plain * upstream).sum(), [rows, decoder.weight, decoder.bias])
    torch.testing.assert_close(loss, plain)
    assert (correct == (logits.argmax(-1) == targets)).all()
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_full_logits_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest product of the decoder has one chunk's rows."""
    monkeypatch.setattr(parts, "TARGETS_PER_CHUNK", 8)
    shapes = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(parts.F, "linear", lambda *args: shapes.append(linear(*args).shape) or linear(*args))
    decoder = Decoder(16, 30)
    torch.nn.init.zeros_(decoder.weight)
    torch.nn.init.zeros_(decoder.bias)
    loss, _ = decoder(torch.zeros(40, 16, requires_grad=True), torch.zeros(40, dtype=torch.long))
    loss.sum().backward()
    # Five chunks forward; backward the last one is still there.
    assert len(shapes) == 9
    assert max(shape[0] for shape in shapes) == 8


def test_recomputed_activations_change_nothing() -> None:
    run = tiny_run("flm")
    objective, rng = objective_of(run), np.random.default_rng(4)
    state = pack(random_examples(objective, rng, captions_per_image=[1, 2]), random_pixels(2, rng))
    counts = torch.bincount(state.target_parts, minlength=len(objective.parts))
    plain = loss_and_gradients(build_model(run, objective), state, objective, counts)
    again = loss_and_gradients(build_model(run.replace(recompute=True), objective), state, objective, counts)
    assert_same(plain, again)


def test_the_pooled_row_does_not_depend_on_the_other_queries() -> None:
    """t13: a downstream head may leave them out."""
    run = tiny_run("flm")
    objective, rng = objective_of(run), np.random.default_rng(5)
    ids, pixels = caption_ids(6, rng), random_pixels(1, rng)
    alone = objective.whole(ids)
    (corrupted,) = objective.corrupt(ids, rng)
    among = replace(alone, queries=np.concatenate([alone.queries, corrupted.queries]),
                    span_first=np.concatenate([alone.span_first, corrupted.span_first]),
                    span_last=np.concatenate([alone.span_last, corrupted.span_last]))
    model = build_model(run, objective)
    rows = [(state := pack([[example]], pixels), model.trunk(state).rows[state.pooled_rows])[1] for example in (alone, among)]
    torch.testing.assert_close(rows[0], rows[1])
