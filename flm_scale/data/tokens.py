"""Captions to token ids and back: the only door to sentencepiece.

A tokenizer is one model file. Its fingerprint stands in the dataset's manifest and in every checkpoint, because two tokenizers of
one size cannot be told apart by their size. Ids 0 to 4 are padding, BOS, EOS, unknown and mask in every tokenizer.
"""

import hashlib
import io
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from flm_scale.errors import DataError

OPTIONS_VERSION = b"flm_scale tokens 1: NFC, BPE, BOS and EOS added"  # change it when encode() changes
SPECIAL_PIECES = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")
CANARY_STRINGS = 1000
# Where versions of a tokenizer's library differ: spaces, controls, two spellings of one letter, wide and composed signs, special pieces as text.
ODD_PIECES = (" ", "  ", "\t", "\n", "\u00a0", "\u200b", "\u00ad", "e\u0301", "\u00e9", "\ufb01", "\uff11", "\u2460", "\u65e5\u672c", "\u0627\u0644",
              "\U0001f469\u200d\U0001f680", "\u2581", "<mask>", "</s>", "0", "1999", "don't", "A", "\u00df", "\u0130", "-", "...", "http://")


def tokenizer_fingerprint(model: bytes) -> str:
    """Return the sha256 of the model file's bytes and of the way in which encode() uses them."""
    return hashlib.sha256(OPTIONS_VERSION + model).hexdigest()


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, model_file: Path) -> None:
    """Write a sentencepiece model of at most `vocab_size` pieces; the same texts in the same order give the same bytes.

    Byte-pair merges rather than the unigram model: on a few hundred distinct sentences they arrive at whole words.
    Raises DataError when there is no text, or more distinct characters than `vocab_size` can hold.
    """
    import sentencepiece

    model = io.BytesIO()
    lines = [line for line in (unicodedata.normalize("NFC", text).strip() for text in texts) if line]
    if not lines:
        raise DataError(f"tokenizer {model_file}: no text to learn from; the training split needs captions or questions")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=vocab_size, hard_vocab_limit=False,
            pad_id=0, bos_id=1, eos_id=2, unk_id=3, control_symbols=["<mask>"], normalization_rule_name="identity",
            character_coverage=1.0, num_threads=1, minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(f"tokenizer {model_file}: vocab_size ({vocab_size}) does not work ({_last_line(error)}); raise it") from error
    part = model_file.with_name(model_file.name + ".part")
    part.write_bytes(model.getvalue())
    part.replace(model_file)


def canary_strings(pieces: Sequence[str]) -> list[str]:
    """Return 1,000 strings of 1 to 16 pieces, odd ones among them; the same for the same pieces, for ever."""
    words = [piece.replace("\u2581", " ") for piece in pieces] + [*ODD_PIECES]
    places = (np.frombuffer(hashlib.shake_128(f"canary/{number}".encode()).digest(4 * (1 + number % 16)), "<u4") for number in range(CANARY_STRINGS))
    return ["".join(words[place % len(words)] for place in row.tolist()) for row in places]


class Tokenizer:
    """A trained model; picklable, so that it travels to the loader's processes."""

    pad_id, bos_id, eos_id, unk_id, mask_id = range(5)

    def __init__(self, model_file: Path) -> None:
        """Read the file. Raises DataError when it is missing, damaged or not made by `train_tokenizer`."""
        import sentencepiece

        try:
            model = model_file.read_bytes()
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (OSError, RuntimeError) as error:
            raise DataError(f"tokenizer {model_file} cannot be read ({_last_line(error)}); rebuild the dataset's tokenizer") from error
        self.fingerprint = tokenizer_fingerprint(model)
        self.vocab_size: int = self._processor.vocab_size()
        specials = tuple(self.pieces(range(min(5, self.vocab_size))))
        if specials != SPECIAL_PIECES:
            raise DataError(f"tokenizer {model_file} begins with the pieces {' '.join(specials)}; it must begin with "
                            f"{' '.join(SPECIAL_PIECES)}; use one that `flm` has trained")

    @cached_property
    def canary(self) -> str:
        """The sha256 of the ids of 1,000 fixed strings, made of the tokenizer's own pieces and of odd ones.

        The fingerprint is of a file; this tells whether the library that reads it still cuts as the one that wrote the ids did.
        """
        encoded = self.encode_all(canary_strings(self.pieces(range(self.vocab_size))))
        return hashlib.sha256(b"".join(np.array([len(ids), *ids], "<u4").tobytes() for ids in encoded)).hexdigest()

    def encode(self, text: str, max_length: int) -> list[int]:
        """Return BOS, the text's ids and EOS: at most `max_length` in all; a longer text is cut and keeps its EOS."""
        ids: list[int] = self._processor.encode(unicodedata.normalize("NFC", text))
        return [self.bos_id, *ids[: max_length - 2], self.eos_id]

    def encode_all(self, texts: Sequence[str], *, threads: int = 1) -> list[list[int]]:
        """Return BOS, the ids and EOS of each text, however long."""
        found: list[list[int]] = self._processor.encode([unicodedata.normalize("NFC", text) for text in texts], num_threads=threads)
        return [[self.bos_id, *ids, self.eos_id] for ids in found]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, without special tokens."""
        text: str = self._processor.decode([int(token) for token in ids if token >= len(SPECIAL_PIECES)])
        return text

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Return each id's piece as it is printed; a leading '▁' marks the beginning of a word."""
        return [self._processor.id_to_piece(int(token)) for token in ids]


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
