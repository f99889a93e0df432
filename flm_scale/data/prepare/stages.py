"""One shard prepared whole, in the calling process: rows are read, judged, fetched, decoded, scaled, encoded, judged again and written.

`prepare_shard` is a pure function of (spec, inputs, work, skip) as far as bytes go, if the servers give the same answers; so a shard may be done
twice, by two workers, and killed at any point. Every row of the input ends with one word, its fate, in the shard's table.
"""

import hashlib
import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from flm_scale.data.clips import MAX_CLIP_FRAMES, ClipHeader, clip_header, fit_clip
from flm_scale.data.images import Fitted, fit_image, read_header
from flm_scale.data.manifest import Shard
from flm_scale.data.prepare.annotations import PICTURES
from flm_scale.data.prepare.filters import column_fate, keep_captions, perceptual_hash, read_forbidden, size_fate
from flm_scale.data.prepare.inputs import Input
from flm_scale.data.prepare.rewrite import read_samples, read_table, rewrite_shard
from flm_scale.data.prepare.rows import Row, as_value
from flm_scale.data.prepare.spec import SCORE, Spec
from flm_scale.data.shards import Place, Sample, read_committed_shard, write_shard
from flm_scale.data.tar import MAX_JSON_BYTES, MAX_SAMPLE_BYTES
from flm_scale.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from flm_scale.data.prepare.fetch import Fetcher, FetchError, Request, Response

HELD_BYTES = 128 * 1024**2  # of finished pictures that wait for an earlier one: no more fetches begin beyond it
BEAT_SECONDS = 1.0
MAX_STORED_BYTES = MAX_SAMPLE_BYTES - 2 * MAX_JSON_BYTES  # or readers of the shard would reject the sample
# Words of img2dataset's tables, and one of ours.
Status = Literal["success", "failed_to_download", "failed_to_resize", "filtered"]
TEXT_FATES = frozenset({"no_caption", "bad_text", "bad_questions"})
# Columns that the table or the index has anyway: a condition may read an input's of that name, but it does not go along.
RESERVED = frozenset({"key", "url", "caption", "captions", "questions", "answers", "concept", "status", "error_message", "image_offset",
                      "image_bytes", "width", "height", "original_width", "original_height", "sha256", "original_sha256", "phash", "frames",
                      "seconds"})
MAX_ABOUT_BYTES = MAX_JSON_BYTES - 4096  # a sample's words and columns; the rest of its JSON is numbers and hashes


class Work(NamedTuple):
    """Rows [first, stop) of an input, which become shard `number` of a split."""

    split: str
    number: int
    source: int
    first: int
    stop: int

    @property
    def name(self) -> str:
        """Of the shard."""
        return f"{self.split}/{self.number:05d}.tar"


class Verdict(NamedTuple):
    """What became of a row."""

    status: Status
    fate: str
    """`success`, or why not."""
    sample: Sample | None = None
    sha256: str = ""
    """Of the original bytes, where there were any."""
    original_size: tuple[int | None, int | None] = (None, None)
    phash: int | None = None


def plan_work(spec: Spec, inputs: Sequence[Input]) -> list[Work]:
    """Cut the inputs into shards, in order, split by split as they are first named; no shard has rows of two inputs, or of two adopted tars."""
    works = list[Work]()
    for split in dict.fromkeys(given.split for given in inputs):
        runs = [(source, first, stop) for source, given in enumerate(inputs) if given.split == split for first, stop in _runs(spec, given)]
        works += [Work(split, number, *run) for number, run in enumerate(runs)]
    return works


def _runs(spec: Spec, given: Input) -> list[tuple[int, int]]:
    """Return first row and end of each shard of an input."""
    if spec.input.adopt:
        ends = accumulate(part.rows for part in given.parts)
        return [(end - part.rows, end) for part, end in zip(given.parts, ends, strict=True) if part.rows]
    size = spec.samples_per_shard
    return [(first, min(first + size, given.rows)) for first in range(0, given.rows, size)]


def prepare_shard(folder: Path, spec: Spec, inputs: Sequence[Input], work: Work, *, attempt: int, skip: Collection[int] = (),
                  retry: Collection[str] = (), beat: Callable[[int, str], None] = lambda _row, _stage: None) -> dict[str, Any]:
    """Prepare and write one shard; return what the fleet counts: name, count, rows, bytes_in, bytes_out, fates, seconds (by stage).

    attempt: stands in temporary names.   skip: rows, counted from work.first, that have killed decoders.   retry: fates; where the shard is there
    already, rows with these are done again and all others keep what they have, bytes and fate.   beat: called with the row and the stage before each
    step that may hang or die, and at least every second of waiting.   Raises DataError when the input is refused.
    Memory: HELD_BYTES, the fetches under way (fetch.concurrency x image.max_bytes at most), one decoded picture, and the rows of the table.
    """
    started = time.time()
    shard = _Shard(spec, inputs[work.source], work, skip, beat)
    began = time.perf_counter()
    earlier = read_committed_shard(folder, work.name) if retry else None
    if earlier:
        shard.keep(folder, earlier, retry)
        entry = rewrite_shard(folder, work.name, shard.samples(), table=shard.table, stats=lambda: shard.stats(started))
    else:
        entry = write_shard(folder, work.name, shard.samples(), table=shard.table, stats=lambda: shard.stats(started), attempt=attempt,
                            adopted=shard.adopted)
    shard.seconds["write"] = time.perf_counter() - began - sum(shard.seconds.values())
    return {"name": work.name, "count": entry.count, "rows": work.stop - work.first, "bytes_in": shard.bytes_in,
            "bytes_out": 0 if shard.adopted else entry.bytes, "fates": shard.fates,
            "seconds": {stage: round(seconds, 3) for stage, seconds in shard.seconds.items()}}


class _Shard:
    """The rows of one shard on their way."""

    def __init__(self, spec: Spec, source: Input, work: Work, skip: Collection[int], beat: Callable[[int, str], None]) -> None:
        self.spec, self.source, self.work, self.skip, self.beat = spec, source, work, skip, beat
        self.kinds = source.kinds
        self.adopted = source.tar_at(work.first) if spec.input.adopt else None
        self.lost: Status = "filtered" if self.adopted else "failed_to_download"  # what a tar has not cannot be had by trying again
        self.rows: list[dict[str, Any]] = [{}] * (work.stop - work.first)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.bytes_in = self.held = 0
        self.kept: dict[int, dict[str, Any]] = {}
        self.kept_samples: Iterator[Sample] = iter(())

    def keep(self, folder: Path, shard: Shard, retry: Collection[str]) -> None:
        """Take rows of the table, and their samples, as they are in a shard that was prepared before, unless their fate is to be tried again."""
        self.kept = {number: row for number, row in enumerate(read_table(folder, shard).to_pylist())
                     if row["status"] != "failed_to_download" or row["error_message"] not in retry}
        samples = read_samples(folder, shard)
        self.kept_samples = map(_unscored, samples) if self.spec.score.pretrained else samples

    def samples(self) -> Iterator[Sample]:
        """Yield what stays, in the order of the input; what finishes earlier waits."""
        waiting: dict[int, Sample | None] = {}
        following = 0
        for number, row, verdict in self._verdicts():
            self.rows[number] = self.kept.get(number) or self._table_row(number, row, verdict)
            waiting[number] = verdict.sample
            self.held += len(verdict.sample.image) if verdict.sample else 0
            while following in waiting:
                sample = waiting.pop(following)
                following += 1
                if sample:
                    self.held -= len(sample.image)
                    yield sample
        self.beat(following - 1, "write")
        if following != len(self.rows):
            raise DataError(f"input {self.source.path} ends {len(self.rows) - following} rows too early; it must not change while it is prepared")

    def _verdicts(self) -> Iterator[tuple[int, Row, Verdict]]:
        """Judge every row: those to be fetched as they come, in any order."""
        under_way: dict[int, tuple[Row, list[str]]] = {}
        rows = enumerate(self.source.read(self.work.first, self.work.stop))
        with ExitStack() as stack:
            fetcher: Fetcher | None = None
            more = True
            while more or under_way:
                while more and len(under_way) < self.spec.fetch.concurrency and (self.held < HELD_BYTES or not under_way):
                    with self._timed("read"):
                        number, row = next(rows, (-1, None))
                    if row is None:
                        more = False
                        break
                    row = row._replace(columns={name: as_value(row.columns.get(name), kind) for name, kind in self.kinds.items()})
                    captions, verdict = self._first_look(number, row)
                    if verdict or row.image is not None:
                        yield number, row, verdict or self._local(number, row, captions)
                        continue
                    fetcher = fetcher or stack.enter_context(_open_fetcher(self.spec))
                    fetcher.submit(number, _request(row))
                    under_way[number] = row, captions
                if fetcher and under_way:
                    self.beat(next(iter(under_way)), "fetch")
                    with self._timed("fetch"):
                        taken = fetcher.take(timeout=BEAT_SECONDS)
                    if taken:
                        number, result = taken
                        row, captions = under_way.pop(number)
                        yield number, row, self._fetched(number, row, captions, result)

    def _first_look(self, number: int, row: Row) -> tuple[list[str], Verdict | None]:
        """Judge what is known before the picture is there; return the captions that stay."""
        if earlier := self.kept.get(number):
            fate = earlier["error_message"]
            return [], Verdict(earlier["status"], fate or "success", None if fate else next(self.kept_samples))
        if number in self.skip:
            return [], Verdict("failed_to_resize", "killed_worker")
        if row.fate:
            return [], Verdict("filtered" if row.fate in TEXT_FATES else self.lost, row.fate)
        if self.spec.fetch.require_hash and not (row.sha256 or row.md5):
            return [], Verdict("filtered", "no_hash")
        with self._timed("text"):
            captions, fate = keep_captions(row.captions, self.spec.text)
            fate = column_fate(row.columns, self.spec.conditions) or ("" if row.questions else fate)
            words = [row.url, captions, row.questions, row.answers, row.concept, dict(row.columns)]
            if len(json.dumps(words, ensure_ascii=False)) > MAX_ABOUT_BYTES // 4:  # UTF-8 takes up to 4 bytes
                fate = fate or "long_text"
        return captions, Verdict("filtered", fate) if fate else None

    def _local(self, number: int, row: Row, captions: list[str]) -> Verdict:
        """Take the file from a tar or a folder."""
        with self._timed("read"):
            is_folder = self.spec.input.clips and isinstance(row.image, Path) and row.image.is_dir()
            data, fate = (_read_folder if is_folder else _read_local)(row, self.spec.image.max_bytes)
        return Verdict(self.lost, fate) if fate else self._picture(number, row, captions, data)

    def _fetched(self, number: int, row: Row, captions: list[str], result: "Response | FetchError") -> Verdict:
        if isinstance(result, Exception):
            return Verdict("failed_to_download", result.reason)
        return self._picture(number, row, captions, result.content)

    def _picture(self, number: int, row: Row, captions: list[str], data: bytes | list[bytes]) -> Verdict:
        """Judge, scale and encode one picture, or clip. data: a list is the pictures of a clip."""
        image, forbidden = self.spec.image, read_forbidden(self.spec.filter.forbidden)
        whole = data if isinstance(data, bytes) else b"".join(data)
        self.bytes_in += len(whole)
        sha256 = hashlib.sha256(whole).hexdigest()
        if sha256 in forbidden.sha256:
            return Verdict("filtered", "forbidden", sha256=sha256)
        self.beat(number, "decode")
        size: tuple[int | None, int | None] = (None, None)
        try:
            with self._timed("image"):
                header = clip_header(data, max_pixels=image.max_pixels) if self.spec.input.clips else read_header(whole, max_pixels=image.max_pixels)
                size = header.width, header.height
                if fate := size_fate(*size, image):
                    return Verdict("filtered", fate, sha256=sha256, original_size=size)
                fitted = Fitted(whole, *size, *size) if self.adopted else self._fit(data)
            with self._timed("hash"):
                phash = perceptual_hash(fitted.data) if self.spec.filter.near_duplicates or forbidden.perceptual else None
        except (DataError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
                raise
            fate = getattr(error, "reason", "damaged") if isinstance(error, DataError) else "memory"
            return Verdict("failed_to_resize", fate, sha256=sha256, original_size=size)
        if len(fitted.data) > MAX_STORED_BYTES:
            return Verdict("failed_to_resize", "too_large", sha256=sha256, original_size=size)
        if phash in forbidden.perceptual:
            return Verdict("filtered", "forbidden", None, sha256, size, phash)
        length = {"frames": header.frames, "seconds": header.seconds} if isinstance(header, ClipHeader) else {}
        return Verdict("success", "success", self._sample(number, row, captions, fitted, sha256, phash, length), sha256, size, phash)

    def _fit(self, data: bytes | list[bytes]) -> Fitted:
        """Scale and encode one picture, or clip."""
        image = self.spec.image
        if self.spec.input.clips:
            return fit_clip(data, size=image.size, mode=image.mode, only_if_larger=image.only_if_larger, max_pixels=image.max_pixels,
                            pass_through=image.pass_through)
        assert isinstance(data, bytes)
        return fit_image(data, size=image.size, mode=image.mode, only_if_larger=image.only_if_larger, image_format=image.format,
                         quality=image.quality, max_pixels=image.max_pixels, pass_through=image.pass_through)

    def _sample(self, number: int, row: Row, captions: list[str], fitted: Fitted, sha256: str, phash: int | None,
                length: Mapping[str, float]) -> Sample:
        """Return what is stored. length: frames and seconds of a clip."""
        about: dict[str, int | float | str] = {
            "original_width": fitted.original_width, "original_height": fitted.original_height, "original_sha256": sha256, **length}
        kept = {name: row.columns[name] for name in self.kinds if name not in RESERVED}
        # A missing score is NaN in the index, where every row of a column has a value; JSON leaves it out.
        scores = {name: math.nan if value is None else float(value) for name, value in kept.items() if self.kinds[name] != "str"}
        return Sample(key=self._key(number, row), image=fitted.data, image_format="mp4" if length else self.spec.image.format, captions=captions,
                      questions=list(row.questions), answers=list(row.answers), concept=row.concept, width=fitted.width, height=fitted.height,
                      place=Place(row.offset, len(fitted.data), sha256) if self.adopted else None,
                      columns=about | ({} if phash is None else {"phash": phash}) | scores,
                      extras={"url": row.url} | about | {name: value for name, value in kept.items() if value is not None})

    def _key(self, number: int, row: Row) -> str:
        """Number samples through the whole split, as img2dataset does, but those of an adopted tar: another split has the same keys."""
        if row.key:
            return row.key
        digits = len(str(self.spec.samples_per_shard - 1))
        return f"{self.work.number * 10**digits + number:0{5 + digits}d}"

    def _table_row(self, number: int, row: Row, verdict: Verdict) -> dict[str, Any]:
        sample, (width, height) = verdict.sample, verdict.original_size
        return {"key": self._key(number, row), "url": row.url or None, "caption": row.captions[0] if row.captions else None, "status": verdict.status,
                "error_message": None if sample else verdict.fate, "width": sample.width if sample else None,
                "height": sample.height if sample else None, "original_width": width, "original_height": height, "sha256": verdict.sha256 or None,
                "phash": verdict.phash, **{name: row.columns[name] for name in self.kinds if name not in RESERVED}}

    def table(self) -> "pa.Table":
        """Return img2dataset's table: a row for every row of the input, with its fate."""
        import pyarrow as pa

        text, side = pa.string(), pa.int32()
        kinds = {"int": pa.int64(), "float": pa.float64(), "str": text}
        schema = [(name, text) for name in ("key", "url", "caption", "status", "error_message")]
        schema += [(name, side) for name in ("width", "height", "original_width", "original_height")] + [("sha256", text), ("phash", pa.uint64())]
        schema += [(name, kinds[kind]) for name, kind in self.kinds.items() if name not in RESERVED]
        if self.spec.score.pretrained and any(SCORE in row for row in self.kept.values()):
            schema.append((SCORE, pa.float32()))
        return pa.Table.from_pylist(self.rows, schema=pa.schema(schema))

    @property
    def fates(self) -> dict[str, int]:
        """How many rows ended how."""
        return dict(sorted(Counter(row["error_message"] or "success" for row in self.rows).items()))

    def stats(self, started: float) -> dict[str, Any]:
        """Return img2dataset's counts, and the seconds of each stage."""
        statuses = Counter(row["status"] for row in self.rows)
        ended = time.time()
        return {"count": len(self.rows), "successes": statuses["success"], "failed_to_download": statuses["failed_to_download"],
                "failed_to_resize": statuses["failed_to_resize"], "filtered": statuses["filtered"], "duration": ended - started,
                "start_time": started, "end_time": ended, "status_dict": self.fates, "seconds": dict(self.seconds),
                **({"adopted": str(self.adopted.path)} if self.adopted else {})}

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - started


def _read_folder(row: Row, max_bytes: int) -> tuple[list[bytes], str]:
    """Return the pictures of a clip in the order of their names, or why there are none, as `_read_local`."""
    assert isinstance(row.image, Path)
    frames, left = list[bytes](), max_bytes
    try:
        files = sorted(path for path in row.image.iterdir() if path.suffix.lower() in PICTURES)
    except OSError:
        return [], "unreadable"
    for file in files[:MAX_CLIP_FRAMES + 1]:
        data, fate = _read_local(row._replace(image=file), left)
        if fate:
            return [], fate
        frames.append(data)
        left -= len(data)
    return frames, "" if frames else "missing"


def _open_fetcher(spec: Spec) -> "Fetcher":
    from flm_scale.data.prepare.fetch import USER_AGENT, Fetcher, FetchLimits

    limits = FetchLimits(max_bytes=spec.image.max_bytes, total_seconds=spec.fetch.total_seconds, allow_loopback=spec.fetch.allow_loopback,
                         user_agent=f"{USER_AGENT} {spec.fetch.contact}".rstrip())
    retries = {"dns": spec.fetch.dns_retries, "timeout": spec.fetch.timeout_retries, "server": spec.fetch.server_retries}
    return Fetcher(concurrency=spec.fetch.concurrency, limits=limits, retries=retries)


def _unscored(sample: Sample) -> Sample:
    """Take the score away: all samples of a shard have the same columns, and new ones have none yet. The table keeps it until they do."""
    return replace(sample, columns={name: value for name, value in sample.columns.items() if name != SCORE})


def _request(row: Row) -> "Request":
    from flm_scale.data.prepare.fetch import Request

    return Request(row.url, sha256=row.sha256, md5=row.md5)


def _read_local(row: Row, max_bytes: int) -> tuple[bytes, str]:
    """Return the bytes of a picture, or why there are none: missing, unreadable, too_large, hash."""
    data = row.image or b""
    if isinstance(data, Path):
        try:
            if not S_ISREG(data.stat().st_mode):  # opening a pipe would wait for ever
                return b"", "unreadable"
            with data.open("rb") as stream:
                data = stream.read(max_bytes + 1)
        except FileNotFoundError:
            return b"", "missing"
        except OSError:
            return b"", "unreadable"
    if len(data) > max_bytes:
        return b"", "too_large"
    is_right = all(not expected or hashlib.new(name, data, usedforsecurity=False).hexdigest() == expected.lower()
                   for name, expected in (("sha256", row.sha256), ("md5", row.md5)))
    return (data, "") if is_right else (b"", "hash")
