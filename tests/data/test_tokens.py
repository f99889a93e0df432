"""Tokenizers: byte-stable, fixed special ids, no special token out of text."""

import hashlib
import pickle
from pathlib import Path

import pytest

from flm_scale.data.tokens import Tokenizer, canary_strings, tokenizer_fingerprint, train_tokenizer
from flm_scale.errors import DataError

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
