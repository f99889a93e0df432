"""Coverage-guided fuzzing of what reads files by strangers: the tar reader, the header check with the decoders behind it, and sidecars.

Good and hostile files are changed at random, half of the time with their checksums put right again; a change that reaches new lines of ours is kept
and changed further. A finding is any error but a DataError, over five seconds or 500 MB, a reader that disagrees with itself or, on a tar that it
accepts, with Python's. Findings are written to a folder; the exit code is 1 if there are any.

    nice -n 19 python -m tools.fuzz_data --minutes 10
"""

import io
import random
import resource
import signal
import sys
import tarfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from types import FrameType

import tyro
from rich.console import Console

from flm_scale.data import images, tar
from flm_scale.data.prepare.worker import limit_memory
from flm_scale.errors import DataError
from tests.data.hostile import Unseekable, encoded, hostile_files, jpeg, member, pax, png, shard

OURS = {images.__file__, tar.__file__}
LIMIT_SECONDS, LIMIT_MEGABYTES, MAX_SEED_BYTES, MAX_PIXELS = 5, 500, 100_000, 4_000_000
TOKENS = (b"\0", b"\xff", b"/", b"..", b".pkl", b"ustar", b"7777777", b"IHDR", b"IDAT", b"\xff\xd8", b"\xff\xc0", b"\xff\xda", b"VP8X", b"NaN",
          b"[" * 50)


def check_tar(data: bytes) -> str:
    """Read a tar three ways; return how it ended."""
    ends = []
    for read in (lambda: tar.read_shard(Unseekable(data)), lambda: tar.list_members(Unseekable(data)), lambda: tar.list_members(io.BytesIO(data))):
        try:
            ends.append(list(read()))
        except tar.ShardError as error:
            ends.append(error.reason)
    streamed, indexed, sought = ends
    if isinstance(sought, str):
        assert streamed == indexed == sought, f"ends differ: {streamed}, {indexed}, {sought}"
        return sought
    assert indexed == sought, "seeking and streaming differ"
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as reference:
        expected = [entry for entry in reference if not entry.isdir()]
    assert [(one.offset, one.size) for one in sought] == [(entry.offset_data, entry.size) for entry in expected], "tarfile sees other members"
    for one, entry in zip(sought, expected, strict=True):
        name = str(PurePosixPath(entry.name))
        assert one.rejected or (one.key, one.extension) == (name[:len(one.key)], name[len(one.key) + 1:].lower()), "tarfile sees another name"
    for sample in streamed:
        places = [one for one in sought if one.key == sample.key]
        assert sample.rejected or sample.members == {one.extension: data[one.offset:one.offset + one.size] for one in places}, "other content"
    return "read"


def check_image(data: bytes) -> str:
    """Read the header, then decode, for training and for storage."""
    header = images.read_header(data, max_pixels=MAX_PIXELS)
    assert 0 < header.width * header.height <= MAX_PIXELS
    assert images.decode_image(data, size=8, max_pixels=MAX_PIXELS).shape == (3, 8, 8)
    fitted = images.fit_image(data, size=8, mode="keep_ratio", max_pixels=MAX_PIXELS)
    assert min(fitted.width, fitted.height) == min(8, header.width, header.height)
    assert images.read_header(fitted.data)[1:] == (fitted.width, fitted.height)
    return "decoded"


def check_json(data: bytes) -> str:
    """Parse a sidecar."""
    fields, num_null = tar.read_json(data)
    assert isinstance(fields, dict)
    return "nulls" if num_null else "parsed"


CHECKS: dict[str, Callable[[bytes], str]] = {"tar": check_tar, "image": check_image, "json": check_json}


def run_one(kind: str, data: bytes) -> tuple[str, frozenset[int]]:
    """Return how one input ended, and which lines of ours it reached."""
    lines: set[int] = set()

    def trace(frame: FrameType, event: str, _argument: object) -> object:
        if frame.f_code.co_filename not in OURS:
            return None
        if event == "line":
            lines.add(hash((frame.f_code.co_filename, frame.f_lineno)))
        return trace

    signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
    sys.settrace(trace)
    try:
        end = CHECKS[kind](data)
    except DataError as error:
        end = "refused" if "\n" not in str(error) else "FINDING: a message of several lines"
    except Exception as error:  # noqa: BLE001, whatever it is, it is what we look for
        end = f"FINDING: {type(error).__name__}: {error}"
    finally:
        sys.settrace(None)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return end, frozenset(lines)


def change(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Change a file at a few places."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        place, length = rng.randrange(len(out) + 1), rng.choice((1, 2, 4, 12, 100, 512, 1024))
        match rng.randrange(7):
            case 0:
                out[place:place + 1] = bytes([rng.randrange(256)])
            case 1:
                out[place:place + length] = rng.randbytes(length)
            case 2:
                del out[place:place + length]
            case 3:
                source = rng.choice(others)
                start = rng.randrange(len(source) + 1) // 512 * 512
                out[place // 512 * 512:place // 512 * 512] = source[start:start + rng.choice((512, 1024, 4096))]
            case 4:
                token = rng.choice(TOKENS)
                out[place:place + rng.choice((0, len(token)))] = token
            case 5 if out:
                place %= len(out)
                out[place] ^= 1 << rng.randrange(8)
            case _:
                del out[rng.choice((place, place // 512 * 512)):]
    return bytes(out[:MAX_SEED_BYTES])


def mend(kind: str, data: bytes) -> bytes:
    """Put checksums right, so that changes get past them."""
    out = bytearray(data)
    if kind == "tar":
        for at in range(0, len(out) - 511, 512):
            if out[at + 257:at + 262] == b"ustar":
                out[at + 148:at + 156] = b"%06o\0 " % (sum(out[at:at + 148]) + 8 * 32 + sum(out[at + 156:at + 512]))
    elif kind == "image" and out.startswith(images.PNG_SIGNATURE):
        at = 8
        while at + 12 <= len(out):
            end = at + 8 + int.from_bytes(out[at:at + 4], "big")
            out[end:end + 4] = zlib.crc32(out[at + 4:end]).to_bytes(4, "big") if end + 4 <= len(out) else b""
            at = end + 4
    return bytes(out)


def seeds() -> dict[str, list[bytes]]:
    """Return the good files and the small hostile ones, by kind."""
    found: dict[str, list[bytes]] = {
        "tar": [shard(pax(mtime="1.5"), member("0001.jpg"), member("./@LongLink", b"a/0002.jpg\0", b"L"), member("x"), member("d/", b"", b"5"))],
        "image": [png(), jpeg(scans=3), encoded("PNG"), encoded("PNG", "P"), encoded("JPEG"), encoded("JPEG", progressive=True), encoded("WEBP"),
                  encoded("WEBP", lossless=True), encoded("WEBP", exif=b"Exif\0\0")],
        "json": [b'{"caption": "a \\u00fc", "width": 3, "similarity": NaN, "list": [1.5, {"a": null}]}'],
    }
    for file in hostile_files().values():
        if file.kind in found and len(file.content) <= MAX_SEED_BYTES:
            found[file.kind].append(file.content)
    return found


def fuzz(*, minutes: float = 10.0, seed: int = 0, findings: Path = Path("fuzz-findings")) -> int:
    """Fuzz for so many minutes."""
    console, rng = Console(), random.Random(seed)
    limit_memory(4 * 1024**3)
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError(f"over {LIMIT_SECONDS} s")))
    warnings.simplefilter("error")
    pool, reached = seeds(), {kind: frozenset[int]() for kind in CHECKS}
    ends: Counter[str] = Counter()
    num_findings, started, told = 0, time.monotonic(), time.monotonic()
    first = [(kind, data) for kind, files in pool.items() for data in files]
    while (now := time.monotonic()) < started + minutes * 60 or first:
        kind, data = first.pop() if first else ("", b"")
        if not kind:
            kind = rng.choices(("tar", "image", "json"), (5, 4, 1))[0]
            data = change(rng.choice(pool[kind]), pool[kind], rng)
            data = mend(kind, data) if rng.random() < 0.5 else data
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        end, lines = run_one(kind, data)
        if (grown := (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) // 1024) > LIMIT_MEGABYTES:
            end = f"FINDING: {grown} MB more memory"
        if end.startswith("FINDING"):
            findings.mkdir(exist_ok=True)
            (findings / f"{kind}-{num_findings:03d}").write_bytes(data)
            num_findings += 1
            console.print(f"{kind}-{num_findings - 1:03d}: {end}", markup=False)
        elif lines - reached[kind]:
            pool[kind].append(data)
        reached[kind] |= lines
        ends[f"{kind} {end.split(':')[0]}"] += 1
        if now > told + 30:
            told = now
            num_lines = sum(map(len, reached.values()))
            console.print(f"{(now - started) / 60:.1f} min: {ends.total():,} inputs, {num_lines} lines, {num_findings} findings")
    console.print(f"{ends.total():,} inputs in {(time.monotonic() - started) / 60:.1f} minutes, {num_findings} findings", dict(ends.most_common()))
    return 1 if num_findings else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(fuzz))
