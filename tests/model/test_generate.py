"""Generation: the cached steps are the forward stream, one beam is greedy, many beams find the best caption, and EOS ends one."""

import itertools

import numpy as np
import pytest
import torch

from flm_scale.config import TextConfig
from flm_scale.data.pack import pack
from flm_scale.errors import ConfigError
from flm_scale.model.assemble import VisionLanguageModel, build_model
from flm_scale.model.generate import CachedDecoder, Generated, encode_images, generate
from flm_scale.objectives.ar import causal_example
from tests.synthetic import VOCAB_SIZE, caption_ids, objective_of, random_pixels, tiny_run

BOS, EOS = 1, 2


def sharp_model(objective: str = "ar", *, norm: str = "pre", seed: int = 0) -> VisionLanguageModel:
    """A random model with opinions: its logits differ by some nats, and by picture."""
    run = tiny_run(objective, seed=seed)
    run = run.replace(text=TextConfig(**(dict(run.text) | {"norm": norm})))
    model = build_model(run, objective_of(run))
    with torch.no_grad():
        model.head.decoder.weight.mul_(4)
        for name, parameter in model.named_parameters():
            if "image_attention" in name or "token" in name:
                parameter.mul_(4)
    return model


def full_logits(model: VisionLanguageModel, prefix: list[int], pixels: np.ndarray) -> torch.Tensor:
    """Logits behind each position of the prefix, from the training-time forward pass over all of it."""
    view = causal_example(np.array([*prefix, EOS], np.int32), ("forward", "eos"))
    state = pack([[view]], pixels[None])
    with torch.no_grad():
        return model.head.decoder.logits(model.head.features(model.trunk(state).rows[state.target_rows]))


def say(model: VisionLanguageModel, pixels: np.ndarray, *, objective: str = "ar", vocab_size: int = VOCAB_SIZE, max_length: int = 8,
        beams: int = 1) -> list[Generated]:
    return generate(model, objective_of(tiny_run(objective)), torch.from_numpy(pixels), bos_id=BOS, eos_id=EOS, vocab_size=vocab_size,
                    max_length=max_length, beams=beams)


def total_score(model: VisionLanguageModel, content: list[int], pixels: np.ndarray, *, vocab_size: int) -> float:
    """Mean log-probability of content and EOS, BOS never being said."""
    logits = full_logits(model, [BOS, *content], pixels)[:, :vocab_size].clone()
    logits[:, BOS] = -torch.inf
    return float(logits.log_softmax(-1)[range(len(content) + 1), [*content, EOS]].mean())


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("objective", ["flm", "ar", "prefix_lm"])
def test_cached_steps_equal_the_forward_stream_over_the_whole_prefix(objective: str, norm: str) -> None:
    rng = np.random.default_rng(0)
    model, pixels = sharp_model(objective, norm=norm), random_pixels(2, rng)
    captions = [caption_ids(6, rng)[:-1] for _ in range(4)]
    decoder = CachedDecoder(model, encode_images(model, torch.from_numpy(pixels)), beams=2)
    with torch.no_grad():
        steps = torch.stack([decoder.step(torch.tensor([int(ids[t]) for ids in captions])) for t in range(7)], dim=1)
    for row, ids in enumerate(captions):
        torch.testing.assert_close(steps[row], full_logits(model, ids.tolist(), pixels[row // 2]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("objective", ["flm", "ar"])
def test_one_beam_is_greedy_search(objective: str) -> None:
    pixels = random_pixels(5, np.random.default_rng(1))
    model = sharp_model(objective, seed=3)
    found = say(model, pixels, objective=objective)
    for picture, one in zip(pixels, found, strict=True):
        ids = [BOS]
        while ids[-1] != EOS and len(ids) < 7:
            logits = full_logits(model, ids, picture)[-1]
            logits[BOS] = -torch.inf
            ids.append(int(logits.argmax()))
        assert one.ids == [token for token in ids[1:] if token != EOS]
        assert one.score == pytest.approx(total_score(model, one.ids, picture, vocab_size=VOCAB_SIZE), abs=1e-5)
    assert len({tuple(one.ids) for one in found}) > 1, "the pictures must matter, or this test shows little"


@pytest.mark.parametrize("seed", range(4))
def test_enough_beams_find_the_best_of_all_captions(seed: int) -> None:
    vocab_size, pixels = 6, random_pixels(3, np.random.default_rng(seed))
    model = sharp_model(seed=seed)
    content = [token for token in range(vocab_size) if token not in (BOS, EOS)]
    everything = [list(ids) for size in range(3) for ids in itertools.product(content, repeat=size)]
    for picture, one in zip(pixels, say(model, pixels, vocab_size=vocab_size, max_length=4, beams=36), strict=True):
        scores = [total_score(model, ids, picture, vocab_size=vocab_size) for ids in everything]
        assert one.ids == everything[int(np.argmax(scores))]
        assert one.score == pytest.approx(max(scores), abs=1e-5)


def test_beam_search_of_a_picture_does_not_depend_on_its_neighbours() -> None:
    pixels, model = random_pixels(4, np.random.default_rng(2)), sharp_model(seed=5)
    together = say(model, pixels, beams=3)
    for picture, one in zip(pixels, together, strict=True):
        alone = say(model, picture[None], beams=3)[0]
        assert alone.ids == one.ids
        assert alone.score == pytest.approx(one.score, abs=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_model_that_wants_to_end_says_nothing_and_one_that_never_does_is_ended(beams: int) -> None:
    pixels, model = random_pixels(2, np.random.default_rng(3)), sharp_model()
    with torch.no_grad():
        model.head.decoder.bias[EOS] = 100.0
        assert [one.ids for one in say(model, pixels, beams=beams)] == [[], []]
        model.head.decoder.bias[EOS] = -100.0
    for one in say(model, pixels, beams=beams, max_length=6):
        assert len(one.ids) == 4, "BOS and EOS are two of the six"
        assert EOS not in one.ids


def test_tokens_that_the_tokenizer_lacks_are_never_said() -> None:
    pixels, model = random_pixels(2, np.random.default_rng(4)), sharp_model()
    with torch.no_grad():
        model.head.decoder.bias[20:] = 50.0
        model.head.decoder.bias[BOS] = 50.0
    assert all(token < 20 and token != BOS for one in say(model, pixels, vocab_size=20, beams=2) for token in one.ids)


def test_masked_language_model_refuses_to_say_a_caption() -> None:
    run = tiny_run("mlm")
    objective = objective_of(run)
    pixels = torch.from_numpy(random_pixels(1, np.random.default_rng(5)))
    with pytest.raises(ConfigError, match=r"mlm.*use flm, ar or prefix_lm"):
        generate(build_model(run, objective), objective, pixels, bos_id=BOS, eos_id=EOS, vocab_size=VOCAB_SIZE, max_length=8)


