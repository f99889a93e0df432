"""How another tokenizer spells our pieces: the bridge between sentencepiece and the vocabulary of a BERT or RoBERTa.

A piece of ours begins a word when it begins with '▁'. Byte-level BPE marks that with a space inside the piece, WordPiece marks the pieces that
do not: '##'. So "▁word" is RoBERTa's "Ġword" and BERT's "word", and "word" is RoBERTa's "word" and BERT's "##word".
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flm_scale.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WORD = "▁"
ROLES = {"<pad>": "[PAD]", "<s>": "[CLS]", "</s>": "[SEP]", "<unk>": "[UNK]", "<mask>": "[MASK]"}
"""Our special pieces, which are called the same in RoBERTa, and BERT's of the same role."""


def speller(folder: Path) -> Callable[[str], list[int]]:
    """Return what gives, for a piece of ours, the ids of the folder's pieces that spell it together: none where they cannot.

    Raises CheckpointError when the folder's tokenizer is missing, damaged or of another kind.
    """
    from tokenizers import models

    tokenizer = open_tokenizer(folder)
    if isinstance(tokenizer.model, models.BPE):
        spell_text = _byte_level(tokenizer)
    elif isinstance(tokenizer.model, models.WordPiece):
        spell_text = _word_piece(tokenizer)
    else:
        raise CheckpointError(f"{folder}: its tokenizer is a {type(tokenizer.model).__name__}; text.pretrained takes BPE as RoBERTa has it, "
                              "and WordPiece")

    def spell(piece: str) -> list[int]:
        if piece not in ROLES:
            return spell_text(piece)
        ids = (tokenizer.token_to_id(name) for name in (piece, ROLES[piece]))
        return [token for token in ids if token is not None][:1]

    return spell


def open_tokenizer(folder: Path) -> "Tokenizer":
    """Return the folder's tokenizer, from tokenizer.json or the vocabulary files of older models. Raises CheckpointError."""
    from tokenizers import Tokenizer, models, normalizers

    whole, words, settings, pairs, merges = (folder / name for name in (
        "tokenizer.json", "vocab.txt", "tokenizer_config.json", "vocab.json", "merges.txt"))
    try:
        if whole.is_file():
            return Tokenizer.from_file(str(whole))
        if pairs.is_file():
            return Tokenizer(models.BPE.from_file(str(pairs), str(merges)))
        if words.is_file():
            tokenizer = Tokenizer(models.WordPiece.from_file(str(words), unk_token=ROLES["<unk>"]))
            cased = settings.is_file() and not json.loads(settings.read_text()).get("do_lower_case", True)
            tokenizer.normalizer = normalizers.BertNormalizer(lowercase=not cased)
            return tokenizer
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{folder}: its tokenizer cannot be read ({error}); fetch it again") from error
    raise CheckpointError(f"{folder}: has no tokenizer.json, vocab.json or vocab.txt; text.pretrained finds each token's vector by its text")


def _byte_level(tokenizer: "Tokenizer") -> Callable[[str], list[int]]:
    from tokenizers import pre_tokenizers

    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def spell(piece: str) -> list[int]:
        return [token.id for text, _ in alphabet.pre_tokenize_str(piece.replace(WORD, " ")) for token in tokenizer.model.tokenize(text)]

    return spell


def _word_piece(tokenizer: "Tokenizer") -> Callable[[str], list[int]]:
    from tokenizers import models, normalizers, pre_tokenizers

    model, cut = tokenizer.model, pre_tokenizers.BertPreTokenizer()
    normalizer = tokenizer.normalizer or normalizers.BertNormalizer(lowercase=False)
    vocabulary, prefix = tokenizer.get_vocab(), model.continuing_subword_prefix
    unknown = vocabulary[model.unk_token]
    # Pieces inside a word are looked up in a vocabulary of their own.
    inside = {text.removeprefix(prefix): token for text, token in vocabulary.items() if text.startswith(prefix)}
    going_on = models.WordPiece(inside | {model.unk_token: unknown}, unk_token=model.unk_token, continuing_subword_prefix="")

    def spell(piece: str) -> list[int]:
        text, begins = normalizer.normalize_str(piece.replace(WORD, " ")), piece.startswith(WORD)
        # A letter before it shows whether a piece inside a word goes on with it, or begins another as punctuation does.
        words = [word for word, _ in cut.pre_tokenize_str(text if begins else f"x{text}")]
        tokens = [] if begins else going_on.tokenize(words.pop(0).removeprefix("x"))
        tokens += [token for word in words for token in model.tokenize(word)]
        ids = [token.id for token in tokens]
        return [] if unknown in ids else ids

    return spell
