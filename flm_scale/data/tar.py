"""Tar shards of image-text samples by untrusted authors, read strictly: the preparation streams samples, an index asks for places alone.

Python's own reader stops without a word at a bad header, honours links and trusts sizes. This one knows what webdataset, img2dataset, GNU tar
and Python's tarfile write for plain files, and refuses the rest:

- What makes the archive doubtful refuses the SHARD, with a ShardError: damage of any kind (a cut, a checksum, a missing end, bytes behind it),
  compression, links and devices, names that leave the folder, the same key or member twice, pickles and what may hold them.
- What makes one sample useless rejects that SAMPLE, with a word for a table: `extension` (none of those asked for), `key` (odd characters, none, or
  too long), `too_large`. Whether a picture or a caption is missing is the caller's to judge.

Nothing is extracted, unpickled or decompressed. Memory holds one sample and the keys seen.
"""

import io
import json
import math
import re
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from flm_scale.errors import DataError

EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "mp4", "txt", "json"})
# Loading any of them may run code; .npy and .npz may hold pickles.
DANGEROUS = frozenset({"pickle", "pkl", "pyd", "pyc", "py", "pt", "pth", "ckpt", "joblib", "dill", "npy", "npz"})
KEY = re.compile(r"[A-Za-z0-9_=+@,-]+(/[A-Za-z0-9_=+@,-]+)*", re.ASCII)
MAX_KEY_LENGTH = 200
MAX_MEMBERS = 1_000_000
MAX_SAMPLES = 300_000
"""Of a shard that we write: each has three members."""
MAX_SAMPLE_BYTES = 64 * 1024**2
MAX_JSON_BYTES, MAX_JSON_DEPTH = 1024**2, 32

BLOCK = 512
RECORD = 20 * BLOCK  # tar and tarfile fill the last one with zeros
MAX_EXTENDED_BYTES = 4096  # of a long name or pax records; webdataset's hold a time, 20 bytes
SKIPPED_AT_ONCE = 1024**2
USTAR, GNU = b"ustar\x0000", b"ustar  \0"  # magic and version
# Mode, owner, group, time and device: readers that use them stop, without a word, at what is no number.
UNUSED_FIELDS = (slice(100, 108), slice(108, 116), slice(116, 124), slice(136, 148), slice(329, 337), slice(337, 345))
NUMBER_OR_NONE = re.compile(rb"[\x80\xff].*| *[0-7]*[ \0]*", re.DOTALL)  # GNU tar writes large ones in base 256
FILE, OLD_FILE, FOLDER, PAX, LONG_NAME = b"0", b"\0", b"5", b"x", b"L"
KINDS = {b"1": "hard link", b"2": "symbolic link", b"3": "character device", b"4": "block device", b"6": "fifo", b"g": "global pax header",
         b"K": "long link name", b"S": "sparse file"}
PAX_IGNORED = frozenset({"atime", "comment", "ctime", "gid", "gname", "mtime", "uid", "uname"})
PAX_IGNORED_PREFIXES = ("LIBARCHIVE.", "SCHILY.fflags", "SCHILY.xattr.")
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4", b"PK": "zip"}


class ShardError(DataError):
    """A shard that is refused. `reason` is one word for tables."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class Member(NamedTuple):
    """One file of a shard."""

    key: str
    extension: str
    offset: int
    """Of the content, in bytes from the shard's start."""
    size: int
    rejected: str = ""
    """Why its whole sample is of no use: `extension`, `key` or `too_large`. Empty for a good one."""


@dataclass
class TarSample:
    """Members that share a key, one behind the other in the shard."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    """By extension, in lower case. Empty when the sample is rejected."""
    rejected: str = ""


def read_shard(source: Path | BinaryIO, *, extensions: Collection[str] = EXTENSIONS, max_sample_bytes: int = MAX_SAMPLE_BYTES,
               expected_bytes: int | None = None, expected_count: int | None = None) -> Iterator[TarSample]:
    """Yield every sample of a shard, rejected ones without their members.

    source: a path, or a stream that need not seek.   extensions: what a sample may hold.   max_sample_bytes: of all its members together.
    expected_bytes, expected_count: size and number of samples, where a manifest states them; a shard cut and padded to look whole is found by them.
    Samples come before the end has been seen: commit nothing until the iterator ends. Raises ShardError.
    """
    sample = None
    with ExitStack() as stack:
        stream = _Stream(source, stack, expected_bytes)
        for member in _members(stream, extensions, max_sample_bytes, expected_count):
            if sample is None or member.key != sample.key:
                if sample:
                    yield sample
                sample = TarSample(member.key)
            if member.rejected or sample.rejected:
                sample.rejected = sample.rejected or member.rejected
                sample.members.clear()
            else:
                sample.members[member.extension] = stream.take(member.size)
        if sample:
            yield sample


def list_members(source: Path | BinaryIO, *, extensions: Collection[str] = EXTENSIONS, max_sample_bytes: int = MAX_SAMPLE_BYTES,
                 expected_bytes: int | None = None, expected_count: int | None = None) -> Iterator[Member]:
    """Yield every member with its place, as strictly as `read_shard` but reading headers alone where the source can seek."""
    with ExitStack() as stack:
        yield from _members(_Stream(source, stack, expected_bytes), extensions, max_sample_bytes, expected_count)


class _Stream:
    """Exact reads, and one kind of error that says where."""

    def __init__(self, source: Path | BinaryIO, stack: ExitStack, expected_bytes: int | None) -> None:
        self.file = stack.enter_context(_open(source)) if isinstance(source, Path) else source
        self.name = str(source) if isinstance(source, Path) else str(getattr(source, "name", "stream"))
        self.offset, self.size, self.expected_bytes = 0, 0, expected_bytes
        self.header_at, self.member = 0, ""  # what errors name
        self.start = self.file.tell() if self.file.seekable() else None
        if self.start is not None:
            self.size = self.file.seek(0, io.SEEK_END) - self.start
            self.file.seek(self.start)
            self._check_size(self.size)

    def take(self, size: int) -> bytes:
        """Return the next `size` bytes."""
        data = self._read(size)
        if len(data) != size:
            self.refuse("truncated", f"ends after {self.offset} bytes, {size - len(data)} too early")
        return data

    def block(self) -> bytes:
        """Return the next header; empty at the end of the file."""
        data = self._read(BLOCK)
        if len(data) not in (0, BLOCK):
            _refuse_compressed(self, data)
            self.refuse("truncated", f"ends inside a header, after {self.offset} bytes")
        return data

    def skip_to(self, offset: int) -> None:
        """Move on, without reading where the file can seek."""
        if self.start is None:
            while self.offset < offset:
                self.take(min(offset - self.offset, SKIPPED_AT_ONCE))
        elif offset > self.size:
            self.refuse("truncated", f"has {self.size} bytes and ends before the content's {offset}")
        elif offset > self.offset:
            self.offset = offset
            self.file.seek(self.start + offset)

    def finish(self) -> None:
        """Check what follows the first zero block: one more, and zeros that fill a record."""
        tail = self._read(RECORD + BLOCK)
        if len(tail) < BLOCK:
            self.refuse("truncated", "ends without its two zero blocks")
        if tail.strip(b"\0") or len(tail) > RECORD or len(tail) % BLOCK:
            self.refuse("trailing", "holds more behind its end than the zeros that fill a record")
        self._check_size(self.offset)

    def refuse(self, reason: str, what: str) -> NoReturn:
        """Raise the error, with shard, member and place."""
        member = f"member {self.member!a} " if self.member else ""
        raise ShardError(f"shard {self.name}: {member}at byte {self.header_at}: {what}; fetch or build the shard again, or leave it out",
                         reason=reason)

    def _read(self, size: int) -> bytes:
        """Read until there are `size` bytes or no more: raw streams give less at a time."""
        parts: list[bytes] = []
        while size > 0:
            try:
                part = self.file.read(min(size, SKIPPED_AT_ONCE))
            except OSError as error:
                self.refuse("unreadable", f"cannot be read ({error})")
            if not part:
                break
            parts.append(part)
            self.offset += len(part)
            size -= len(part)
        return b"".join(parts)

    def _check_size(self, size: int) -> None:
        if self.expected_bytes is not None and size != self.expected_bytes:
            self.refuse("size", f"the shard has {size} bytes; {self.expected_bytes} are expected")


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise ShardError(f"shard {path} cannot be read ({error.strerror}); restore the file or leave it out", reason="unreadable") from error


def _members(stream: _Stream, extensions: Collection[str], max_sample_bytes: int, expected_count: int | None) -> Iterator[Member]:
    """Yield members with the stream at their content; group them and refuse what must not be in a shard."""
    keys: set[str] = set()
    sample_extensions: set[str] = set()
    key, sample_bytes, num_members = None, 0, 0
    while file := _next_file(stream):
        name, size = file
        num_members += 1
        if num_members > MAX_MEMBERS:
            stream.refuse("too_many", f"more than {MAX_MEMBERS} members")
        member_key, extension = _split(name)
        if danger := DANGEROUS.intersection(extension.split(".")):
            stream.refuse("dangerous", f"loading .{min(danger)} files may run code")
        if member_key != key:
            if member_key in keys:
                stream.refuse("duplicate", f"key {member_key!a} was in the shard before")
            key, sample_bytes = member_key, 0
            keys.add(key)
            sample_extensions.clear()
        if extension in sample_extensions:
            stream.refuse("duplicate", f"sample {key!a} has two .{extension} members")
        sample_extensions.add(extension)
        sample_bytes += size
        rejected = "too_large" if sample_bytes > max_sample_bytes else _rejection(key, extension, extensions)
        offset = stream.offset
        yield Member(key, extension, offset, size, rejected)
        stream.skip_to(offset + size + -size % BLOCK)
    if expected_count is not None and len(keys) != expected_count:
        stream.refuse("count", f"the shard has {len(keys)} samples; {expected_count} are expected")


def _rejection(key: str, extension: str, extensions: Collection[str]) -> str:
    if len(key) > MAX_KEY_LENGTH or not KEY.fullmatch(key):
        return "key"
    return "" if extension in extensions else "extension"


def _split(name: str) -> tuple[str, str]:
    """Cut a name as webdataset does: the extension begins at the first dot behind the last slash."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return (folder + slash + stem, extension.lower()) if stem else (name, "")


def _next_file(stream: _Stream) -> tuple[str, int] | None:
    """Return name and size of the next regular file, the stream at its content; None behind the end."""
    extended, longer_name = False, ""
    while True:
        stream.header_at, stream.member = stream.offset, ""
        block = stream.block()
        if not block:
            stream.refuse("truncated", "the shard ends without its two zero blocks" if stream.offset else "the shard is empty")
        if not block.strip(b"\0") and not extended:
            stream.finish()
            return None
        kind, size = _check_header(stream, block)
        name = _relative(stream, longer_name or _name(stream, block))
        if kind in (PAX, LONG_NAME):
            if extended or size > MAX_EXTENDED_BYTES:
                stream.refuse("header", f"extended header of {size} bytes, or one behind another; one of {MAX_EXTENDED_BYTES} is read")
            content = stream.take(size)
            stream.skip_to(stream.offset + -size % BLOCK)
            extended, longer_name = True, _pax_path(stream, content) if kind == PAX else _text(stream, content.removesuffix(b"\0"))
        elif kind == FOLDER:
            if size:
                stream.refuse("header", "a folder with content")
            extended, longer_name = False, ""
        elif not name or name.endswith("/"):
            stream.refuse("name", "a file without a name")
        else:
            return name, size


def _relative(stream: _Stream, name: str) -> str:
    """Return the name without `./`; refuse one that leaves the folder."""
    stream.member = name
    parts = name.split("/")
    if name.startswith("/") or ".." in parts:
        stream.refuse("name", "the name leaves the folder")
    return "/".join(part for part in parts if part != ".")


def _check_header(stream: _Stream, block: bytes) -> tuple[bytes, int]:
    """Return type and size of one header. Source: POSIX.1-2017, pax, ustar interchange format."""
    magic, kind = block[257:265], block[156:157]
    if magic not in (USTAR, GNU):
        _refuse_compressed(stream, block)
        stream.refuse("header", "not the header of a tar member")
    if not all(NUMBER_OR_NONE.fullmatch(block[field]) for field in UNUSED_FIELDS):
        stream.refuse("header", "a field of the header is no number")
    if magic == GNU and block[345:500].strip(b"\0"):
        stream.refuse("header", "GNU's header with a prefix, which some readers take for a folder and others do not")
    if _octal(stream, block[148:156], "checksum") != sum(block[:148]) + 8 * 32 + sum(block[156:]):
        stream.refuse("checksum", "the header's checksum is wrong")
    if kind not in (FILE, OLD_FILE, FOLDER, PAX, LONG_NAME):
        stream.member = _name(stream, block)
        stream.refuse("kind", f"a {KINDS.get(kind, f'member of type {kind!r}')}; only plain files are read")
    return kind, _octal(stream, block[124:136], "size")


def _refuse_compressed(stream: _Stream, start: bytes) -> None:
    for signature, format_name in COMPRESSED.items():
        if stream.header_at == 0 and start.startswith(signature):
            stream.refuse("compressed", f"the shard is compressed ({format_name}); only plain tar is read")


def _octal(stream: _Stream, digits: bytes, what: str) -> int:
    if not re.fullmatch(rb" *[0-7]+[ \0]*", digits):
        stream.refuse("header", f"{what} field {digits!r} is no octal number")
    return int(digits.strip(b" \0"), 8)


def _name(stream: _Stream, block: bytes) -> str:
    name = _text(stream, block[:100].rstrip(b"\0"))
    prefix = _text(stream, block[345:500].rstrip(b"\0")) if block[257:265] == USTAR else ""
    return f"{prefix}/{name}" if prefix else name


def _text(stream: _Stream, name: bytes) -> str:
    """Decode a name. What is not UTF-8 shows as escapes, which no good key has."""
    if b"\0" in name:
        stream.refuse("name", f"name {name!r} has a NUL inside")
    return name.decode("utf-8", "backslashreplace")


def _pax_path(stream: _Stream, content: bytes) -> str:
    """Return the path that pax records ("LENGTH KEY=VALUE newline", end to end) give, or nothing; times and owners pass."""
    path = ""
    while content:
        record = re.match(rb"([1-9]\d{0,4}) ([^=\0]+)=", content)
        length = int(record[1]) if record else 0
        if not record or not record.end() < length <= len(content) or content[length - 1:length] != b"\n":
            stream.refuse("header", "damaged pax records")
        keyword = record[2].decode("utf-8", "backslashreplace")
        if keyword == "path":
            path = _text(stream, content[record.end():length - 1])
        elif keyword not in PAX_IGNORED and not keyword.startswith(PAX_IGNORED_PREFIXES):
            stream.refuse("header", f"pax record {keyword!a} would change how the member is read")
        content = content[length:]
    return path


def read_json(content: bytes) -> tuple[dict[str, Any], int]:
    """Parse a sample's JSON sidecar; return its fields and how many numbers became null.

    NaN, infinities (img2dataset writes them) and whole numbers beyond 64 bits become null. Raises DataError when it is above 1 MiB, deeper than 32,
    no JSON object in UTF-8, holds a key twice or a lone surrogate, which no table can store.
    """
    if len(content) > MAX_JSON_BYTES:
        raise DataError(f"JSON of {len(content)} bytes exceeds the limit of {MAX_JSON_BYTES}; drop the sample")
    dropped: list[str] = []

    def whole(digits: str) -> int | None:
        if len(digits) <= 20 and -2**63 <= int(digits) < 2**64:
            return int(digits)
        dropped.append(digits)
        return None

    def real(digits: str) -> float | None:
        if math.isfinite(float(digits)):
            return float(digits)
        dropped.append(digits)
        return None

    try:
        fields = json.loads(content.decode("utf-8"), parse_constant=dropped.append, parse_int=whole, parse_float=real, object_pairs_hook=_unique)
        _check_value(fields, depth=0)
    except (ValueError, RecursionError) as error:
        raise DataError(f"JSON of {len(content)} bytes cannot be read ({error}); drop the sample") from error
    if not isinstance(fields, dict):
        raise DataError(f"JSON holds a {type(fields).__name__}, not an object with fields; drop the sample")
    return fields, len(dropped)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key stands in it twice")
    return fields


def _check_value(value: object, *, depth: int) -> None:
    if depth > MAX_JSON_DEPTH:
        raise ValueError(f"nested deeper than {MAX_JSON_DEPTH}")
    if isinstance(value, str):
        value.encode("utf-8")
    elif isinstance(value, dict | list):
        if isinstance(value, dict):
            "".join(value).encode("utf-8")
        for part in value.values() if isinstance(value, dict) else value:
            _check_value(part, depth=depth + 1)
