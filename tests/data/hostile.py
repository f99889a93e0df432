"""Files that mean harm, made by code, and what each must end in; run as a module it meets them all under a limit of memory and time.

    python -m tests.data.hostile DIR        one JSON line a file: name, outcome, the one it must have, seconds, memory in MB that it added to the peak
"""

import gzip
import io
import json
import lzma
import pickle
import resource
import signal
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from flm_scale.data.images import decode_image, fit_image, read_header
from flm_scale.data.prepare.worker import limit_memory
from flm_scale.data.tar import list_members, read_json, read_shard
from flm_scale.errors import DataError
from tests.data.prepare.hostile_tables import annotation_files, csv_files, meet_table, parquet_files

Kind = Literal["tar", "image", "json", "parquet", "csv", "annotations"]
MEMORY_BYTES, SECONDS = 2 * 1024**3, 20
TRAP = str(Path(tempfile.gettempdir()) / "flm_scale-hostile-trap")  # what loading the pickle would make, and nothing may


class Hostile(NamedTuple):
    """A file and how reading it must end."""

    kind: Kind
    content: bytes
    outcome: str
    """`refused`, with the reason where there is one; `rejected REASON` of the one bad sample among good ones; `harmless`."""


class _Trap:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path(TRAP),)


PICKLE = pickle.dumps(_Trap())


def header(name: str | bytes, size: int = 0, kind: bytes = b"0", *, prefix: bytes = b"", link: bytes = b"", size_field: bytes = b"",
           time: bytes = b"0", checksum: int | None = None) -> bytes:
    """One tar header, as right or wrong as wanted."""
    name = name.encode() if isinstance(name, str) else name
    block = bytearray(512)
    block[:len(name)] = name
    block[100:136] = b"0000644\x000000000\x000000000\x00" + (size_field or b"%011o\0" % size)
    block[136:156] = time.rjust(11, b"0") + b"\0" + b" " * 8
    block[156:157] = kind
    block[157:157 + len(link)] = link
    block[257:265] = b"ustar\x0000"
    block[345:345 + len(prefix)] = prefix
    block[148:156] = b"%06o\0 " % (sum(block) if checksum is None else checksum)
    return bytes(block)


def member(name: str | bytes, content: bytes = b"x", kind: bytes = b"0") -> bytes:
    """Header, content, padding."""
    return header(name, len(content), kind) + content + bytes(-len(content) % 512)


def pax(**records: str) -> bytes:
    """A pax header for the member behind it."""
    lines = b""
    for keyword, value in records.items():
        rest = f" {keyword.replace('__', '.')}={value}\n".encode()
        length = next(n for n in range(len(rest), len(rest) + 9) if n == len(rest) + len(str(n)))
        lines += str(length).encode() + rest
    return member("pax", lines, b"x")


END = bytes(10240)
GOOD = b"".join(member(f"0000.{extension}", content) for extension, content in (("jpg", b"picture"), ("json", b"{}"), ("txt", b"words")))
LAST = b"".join(member(f"0009.{extension}") for extension in ("jpg", "txt"))


def shard(*middle: bytes) -> bytes:
    """Something between two good samples."""
    return GOOD + b"".join(middle) + LAST + END


def _tars() -> dict[str, tuple[bytes, str]]:
    whole = shard()
    cut = len(GOOD) + 512
    return {
        "gzip": (gzip.compress(whole), "refused compressed"),
        "gzip bomb": (gzip.compress(bytes(200_000_000), 9), "refused compressed"),
        "xz": (lzma.compress(whole), "refused compressed"),
        "zstd": (b"\x28\xb5\x2f\xfd" + bytes(600), "refused compressed"),
        "zip": (_zip({"0000.jpg": bytes(900)}), "refused compressed"),
        "html": (b"<html>404" + b" " * 600, "refused header"),
        "empty": (b"", "refused truncated"),
        "cut between samples": (GOOD, "refused truncated"),
        "cut between members": (whole[:1024], "refused truncated"),
        "cut inside a header": (whole[:cut - 100], "refused truncated"),
        "cut inside content": (whole[:cut + 1], "refused truncated"),
        "cut behind one zero block": (GOOD + bytes(512), "refused truncated"),
        "zero-filled tail": (GOOD + bytes(50_000), "refused trailing"),
        "bytes behind the end": (whole + b"x" * 512, "refused trailing"),
        "two tars end to end": (whole + whole, "refused trailing"),
        "half a block behind the end": (whole[:-9216] + bytes(100), "refused trailing"),
        "wrong checksum": (shard(header("0001.jpg", checksum=1)), "refused checksum"),
        "flipped bit in a header": (whole[:3] + bytes([whole[3] ^ 1]) + whole[4:], "refused checksum"),
        "no ustar mark": (shard(bytes(100) + b"1" + bytes(411)), "refused header"),
        "size is no number": (shard(header("0001.jpg", size_field=b"12x45678901\0")), "refused header"),
        "time is no number": (shard(header("0001.jpg", time=b"never")), "refused header"),
        "negative size": (shard(header("0001.jpg", size_field=b"\xff" * 12)), "refused header"),
        "size in base 256": (shard(header("0001.jpg", size_field=b"\x80" + bytes(10) + b"\1")), "refused header"),
        "no size": (shard(header("0001.jpg", size_field=b"\0" * 12)), "refused header"),
        "size beyond the end": (shard(header("0001.jpg", 8 * 1024**3 - 1)), "refused truncated"),
        "symbolic link": (shard(header("0001.jpg", kind=b"2", link=b"/etc/passwd")), "refused kind"),
        "hard link": (shard(header("0001.jpg", kind=b"1", link=b"0000.jpg")), "refused kind"),
        "character device": (shard(header("0001.jpg", kind=b"3")), "refused kind"),
        "block device": (shard(header("0001.jpg", kind=b"4")), "refused kind"),
        "fifo": (shard(header("0001.jpg", kind=b"6")), "refused kind"),
        "sparse file": (shard(header("0001.jpg", kind=b"S")), "refused kind"),
        "global pax header": (shard(member("g", b"20 comment=12345678\n", b"g")), "refused kind"),
        "unknown type": (shard(header("0001.jpg", kind=b"Z")), "refused kind"),
        "folder with content": (shard(header("dir/", 512, b"5"), bytes(512)), "refused header"),
        "long name of a gigabyte": (shard(header("././@LongLink", 1024**3, b"L")), "refused header"),
        "long name behind a long name": (shard(member("L", b"a", b"L"), member("L", b"b", b"L")), "refused header"),
        "long name without a file": (GOOD + member("L", b"a", b"L") + END, "refused header"),
        "pax header of a gigabyte": (shard(header("pax", 1024**3, b"x")), "refused header"),
        "pax record that changes the size": (shard(pax(size="99"), member("0001.jpg")), "refused header"),
        "pax record of a sparse file": (shard(pax(GNU__sparse__realsize="999999999999"), member("0001.jpg")), "refused header"),
        "pax record that lies about its length": (shard(member("pax", b"99 path=a\n", b"x"), member("0001.jpg")), "refused header"),
        "pax path that leaves the folder": (shard(pax(path="../../0001.jpg"), member("0001.jpg")), "refused name"),
        "pax path with a NUL": (shard(pax(path="0001\0.jpg"), member("0001.jpg")), "refused name"),
        "absolute name": (shard(member("/etc/0001.jpg")), "refused name"),
        "parent folder": (shard(member("a/../../0001.jpg")), "refused name"),
        "parent folder in the prefix": (shard(header("0001.jpg", prefix=b"..")), "refused name"),
        "NUL inside a name": (shard(member(b"0001.jpg\0.pkl")), "refused name"),
        "no name": (shard(member("")), "refused name"),
        "key that comes back": (shard(member("0001.jpg"), member("0002.jpg"), member("0001.txt")), "refused duplicate"),
        "key of the first sample": (shard(member("0000.png")).replace(GOOD, GOOD + member("0005.jpg")), "refused duplicate"),
        "member twice": (shard(member("0001.jpg"), member("0001.jpg")), "refused duplicate"),
        "member twice in other letters": (shard(member("0001.jpg"), member("0001.JPG")), "refused duplicate"),
        "pickle": (shard(member("0001.pickle", PICKLE)), "refused dangerous"),
        "pyd": (shard(member("0001.pyd", PICKLE)), "refused dangerous"),
        "zipped pickle": (shard(member("0001.pkl.gz", gzip.compress(PICKLE))), "refused dangerous"),
        "npy": (shard(member("0001.ids.npy", PICKLE)), "refused dangerous"),
        "shell script": (shard(member("0001.jpg"), member("0001.sh", b"#!/bin/sh")), "rejected extension"),
        "unknown member in a good sample": (shard(member("0001.jpg"), member("0001.mp3"), member("0001.txt")), "rejected extension"),
        "readme": (shard(member("README")), "rejected extension"),
        "sample above the limit": (shard(member("0001.jpg", bytes(2_000_000)), member("0001.txt")), "rejected too_large"),
        "key with a blank and a quote": (shard(member("a 'b.jpg")), "rejected key"),
        "key with a backslash": (shard(member("..\\..\\a.jpg")), "rejected key"),
        "key that is not UTF-8": (shard(member(b"\xff\xfe.jpg")), "rejected key"),
        "key of a terminal's escape codes": (shard(member(b"\x1b[2J.jpg")), "rejected key"),
        "key of a shell command": (shard(member("$(touch x).jpg")), "rejected key"),
        "key that is too long": (shard(member("L", b"k" * 300 + b".jpg\0", b"L"), member("0001.jpg")), "rejected key"),
        "hidden file": (shard(member("._0001.jpg")), "rejected key"),
    }


def png_chunk(kind: bytes, body: bytes = b"") -> bytes:
    """One chunk with its checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int = 8, height: int = 8, *, extra: bytes = b"", pixels: bytes | None = None) -> bytes:
    """A grey PNG; without pixels given, all black."""
    pixels = zlib.compress(bytes((width + 1) * height), 9) if pixels is None else pixels
    return (b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)) + extra
            + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND"))


def jpeg(width: int = 8, height: int = 8, *, scans: int = 0, frame: bytes = b"\xff\xc2", extra: bytes = b"") -> bytes:
    """A grey progressive JPEG whose scans after the first hold nothing; each is a pass over the picture all the same."""
    table = bytes([1] + [0] * 15)
    size = frame + struct.pack(">HBHHB", 11, 8, height, width, 1) + b"\x01\x11\x00"
    tables = b"\xff\xdb\x00\x43\x00" + b"\x01" * 64 + b"\xff\xc4\x00\x14\x00" + table + b"\0" + b"\xff\xc4\x00\x14\x10" + table + b"\0"
    first = b"\xff\xda\x00\x08\x01\x01\x00\x00\x00\x01" + bytes(2)
    return b"\xff\xd8" + extra + tables + size + first + b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00\0\0" * scans + b"\xff\xd9"


def encoded(kind: str, mode: str = "RGB", **options: object) -> bytes:
    """A small picture by Pillow."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def webp(kind: bytes, body: bytes) -> bytes:
    """A RIFF file of one chunk."""
    return b"RIFF" + struct.pack("<I", len(body) + 12) + b"WEBP" + kind + struct.pack("<I", len(body)) + body


def _images() -> dict[str, tuple[bytes, str]]:
    megabytes = zlib.compress(bytes(200_000_000), 9)
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    still = encoded("JPEG")
    side = (16383).to_bytes(2, "little")
    wide = (16382).to_bytes(3, "little")
    tiff_loop = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, 0x8769, 4, 1, 8) + struct.pack("<I", 8)
    tiff_huge = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, 0x010E, 2, 0xFFFFFFFF, 8) + bytes(4)
    return {
        "png bomb of 30,000 x 30,000": (png(30_000, 30_000), "refused pixels"),
        "png that claims 4 billion": (png(2**31 - 1, 2, pixels=b""), "refused pixels"),
        "png without pixels": (png(0, 5), "refused pixels"),
        "jpeg bomb": (jpeg(65_500, 65_500), "refused pixels"),
        "webp bomb, extended": (webp(b"VP8X", bytes(4) + wide + wide), "refused pixels"),
        "webp bomb, lossless": (webp(b"VP8L", b"\x2f" + struct.pack("<I", 16382 | 16382 << 14)), "refused pixels"),
        "webp bomb, lossy": (webp(b"VP8 ", bytes(3) + b"\x9d\x01\x2a" + side + side), "refused pixels"),
        "png profile that inflates to 200 MB": (png(extra=png_chunk(b"iCCP", b"a\0\0" + megabytes)), "refused damaged"),
        "png text that inflates to 200 MB": (png(extra=png_chunk(b"zTXt", b"a\0\0" + megabytes)), "refused damaged"),
        "png international text that inflates to 200 MB": (png(extra=png_chunk(b"iTXt", b"a\0\1\0\0\0" + megabytes)), "refused damaged"),
        "png with a thousand profiles": (png(extra=png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1_000_000))) * 1000), "refused header"),
        "png with a million empty chunks": (png(extra=png_chunk(b"teSt") * 1_000_000), "refused header"),
        "png pixels that inflate to 200 MB": (png(pixels=megabytes), "harmless"),
        "png of 4,000 x 4,000 transparent pixels": (_clear_png(4_000), "harmless"),
        "png with a wrong checksum": (png()[:30] + b"\0" + png()[31:], "refused damaged"),
        "png with two headers": (png(extra=png_chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 8, 0, 0, 0, 0)), pixels=zlib.compress(bytes(17 * 16))),
                                 "refused header"),
        "png cut off": (encoded("PNG")[:-200], "refused damaged"),
        "png chunk longer than the file": (png()[:33] + struct.pack(">I", 2**31 - 1) + b"IDAT" + bytes(50), "refused damaged"),
        "animated png": (_saved(frames, "PNG"), "harmless"),
        "animated png with a frame outside": (png(extra=png_chunk(b"acTL", struct.pack(">II", 2, 0))
                                                  + png_chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 99, 99, 0, 0, 1, 1, 0, 0))), "refused damaged"),
        "jpeg of 100,000 scans": (jpeg(8_000, 8_000, scans=100_000), "refused header"),
        "sequential jpeg with 100,000 scans behind its only one": (jpeg(8_000, 8_000, frame=b"\xff\xc0", scans=100_000), "refused damaged"),
        "jpeg of 99 scans at the limit of pixels": (jpeg(8_000, 8_000, scans=99), "harmless"),
        "jpeg of a million segments": (jpeg(extra=b"\xff\xe5\x00\x02" * 1_000_000), "refused header"),
        "jpeg of ten million filling bytes": (jpeg(extra=b"\xff" * 10_000_000), "refused header"),
        "jpeg of ten million stray bytes": (b"\xff\xd8\xff\xe5\x00\x02" + bytes(10_000_000) + jpeg()[2:], "refused header"),
        "jpeg with two frames": (jpeg(extra=b"\xff\xc0" + struct.pack(">HBHHB", 11, 8, 9, 9, 1) + b"\x01\x11\x00"), "refused header"),
        "jpeg scan without a frame": (b"\xff\xd8\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00\xff\xd9", "refused header"),
        "jpeg of a lossless frame": (jpeg(frame=b"\xff\xc3"), "refused damaged"),
        "jpeg cut off": (still[:len(still) // 2], "refused damaged"),
        "jpeg header alone": (b"\xff\xd8\xff", "refused header"),
        "jpeg with a looping EXIF": (jpeg(extra=b"\xff\xe1" + struct.pack(">H", len(tiff_loop) + 2) + tiff_loop), "harmless"),
        "jpeg with an EXIF field of 4 GB": (jpeg(extra=b"\xff\xe1" + struct.pack(">H", len(tiff_huge) + 2) + tiff_huge), "harmless"),
        "jpeg in CMYK": (encoded("JPEG", "CMYK"), "harmless"),
        "jpeg that is a zip as well": (still + _zip({"evil.py": b"import os"}), "harmless"),
        "webp animated": (_saved(frames, "WEBP"), "harmless"),
        "webp cut off": (encoded("WEBP")[:200], "refused damaged"),
        "webp of another canvas than picture": (webp(b"VP8X", bytes(4) + bytes(6)) + encoded("WEBP")[12:], "refused damaged"),
        "webp that lies about its length": (b"RIFF\xff\xff\xff\xff" + encoded("WEBP")[8:], "refused damaged"),
        "gif": (encoded("GIF"), "refused format"),
        "bmp": (encoded("BMP"), "refused format"),
        "tiff": (encoded("TIFF"), "refused format"),
        "eps, which Pillow hands to a program": (encoded("EPS"), "refused format"),
        "svg with entities": (b"<!DOCTYPE x [<!ENTITY a 'aaaa'>]><svg>&a;</svg>", "refused format"),
        "html": (b"<!doctype html><title>404</title>", "refused format"),
        "pickle": (PICKLE, "refused format"),
        "nothing": (b"", "refused format"),
    }


def _clear_png(side: int) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes((side * 4 + 1) * side), 9))
            + png_chunk(b"IEND"))


def _saved(frames: list[Image.Image], kind: str) -> bytes:
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def _sidecars() -> dict[str, tuple[bytes, str]]:
    return {
        "nested 100,000 deep": (b"[" * 100_000 + b"]" * 100_000, "refused"),
        "nested 40 deep": (b'{"a":' * 40 + b"1" + b"}" * 40, "refused"),
        "above a megabyte": (b'{"a":"' + b"x" * 1_100_000 + b'"}', "refused"),
        "key twice": (b'{"url":"a","url":"b"}', "refused"),
        "lone surrogate": (rb'{"caption":"\ud800"}', "refused"),
        "lone surrogate in a key": (rb'{"\udfff":1}', "refused"),
        "not UTF-8": (b'{"a":"\xff"}', "refused"),
        "UTF-16": ('{"a":1}'.encode("utf-16"), "refused"),
        "list": (b"[1,2]", "refused"),
        "cut off": (b'{"a":"b', "refused"),
        "nothing": (b"", "refused"),
        "pickle": (PICKLE, "refused"),
        "not a number": (b'{"similarity":NaN,"a":[Infinity,-Infinity]}', "3 null"),
        "number beyond floats": (b'{"a":1e999,"b":-1e999}', "2 null"),
        "whole number of a million digits": (b'{"a":' + b"9" * 1_000_000 + b"}", "1 null"),
        "whole number beyond 64 bits": (b'{"a":18446744073709551616,"b":18446744073709551615}', "1 null"),
    }


def hostile_files() -> dict[str, Hostile]:
    """Every file by its name."""
    made: dict[Kind, dict[str, tuple[bytes, str]]] = {"tar": _tars(), "image": _images(), "json": _sidecars(), "parquet": parquet_files(),
                                                      "csv": csv_files(), "annotations": annotation_files()}
    return {f"{kind}: {name}": Hostile(kind, *entry) for kind, files in made.items() for name, entry in files.items()}


def meet(kind: Kind, content: bytes, folder: Path) -> str:
    """Read a file the way the data plane does and say how it ended."""
    try:
        if kind == "image":
            header = read_header(content)
            assert decode_image(content, size=16).shape == (3, 16, 16)
            fitted = fit_image(content, size=16, mode="center_crop", image_format="png")
            assert max(fitted.width, fitted.height) <= 16
            assert min(header.width, header.height) > 0
            return "harmless"
        if kind == "json":
            fields, num_null = read_json(content)
            json.dumps(fields, allow_nan=False, ensure_ascii=False).encode()
            return f"{num_null} null" if num_null else "harmless"
        if kind in ("parquet", "csv", "annotations"):
            return meet_table(kind, content, folder)
        file = folder / "hostile.tar"
        file.write_bytes(content)
        return _meet_tar(file)
    except DataError as error:
        return f"refused {getattr(error, 'reason', '')}".strip() if "\n" not in str(error) else "more than one line"


def _meet_tar(file: Path) -> str:
    """Read from a file, from a stream and as an index: all must agree."""
    ends = []
    for read in (lambda: read_shard(file, max_sample_bytes=1_000_000), lambda: read_shard(Unseekable(file.read_bytes()), max_sample_bytes=1_000_000),
                 lambda: list_members(file, max_sample_bytes=1_000_000)):
        try:
            rejected = {entry.key: entry.rejected for entry in read() if entry.rejected}
            ends.append(" ".join(["rejected", *rejected.values()]) if rejected else "harmless")
        except DataError as error:
            ends.append(f"refused {error.reason}")
            last = error
    if len(set(ends)) > 1:
        return " | ".join(ends)
    if ends[0].startswith("refused"):
        raise last
    return ends[0]


class Unseekable(io.BytesIO):
    """As a network gives it: no seeking, and seldom as much as was asked for."""

    def seekable(self) -> bool:
        return False

    def read(self, size: int | None = -1) -> bytes:
        return super().read(min(size, 700) if size else size)


def main() -> None:
    """Meet every file; a case that hangs ends the process, its name being the last line."""
    files = hostile_files()
    folder = Path(sys.argv[1])
    limit_memory(MEMORY_BYTES)
    meet("image", encoded("JPEG"), folder)  # imports are not what is measured
    for name, (kind, content, must) in files.items():
        print(json.dumps({"name": name}), flush=True)
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        signal.alarm(SECONDS)
        outcome = meet(kind, content, folder)
        signal.alarm(0)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(json.dumps({"name": name, "outcome": outcome, "must": must, "seconds": round(time.monotonic() - started, 2),
                          "megabytes": round(grown)}), flush=True)


if __name__ == "__main__":
    main()
