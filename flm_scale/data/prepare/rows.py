"""One row of an input, whatever it was read from: captions, a picture or where to get it, and what is wrong with it.

What is wrong with one row is the row's `fate`, for the counters; an input that cannot be trusted is refused as a whole, with a TableError.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

from flm_scale.data.prepare.filters import normalise
from flm_scale.data.prepare.spec import Spec
from flm_scale.errors import DataError, did_you_mean

MAX_TEXT_BYTES, MAX_CAPTIONS = 65_536, 256  # of one text; of one picture, and as many questions
SHOWN_CHARACTERS = 200  # of a text that is refused
Kind = Literal["int", "float", "str"]


class TableError(DataError):
    """A table that is refused. `reason`: unreadable, encrypted, compressed, columns, type, rows, too_large."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class Row(NamedTuple):
    """What is known of one picture before it is looked at."""

    url: str
    """An address, or the picture's name in its folder or shard."""
    captions: list[str]
    image: bytes | Path | None = None
    """The file itself or where it lies; None where it must be fetched."""
    sha256: str = ""
    md5: str = ""
    columns: Mapping[str, int | float | str | None] = {}
    """Spec.kept_columns."""
    fate: str = ""
    """Why nothing can be made of it: no_url, no_caption, bad_text, bad_questions, bad_row, bad_path, or the reader's word. Empty for a good one."""
    questions: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    """One for each question."""
    concept: str = ""
    key: str = ""
    """In a tar that stays as it is; elsewhere a row gets one."""
    offset: int = 0
    """Of the picture in that tar."""


class Part(Protocol):
    """One file of an input."""

    @property
    def path(self) -> Path:
        """The file, or the folder."""

    @property
    def rows(self) -> int:
        """How many there are."""

    @property
    def kinds(self) -> Mapping[str, Kind]:
        """What the values of Spec.kept_columns are."""

    def read(self, first: int, stop: int) -> Iterator[Row]:
        """Yield rows [first, stop)."""


def make_row(spec: Spec, url: bytes | str | None, captions: Sequence[bytes | str | None], about: Mapping[str, Any] = {}, /, *,
             sha256: str = "", md5: str = "", columns: Mapping[str, int | float | str | None] | None = None) -> Row:
    """Judge the texts of one row and find its picture. Empty captions, repeated ones and damaged ones go; the row stays where one is left.

    about: fields of somebody's JSON, which may hold questions, answers and concept. A row with questions needs no caption.
    """
    address, is_good = _text(url)
    fate = "bad_text" if not is_good else "" if address.strip() else "no_url"
    image = None
    if spec.input.images and not fate:
        image = find_image(spec.input.images, address)
        fate = "" if image else "bad_path"
    texts = [_text(caption) for caption in captions[:MAX_CAPTIONS]]
    good = list(dict.fromkeys(text for text, is_good in texts if is_good and text.strip()))
    damaged = [text for text, is_good in texts if not is_good]
    asked, wrong = _asked(spec, about)
    if not good and not asked:
        good, wrong = damaged[:1], wrong or ("bad_text" if damaged else "no_caption")
    questions, answers = zip(*asked, strict=True) if asked else ((), ())
    return Row(address, good, image, sha256, md5, columns or {}, fate or wrong, questions, answers, _clean(spec, about.get("concept")))


def _asked(spec: Spec, about: Mapping[str, Any]) -> tuple[list[tuple[str, str]], str]:
    """Return the questions with their answers, without pairs in which a text is empty or damaged, and bad_questions where it is open what pairs."""
    questions, answers = (about.get(name) or [] for name in ("questions", "answers"))
    if not isinstance(questions, list) or not isinstance(answers, list) or len(questions) != len(answers):
        return [], "bad_questions"
    pairs = zip(questions[:MAX_CAPTIONS], answers[:MAX_CAPTIONS], strict=True)
    cleaned = ((_clean(spec, question), _clean(spec, answer)) for question, answer in pairs)
    return [(question, answer) for question, answer in cleaned if question and answer], ""


def _clean(spec: Spec, value: object) -> str:
    """Return a text as captions are taken, normalised if they are; nothing for what is damaged or no text."""
    text, is_good = _text(value) if isinstance(value, str) else ("", False)
    text = normalise(text) if spec.text.normalise else text
    return text if is_good and text.strip() else ""


def find_image(folder: Path, name: str) -> Path | None:
    """Return where the picture of a relative name, or of an address by its last part, lies; None when that is outside the folder."""
    if "://" in name:
        name = unquote(urlsplit(name).path).rpartition("/")[2]
    try:
        found = (folder / name).resolve()
        return found if name and found.is_relative_to(folder.resolve()) else None
    except (OSError, ValueError, RuntimeError):  # a NUL, a name too long, links in a circle
        return None


def _text(value: bytes | str | None) -> tuple[str, bool]:
    """Return the text and whether it is one: not above the limit, in UTF-8 that can be written again."""
    raw = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value or b""
    if len(raw) <= MAX_TEXT_BYTES:
        try:
            return raw.decode("utf-8"), True
        except UnicodeDecodeError:
            pass
    return raw[:4 * SHOWN_CHARACTERS].decode("utf-8", "replace")[:SHOWN_CHARACTERS], False


def _find_column(path: Path, name: str, names: Sequence[str]) -> str:
    """Return the column of that name, or of the only one that differs in case alone. Raises TableError."""
    alike = [name] if names.count(name) == 1 else [column for column in names if column.lower() == name.lower()]
    if len(alike) != 1:
        shown = [quoted(column) for column in names]
        problem = f"{len(alike)} columns called '{name}'" if alike else f"no column '{name}'{did_you_mean(name, shown)}"
        raise TableError(f"table {path} has {problem} (it has {', '.join(shown)[:300]}); set input.preset, or name the column "
                         "(input.url, input.captions, input.keep)", reason="columns")
    return alike[0]


def find_columns(path: Path, spec: Spec, names: Sequence[str]) -> dict[str, str]:
    """Return the column in this file for each that the spec names."""
    wanted = spec.input.columns
    named = [wanted.url, *wanted.captions, wanted.sha256, wanted.md5, *spec.kept_columns]
    return {name: _find_column(path, name, names) for name in dict.fromkeys(named) if name}


def compared_columns(spec: Spec) -> frozenset[str]:
    """Columns that conditions compare as numbers: they are numbers then, whatever the file calls them."""
    return frozenset(condition.column for condition in spec.conditions if condition.numeric)


def json_kinds(spec: Spec) -> dict[str, Kind]:
    """Return what the kept columns are where a JSON beside each picture holds them, and promises nothing: texts, but for what conditions compare."""
    return {name: "float" if name in compared_columns(spec) else "str" for name in spec.kept_columns}


def quoted(strange: object) -> str:
    """Return the first line of what a stranger's file or a library says of it, as an error may print it."""
    lines = str(strange).strip().splitlines() or [type(strange).__name__]
    return "".join(character if character.isprintable() else "?" for character in lines[0][:SHOWN_CHARACTERS])


def as_value(value: object, kind: Kind) -> int | float | str | None:
    """Return the value as what its column holds; None for what is no such thing, NaN and infinities included."""
    if value is None:
        return None
    if kind == "str":
        return _text(value if isinstance(value, bytes | str) else str(value))[0]
    try:
        number = int(value) if kind == "int" and isinstance(value, int) else float(value)  # type: ignore[arg-type]  # that is tried
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
