"""What becomes of handed-over pictures and captions: every value that `flm data prepare` has, as frozen pydantic models.

Two runs with one `Spec.hash` and one input give the same bytes. So a dataset keeps `Spec.decisive()`, and a run that would go on with another
one is refused with the `difference`. Where the input lies and how many workers prepare it is no part of it.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from flm_scale.data.sources import Source
from flm_scale.data.storage import file_sha256
from flm_scale.data.tar import MAX_SAMPLES
from flm_scale.errors import ConfigError
from flm_scale.section import Section

SCORE = "clip_score"
"""The column that ScoreConfig is about, and the fate of what is below its minimum."""
Preset = Literal["img2dataset", "laion", "re-laion", "laion-coco", "datacomp", "coyo", "cc3m", "cc12m"]


class Columns(NamedTuple):
    """Which columns of a table hold what; names are found whatever their case."""

    url: str = "url"
    captions: tuple[str, ...] = ("caption",)
    """Each a text, or a list of texts."""
    sha256: str = ""
    md5: str = ""
    header: tuple[str, ...] = ()
    """What a table without a first line of names holds, in this order."""


PRESETS: dict[Preset, Columns] = {
    "img2dataset": Columns(),
    "laion": Columns("URL", ("TEXT",)),
    "re-laion": Columns("url", ("caption",)),
    "laion-coco": Columns("URL", ("top_caption", "all_captions")),
    "datacomp": Columns("url", ("text",), sha256="sha256"),
    "coyo": Columns("url", ("text",)),
    "cc3m": Columns(header=("caption", "url")),
    "cc12m": Columns(header=("url", "caption")),
}
WARNINGS: dict[Preset, str] = {
    "laion": "LAION-5B was withdrawn in December 2023 (links to abuse material); use Re-LAION-5B (--input.preset re-laion) in its place. "
             "LAION-400M was not re-issued",
}


class InputConfig(Section):
    """What is handed over."""

    kind: Literal["table", "shards", "folder", "coco", "visual_genome", "sbu"] = "table"
    """table: parquet, CSV or TSV of addresses and captions; shards: tars of img2dataset or webdataset; folder: pictures with KEY.txt beside them,
    metadata.jsonl or captions.csv; coco, visual_genome, sbu: their own annotation files. A folder of such files counts as one."""
    preset: Preset = "img2dataset"
    """Column names of a table, as its authors publish it; the next four override single ones."""
    url: str = ""
    captions: tuple[str, ...] = Field((), strict=False)
    sha256: str = ""
    md5: str = ""
    keep: tuple[str, ...] = Field((), strict=False)
    """More columns that go along, into the table and the sample's JSON; numbers also into the index, as float32."""
    images: Path | None = Field(None, strict=False)
    """Folder with the pictures of a table or annotation file, by their file names; without it they are fetched."""
    clips: bool = False
    """The samples are clips and not pictures: MP4 files, or in a folder also folders of pictures, each of them a clip of these in the order of
    their names. image.* says how frames are scaled; what is encoded anew becomes H.264."""
    adopt: bool = False
    """Keep the tars of kind shards as they are: linked, each one a shard, no picture decoded; flm data import sets it."""

    @model_validator(mode="after")
    def _pictures_are_elsewhere(self) -> Self:
        if self.images and self.kind in ("folder", "shards"):
            raise ConfigError(f"input.images ({self.images}) does not go with input.kind {self.kind}, which holds its pictures; clear it")
        if self.clips and self.kind in ("coco", "visual_genome", "sbu"):
            raise ConfigError(f"input.clips does not go with input.kind {self.kind}, which names pictures; set input.kind to table, shards or folder")
        if self.adopt and self.kind != "shards":
            raise ConfigError(f"input.adopt keeps tars as they are, and input.kind {self.kind} has none; set input.kind shards")
        return self

    @property
    def columns(self) -> Columns:
        """The preset with what overrides it."""
        preset = PRESETS[self.preset]
        return Columns(self.url or preset.url, self.captions or preset.captions, self.sha256 or preset.sha256, self.md5 or preset.md5, preset.header)

    @property
    def warning(self) -> str:
        """What the user should know before anything is fetched; mostly nothing."""
        return WARNINGS.get(self.preset, "") if self.kind == "table" else ""


class FetchConfig(Section):
    """How addresses are fetched."""

    concurrency: int = Field(64, ge=1, le=1024)
    """Fetches at a time in each worker; the result does not depend on it."""
    total_seconds: float = Field(30.0, gt=0)
    """For one try: look-up, connection, redirects and the last byte."""
    dns_retries: int = Field(2, ge=0)
    """More tries where a name is not found; look-ups fail in bursts when a name server is overrun."""
    timeout_retries: int = Field(0, ge=0)
    """More tries where the time ran out; seldom worth it."""
    server_retries: int = Field(1, ge=0)
    """More tries behind an answer of 429 or 500 to 599, or a connection that broke."""
    contact: str = ""
    """An address for complaints, which servers are told beside our name (User-Agent); a large crawl should have one."""
    allow_loopback: bool = False
    """Fetch from this machine too, for tests."""
    require_hash: bool = False
    """Refuse rows without a sha256 or md5: an address may have changed hands since the table was made."""


# Fields of ImageConfig that an adopted tar has no use for.
REDRAWING = ("size", "mode", "only_if_larger", "format", "quality", "pass_through")


class ImageConfig(Section):
    """What becomes of a picture."""

    size: int = Field(256, ge=8)
    """Pixels of the shorter side (keep_ratio) or of both (center_crop)."""
    mode: Literal["keep_ratio", "center_crop", "none"] = "keep_ratio"
    only_if_larger: bool = True
    """Leave smaller pictures at their size."""
    format: Literal["jpg", "webp", "png"] = "jpg"
    quality: int = Field(90, ge=1, le=100)
    """Of JPEG and WebP."""
    pass_through: bool = True
    """Keep the bytes of a picture that has the right format and needs no scaling."""
    max_pixels: int = Field(64_000_000, ge=1)
    """Larger pictures are rejected by their header, before anything is decoded."""
    max_bytes: int = Field(16 * 1024**2, ge=1)
    """Larger files are not read to their end."""
    min_side: int = Field(0, ge=0)
    """Shortest side wanted, before scaling; DataComp's basic filter takes 200."""
    max_aspect: float = Field(0.0, ge=0)
    """Longest side over shortest, before scaling; 0 takes any, DataComp's basic filter 3."""


class TextConfig(Section):
    """Which captions stay. A picture that has none left is rejected, for the reason of its first."""

    normalise: bool = True
    """Unicode NFC; control characters and runs of blanks become one blank. The table keeps the first caption as it came."""
    min_characters: int = Field(1, ge=1)
    """LAION took 5."""
    max_characters: int = Field(2000, ge=1)
    min_words: int = Field(0, ge=0)
    """Blanks separate words; DataComp's basic filter takes 3."""
    max_words: int = Field(0, ge=0)
    """0 takes any number."""
    languages: tuple[str, ...] = Field((), strict=False)
    """ISO 639-1 codes, such as en; none takes every language. Guesses on a few words are often wrong: expect to lose good captions."""


class FilterConfig(Section):
    """Which pictures stay, by columns, hashes and repetition."""

    where: tuple[str, ...] = Field((), strict=False)
    """Conditions on columns, all of which must hold: similarity>=0.3, pwatermark<0.8, punsafe<0.5, NSFW!=NSFW, LANGUAGE=en,de. A missing value
    fails all but !=."""
    duplicates: bool = True
    """Of pictures with the same bytes, and of rows with the same address and caption, the first one stays."""
    near_duplicates: bool = False
    """The same for pictures with equal perceptual hashes: scaled, compressed or slightly changed copies; also some different, very plain pictures."""
    forbidden: Path | None = Field(None, strict=False)
    """File of sha256 sums (64 hexadecimal digits, of the original bytes) or perceptual hashes (16), one a line: pictures of an evaluation, say."""


class ScoreConfig(Section):
    """How well pictures and captions go together, by an open_clip model: a column `clip_score`, the cosine of a picture and its best caption."""

    model: str = "ViT-B-32"
    """open_clip's name; OpenAI's weights in a file want the name with -quickgelu."""
    pretrained: str = ""
    """A tag of the model, which is fetched, or a file of weights, on every node; without one nothing is scored."""
    minimum: float | None = Field(None, ge=-1, le=1)
    """Pictures with captions that score less are rejected, compared as float32; LAION-400M took 0.3. None keeps all and their scores."""
    batch: int = Field(64, ge=1)
    """Pictures, and captions, that go through the model together. Another number gives other last bits."""

    @model_validator(mode="after")
    def _minimum_has_scores(self) -> Self:
        if self.minimum is not None and not self.pretrained:
            raise ConfigError(f"score.minimum ({self.minimum}) needs scores, and nothing is scored; set score.pretrained, or leave the minimum out")
        return self

    @property
    def file(self) -> Path | None:
        """The file of weights; None for a tag."""
        return Path(self.pretrained) if self.pretrained and Path(self.pretrained).is_file() else None


class Condition(NamedTuple):
    """One of FilterConfig.where."""

    column: str
    operator: Literal[">=", "<=", ">", "<", "=", "!="]
    values: tuple[str, ...]

    @property
    def numeric(self) -> bool:
        """Whether it compares sizes."""
        return self.operator not in ("=", "!=")


class Spec(Section):
    """Everything that decides what a prepared dataset holds."""

    name: str = Field("prepared", min_length=1)
    split: str = Field("train", pattern=r"^[a-z0-9_]+$")
    """Of inputs that name none; --input val=PATH does."""
    samples_per_shard: int = Field(10_000, ge=1, le=MAX_SAMPLES)
    """Rows of the input that make a shard; what is rejected leaves it smaller."""
    input: InputConfig = InputConfig()
    fetch: FetchConfig = FetchConfig()
    image: ImageConfig = ImageConfig()
    text: TextConfig = TextConfig()
    filter: FilterConfig = FilterConfig()
    score: ScoreConfig = ScoreConfig()
    tokenizer: Path | None = Field(None, strict=False)
    """Model file of the dataset's tokenizer; without one, train it afterwards (flm tokenizer train)."""
    readme: Path | None = Field(None, strict=False)
    """What becomes the dataset's README.md; without one, a page with the counts does."""
    sources: tuple[Source, ...] = Field((), strict=False)
    """Where the pictures are from, with licences, for dataset.json; only a spec file can hold them."""

    @model_validator(mode="after")
    def _conditions_are_read(self) -> Self:
        _ = self.conditions
        return self

    @model_validator(mode="after")
    def _adopted_tars_stay_as_they_are(self) -> Self:
        usual = Spec.model_fields["samples_per_shard"].default
        changed = [f"image.{name} ({getattr(self.image, name)})" for name in REDRAWING if getattr(self.image, name) != getattr(ImageConfig(), name)]
        changed += [f"samples_per_shard ({self.samples_per_shard})"] if self.samples_per_shard != usual else []
        if self.input.adopt and changed:
            raise ConfigError(f"{', '.join(changed)}: tars are kept as they are (input.adopt), so nothing may say how pictures or shards are made; "
                              "leave that out, or write new tars: flm data prepare --input.kind shards")
        return self

    @model_validator(mode="after")
    def _clips_are_no_pictures(self) -> Self:
        if self.input.clips and self.filter.near_duplicates:
            raise ConfigError("filter.near_duplicates compares single pictures, and clips that differ in motion alone would go; leave it out with "
                              "input.clips")
        return self

    @model_validator(mode="after")
    def _there_is_one_score(self) -> Self:
        if self.score.pretrained and SCORE in self.kept_columns:
            raise ConfigError(f"{SCORE} is the column that score.pretrained makes, so the input's cannot be kept or compared; leave one of them out")
        return self

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """The conditions on columns, taken apart. Raises ConfigError."""
        return tuple(map(_condition, self.filter.where))

    @property
    def kept_columns(self) -> tuple[str, ...]:
        """Columns that go along: those asked for and those of conditions, each once."""
        return tuple(dict.fromkeys((*self.input.keep, *(condition.column for condition in self.conditions))))

    def anchored(self) -> "Spec":
        """Return the same values with absolute paths: workers, and whoever repairs the dataset later, stand in other folders."""
        given = self.input.model_copy(update={"images": self.input.images and self.input.images.resolve()})
        rules = self.filter.model_copy(update={"forbidden": self.filter.forbidden and self.filter.forbidden.resolve()})
        weights = self.score.model_copy(update={"pretrained": str(self.score.file.resolve()) if self.score.file else self.score.pretrained})
        return self.model_copy(update={"input": given, "filter": rules, "score": weights, "tokenizer": self.tokenizer and self.tokenizer.resolve(),
                                       "readme": self.readme and self.readme.resolve()})

    def decisive(self) -> dict[str, Any]:
        """Return every value that decides bytes, files by their sha256, as plain JSON. Raises ConfigError when a file cannot be read."""
        values = self.model_dump(mode="json", exclude={"fetch": {"concurrency", "contact"}})
        values["input"]["images"] = self.input.images is not None  # read or fetched; where they lie decides nothing
        if not self.input.clips:
            del values["input"]["clips"]  # what was begun before there were clips goes on
        if self.input.adopt:
            values["image"] = {name: value for name, value in values["image"].items() if name not in REDRAWING}
            del values["samples_per_shard"]
        else:
            del values["input"]["adopt"]  # what was begun before there were adopted tars goes on
        values["filter"]["forbidden"] = _sha256("filter.forbidden", self.filter.forbidden)
        if self.score.file:
            values["score"]["pretrained"] = _sha256("score.pretrained", self.score.file)
        elif not self.score.pretrained:
            del values["score"]  # nothing is scored
        values["tokenizer"] = _sha256("tokenizer", self.tokenizer)
        values["readme"] = _sha256("readme", self.readme)
        return values

    @property
    def hash(self) -> str:
        """The sha256 of the canonical JSON of `decisive()`."""
        return hashlib.sha256(json.dumps(self.decisive(), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def difference(old: Mapping[str, Any], new: Mapping[str, Any], *, prefix: str = "") -> list[str]:
    """Return a line for each value in which two results of `Spec.decisive` differ: `image.size was 256, is 224`."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += difference(before, after, prefix=f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key} was {json.dumps(before)}, is {json.dumps(after)}")
    return lines


@cache
def _condition(text: str) -> Condition:
    found = re.fullmatch(r"\s*(\w+)\s*(>=|<=|!=|>|<|=)\s*(.*?)\s*", text)
    if not found:
        raise ConfigError(f"filter.where ({text!r}) must be a column, one of >= <= > < = != and a value, such as similarity>=0.3")
    column, operator, value = found.groups()
    condition = Condition(column, operator, tuple(part.strip() for part in value.split(",")))  # type: ignore[arg-type]  # the pattern knows six
    if condition.numeric and not re.fullmatch(r"-?\d+(\.\d+)?([eE]-?\d+)?", value):
        raise ConfigError(f"filter.where ({text!r}): {operator} needs one number, not {value!r}; use = or != for words")
    return condition


def _sha256(field: str, file: Path | None) -> str:
    if file is None:
        return ""
    try:
        return file_sha256(file)
    except OSError as error:
        raise ConfigError(f"{field} ({file}) cannot be read ({error.strerror}); correct the path") from error
