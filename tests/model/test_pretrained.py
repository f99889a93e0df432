"""Text weights of a RoBERTa and a BERT made by transformers compute here what they compute there; the account tells what became of everything."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flm_scale.cli import main
from flm_scale.config import Run, TextConfig
from flm_scale.config_vision import OpenClipVisionConfig
from flm_scale.data.shards import Dataset
from flm_scale.data.tokens import Tokenizer, train_tokenizer
from flm_scale.errors import CheckpointError, ConfigError
from flm_scale.model.assemble import VisionLanguageModel, account_for, assemble, build_model, is_pretrained, layer_builders
from flm_scale.model.parts import PlainParts
from flm_scale.model.pretrained import Account, PretrainedText
from flm_scale.model.spelling import speller
from flm_scale.model.text import split_rows
from tests.model.test_vision import NAME, shrunk, weight_file  # noqa: F401 - fixtures
from tests.synthetic import as_batch, objective_of, random_pixels, tiny_run
from tests.test_train import ROOT, lines_of

SENTENCES = ["a red circle", "the big square, that you see here, is blue", "green on white", "is it a red square?"]
OTHERS = ["redder circles", "é"]
KINDS = ["roberta", "bert"]
LAYERS = 3


def new_tokenizer(kind: str) -> Any:
    """A tokenizer of the kind that RoBERTa or BERT has, which knows every word of SENTENCES."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    if kind == "bert":
        words = sorted({word for sentence in SENTENCES for word in sentence.replace(",", " ,").replace("?", " ?").split()})
        letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
        inside = [f"##{piece}" for piece in ["ircle", *letters]]
        vocabulary = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *letters, *inside])
        tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(vocabulary)}, unk_token="[UNK]"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
        return tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator([f" {sentence}" for sentence in SENTENCES] * 9, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


def write_source(kind: str, folder: Path, **changes: Any) -> Any:
    """Save a whole model of random weights, norms and biases too, as its users have it; return transformers' model."""
    import transformers

    tokenizer = new_tokenizer(kind)
    config, model = {"roberta": (transformers.RobertaConfig, transformers.RobertaForMaskedLM),
                     "bert": (transformers.BertConfig, transformers.BertForPreTraining)}[kind]
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
             "intermediate_size": 128, "max_position_embeddings": 30, "layer_norm_eps": 1e-5}
    theirs = model(config(**sizes | changes)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.3)
    theirs.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return theirs


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    folders = {kind: tmp_path_factory.mktemp("source") / kind for kind in KINDS}
    return {kind: (folder, write_source(kind, folder)) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer([text for sentence in SENTENCES for text in [sentence] * 9] + OTHERS, vocab_size=110, model_file=path)
    return Tokenizer(path)


def pieces_of(tokenizer: Tokenizer) -> list[str]:
    return tokenizer.pieces(range(tokenizer.vocab_size))


def run_of(folder: Path, tokenizer: Tokenizer, objective: str = "flm", **changes: Any) -> Run:
    """Three rows of the table stand for no piece."""
    text = {"width": 32, "heads": 4, "bottom_layers": 2, "fusion_layers": 1, "reconstructor_bottom_layers": 1, "reconstructor_fusion_layers": 1,
            "vocab_size": tokenizer.vocab_size + 3, "max_length": 20, "norm": "post", "pretrained": str(folder)}
    return tiny_run(objective, text=TextConfig(**text | changes))


def model_of(run: Run, tokenizer: Tokenizer) -> tuple[VisionLanguageModel, PretrainedText]:
    text = PretrainedText(run.text, pieces_of(tokenizer))
    return assemble(run, layer_builders(run, objective_of(run), PlainParts(), pretrained_text=text)), text


@pytest.mark.parametrize("kind", KINDS)
def test_bottom_layers_and_head_compute_what_transformers_computes(kind: str, sources: dict, tokenizer: Tokenizer) -> None:
    """Hidden tokens and all: MLM rows see their whole caption, as a BERT's do. Both cut the sentences alike."""
    folder, theirs = sources[kind]
    run = run_of(folder, tokenizer, "mlm")
    objective = objective_of(run)
    model, text = model_of(run, tokenizer)
    encoded = [np.array(tokenizer.encode(sentence, 20), dtype=np.int32) for sentence in SENTENCES]
    for sentence, ids in zip(SENTENCES, encoded, strict=True):
        spelled = [token for piece in ids[1:-1].tolist() for token in text.spellings[piece]]
        assert spelled == new_tokenizer(kind).encode(f" {sentence}").ids
        assert len(spelled) == len(ids) - 2
    rng = np.random.default_rng(0)
    batch = as_batch([objective.corrupt(ids, rng) for ids in encoded], random_pixels(len(encoded), rng), objective)
    state = batch.state
    with torch.no_grad():
        for name in ("vision_entry", "vision_0", "vision_1", "vision_exit", "text_entry", "bottom_0", "bottom_1"):
            state = model.layers[name](state)
        rows = split_rows(state)[0][0]
        assert tokenizer.mask_id in state.ids
        found, theirs_of = [i for i, ids in enumerate(text.spellings) if len(ids) == 1], [ids[0] for ids in text.spellings if len(ids) == 1]
        ours = iter(rows.split(state.lengths.tolist()))
        for ids in state.ids.split(state.lengths.tolist()):
            wanted = theirs(torch.tensor([[text.spellings[i][0] for i in ids]]), output_hidden_states=True)
            caption = next(ours)
            torch.testing.assert_close(caption, wanted.hidden_states[2][0], rtol=0, atol=1e-5)
            top = wanted.hidden_states[-1][0]
            logits = wanted.logits if kind == "roberta" else wanted.prediction_logits
            torch.testing.assert_close(model.head.logits(top)[:, found], logits[0][:, theirs_of], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("kind", "spelled"), [
    ("roberta", {"▁circle": ["Ġcircle"], "s": ["s"], "▁": ["Ġ"], ",": [","], "é": ["Ã", "©"], "<pad>": ["<pad>"], "<mask>": ["<mask>"]}),
    ("bert", {"▁circle": ["circle"], "▁Circle": ["circle"], "ircle": ["##ircle"], ",": [","], "▁reds": ["red", "##s"], "▁é": ["e"], "☃": [],
              "▁": [], "<pad>": ["[PAD]"], "<s>": ["[CLS]"], "</s>": ["[SEP]"], "<unk>": ["[UNK]"], "<mask>": ["[MASK]"]}),
])
def test_a_piece_is_spelled_as_the_other_tokenizer_would_inside_a_sentence(kind: str, spelled: dict[str, list[str]], sources: dict) -> None:
    """Punctuation is a word of its own for a BERT; what it cannot spell has no counterpart."""
    theirs, spell = new_tokenizer(kind), speller(sources[kind][0])
    assert {piece: [theirs.id_to_token(token) for token in spell(piece)] for piece in spelled} == spelled


@pytest.mark.parametrize("kind", KINDS)
def test_older_vocabulary_files_spell_alike(kind: str, sources: dict, tokenizer: Tokenizer, tmp_path: Path) -> None:
    theirs = new_tokenizer(kind)
    theirs.model.save(str(tmp_path))
    found, wanted = speller(tmp_path), speller(sources[kind][0])
    assert [found(piece) for piece in pieces_of(tokenizer)] == [wanted(piece) for piece in pieces_of(tokenizer)]
    assert not (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_is_its_row_or_the_mean_of_those_that_spell_it_or_random(kind: str, sources: dict, tokenizer: Tokenizer) -> None:
    folder, _ = sources[kind]
    run = run_of(folder, tokenizer)
    model, text = model_of(run, tokenizer)
    random = build_model(run.replace(text=run.text.replace(pretrained="")), objective_of(run))
    source = text.tensors[f"{kind}.embeddings.word_embeddings.weight"]
    table, fresh = (one.layers.get_parameter("text_entry.tokens.weight") for one in (model, random))
    lengths = {len(ids) for ids in text.spellings}
    assert {1, 2} <= lengths
    assert (0 in lengths) == (kind == "bert")
    for row, ids in enumerate([*text.spellings, [], [], []]):
        torch.testing.assert_close(table[row], source[ids].mean(0) if ids else fresh[row], rtol=0, atol=1e-6)
    mask = text.spellings[tokenizer.mask_id]
    assert torch.equal(model.layers.get_parameter("text_entry.query.weight"), source[mask])


def changed_by(text: PretrainedText, tensor: str, names: Sequence[str], fresh: Callable[[str], torch.Tensor]) -> set[str]:
    """The weights that another value everywhere in one tensor would change."""
    before = {name: text.over(name, fresh(name)) for name in names}
    values = text.tensors[tensor]
    text.tensors[tensor] = values + 1
    after = {name: text.over(name, fresh(name)) for name in names}
    text.tensors[tensor] = values
    return {name for name in names if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("kind", "objective"), [("roberta", "flm"), ("bert", "ar")])
def test_the_account_names_every_tensor_and_every_weight_and_what_it_says_is_so(kind: str, objective: str, tied: bool, sources: dict,
                                                                                tokenizer: Tokenizer) -> None:
    run = run_of(sources[kind][0], tokenizer, objective, tied=tied)
    model, text = model_of(run, tokenizer)
    account = account_for(run, objective_of(run), text)["text"]
    random = build_model(run.replace(text=run.text.replace(pretrained="")), objective_of(run))
    fresh = dict(random.layers.named_parameters())
    assert account.tensors.keys() == load_file(sources[kind][0] / "model.safetensors").keys()
    assert set(account.weights) == {name for name in fresh if not name.startswith("vision_")}
    for name, weight in model.layers.named_parameters():
        assert torch.equal(weight, fresh[name]) == (not account.weights.get(name)), name
    for tensor, fate in account.tensors.items():
        changed = changed_by(text, tensor, list(account.weights), lambda name: fresh[name].detach())
        assert changed == {name for name, tensors in account.weights.items() if tensor in tensors}, tensor
        assert bool(changed) == (fate.fate != "left out"), tensor
    assert set(account.random_tokens) == {piece for piece in pieces_of(tokenizer) if not speller(sources[kind][0])(piece)}


def test_the_summary_counts_what_was_used_resized_and_left_out(sources: dict, tokenizer: Tokenizer) -> None:
    folder, _ = sources["bert"]
    run = run_of(folder, tokenizer)
    text = PretrainedText(run.text, pieces_of(tokenizer))
    rows, ours = len(text.tensors["bert.embeddings.word_embeddings.weight"]), run.text.vocab_size
    lengths = [len(ids) for ids in text.spellings]
    whole, several = lengths.count(1), sum(length > 1 for length in lengths)
    assert account_for(run, objective_of(run), text)["text"].summary() == (
        f"{folder} (bert, 3 layers): 38 tensors used as they are; resized: embeddings.position_embeddings (30 rows to 20, from row 0 on), "
        "embeddings.token_type_embeddings (2 rows to one, which is added to every position), embeddings.word_embeddings and predictions.bias "
        f"({rows} rows to {ours}: {whole} as they are, {several} the mean of several, {ours - whole - several} random); left out: layers from 2 on "
        "(16), pooler (2), next-sentence head (2); 51 of 86 weights of this side start from random")


def stored(folder: Path, tensors: dict[str, torch.Tensor], how: str) -> None:
    """Replace a folder's weights by others, stored in another way."""
    (folder / "model.safetensors").unlink()
    if how == "pickled":
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    names = sorted(tensors)
    for file, some in (("model-00001-of-00002.safetensors", names[::2]), ("model-00002-of-00002.safetensors", names[1::2])):
        save_file({name: tensors[name].clone() for name in some}, folder / file)
    weight_map = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("how", ["in shards", "pickled"])
def test_other_ways_of_storing_give_the_same_weights(how: str, sources: dict, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Of a bare model with the first BERTs' names of a norm's weights, too: then the head starts from random."""
    folder = shutil.copytree(sources["bert"][0], tmp_path / "bert")
    wanted, _ = model_of(run_of(folder, tokenizer), tokenizer)
    tensors = {name.removeprefix("bert.").replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): tensor
               for name, tensor in load_file(folder / "model.safetensors").items() if name.startswith("bert.")}
    stored(folder, tensors, how)
    model, text = model_of(run_of(folder, tokenizer), tokenizer)
    assert not any(name.startswith("head.") for name in text.origins)
    for name, weight in model.layers.named_parameters():
        assert torch.equal(weight, wanted.layers.get_parameter(name)) == (not name.startswith("head.")), name


def test_a_decoder_apart_from_the_table_is_used_and_every_other_copy_is_left_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_source("roberta", tmp_path, tie_word_embeddings=False)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.decoder.weight" in tensors
    save_file(tensors | {"lm_head.decoder.bias": tensors["lm_head.bias"].clone(), "roberta.embeddings.position_ids": torch.arange(30)[None],
                         "adapter.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    run = run_of(tmp_path, tokenizer)
    model, text = model_of(run, tokenizer)
    account = account_for(run, objective_of(run), text)["text"]
    mask = text.spellings[tokenizer.mask_id]
    assert torch.equal(model.layers.get_parameter("head.decoder.weight")[tokenizer.mask_id], tensors["lm_head.decoder.weight"][mask][0])
    assert {name: fate.why for name, fate in account.tensors.items() if fate.fate == "left out" and "layer." not in name} == {
        "lm_head.decoder.bias": "stored twice", "roberta.embeddings.position_ids": "buffers", "adapter.weight": "not known"}
    tied = run.replace(text=run.text.replace(tied=True))
    assert account_for(tied, objective_of(run), PretrainedText(tied.text, pieces_of(tokenizer)))["text"].tensors["lm_head.decoder.weight"] == (
        "left out", "decoder, which is the token table here")


def test_another_epsilon_is_told(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_source("bert", tmp_path, layer_norm_eps=1e-12)
    run = run_of(tmp_path, tokenizer)
    account = account_for(run, objective_of(run), PretrainedText(run.text, pieces_of(tokenizer)))["text"]
    assert account.summary().endswith("its norms were trained with an epsilon of 1e-12, here it is 1e-05")


def test_what_the_file_fills_learns_slower_but_the_head(tokenizer: Tokenizer, sources: dict) -> None:
    run = run_of(sources["roberta"][0], tokenizer)
    slow = {name.split(".", 2)[0] + ("" if "streams" not in name else ".streams") for name in model_of(run, tokenizer)[0].pretrained}
    assert slow == {"text_entry", "bottom_0.streams", "bottom_1.streams"}
    tied = run.replace(text=run.text.replace(tied=True))
    assert is_pretrained(tied, "head.decoder.weight")  # a copy on another stage moves as the table does
    assert not is_pretrained(run, "head.decoder.weight")
    assert not is_pretrained(run.replace(text=run.text.replace(pretrained="")), "text_entry.tokens.weight")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(folder: Path, *names: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name not in names}, folder / "model.safetensors")


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), r"config.json cannot be read \(No such file"),
    "no JSON": (lambda folder: cut_off(folder / "config.json"), r"config.json: it: Invalid JSON"),
    "another kind": (lambda folder: edit_config(folder, model_type="gpt2"), r"model_type \('gpt2'\): Input should be 'bert' or 'roberta'"),
    "another activation": (lambda folder: edit_config(folder, hidden_act="relu"), r"hidden_act \('relu'\): Input should be 'gelu'"),
    "another MLP": (lambda folder: edit_config(folder, intermediate_size=64), r"intermediate_size \(64\) must be four times hidden_size \(32\)"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"has no model.safetensors and no pytorch_model.bin"),
    "cut off": (lambda folder: cut_off(folder / "model.safetensors"), r"model.safetensors cannot be read .*fetch it again"),
    "missing": (lambda folder: without(folder, "roberta.encoder.layer.1.output.dense.bias"), r"layer.1.output.dense.bias' is missing:"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), r"has no tokenizer.json, vocab.json or vocab.txt"),
    "no tokenizer's JSON": (lambda folder: cut_off(folder / "tokenizer.json"), r"its tokenizer cannot be read"),
    "other rows": (lambda folder: save_file(load_file(folder / "model.safetensors") | {
        "roberta.embeddings.word_embeddings.weight": torch.zeros(9, 32)}, folder / "model.safetensors"),
        r"'roberta.embeddings.word_embeddings.weight' \[9, 32\] cannot become text_entry.tokens.weight"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(damage: str, sources: dict, tokenizer: Tokenizer, tmp_path: Path) -> None:
    break_it, message = DAMAGES[damage]
    folder = shutil.copytree(sources["roberta"][0], tmp_path / "roberta")
    break_it(folder)
    with pytest.raises(CheckpointError, match=message) as refusal:
        model_of(run_of(folder, tokenizer), tokenizer)
    assert "\n" not in str(refusal.value)
    assert str(folder) in str(refusal.value)


def test_a_text_side_of_other_sizes_is_refused_with_all_of_them(sources: dict, tokenizer: Tokenizer) -> None:
    run = run_of(sources["roberta"][0], tokenizer, norm="pre", width=64, heads=8, bottom_layers=5, max_length=40)
    with pytest.raises(ConfigError) as refusal:
        PretrainedText(run.text, pieces_of(tokenizer))
    assert str(refusal.value).endswith("text.norm (pre) must be post, text.width (64) must be 32, text.heads (8) must be 4, text.bottom_layers (5) "
                                       "must be at most 3, text.max_length (40) must be at most 28")


@pytest.mark.parametrize("name", ["no/such/folder", "nobody/nothing"])
def test_a_name_that_is_neither_folder_nor_reachable_is_refused_in_one_line(name: str, tokenizer: Tokenizer,
                                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=rf"'{name}'\) is not a folder, and cannot be had from the hub \(.*\); fetch it") as refusal:
        PretrainedText(TextConfig(pretrained=name), pieces_of(tokenizer))
    assert "\n" not in str(refusal.value)


def vision_truth(run: Run, account: Account, file: Path) -> None:
    """Assert that an account of a tower names all of a file and of the tower, and that the model holds what it says."""
    saved = torch.load(file)["state_dict"]
    weights = {name: weight for name, weight in build_model(run, objective_of(run)).layers.named_parameters() if name.startswith("vision_")}
    assert account.tensors.keys() == saved.keys()
    assert account.weights.keys() == weights.keys()
    assert {tensor for tensors in account.weights.values() for tensor in tensors} == {
        name for name, fate in account.tensors.items() if fate.fate != "left out"}
    for name, tensors in account.weights.items():
        assert bool(tensors) == is_pretrained(run, name), name
        if tensors and account.tensors[tensors[0]].fate == "used":
            assert torch.equal(weights[name].flatten(), saved[tensors[0]].flatten()), name
        elif tensors:
            assert weights[name].numel() != saved[tensors[0]].numel()


@pytest.mark.parametrize(("image_size", "output", "used", "more", "fresh"), [
    (288, "penultimate",
     "138 tensors used as they are; resized: visual.positional_embedding (7 x 7 patches to 9 x 9)", ", last block (12)", "142"),
    (224, "final", "151 tensors used as they are", "", "154"),
])
def test_the_account_of_a_tower_names_every_tensor_of_the_file(weight_file: Path, image_size: int, output: str, used: str,  # noqa: F811
                                                                  more: str, fresh: str) -> None:
    run = tiny_run("ar", vision=OpenClipVisionConfig(name=NAME, pretrained=str(weight_file), image_size=image_size, output=output))
    account = account_for(run, objective_of(run), None)["vision"]
    vision_truth(run, account, weight_file)
    assert account.summary() == (f"{weight_file} of {NAME}: {used}; left out: text tower (125), logit_scale (1), proj (1){more}; 3 of {fresh} "
                                 "weights of this side start from random")


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "EVA02-B-16"])
def test_the_account_of_timms_towers_is_as_exact(shrunk: None, tmp_path: Path, name: str) -> None:  # noqa: F811
    run = tiny_run("ar", vision=OpenClipVisionConfig(name=name, pretrained=str(tmp_path / name), image_size=64))
    account = account_for(run, objective_of(run), None)["vision"]
    vision_truth(run, account, tmp_path / name)
    assert [fate.why for fate in account.tensors.values() if fate.fate == "resized"] == ["14 x 14 patches to 4 x 4"]


def words(dataset: Dataset, folder: Path, run_dir: Path, *more: str) -> list[str]:
    return ["train", "debug", "--data.path", str(dataset.folder), "--run-dir", str(run_dir), "--text.vocab-size", "203", "--text.norm", "post",
            "--text.bottom-layers", "2", "--text.pretrained", str(folder), "--steps", "3", *more]


def test_a_run_prints_and_keeps_the_account_and_resumes_without_the_folder(
        sources: dict, toy_dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, run_dir = shutil.copytree(sources["roberta"][0], tmp_path / "roberta"), tmp_path / "run"
    assert main(words(toy_dataset, folder, run_dir)) == 0
    assert f"flm: text weights {folder} (roberta, 3 layers): 38 tensors used as they are; resized: " in capsys.readouterr().err
    kept = json.loads((run_dir / "pretrained.json").read_text())
    assert kept.keys() == {"text"}
    assert kept["text"]["tensors"].keys() == load_file(folder / "model.safetensors").keys()
    assert kept["text"]["weights"]["bottom_1.streams.mlp.up.bias"] == ["roberta.encoder.layer.1.intermediate.dense.bias"]
    shutil.rmtree(folder)
    assert main(words(toy_dataset, folder, run_dir, "--steps", "4", "--resume")) == 0
    assert "text weights" not in capsys.readouterr().err
    assert main(words(toy_dataset, folder, tmp_path / "other")) == 2
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_every_layout_starts_from_the_same_imported_weights(sources: dict, toy_dataset: Dataset, tmp_path: Path) -> None:
    """Shards of heads, hidden units and vocabulary, and stages that tie the table to the decoder: the losses of one process. Rank 0 alone tells."""
    folder, _ = sources["bert"]
    assert main(words(toy_dataset, folder, tmp_path / "one", "--text.tied")) == 0
    environ = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "-m", "flm_scale",
         *words(toy_dataset, folder, tmp_path / "four", "--text.tied", "--parallel.engine", "deepspeed", "--parallel.tensor", "2",
                "--parallel.pipe", "2")], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("flm: text weights") == 1
    one, four = ([line["loss"] for line in lines_of(tmp_path / name) if "loss" in line] for name in ("one", "four"))
    assert four == pytest.approx(one, rel=1e-5)
