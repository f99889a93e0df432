"""A table of addresses and the loopback server behind it: pictures, copies of pictures, and every tenth answer hostile or broken.

What a row gets follows from its number alone, and so does what must become of it.
"""

import asyncio
import gzip
import io
import struct
import zlib
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from tests.data.loopback import Loopback
from tests.data.prepare.server import NOT_FOUND, answer, redirect

PICTURES = 40
COPY_EVERY = 97
"""Rows of this distance hold the very bytes of the row before them."""
FATES = {"": "success", "copy": "duplicate", "not found": "http_404", "endless": "timeout", "redirect loop": "redirects", "hangs up": "disconnected",
         "pdf": "format", "truncated": "damaged", "huge png": "pixels", "gzip bomb": "encoding", "html": "format"}


def picture(number: int, *, width: int, height: int) -> bytes:
    """A JPEG of smooth colours, edges and noise, which takes a decoder about what a photograph does."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[0:height, 0:width] / height
    waves = [np.sin(x * rng.uniform(2, 20) + y * rng.uniform(2, 20)) + (np.sin(x * rng.uniform(9, 40)) > rng.uniform(-1, 1)) for _ in range(3)]
    pixels = 64 * np.stack(waves, axis=-1) + 100 + rng.normal(0, 6, (height, width, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def with_comment(jpeg: bytes, comment: str) -> bytes:
    """The same picture in other bytes."""
    return jpeg[:2] + b"\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment.encode() + jpeg[2:]


def bomb_png() -> bytes:
    """30,000 x 30,000 pixels in a few kB."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    zeros = zlib.compressobj(9)
    data = b"".join([*(zeros.compress(bytes(2**20)) for _ in range(4)), zeros.flush()])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


class Crawl(Loopback):
    """`rows` addresses; a context manager, which stops serving them at its end."""

    def __init__(self, rows: int, *, width: int = 160, height: int = 120) -> None:
        self.rows, self.requests, self.is_down = rows, Counter[str](), False
        self._pictures = [picture(number, width=width, height=height) for number in range(min(PICTURES, rows))]
        whole = self._pictures[0]
        self._hostile = {
            "not found": NOT_FOUND, "endless": b"", "redirect loop": b"", "hangs up": b"",
            "pdf": answer(b"%PDF-1.7 and so on"), "truncated": answer(whole[: len(whole) // 2], kind="image/jpeg"), "huge png": answer(bomb_png()),
            "gzip bomb": answer(gzip.compress(bytes(5_000_000)), "Content-Encoding: gzip"), "html": answer(b"<html>gone</html>", kind="text/html"),
        }
        super().__init__()

    def kind(self, row: int) -> str:
        """What is wrong with a row, or nothing; `copy` for a copy of the row before it."""
        if row % 10 == 7:
            return list(self._hostile)[row // 10 % len(self._hostile)]
        return "copy" if row % COPY_EVERY == 1 and row > 1 and (row - 1) % 10 != 7 else ""

    def fate(self, row: int) -> str:
        """What must become of a row."""
        return FATES[self.kind(row)]

    def image(self, row: int) -> bytes:
        row -= self.kind(row) == "copy"
        return with_comment(self._pictures[row % len(self._pictures)], f"row {row}")

    def write_table(self, file: Path) -> Path:
        """Write the addresses and captions as parquet."""
        parquet.write_table(pa.table({"url": [f"http://127.0.0.1:{self.port}/{row}.jpg" for row in range(self.rows)],
                                      "caption": [f"picture {row % len(self._pictures)}, seen as number {row}" for row in range(self.rows)]}), file)
        return file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.stop()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode()
        self.requests[path] += 1
        row = int(path.strip("/").removesuffix(".jpg"))
        match kind := "hangs up" if self.is_down else self.kind(row):
            case "endless":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 50000\r\n\r\n")
                while not writer.is_closing():
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.1)
            case "redirect loop":
                writer.write(redirect(path))
            case "" | "copy":
                writer.write(answer(self.image(row), kind="image/jpeg"))
            case _:
                writer.write(self._hostile[kind])
        await writer.drain()
