"""Captions to token ids and back: the only door to sentencepiece.

A tokenizer is one model file. Its fingerprint stands in the dataset's manifest and in every checkpoint, because two tokenizers of
one size cannot be told apart by their size. Ids 0 to 4 are padding, BOS, EOS, unknown and mask in every tokenizer.
"""

import hashlib
import io
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from flm_scale.errors import DataError

OPTIONS_VERSION = b"flm_scale tokens 1: NFC, BPE, BOS and EOS added"  # change it when encode() changes
SPECIAL_PIECES = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")


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

    def encode(self, text: str, max_length: int) -> list[int]:
        """Return BOS, the text's ids and EOS: at most `max_length` in all; a longer text is cut and keeps its EOS."""
        ids: list[int] = self._processor.encode(unicodedata.normalize("NFC", text))
        return [self.bos_id, *ids[: max_length - 2], self.eos_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, without special tokens."""
        text: str = self._processor.decode([int(token) for token in ids if token >= len(SPECIAL_PIECES)])
        return text

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Return each id's piece as it is printed; a leading '▁' marks the beginning of a word."""
        return [self._processor.id_to_piece(int(token)) for token in ids]


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
