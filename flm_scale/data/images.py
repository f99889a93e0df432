"""From the bytes of one image file to a square RGB array; the loader calls this once a sample.

The bytes are hostile until proven otherwise: the header is read by code of our own, and what it states is checked, before a decoder sees
them. Whatever goes wrong is one DataError, so that the loader can skip the sample and count it.
"""

import io
import struct
import warnings
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flm_scale.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 64_000_000
# Each costs Pillow a pass or an inflation, however few bytes it has; cameras and editors stay far below.
MAX_PNG_CHUNKS, MAX_JPEG_SEGMENTS, MAX_JPEG_SCANS = 100, 1000, 100
STRIP_ROWS = 256
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class Header(NamedTuple):
    """What an image file says of itself."""

    format: Literal["PNG", "JPEG", "WEBP"]
    width: int
    height: int


def read_header(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Header:
    """Return format and size of an image, in plain Python and without decoding anything.

    Raises DataError when the data is not a PNG, JPEG or WebP, states more than `max_pixels`, or has more parts than a picture needs.
    """
    try:
        if data.startswith(PNG_SIGNATURE):
            header = _png_header(data)
        elif data.startswith(b"\xff\xd8\xff"):
            header = _jpeg_header(data)
        elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            header = _webp_header(data)
        else:
            raise DataError(f"image of {len(data)} bytes cannot be decoded (neither PNG, JPEG nor WebP); replace or drop it")
    except (struct.error, IndexError) as error:
        raise DataError(f"image of {len(data)} bytes cannot be decoded (its header is cut off); replace or drop it") from error
    if not 0 < header.width * header.height <= max_pixels:
        raise DataError(f"image of {header.width} x {header.height} pixels exceeds the limit of {max_pixels} pixels, or has none; "
                        "scale it down or drop it")
    return header


def _png_header(data: bytes) -> Header:
    """Source: PNG, third edition, Sec. 5."""
    length, kind, width, height = struct.unpack_from(">I4sII", data, 8)
    if kind != b"IHDR" or length != 13:
        raise _too_odd(data, "a PNG without IHDR at its start")
    at, others = 8, 0
    while at + 8 <= len(data) and kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, at)
        others += kind not in (b"IDAT", b"fcTL", b"fdAT")
        if others > MAX_PNG_CHUNKS:
            raise _too_odd(data, f"more than {MAX_PNG_CHUNKS} PNG chunks beside the picture")
        at += length + 12
    return Header("PNG", width, height)


def _jpeg_header(data: bytes) -> Header:
    """Walk the segments up to the first scan. Source: ITU-T T.81, Annex B."""
    if data.count(b"\xff\xda") > MAX_JPEG_SCANS:  # each is a pass over all coefficients; compressed data never holds this marker
        raise _too_odd(data, f"more than {MAX_JPEG_SCANS} JPEG scans")
    at, size = 2, None
    for _ in range(MAX_JPEG_SEGMENTS):
        marker = data[at + 1]
        if data[at] != 0xFF or marker == 0xFF:  # a stray or filling byte, which decoders pass over one by one
            at += 1
        elif marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # no length behind it
            at += 2
        elif marker == 0xDA:
            if not size:
                raise _too_odd(data, "a JPEG scan before its frame")
            return Header("JPEG", *size)
        else:
            length, _depth, height, width = struct.unpack_from(">HBHH", data, at + 2)
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                if size:
                    raise _too_odd(data, "a JPEG with two frames")
                size = (width, height)
            at += 2 + max(2, length)
    raise _too_odd(data, f"more than {MAX_JPEG_SEGMENTS} JPEG segments and stray bytes before the picture")


def _webp_header(data: bytes) -> Header:
    """Source: RFC 9649, Sec. 2; the frame's own size is in the first chunk, or the canvas is."""
    kind = data[12:16]
    if kind == b"VP8X":
        wide, high = (int.from_bytes(data[at:at + 3], "little") + 1 for at in (24, 27))
    elif kind == b"VP8L":
        bits, = struct.unpack_from("<I", data, 21)
        wide, high = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 ":
        wide, high = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    else:
        raise _too_odd(data, "a WebP without a picture at its start")
    return Header("WEBP", wide, high)


def _too_odd(data: bytes, what: str) -> DataError:
    return DataError(f"image of {len(data)} bytes cannot be decoded ({what}); replace or drop it")


def decode_image(data: bytes, *, size: int, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Return the centre square of the image, scaled to [3, size, size] (red, green, blue; 0 to 255).

    The shorter side becomes `size` (bicubic, antialiased). Transparency is laid on white; of an animation, the first frame counts.
    Raises DataError as `read_header` does, and when the data is damaged. Memory: up to 10 bytes a pixel of the whole image.
    """
    from PIL import Image

    header = read_header(data, max_pixels=max_pixels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow warns of, an odd animation or profile, is not ours to print for every file
            image = Image.open(io.BytesIO(data), formats=[header.format])
            if image.size == (header.width, header.height):
                return np.ascontiguousarray(np.asarray(_centre_square(on_white(image), size=size)).transpose(2, 0, 1))
    except Exception as error:  # Pillow's decoders raise almost any class on damaged data
        raise DataError(f"image of {len(data)} bytes cannot be decoded ({type(error).__name__}: {error}); replace or drop it") from error
    raise _too_odd(data, f"two readers disagree on its size, {header.width} x {header.height} and {image.width} x {image.height}")


def on_white(image: "Image.Image") -> "Image.Image":
    """Return the image as RGB, with whatever is transparent laid on white."""
    from PIL import Image

    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey to white instead of scaling it
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    opaque = Image.new("RGB", image.size)
    for top in range(0, image.height, STRIP_ROWS):  # at once it would take three more pictures of memory
        strip = image.crop((0, top, image.width, min(top + STRIP_ROWS, image.height))).convert("RGBA")
        opaque.paste(Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip), (0, top))
    return opaque


def _centre_square(image: "Image.Image", *, size: int) -> "Image.Image":
    """Cut, then scale: a 1 x 60000 image scaled first would need gigabytes."""
    from PIL import Image

    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    if side == size:
        return image.crop((int(left), int(top), int(left) + size, int(top) + size))
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
