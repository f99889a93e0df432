"""Captions to token ids and back: the only door to sentencepiece.

`Tokenizer` is a dataset's own, one model file. Its fingerprint stands in the dataset's manifest and in every checkpoint, because two tokenizers of
one size cannot be told apart by their size. Ids 0 to 4 are padding, BOS, EOS, unknown and mask in every one. `LmTokenizer` is what a language model
from Hugging Face brings along. Captions become [BOS, ids, EOS] in both, and no text becomes a special token.
"""

import hashlib
import io
import json
import os
import unicodedata
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from flm_scale.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

OPTIONS_VERSION = b"flm_scale tokens 1: NFC, BPE, BOS and EOS added"  # change it when encode() changes
SPECIAL_PIECES = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")
LM_OPTIONS_VERSION = b"flm_scale language model tokens 1: NFC, BOS or else EOS in front, EOS behind, special tokens are text"  # likewise
LM_FILE, LM_SETTINGS = "tokenizer.json", ("tokenizer_config.json", "special_tokens_map.json", "config.json")
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


class AnyTokenizer(Protocol):
    """What token ids beside shards, training and evaluation need of a tokenizer; picklable, so that it travels to the loader's processes."""

    fingerprint: str
    """Of all that decides the ids: the file, and the way in which it is used."""
    option: str
    """What names it to `flm tokenizer encode DATASET`; empty for the dataset's own."""
    vocab_size: int
    bos_id: int
    """The first id of every caption."""
    eos_id: int

    @property
    def canary(self) -> str:
        """The sha256 of the ids of 1,000 fixed strings, made of the tokenizer's own pieces and of odd ones.

        The fingerprint is of a file; this tells whether the library that reads it still cuts as the one that wrote the ids did.
        """
        ...

    def encode(self, text: str, max_length: int) -> list[int]:
        """Return BOS, the text's ids and EOS: at most `max_length` in all; a longer text is cut and keeps its EOS."""
        ...

    def encode_all(self, texts: Sequence[str], *, threads: int = 1) -> list[list[int]]:
        """Return BOS, the ids and EOS of each text, however long."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, without special tokens."""
        ...

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Return each id's piece as it is printed; a leading '▁' marks the beginning of a word."""
        ...


def canary_of(tokenizer: AnyTokenizer) -> str:
    """Return the canary, made anew."""
    encoded = tokenizer.encode_all(canary_strings(tokenizer.pieces(range(tokenizer.vocab_size))))
    return hashlib.sha256(b"".join(np.array([len(ids), *ids], "<u4").tobytes() for ids in encoded)).hexdigest()


class Tokenizer:
    """A dataset's own, trained by sentencepiece."""

    option = ""
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
        """What this process's sentencepiece makes of fixed strings."""
        return canary_of(self)

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


class LmTokenizer:
    """A language model's, as its folder has it: tokenizer.json, and the file that says which tokens begin and end a text.

    Captions begin with BOS, or with EOS where the model has no BOS (GPT-2, Qwen). Nothing else is added, whatever tokenizer.json would add, cut or
    fill up. There is no padding id: LLaMA has none, and everything here goes by lengths.
    """

    def __init__(self, folder: Path, *, fingerprint: str = "") -> None:
        """fingerprint: what the caller expects; empty expects nothing.

        Raises DataError when there is no tokenizer.json or it is damaged, no EOS is named, or text can become one; and for another fingerprint.
        """
        file = folder / LM_FILE
        if not file.is_file():
            raise _no_tokenizer_json(folder)
        self.option = f" --tokenizer {folder}"
        try:
            content = file.read_bytes()
            self._tokenizer = _opened(content)
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"tokenizer {file} cannot be read ({_last_line(error)}); fetch it again") from error
        self.bos_id, self.eos_id = self._take_special(folder)
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1  # ids may have gaps
        self.fingerprint = hashlib.sha256(LM_OPTIONS_VERSION + content + json.dumps([self.bos_id, self.eos_id]).encode()).hexdigest()
        if fingerprint and fingerprint != self.fingerprint:
            raise DataError(f"tokenizer {file} has the fingerprint {self.fingerprint}; the run expects {fingerprint}; "
                            "restore the run's file, or train anew")

    def _take_special(self, folder: Path) -> tuple[int, int]:
        """Return the ids that begin and end a text, and make both special, so that no text becomes one."""
        file, *named = _begin_and_end(folder)
        ids = [self._id_of(value, file) for value in named if value is not None]
        for spelled in (str(self._tokenizer.id_to_token(token)) for token in ids):
            self._tokenizer.add_special_tokens([spelled])
            if set(ids) & set(self._ids_of([spelled])[0]):
                raise DataError(f"tokenizer {folder / LM_FILE} reads the text '{spelled}' as that special token, so a caption could end itself; "
                                "use a model whose tokenizer is a BPE")
        return ids[0], ids[-1]

    def _id_of(self, named: object, file: Path) -> int:
        """Return the id of what a settings file names: a token as text or with its flags, an id, or several of which the first counts."""
        first = named[0] if isinstance(named, list) and named else named
        token = first.get("content") if isinstance(first, dict) else first
        found = self._tokenizer.token_to_id(token) if isinstance(token, str) else token
        if not isinstance(found, int) or found < 0 or self._tokenizer.id_to_token(found) is None:
            raise DataError(f"tokenizer {file} names {named!r}, which {LM_FILE} does not have; fetch both again")
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Return everything as text and numbers; what the library pickles by itself would read special tokens from text again."""
        return {**vars(self), "_tokenizer": self._tokenizer.to_str()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _tokenizer=_opened(state["_tokenizer"].encode()))

    @cached_property
    def canary(self) -> str:
        """What this process's tokenizers library makes of fixed strings."""
        return canary_of(self)

    def encode(self, text: str, max_length: int) -> list[int]:
        """Return BOS, the text's ids and EOS: at most `max_length` in all; a longer text is cut and keeps its EOS."""
        (ids,) = self._ids_of([text])
        return [self.bos_id, *ids[: max_length - 2], self.eos_id]

    def encode_all(self, texts: Sequence[str], *, threads: int = 1) -> list[list[int]]:
        """Return BOS, the ids and EOS of each text, however long; of a text of nothing but blanks BOS and EOS alone, as sentencepiece does."""
        size = max(1, -(-len(texts) // threads))
        with ThreadPoolExecutor(threads) as pool:
            parts = pool.map(self._ids_of, (texts[first:first + size] for first in range(0, len(texts), size)))
            return [[self.bos_id, *ids, self.eos_id] for part in parts for ids in part]

    def _ids_of(self, texts: Sequence[str]) -> list[list[int]]:
        normal = [unicodedata.normalize("NFC", text) if text.strip() else "" for text in texts]
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(normal, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, without special tokens."""
        text: str = self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)
        return text

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Return each id's piece as it is printed; a leading '▁' marks the beginning of a word. Parts of a character are printed as in the file."""
        names, decoder = [self._tokenizer.id_to_token(int(token)) or "" for token in ids], self._tokenizer.decoder
        if decoder is None:
            return names
        # Behind another piece, because decoders take the space in front of a text away.
        printed = (decoder.decode(["a", name]).removeprefix("a").replace(" ", "\u2581") for name in names)
        return [name if "\ufffd" in text else text for name, text in zip(names, printed, strict=True)]


def _opened(content: bytes) -> "FastTokenizer":
    """Return a tokenizer.json's, ready to cut texts as they are."""
    from tokenizers import Tokenizer as FastTokenizer

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads are ours: as many as are asked for, and none where a process will be forked
    tokenizer: FastTokenizer = FastTokenizer.from_buffer(content)
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _begin_and_end(folder: Path) -> tuple[Path, object, object]:
    """Return a file of a language model's folder, and what it names as BOS, if anything, and EOS: the first file that names EOS says both."""
    for file in (folder / name for name in LM_SETTINGS):
        try:
            settings = json.loads(file.read_bytes()) if file.is_file() else {}
            bos, eos = (settings.get(name, settings.get(f"{name}_id")) for name in ("bos_token", "eos_token"))
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(f"tokenizer {file} cannot be read ({_last_line(error)}); fetch it again") from error
        if eos is not None:
            return file, bos, eos
    raise DataError(f"tokenizer {folder}: no eos_token in {', '.join(LM_SETTINGS)}; write the token that ends a text into {LM_SETTINGS[0]}")


def _no_tokenizer_json(folder: Path) -> DataError:
    if not folder.is_dir():
        return DataError(f"tokenizer {folder}: there is no such folder; give that of a language model, with {LM_FILE}")
    gguf = next((f", gguf_file='{path.name}'" for path in sorted(folder.glob("*.gguf"))), "")
    return DataError(f"tokenizer {folder}: there is no {LM_FILE}; make it of the model's other files with transformers: "
                     f"AutoTokenizer.from_pretrained('{folder}'{gguf}).save_pretrained('{folder}')")


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
