"""The frozen language model against transformers' own, on tiny random models of every family saved as several safetensors."""

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flm_scale.batch import State
from flm_scale.config_lm import LanguageModelConfig
from flm_scale.data.pack import pack
from flm_scale.errors import CheckpointError, ConfigError, UserError
from flm_scale.model import frozen_lm
from flm_scale.model.frozen_lm import FAMILIES, FrozenLm, content_hash, language_shape, open_frozen
from flm_scale.objectives.captioning import Answering
from tests.synthetic import caption_ids, objective_of, random_examples, random_pixels, tiny_run

PREFIX = 5
BOS, EOS = 1, 2
UP, HEAD = "model.layers.0.mlp.up_proj.weight", "lm_head.weight"
SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 40,
         "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}
LLAMA = {"intermediate_size": 64, "num_key_value_heads": 2, "attention_dropout": 0.5}
OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
    # Like OPT-350M, whose embeddings are narrower than its layers.
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 24, "dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5},
    "llama": LLAMA, "qwen2": LLAMA | {"tie_word_embeddings": True}, "qwen3": LLAMA | {"head_dim": 8, "tie_word_embeddings": True},
    "mistral": LLAMA | {"sliding_window": 7}, "smollm3": LLAMA,
}


def write_model(family: str, folder: Path, **changes: Any) -> Any:
    """Save a model of random weights in several files, every dropout at .5; return transformers' own, which has none in eval mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | OTHERS[family] | changes)).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.2)
    theirs.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return theirs


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    folders = {family: tmp_path_factory.mktemp("language_models") / family for family in FAMILIES}
    return {family: (folder, write_model(family, folder)) for family, folder in folders.items()}


@pytest.fixture
def printed(capfd: pytest.CaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What has reached the terminal; transformers' log too, which prints to the stderr that was there when it was imported."""
    records, handler, logger = list[str](), logging.Handler(), logging.getLogger("transformers")
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    yield lambda: [*filter(None, capfd.readouterr()), *records]
    logger.removeHandler(handler)


def opened(folder: Path, *, recompute: bool = False, precision: str = "fp32", **changes: Any) -> FrozenLm:
    values = {"name": str(folder), "max_length": 16} | changes
    return open_frozen(LanguageModelConfig(**values), precision=precision, prefix_tokens=PREFIX, recompute=recompute)


def state_of(captions_per_image: list[int], *, width: int, seed: int = 0) -> State:
    """AR targets of captions of several lengths, behind random rows."""
    rng = np.random.default_rng(seed)
    objective = objective_of(tiny_run("ar"))
    state = pack(random_examples(objective, rng, captions_per_image=captions_per_image), random_pixels(len(captions_per_image), rng))
    generator = torch.Generator().manual_seed(seed)
    return state._replace(rows=torch.randn(len(captions_per_image) * PREFIX, width, generator=generator).requires_grad_())


def padded(theirs: Any, state: State, captions_per_image: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The same captions as transformers' users lay them out: embeddings, attention mask, labels with -100 on the prefix, BOS and padding."""
    images = [image for image, count in enumerate(captions_per_image) for _ in range(count)]
    captions = state.ids.split(state.lengths.tolist())
    longest = max(len(ids) for ids in captions)
    ids = torch.stack([torch.cat([ids, torch.full((longest - len(ids),), EOS)]) for ids in captions])
    real = torch.stack([torch.arange(longest) < len(ids) for ids in captions])
    prefixes = state.rows.unflatten(0, (-1, PREFIX))[images]
    labels = torch.where(real, ids, -100)
    labels[:, 0] = -100
    ones = torch.ones(len(ids), PREFIX, dtype=torch.long)
    return (torch.cat([prefixes, theirs.get_input_embeddings()(ids)], dim=1), torch.cat([ones, real.long()], dim=1),
            torch.cat([ones * -100, labels], dim=1))


COUNTS = [1, 3, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_gradients_are_transformers_own(family: str, models: dict) -> None:
    """Packed captions of several lengths, several of one picture; theirs are padded rows with -100 where there is no target."""
    folder, theirs = models[family]
    ours = opened(folder)
    width = language_shape(LanguageModelConfig(name=str(folder))).width
    assert width == theirs.get_input_embeddings().embedding_dim
    state = state_of(COUNTS, width=width)
    embeds, mask, labels = padded(theirs, state, COUNTS)
    wanted = theirs(inputs_embeds=embeds, attention_mask=mask, labels=labels)
    wanted_gradient, = torch.autograd.grad(wanted.loss, state.rows)
    # A row predicts the next one's label.
    torch.testing.assert_close(ours.logits(state), wanted.logits[:, :-1][labels[:, 1:] != -100], rtol=0, atol=1e-5)
    loss, correct = ours(state)
    torch.testing.assert_close(loss.mean(), wanted.loss, rtol=0, atol=1e-5)
    assert torch.equal(correct, ours.logits(state).argmax(-1) == state.target_ids)
    loss.mean().backward()
    torch.testing.assert_close(state.rows.grad, wanted_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_answers_is_transformers_own_with_questions_left_out(family: str, models: dict) -> None:
    """Questions of several lengths, which are read and no target."""
    folder, theirs = models[family]
    ours, rng = opened(folder), np.random.default_rng(0)
    num_read = [3, 1, 6, 2, 4, 5]
    texts = [caption_ids(8 - number, rng) for number in range(6)]
    examples = iter(Answering().corrupt(np.append(ids, read), rng)[0] for ids, read in zip(texts, num_read, strict=True))
    state = pack([[next(examples) for _ in range(count)] for count in COUNTS], random_pixels(len(COUNTS), rng))
    state = state._replace(rows=torch.randn(len(COUNTS) * PREFIX, ours.lm.get_input_embeddings().embedding_dim))
    embeds, mask, labels = padded(theirs, state, COUNTS)
    for row, read in zip(labels, num_read, strict=True):
        row[:PREFIX + read] = -100
    loss, _ = ours(state)
    assert len(loss) == int((labels != -100).sum())
    torch.testing.assert_close(loss.mean(), theirs(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss, rtol=0, atol=1e-5)


def test_a_large_batch_is_scored_chunk_by_chunk_with_the_same_gradients(models: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weighted unlike each other, as the parts of an objective are."""
    folder, _ = models["gpt2"]
    ours, state = opened(folder), state_of(COUNTS, width=32)
    weights = torch.rand(len(state.target_ids))

    def losses_and_gradient() -> tuple[Tensor, Tensor]:
        loss, _ = ours(state)
        return loss.detach(), torch.autograd.grad((loss * weights).sum(), state.rows)[0]

    whole = losses_and_gradient()
    through_logits = torch.nn.functional.cross_entropy(ours.logits(state), state.target_ids, reduction="none")
    monkeypatch.setattr(frozen_lm, "TARGETS_PER_CHUNK", 4)
    for got, same, wanted in zip(losses_and_gradient(), whole, (through_logits.detach(), torch.autograd.grad(
            (through_logits * weights).sum(), state.rows)[0]), strict=True):
        torch.testing.assert_close(got, same, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_captions_equal_one_by_one(family: str, models: dict) -> None:
    """And two captions of one picture equal two rows."""
    folder, _ = models[family]
    ours = opened(folder)
    width = ours.lm.get_input_embeddings().embedding_dim
    rng, objective = np.random.default_rng(0), objective_of(tiny_run("ar"))
    examples = random_examples(objective, rng, captions_per_image=COUNTS)
    rows = torch.randn(len(COUNTS), PREFIX, width)

    def losses(examples: list, rows: Tensor) -> Tensor:
        state = pack(examples, random_pixels(len(examples), rng))._replace(rows=rows.flatten(0, 1))
        return ours(state)[0]

    alone = [losses([[example]], rows[[image]]) for image, views in enumerate(examples) for example in views]
    torch.testing.assert_close(losses(examples, rows), torch.cat(alone), rtol=0, atol=1e-5)


def test_a_picture_without_a_target_scores_nothing(models: dict) -> None:
    state = state_of([2, 1], width=32)
    nothing = torch.empty(0, dtype=torch.long)
    loss, correct = opened(models["gpt2"][0])(state._replace(target_rows=nothing, target_ids=nothing, target_parts=nothing))
    assert len(loss) == len(correct) == 0
    loss.sum().backward()
    assert not state.rows.grad.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_reach_a_target(family: str, models: dict) -> None:
    ours = opened(models[family][0])
    state = state_of(COUNTS, width=ours.lm.get_input_embeddings().embedding_dim)
    padding = torch.ones_like(state.slots, dtype=torch.bool).flatten().index_fill(0, state.places, False).view_as(state.slots)
    assert padding.any()
    slots = state.slots.clone()
    slots[padding] = torch.arange(int(padding.sum())) % len(state.ids)
    other = state._replace(slots=slots)
    assert not torch.equal(state.ids[state.slots], state.ids[other.slots])
    assert torch.equal(ours(state)[0], ours(other)[0])
    assert torch.equal(torch.autograd.grad(ours(state)[0].sum(), state.rows)[0], torch.autograd.grad(ours(other)[0].sum(), state.rows)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_means_frozen(family: str, models: dict) -> None:
    """In train mode and with every dropout of its config at .5: no noise, no gradient, no change of a weight."""
    ours = opened(models[family][0])
    assert ours.train().lm.training
    before = content_hash(ours)
    state = state_of(COUNTS, width=ours.lm.get_input_embeddings().embedding_dim)
    first, second, evaluated = ours(state)[0], ours(state)[0], ours.eval()(state)[0]
    assert torch.equal(first, second)
    assert torch.equal(first, evaluated)
    first.sum().backward()
    assert state.rows.grad.any()
    assert not any(weight.requires_grad or weight.grad is not None for weight in ours.parameters())
    assert content_hash(ours) == before
    with torch.no_grad():
        next(ours.parameters()).view(-1)[3] += 1e-3
    assert content_hash(ours) != before


def saved_bytes(work: Callable[[], Tensor], held: set[int]) -> tuple[Tensor, int]:
    """What `work` gives, and the memory that it keeps for the backward pass beside what is `held` anyway."""
    sizes = dict[int, int]()

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        out = work()
    return out, sum(sizes.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputation_saves_memory_and_changes_no_bit(family: str, models: dict) -> None:
    """In the mode that a new model is in, without a call of train(): transformers recomputes in train mode alone, and says nothing elsewhere."""
    results = []
    for recompute in (False, True):
        ours = opened(models[family][0], recompute=recompute)
        state = state_of(COUNTS, width=ours.lm.get_input_embeddings().embedding_dim)
        weights = {weight.untyped_storage().data_ptr() for weight in ours.parameters()}
        loss, saved = saved_bytes(lambda ours=ours, state=state: ours(state)[0], weights)
        loss.sum().backward()
        results.append((saved, loss.detach(), state.rows.grad))
    (plain, *wanted), (recomputed, *got) = results
    assert recomputed < plain / 3
    assert all(torch.equal(left, right) for left, right in zip(got, wanted, strict=True))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_transformers_own(family: str, beams: int, models: dict) -> None:
    """On the same embeddings, in train mode with recomputation too; scores are the mean log-probability of the tokens, EOS counted."""
    from transformers import GenerationConfig

    folder, theirs = models[family]
    ours = opened(folder, recompute=True)
    prefixes = torch.randn(4, PREFIX, theirs.get_input_embeddings().embedding_dim, generator=torch.Generator().manual_seed(1))
    prompt = [BOS, 7, 9]
    said = ours.generate(prefixes, [prompt] * 4, end_ids=[EOS], max_new=9, beams=beams)
    assert ours.lm.training
    table = theirs.get_input_embeddings()
    embeds = torch.cat([prefixes, table(torch.tensor(prompt)).expand(4, -1, -1)], dim=1)
    wanted = theirs.generate(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long), generation_config=GenerationConfig(
        max_new_tokens=9, num_beams=beams, do_sample=False, eos_token_id=EOS, pad_token_id=EOS))
    for (ids, score), prefix, row in zip(said, embeds, wanted.tolist(), strict=True):
        cut = row[:row.index(EOS)] if EOS in row else row
        assert ids == cut
        tokens = cut + [EOS] * (EOS in row)
        logits = theirs(inputs_embeds=torch.cat([prefix, table(torch.tensor(tokens))])[None]).logits[0, len(prefix) - 1:-1]
        assert score == pytest.approx(float(logits.log_softmax(-1)[torch.arange(len(tokens)), tokens].mean().detach()), abs=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_unlike_lengths_are_continued_as_one_by_one(family: str, beams: int, models: dict) -> None:
    """Token by token, whichever way a family finds its positions behind padding on the left; also without a picture, and with another penalty."""
    ours = opened(models[family][0])
    rows = torch.randn(4, PREFIX, ours.lm.get_input_embeddings().embedding_dim, generator=torch.Generator().manual_seed(2))
    prompts = [[BOS, 7, 9, 11, 13], [BOS], [BOS, 20, 21], [BOS, 30, 31, 32, 33, 34, 35]]
    for prefixes, penalty in ((rows, 1.0), (rows, 0.0), (ours.no_pictures(4), 1.0)):
        options: dict[str, Any] = {"end_ids": [EOS, 5, 8], "max_new": 10, "beams": beams, "length_penalty": penalty}
        alone = [ours.generate(prefixes[[number]], [prompt], **options)[0] for number, prompt in enumerate(prompts)]
        together = ours.generate(prefixes, prompts, **options)
        assert [ids for ids, _ in together] == [ids for ids, _ in alone]
        assert [score for _, score in together] == pytest.approx([score for _, score in alone], abs=1e-4)
        assert not {EOS, 5, 8} & {token for ids, _ in together for token in ids}


def test_generation_never_copies_the_output_embeddings_for_each_caption(models: dict) -> None:
    """torch does so for rows that are a strided slice, as transformers' first step has them: 18 GB for 64 captions, five beams and 135 M weights."""
    ours, met = opened(models["llama"][0]), list[bool]()
    ours.lm.get_output_embeddings().register_forward_hook(lambda _, inputs, __: met.append(inputs[0].is_contiguous()))
    ours.generate(torch.randn(16, PREFIX, 32), [[BOS, 7]] * 16, end_ids=[EOS], max_new=2)
    assert met
    assert all(met)


def test_what_ends_a_text_waits_for_the_least_length(models: dict) -> None:
    ours = opened(models["llama"][0])
    rows = torch.randn(1, PREFIX, 32, generator=torch.Generator().manual_seed(3))
    (said, _), = ours.generate(rows, [[BOS, 7]], end_ids=[EOS], max_new=6)
    (nothing, _), = ours.generate(rows, [[BOS, 7]], end_ids=[EOS, said[0]], max_new=6)
    (something, _), = ours.generate(rows, [[BOS, 7]], end_ids=[EOS, said[0]], max_new=6, min_new=2)
    assert nothing == []
    assert len(something) >= 2
    assert said[0] not in something


def test_what_its_folder_says_of_sampling_is_not_followed(tmp_path: Path) -> None:
    write_model("llama", tmp_path)
    prefixes, said = torch.randn(2, PREFIX, 32), []
    for values in ({}, {"do_sample": True, "temperature": 9.0, "repetition_penalty": 5.0, "forced_bos_token_id": 8}):
        (tmp_path / "generation_config.json").write_text(json.dumps(values))
        said.append(opened(tmp_path).generate(prefixes, [[BOS]] * 2, end_ids=[EOS], max_new=11))
    assert said[0] == said[1]


def test_precision_is_the_configs_whatever_an_engine_casts(models: dict) -> None:
    """DeepSpeed casts a whole module; rotary tables in bf16 would turn far positions by the wrong angle."""
    folder, _ = models["llama"]
    state = state_of(COUNTS, width=32)
    named, cast = opened(folder, dtype="bf16"), opened(folder, precision="bf16").bfloat16()
    kept = opened(folder, dtype="fp32", precision="bf16").bfloat16()
    assert {weight.dtype for weight in cast.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in kept.parameters()} == {buffer.dtype for buffer in cast.buffers()} == {torch.float32}
    assert torch.equal(named(state)[0], cast(state)[0])
    assert torch.equal(kept(state)[0], opened(folder)(state)[0])
    loss, _ = cast(state)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    torch.testing.assert_close(loss, kept(state)[0], rtol=0.1, atol=0.2)
    cosine = torch.cosine_similarity(state.rows.grad.flatten(), torch.autograd.grad(kept(state)[0].sum(), state.rows)[0].flatten(), dim=0)
    assert float(cosine) > 0.99


def test_a_model_of_the_hub_is_read_offline_at_its_revision(models: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the cache that an earlier download has left."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "models--somebody--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "v2").write_text(commit)
    shutil.copytree(models["qwen2"][0], cache / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ours = opened("somebody/tiny", revision="v2")
    assert content_hash(ours) == content_hash(opened(models["qwen2"][0]))
    for wrong in ({"folder": "somebody/tiny", "revision": "v3"}, {"folder": "somebody/else"}):
        with pytest.raises(CheckpointError, match=r"^text.name \('somebody/(tiny|else)'\) is not a folder, and cannot be had from the hub"):
            opened(**wrong)


def shards_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any], *, of: str = UP) -> None:
    """Change the tensors of the file that holds this one."""
    from safetensors.torch import load_file, save_file

    path = folder / shards_of(folder)[of]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def only_pickles(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")


MISTAKES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing shard": (lambda folder: (folder / shards_of(folder)[UP]).unlink(), r"1 of \d+ files of weights are missing \(model-000"),
    "tensor of the index in no shard": (lambda folder: rewrite(folder, lambda tensors: tensors.pop(UP)), rf"'{UP}' is missing: not the weights"),
    "untied head that is absent": (lambda folder: rewrite(folder, lambda tensors: tensors.pop(HEAD), of=HEAD), rf"'{HEAD}' is missing: not the"),
    "tensor that the model does not have": (lambda folder: rewrite(folder, lambda tensors: tensors.update(x=torch.ones(1))), "'x' is not the model"),
    "wrong shape": (lambda folder: rewrite(folder, lambda tensors: tensors.update({UP: torch.ones(64, 31)})), rf"'{UP}' \[64, 31\] must be \[64, 3"),
    "wrong width": (lambda folder: edit_config(folder, hidden_size=64), r"'lm_head.weight' \[61, 32\] must be \[61, 64\], .* and \d+ more: not the"),
    "a layer more": (lambda folder: edit_config(folder, num_hidden_layers=4), r"'model.layers.3.*is missing.* and 6 more"),
    "truncated shard": (lambda folder: (folder / shards_of(folder)[UP]).write_bytes(b"\0" * 9), "does not load"),
    "damaged index": (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), "index.json cannot be read .*; fetch it again"),
    "pickles alone": (only_pickles, "has no model.safetensors; pickled weights .* are not read, because they can run code"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing; text.name wants a folder"),
    "config that is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json: .*not a valid JSON"),
    "config of a wrong type": (lambda folder: edit_config(folder, hidden_size="wide"), "config.json: .*hidden_size"),
    "architecture that nobody knows": (lambda folder: edit_config(folder, model_type="martian"), "config.json: .*martian"),
    "architecture with code of its own": (lambda folder: edit_config(folder, model_type="martian", auto_map={"AutoConfig": "code.Config"}),
                                          "config.json: .*custom code"),
    "architecture that is not tested": (lambda folder: edit_config(folder, model_type="bert"), r"model_type \('bert'\) is not one of gpt2, llama"),
    "quantised weights": (lambda folder: edit_config(folder, quantization_config={"quant_method": "fp8"}), "its weights are quantised"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_folder_is_one_line(mistake: str, models: dict, tmp_path: Path, printed: Callable[[], list[str]]) -> None:
    """And nothing else reaches the terminal."""
    spoil, message = MISTAKES[mistake]
    folder = shutil.copytree(models["llama"][0], tmp_path / "llama")
    spoil(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert not printed()


@pytest.mark.parametrize(("values", "kind", "message"), [
    ({"name": "no/such/folder"}, CheckpointError, r"text.name \('no/such/folder'\) is not a folder, and cannot be had from the hub"),
    ({"revision": "main"}, ConfigError, r"text.revision \('main'\) is of a model of the hub, and .* is a folder; leave it out"),
    ({"attention": "flash_attention_2"}, ConfigError, r"text.attention \('flash_attention_2'\) cannot be had here .*; use sdpa"),
    ({"max_length": 36}, ConfigError, r"text.max_length \(36\) behind 5 tokens of a picture must fit into .* 40 positions; use at most 35"),
    ({"gguf_file": "none.gguf"}, CheckpointError, "none.gguf is missing"),
])
def test_a_wrong_value_is_one_line(values: dict, kind: type[UserError], message: str, models: dict, printed: Callable[[], list[str]]) -> None:
    with pytest.raises(kind, match=message) as caught:
        opened(models["llama"][0], **values)
    assert "\n" not in str(caught.value)
    assert not printed()


def test_loading_and_generating_say_nothing(models: dict, tmp_path: Path, printed: Callable[[], list[str]]) -> None:
    """With a tied head that the files do not have, and tables that old checkpoints have and nobody wants. Others may still log."""
    from transformers.utils.logging import get_verbosity, is_progress_bar_enabled

    before = get_verbosity(), is_progress_bar_enabled()
    folder = shutil.copytree(models["qwen2"][0], tmp_path / "qwen2")
    assert HEAD not in shards_of(folder)
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    opened(folder).generate(torch.randn(2, PREFIX, 32), [[BOS]] * 2, end_ids=[EOS], max_new=8, beams=2)
    assert not printed()
    assert (get_verbosity(), is_progress_bar_enabled()) == before


def write_gguf(theirs: Any, path: Path) -> None:
    """The tiny llama as llama.cpp has it: its own names, rotary pairs side by side."""
    from gguf import GGUFWriter

    config, writer = theirs.config, GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    modules = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
               "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
               "post_attention_layernorm": "ffn_norm"}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    for name, weight in theirs.state_dict().items():
        if name in names:
            writer.add_tensor(names[name], weight.numpy())
            continue
        _, _, layer, module, _ = name.replace("self_attn.", "self_attn/").replace("mlp.", "mlp/").split(".")
        kind = modules[module.replace("/", ".")]
        values = weight.unflatten(0, (heads[kind], 2, -1)).transpose(1, 2).flatten(0, 2) if kind in heads else weight
        writer.add_tensor(f"blk.{layer}.{kind}.weight", values.contiguous().numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()


def test_a_gguf_file_is_the_same_model_as_its_safetensors(models: dict, tmp_path: Path, printed: Callable[[], list[str]]) -> None:
    folder, theirs = models["llama"]
    write_gguf(theirs, tmp_path / "tiny.gguf")
    printed()
    ours, state = opened(tmp_path, gguf_file="tiny.gguf"), state_of(COUNTS, width=32)
    assert not printed()
    assert content_hash(ours) == content_hash(opened(folder))
    loss, _ = ours(state)
    torch.testing.assert_close(loss, opened(folder)(state)[0], rtol=0, atol=1e-5)
    loss.sum().backward()
    assert state.rows.grad.any()


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_gguf_file_without_the_package_is_one_line(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, package, None)  # Python's own way to forbid an import
    with pytest.raises(ConfigError, match=f"text.gguf_file needs the package {package}; `pip install {package}`"):
        opened(tmp_path, gguf_file="tiny.gguf")


def test_a_damaged_gguf_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF" + b"\0" * 20)
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: ") as caught:
        opened(tmp_path, gguf_file="tiny.gguf")
    assert "\n" not in str(caught.value)
