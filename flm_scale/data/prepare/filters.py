"""What stays: pure functions from a sample's words, columns, size and pixels to a fate, one word for the counters, empty where it stays.

The only door to py3langid.
"""

import io
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from operator import ge, gt, le, lt
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flm_scale.data.clips import is_clip, middle_frame
from flm_scale.data.images import ImageError, on_white
from flm_scale.data.prepare.spec import Condition, ImageConfig, TextConfig
from flm_scale.errors import ConfigError

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
COMPARED = {">=": ge, "<=": le, ">": gt, "<": lt}
HASH_SIDE, HASHED_SIDE = 8, 32  # of the coefficients that make a perceptual hash; of the picture they are made of
# Cosines as whole numbers: sums of these are exact, so that a hash is the same on any processor.
COSINES = np.rint(2**16 * np.cos(np.pi / (2 * HASHED_SIDE) * np.outer(np.arange(HASH_SIDE), 2 * np.arange(HASHED_SIDE) + 1))).astype(np.int64)


def normalise(text: str) -> str:
    """Return the text in Unicode NFC, with one blank for every run of blanks and control characters, and none at its ends."""
    return " ".join(CONTROL.sub(" ", unicodedata.normalize("NFC", text)).split())


def keep_captions(captions: Sequence[str], config: TextConfig) -> tuple[list[str], str]:
    """Return the captions that stay, and where none does, why the first went: no_caption, short_text, long_text, few_words, many_words, language."""
    texts = list(dict.fromkeys(normalise(caption) for caption in captions)) if config.normalise else list(captions)
    fates = [text_fate(text, config) for text in texts]
    kept = [text for text, fate in zip(texts, fates, strict=True) if not fate]
    return kept, "" if kept else (fates or ["no_caption"])[0]


def text_fate(text: str, config: TextConfig) -> str:
    """Judge one caption."""
    num_words = len(text.split())
    if not num_words:
        return "no_caption"
    if len(text) < config.min_characters:
        return "short_text"
    if len(text) > config.max_characters:
        return "long_text"
    if num_words < config.min_words:
        return "few_words"
    if config.max_words and num_words > config.max_words:
        return "many_words"
    return "language" if config.languages and language(text) not in config.languages else ""


def language(text: str) -> str:
    """Return the likeliest language as an ISO 639-1 code; empty where nothing in the text speaks for one."""
    import py3langid

    code, log_probability = py3langid.classify(text)
    return str(code) if log_probability > -1e30 else ""


def column_fate(columns: Mapping[str, int | float | str | None], conditions: Sequence[Condition]) -> str:
    """Return column_NAME for the first condition that does not hold. A missing value fails all but !=."""
    for condition in conditions:
        value = columns[condition.column]
        if condition.numeric:
            holds = isinstance(value, int | float) and COMPARED[condition.operator](value, float(condition.values[0]))
        else:
            holds = (value is not None and _as_text(value) in condition.values) == (condition.operator == "=")
        if not holds:
            return f"column_{condition.column}"
    return ""


def _as_text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def size_fate(width: int, height: int, config: ImageConfig) -> str:
    """Judge a picture by its size before scaling: small or aspect."""
    if min(width, height) < config.min_side:
        return "small"
    return "aspect" if config.max_aspect and max(width, height) > config.max_aspect * min(width, height) else ""


def perceptual_hash(image: bytes) -> int:
    """Return 64 bits that say where the coarse structure of a picture lies above its median: copies of one picture mostly have them all in common.

    image: the file of a good picture, as it is stored; of a clip the frame in its middle counts.   It is imagehash's phash, bit for bit, in whole
    numbers and without scipy: the 8 x 8 lowest cosine coefficients of 32 x 32 grey pixels. Raises ImageError.
    Source: hackerfactor.com, "Looks Like It".
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opened = Image.fromarray(middle_frame(image)) if is_clip(image) else on_white(Image.open(io.BytesIO(image)))
            grey = opened.convert("L").resize((HASHED_SIDE, HASHED_SIDE), Image.Resampling.LANCZOS)
    except MemoryError:
        raise
    except Exception as error:  # Pillow refuses some of what simplejpeg takes, with almost any class
        raise ImageError(f"image of {len(image)} bytes cannot be decoded ({type(error).__name__}: {error}); replace or drop it",
                         reason="damaged") from error
    low = COSINES @ np.asarray(grey, np.int64) @ COSINES.T
    middle = np.sort(low, axis=None)[31:33].sum()
    return int.from_bytes(np.packbits(2 * low > middle).tobytes(), "big")


class Forbidden(NamedTuple):
    """Pictures that must not be in the dataset."""

    sha256: frozenset[str] = frozenset()
    perceptual: frozenset[int] = frozenset()


@lru_cache(maxsize=1)  # once a worker, not once a shard
def read_forbidden(file: Path | None) -> Forbidden:
    """Read FilterConfig.forbidden. Raises ConfigError for a line that is no hash."""
    if file is None:
        return Forbidden()
    try:
        lines = [line.strip().lower() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"filter.forbidden ({file}) cannot be read ({error}); name a text file with a hash a line") from error
    if wrong := next((line for line in lines if not re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{16}", line)), ""):
        raise ConfigError(f"filter.forbidden ({file}): {wrong[:80]!r} is neither a sha256 (64 hexadecimal digits) nor a perceptual hash (16)")
    return Forbidden(frozenset(line for line in lines if len(line) == 64), frozenset(int(line, 16) for line in lines if len(line) == 16))
