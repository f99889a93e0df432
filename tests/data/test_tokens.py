"""Tokenizers: byte-stable, fixed special ids, no special token out of text."""

import hashlib
import json
import pickle
import unicodedata
from pathlib import Path

import pytest

from flm_scale.cli import main
from flm_scale.data.tokens import (
    LM_OPTIONS_VERSION,
    ODD_PIECES,
    LmTokenizer,
    Tokenizer,
    canary_strings,
    tokenizer_fingerprint,
    train_tokenizer,
)
from flm_scale.errors import DataError
from tests.data import lm_folder
from tests.data.lm_folder import FAMILIES, settings, write_lm_folder

TEXTS = ["a teal triangle", "a red circle", "is there not a yellow shape in the image?", "un café noir"] * 5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    file = tmp_path_factory.mktemp("tokens") / "tokenizer.model"
    train_tokenizer(TEXTS, vocab_size=300, model_file=file)
    return Tokenizer(file)


def test_same_texts_give_the_same_bytes_in_any_folder(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        train_tokenizer(iter(TEXTS), vocab_size=60, model_file=tmp_path / name / f"{name}.model")
    assert (tmp_path / "one/one.model").read_bytes() == (tmp_path / "two/two.model").read_bytes()


def test_fingerprint_tells_tokenizers_of_one_size_apart(tmp_path: Path) -> None:
    for name, texts in (("one", TEXTS), ("two", [text[::-1] for text in TEXTS])):
        train_tokenizer(texts, vocab_size=50, model_file=tmp_path / name)
    one, two = Tokenizer(tmp_path / "one"), Tokenizer(tmp_path / "two")
    assert one.vocab_size == two.vocab_size == 50
    assert one.fingerprint != two.fingerprint
    assert one.fingerprint == tokenizer_fingerprint((tmp_path / "one").read_bytes())


def test_special_ids_are_fixed(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.mask_id]
    assert ids == [0, 1, 2, 3, 4]
    assert tokenizer.pieces(ids) == ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]


def test_round_trip_in_whole_words(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a teal triangle", max_length=50)
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert tokenizer.pieces(ids[1:-1]) == ["▁a", "▁teal", "▁triangle"]
    assert tokenizer.decode(ids) == "a teal triangle"
    assert tokenizer.decode([tokenizer.bos_id, tokenizer.mask_id, *ids]) == "a teal triangle"


def test_truncation_keeps_eos(tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode("is there not a yellow shape in the image?", max_length=50)
    cut = tokenizer.encode("is there not a yellow shape in the image?", max_length=6)
    assert len(whole) > 6
    assert cut == [*whole[:5], tokenizer.eos_id]


def test_no_special_token_comes_out_of_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<mask> <s></s> a <pad><mask>", max_length=100)[1:-1]
    assert not {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id} & set(ids)


def test_both_unicode_spellings_give_the_same_ids(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("un caf\u00e9 noir", max_length=50)
    assert tokenizer.encode("un cafe\u0301 noir", max_length=50) == ids
    assert tokenizer.unk_id not in ids


def test_the_canary_tells_what_a_tokenizer_makes_of_fixed_strings(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The strings of today are those of tomorrow: every token id on a disk is bound to what was made of them."""
    strings = canary_strings(["\u2581a", "b", "\u2581teal"])
    assert len(strings) == 1000
    assert hashlib.sha256("\0".join(strings).encode()).hexdigest() == "022422fe48cc47b8a206b716d7c06c430d7fa8ba5286333e84ade04cf74d4205"
    train_tokenizer([text[::-1] for text in TEXTS], vocab_size=300, model_file=tmp_path / "other")
    assert tokenizer.canary != Tokenizer(tmp_path / "other").canary
    assert tokenizer.canary == pickle.loads(pickle.dumps(tokenizer)).canary


def test_texts_are_encoded_alike_one_by_one_and_together(tokenizer: Tokenizer) -> None:
    texts = canary_strings(tokenizer.pieces(range(tokenizer.vocab_size)))
    assert tokenizer.encode_all(texts) == tokenizer.encode_all(texts, threads=2) == [tokenizer.encode(text, max_length=1000) for text in texts]


def test_tokenizer_travels_to_another_process(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("a red circle", max_length=9) == tokenizer.encode("a red circle", max_length=9)
    assert copy.fingerprint == tokenizer.fingerprint


def test_missing_or_damaged_file_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "damaged").write_bytes(b"\xff\x00 no model")
    for name in ("missing", "damaged"):
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            Tokenizer(tmp_path / name)


def test_foreign_sentencepiece_model_is_refused(tmp_path: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_prefix=str(tmp_path / "foreign"), vocab_size=50, minloglevel=2,
                                             hard_vocab_limit=False)
    with pytest.raises(DataError, match="must begin with <pad>"):
        Tokenizer(tmp_path / "foreign.model")


def test_texts_or_size_that_cannot_work_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text"):
        train_tokenizer(["", " "], vocab_size=50, model_file=tmp_path / "x")
    with pytest.raises(DataError, match=r"vocab_size \(7\)"):
        train_tokenizer(TEXTS, vocab_size=7, model_file=tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def lm_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_lm_folder(tmp_path_factory.mktemp("lm") / "model", family) for family in FAMILIES}


def odd_strings(tokenizer: LmTokenizer) -> list[str]:
    """A thousand, some with special tokens spelled out, none of nothing but blanks."""
    strings = canary_strings(tokenizer.pieces(range(tokenizer.vocab_size)))
    return [unicodedata.normalize("NFC", text) for text in strings if text.strip()]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_language_models_ids_are_those_of_its_makers(lm_folders: dict[str, Path], family: str) -> None:
    """Of transformers, told to take special tokens as text. Its LLaMA of today loses a space in front of a text, so there sentencepiece is asked."""
    import sentencepiece
    from transformers import AutoTokenizer

    tokenizer, theirs = LmTokenizer(lm_folders[family]), AutoTokenizer.from_pretrained(lm_folders[family])
    captions, strings = lm_folder.TEXTS, odd_strings(tokenizer)
    assert len(strings) > 950
    ids = [ids[1:-1] for ids in tokenizer.encode_all([*captions, *strings])]
    assert ids[:len(captions)] == theirs(captions, add_special_tokens=False)["input_ids"]
    if family == "llama 2":
        original = sentencepiece.SentencePieceProcessor(model_file=str(lm_folders[family] / "tokenizer.model"))
        assert ids[len(captions):] == original.encode(strings)
    else:
        assert ids[len(captions):] == theirs(strings, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@pytest.mark.parametrize(("family", "begin", "end"), [
    ("gpt2", "<|endoftext|>", "<|endoftext|>"), ("opt", "</s>", "</s>"), ("qwen2", "<|endoftext|>", "<|endoftext|>"), ("llama", "<s>", "</s>"),
    ("llama 2", "<s>", "</s>")])
def test_a_caption_begins_and_ends_as_its_models_texts_do(lm_folders: dict[str, Path], family: str, begin: str, end: str) -> None:
    tokenizer = LmTokenizer(lm_folders[family])
    ids = tokenizer.encode("a red circle", max_length=50)
    first = "▁a" if "llama" in family else "a"
    assert tokenizer.pieces(ids) == [begin, first, "▁red", "▁circle", end]
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert tokenizer.encode("a red circle", max_length=4) == [*ids[:3], tokenizer.eos_id]
    assert tokenizer.encode(" \t", max_length=9) == tokenizer.encode("", max_length=9) == [ids[0], ids[-1]]
    assert tokenizer.encode("un cafe\u0301 noir", max_length=50) == tokenizer.encode("un caf\u00e9 noir", max_length=50)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_language_models_ids_become_the_text_again(lm_folders: dict[str, Path], family: str) -> None:
    tokenizer = LmTokenizer(lm_folders[family])
    for text in (unicodedata.normalize("NFC", f"a{piece} b{piece}") for piece in ODD_PIECES if piece != "\u2581" or "llama" not in family):
        assert tokenizer.decode(tokenizer.encode(text, max_length=100)) == text
    assert tokenizer.decode([tokenizer.vocab_size + 5, *tokenizer.encode("a red circle", max_length=9)]) == "a red circle"


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_spelled_in_a_caption_stay_text(lm_folders: dict[str, Path], family: str) -> None:
    """In another process too: the library's own pickles forget that they should."""
    tokenizer = LmTokenizer(lm_folders[family])
    specials = {token["content"]: token["id"] for token in json.loads((lm_folders[family] / "tokenizer.json").read_text())["added_tokens"]}
    text = "".join(f"{spelled} a{spelled}" for spelled in specials)
    assert specials.keys() & {tokenizer.pieces([tokenizer.eos_id])[0]}
    for reader in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
        assert not set(specials.values()) & set(reader.encode(text, max_length=1000)[1:-1])
        assert reader.decode(reader.encode(text, max_length=1000)) == text


def test_what_ends_a_text_is_special_whatever_tokenizer_json_calls_it(tmp_path: Path) -> None:
    folder = write_lm_folder(tmp_path / "model", "opt")
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = LmTokenizer(folder)
    assert tokenizer.eos_id not in tokenizer.encode("a </s>", max_length=50)[1:-1]
    assert tokenizer.decode(tokenizer.encode("a </s>", max_length=50)) == "a </s>"


def test_a_language_models_tokenizer_travels_to_another_process(lm_folders: dict[str, Path], tmp_path: Path) -> None:
    """Where its folder is not, and another library might cut otherwise."""
    tokenizer = LmTokenizer(write_lm_folder(tmp_path / "model"))
    content = pickle.dumps(tokenizer)
    (tmp_path / "model").rename(tmp_path / "gone")
    copy = pickle.loads(content)
    assert (copy.canary, copy.fingerprint, copy.vocab_size) == (tokenizer.canary, tokenizer.fingerprint, tokenizer.vocab_size)
    strings = odd_strings(tokenizer)
    together = tokenizer.encode_all(strings)
    assert copy.encode_all(strings, threads=3) == together == [copy.encode(text, max_length=1000) for text in strings]
    assert tokenizer.encode_all([], threads=2) == []
    assert tokenizer.canary != LmTokenizer(lm_folders["opt"]).canary


def test_what_a_tokenizer_json_would_cut_fill_up_or_add_does_not_count(tmp_path: Path) -> None:
    folder = write_lm_folder(tmp_path / "model", "opt")
    before = LmTokenizer(folder).encode_all(["a red circle", "a teal triangle on white"])
    content = json.loads((folder / "tokenizer.json").read_text())
    content |= {"truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
                "padding": {"strategy": {"Fixed": 20}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0,
                            "pad_token": "<pad>"}}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert LmTokenizer(folder).encode_all(["a red circle", "a teal triangle on white"]) == before
    assert len(before[0]) == 5


def test_a_swapped_tokenizer_json_is_refused_by_both_fingerprints(tmp_path: Path) -> None:
    folder = write_lm_folder(tmp_path / "model", "opt")
    tokenizer = LmTokenizer(folder)
    content = (folder / "tokenizer.json").read_bytes()
    assert tokenizer.fingerprint == hashlib.sha256(LM_OPTIONS_VERSION + content + b"[2, 2]").hexdigest()
    assert LmTokenizer(folder, fingerprint=tokenizer.fingerprint).fingerprint == tokenizer.fingerprint
    settings("tokenizer_config", folder, bos_token="<s>", eos_token="</s>")
    assert LmTokenizer(folder).fingerprint == hashlib.sha256(LM_OPTIONS_VERSION + content + b"[0, 2]").hexdigest()
    settings("tokenizer_config", folder, eos_token="</s>")
    (folder / "tokenizer.json").write_bytes(content + b" ")
    other = LmTokenizer(folder).fingerprint
    with pytest.raises(DataError, match=f"tokenizer.json has the fingerprint {other}; the run expects {tokenizer.fingerprint};") as caught:
        LmTokenizer(folder, fingerprint=tokenizer.fingerprint)
    assert "\n" not in str(caught.value)


def word_level(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    settings("tokenizer_config", folder, eos_token="</s>")


@pytest.mark.parametrize(("change", "message"), [
    (lambda folder: folder.rename(folder.with_name("away")), "there is no such folder"),
    (lambda folder: (folder / "tokenizer.json").write_text("{"), r"tokenizer\.json cannot be read \(.*EOF"),
    (lambda folder: (folder / "tokenizer_config.json").write_text("{"), r"tokenizer_config\.json cannot be read"),
    (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), r"tokenizer_config\.json cannot be read"),
    (lambda folder: (folder / "config.json").unlink(), r"no eos_token in tokenizer_config\.json, special_tokens_map\.json, config\.json; write"),
    (lambda folder: settings("special_tokens_map", folder, eos_token="</s>"), r"special_tokens_map\.json names '</s>', which tokenizer\.json"),
    (lambda folder: settings("tokenizer_config", folder, eos_token={}), r"tokenizer_config\.json names \{\}, which"),
    (lambda folder: settings("config", folder, eos_token_id=[-1, 5]), r"config\.json names \[-1, 5\], which"),
    (lambda folder: settings("config", folder, bos_token_id=9999, eos_token_id=0), r"config\.json names 9999, which"),
    (word_level, "reads the text '</s>' as that special token, so a caption could end itself"),
])
def test_a_folder_that_is_no_language_models_is_refused_in_one_line(tmp_path: Path, change: object, message: str) -> None:
    folder = write_lm_folder(tmp_path / "model")
    change(folder)
    with pytest.raises(DataError, match=message) as caught:
        LmTokenizer(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("held", ["vocab.json and merges.txt", "tokenizer.model"])
def test_without_tokenizer_json_the_remedy_that_is_named_works(tmp_path: Path, held: str) -> None:
    from transformers import AutoTokenizer

    whole = write_lm_folder(tmp_path / "whole", "gpt2" if "vocab" in held else "llama")
    folder = tmp_path / "slow"
    folder.mkdir()
    if "vocab" in held:
        lm_folder.byte_level(["<|endoftext|>"]).model.save(str(folder))
        settings("tokenizer_config", folder, tokenizer_class="GPT2Tokenizer")
    else:
        lm_folder.write_sentencepiece(folder)
    with pytest.raises(DataError, match=r"there is no tokenizer\.json") as caught:
        LmTokenizer(folder)
    exec(str(caught.value).partition("with transformers: ")[2], {"AutoTokenizer": AutoTokenizer})
    assert LmTokenizer(folder).encode_all(lm_folder.TEXTS) == LmTokenizer(whole).encode_all(lm_folder.TEXTS)


def test_a_gguf_alone_is_named_in_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "small.Q4_1.gguf").touch()
    with pytest.raises(DataError, match=rf"from_pretrained\('{tmp_path}', gguf_file='small.Q4_1.gguf'\)\.save_pretrained\('{tmp_path}'\)$"):
        LmTokenizer(tmp_path)


def test_show_tells_a_language_models_tokenizer_too(lm_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenizer", "show", str(lm_folders["opt"]), "a red </s>"]) == 0
    tokenizer = LmTokenizer(lm_folders["opt"])
    assert capsys.readouterr().out.splitlines() == [
        f"{lm_folders['opt'] / 'tokenizer.json'}: {tokenizer.vocab_size} pieces, fingerprint {tokenizer.fingerprint}", "</s> a ▁red ▁ < / s > </s>"]
