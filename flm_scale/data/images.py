"""From the bytes of one image file to an RGB array (the loader), or to the bytes of a smaller one (the preparation). The only door to simplejpeg.

The bytes are hostile until proven otherwise: the header is read by code of our own, and what it states is checked, before a decoder sees
them. Whatever goes wrong is one ImageError, so that the caller can leave the sample out and count it.

A JPEG goes the fast way: simplejpeg (libjpeg-turbo) decodes it, at a half, a quarter or an eighth of its size where no more is needed, and torch
scales whole numbers with the CPU's vector instructions. Whatever simplejpeg does not take (CMYK, damage), PNG and WebP go through Pillow.
Both ways scale with the same antialiased bicubic filter. docs/data.md, Pixels, states how far they differ.
"""

import io
import struct
import warnings
from collections.abc import Callable
from math import ceil
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
SPARE = 1.25
"""How many times the pixels a side a JPEG that is decoded smaller must keep: as near to exact as img2dataset's own scaling (docs/data.md, Pixels)."""
MAX_SIDE = 16_383
"""Of a prepared picture: WebP holds no more. Only strips are longer."""
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

ImageFormat = Literal["jpg", "png", "webp"]
FORMATS: dict[ImageFormat, str] = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
Part = tuple[int, int, int, int]
"""Left, top, right and bottom of what is cut out of a picture, in its own pixels."""


class ImageError(DataError):
    """An image or clip that is refused. `reason` is one word for tables: `format`, `header`, `pixels`, `side`, `damaged` or `memory`; of clips also
    `frames` (too many) and `size` (several)."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class Header(NamedTuple):
    """What an image file says of itself."""

    format: Literal["PNG", "JPEG", "WEBP"]
    width: int
    height: int


def read_header(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Header:
    """Return format and size of an image, in plain Python and without decoding anything.

    Raises ImageError when the data is not a PNG, JPEG or WebP, states more than `max_pixels`, or has more parts than a picture needs.
    """
    try:
        if data.startswith(PNG_SIGNATURE):
            header = _png_header(data)
        elif data.startswith(b"\xff\xd8\xff"):
            header = _jpeg_header(data)
        elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            header = _webp_header(data)
        else:
            raise _refusal(data, "neither PNG, JPEG nor WebP", reason="format")
    except (struct.error, IndexError) as error:
        raise _refusal(data, "its header is cut off", reason="header") from error
    if not 0 < header.width * header.height <= max_pixels:
        raise ImageError(f"image of {header.width} x {header.height} pixels exceeds the limit of {max_pixels} pixels, or has none; "
                         "scale it down or drop it", reason="pixels")
    return header


def _png_header(data: bytes) -> Header:
    """Source: PNG, third edition, Sec. 5."""
    length, kind, width, height = struct.unpack_from(">I4sII", data, 8)
    if kind != b"IHDR" or length != 13:
        raise _refusal(data, "a PNG without IHDR at its start")
    at, others = 8, 0
    while at + 8 <= len(data) and kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, at)
        others += kind not in (b"IDAT", b"fcTL", b"fdAT")
        if others > MAX_PNG_CHUNKS:
            raise _refusal(data, f"more than {MAX_PNG_CHUNKS} PNG chunks beside the picture")
        at += length + 12
    return Header("PNG", width, height)


def _jpeg_header(data: bytes) -> Header:
    """Walk the segments up to the first scan. Source: ITU-T T.81, Annex B."""
    at, size, progressive, components = 2, None, False, 0
    for _ in range(MAX_JPEG_SEGMENTS):
        marker = data[at + 1]
        if data[at] != 0xFF or marker == 0xFF:  # a stray or filling byte, which decoders pass over one by one
            at += 1
        elif marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # no length behind it
            at += 2
        elif marker == 0xDA:
            if not size:
                raise _refusal(data, "a JPEG scan before its frame")
            # Decoders stop behind a sequential scan of all components. Else each scan is a pass over all coefficients; their marker is never in data.
            if (progressive or data[at + 4] < components) and data.count(b"\xff\xda") > MAX_JPEG_SCANS:
                raise _refusal(data, f"more than {MAX_JPEG_SCANS} JPEG scans")
            return Header("JPEG", *size)
        else:
            length, _depth, height, width, number = struct.unpack_from(">HBHHB", data, at + 2)
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                if size:
                    raise _refusal(data, "a JPEG with two frames")
                size, progressive, components = (width, height), marker & 3 == 2, number
            at += 2 + max(2, length)
    raise _refusal(data, f"more than {MAX_JPEG_SEGMENTS} JPEG segments and stray bytes before the picture")


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
        raise _refusal(data, "a WebP without a picture at its start")
    return Header("WEBP", wide, high)


def _refusal(data: bytes, what: str, *, reason: str = "header") -> ImageError:
    return ImageError(f"image of {len(data)} bytes cannot be decoded ({what}); replace or drop it", reason=reason)


def centre_square(width: int, height: int) -> Part:
    """Return the largest square in the middle of a picture, at whole pixels."""
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def decode_image(data: bytes, *, size: int, max_pixels: int = MAX_PIXELS, part: Callable[[int, int], Part] = centre_square) -> NDArray[np.uint8]:
    """Return a part of the image, scaled to [3, size, size] (red, green, blue; 0 to 255).

    part: chooses it by width and height. In a JPEG that is decoded at a half or less it begins at the nearest pixel of the smaller picture.
    Bicubic, antialiased. Transparency is laid on white; of an animation, the first frame counts; EXIF's orientation does not.
    Raises ImageError as `read_header` does, and when the data is damaged. Memory: up to 10 bytes a pixel of the whole image.
    """
    header = read_header(data, max_pixels=max_pixels)
    pixels = _decode(data, header, part(header.width, header.height), width=size, height=size)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


class Fitted(NamedTuple):
    """A picture as it is stored, and the sizes that it had and has."""

    data: bytes
    width: int
    height: int
    original_width: int
    original_height: int


def fit_image(data: bytes, *, size: int, mode: Literal["keep_ratio", "center_crop", "none"], only_if_larger: bool = True,
              image_format: ImageFormat = "jpg", quality: int = 95, max_pixels: int = MAX_PIXELS, pass_through: bool = False) -> Fitted:
    """Decode, scale and encode one picture for storage; the same bytes in give the same bytes out, for the same `codec_versions`.

    size: of the shorter side (keep_ratio), or of the square cut from the middle (center_crop).   only_if_larger: never scale up.
    quality: of JPEG and WebP; PNG has none.   pass_through: the file's own bytes where it has the format and no pixel needs to change; it is
    decoded all the same, to know that it is whole. What is encoded anew has no metadata. JPEGs have half the colour resolution (4:2:0).
    Raises ImageError as `decode_image` does, and when a side would exceed MAX_SIDE.
    """
    header = read_header(data, max_pixels=max_pixels)
    part, (width, height) = fitted_size(header.width, header.height, size=size, mode=mode, only_if_larger=only_if_larger)
    pixels = _decode(data, header, part, width=width, height=height)
    if pass_through and FORMATS[image_format] == header.format and (0, 0, header.width, header.height) == part == (0, 0, width, height):
        stored = data
    else:
        stored = _encode(pixels, image_format, quality)
    return Fitted(stored, width, height, header.width, header.height)


def fitted_size(width: int, height: int, *, size: int, mode: Literal["keep_ratio", "center_crop", "none"],
                only_if_larger: bool) -> tuple[Part, tuple[int, int]]:
    """Return the part of a picture that is stored, and its width and height there; values as of `fit_image`. Raises ImageError for a longer side
    than MAX_SIDE."""
    part = centre_square(width, height) if mode == "center_crop" else (0, 0, width, height)
    shorter = min(width, height)
    scale = 1.0 if mode == "none" or (only_if_larger and shorter <= size) else size / shorter
    across, down = (max(1, round((end - begin) * scale)) for begin, end in ((part[0], part[2]), (part[1], part[3])))
    if max(across, down) > MAX_SIDE:
        raise ImageError(f"image of {width} x {height} pixels would be stored as {across} x {down}; {MAX_SIDE} is the longest side; "
                         "drop it", reason="side")
    return part, (across, down)


def decode_whole(data: bytes, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Return the whole image as it is, [height, width, 3]. Raises ImageError as `decode_image` does."""
    header = read_header(data, max_pixels=max_pixels)
    return _decode(data, header, (0, 0, header.width, header.height), width=header.width, height=header.height)


def codec_versions() -> dict[str, str]:
    """Return the libraries that decide what `fit_image` makes of a file."""
    import simplejpeg
    import torch
    from PIL import __version__, features

    bundled = {f"pillow {name}": str(features.version(name)) for name in ("libjpeg_turbo", "webp", "zlib")}
    return {"simplejpeg": simplejpeg.__version__, "torch": torch.__version__, "pillow": __version__} | bundled


def _decode(data: bytes, header: Header, part: Part, *, width: int, height: int) -> NDArray[np.uint8]:
    """Return the part, scaled to [height, width, 3]."""
    pixels = _decode_jpeg(data, header, part, width=width, height=height) if header.format == "JPEG" else None
    return _decode_any(data, header, part, width=width, height=height) if pixels is None else pixels


def _decode_jpeg(data: bytes, header: Header, part: Part, *, width: int, height: int) -> NDArray[np.uint8] | None:
    """The same for a JPEG; None for one that Pillow must judge.

    shrink: the decoder makes one pixel of so many a side. A part then begins at a whole one of those, and its end may lie inside of one.
    """
    import simplejpeg
    import torch

    left, top, right, bottom = part
    shrink = next(by for by in (8, 4, 2, 1) if by == 1 or (right - left >= by * SPARE * width and bottom - top >= by * SPARE * height))
    rows, columns = ceil(header.height / shrink), ceil(header.width / shrink)
    try:
        found_height, found_width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if (found_height, found_width) != (header.height, header.width) or colours in {"CMYK", "YCCK"}:
            return None
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, **{"min_height": rows, "min_width": columns} if shrink > 1 else {})
    except (ValueError, MemoryError):
        return None
    assert pixels.shape == (rows, columns, 3)
    down, across = (bottom - top) / shrink, (right - left) / shrink
    row, column = min(round(top / shrink), rows - ceil(down)), min(round(left / shrink), columns - ceil(across))
    pixels = pixels[row:row + ceil(down), column:column + ceil(across)]
    if (down, across) == (height, width):
        return pixels
    # By scale, because `down` and `across` may end inside a pixel. What torch rounds down must not fall below the size that is asked for.
    scale = [height / down * (1 + 1e-9), width / across * (1 + 1e-9)]
    images = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # in this order torch sees, and keeps, the colours side by side: twice as fast
    scaled = torch.nn.functional.interpolate(images, scale_factor=scale, mode="bicubic", antialias=True)
    return scaled[0, :, :height, :width].permute(1, 2, 0).numpy()


def _decode_any(data: bytes, header: Header, part: Part, *, width: int, height: int) -> NDArray[np.uint8]:
    """The same by Pillow. It cuts, then scales: a 1 x 60000 image scaled first would need gigabytes."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow warns of, an odd animation or profile, is not ours to print for every file
            image = Image.open(io.BytesIO(data), formats=[header.format])
            if image.size == (header.width, header.height):
                return np.asarray(on_white(image).resize((width, height), Image.Resampling.BICUBIC, box=part))
    except Exception as error:  # Pillow's decoders raise almost any class on damaged data
        reason = "memory" if isinstance(error, MemoryError) else "damaged"
        raise _refusal(data, f"{type(error).__name__}: {error}", reason=reason) from error
    raise _refusal(data, f"two readers disagree on its size, {header.width} x {header.height} and {image.width} x {image.height}")


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


def _encode(pixels: NDArray[np.uint8], image_format: ImageFormat, quality: int) -> bytes:
    """Return the file of [height, width, 3] pixels."""
    import simplejpeg
    from PIL import Image

    if image_format == "jpg":
        return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, colorsubsampling="420"))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, FORMATS[image_format], quality=quality)
    return buffer.getvalue()
