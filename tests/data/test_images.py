"""Decoding: exact geometry, white behind transparency, and one kind of error for whatever is wrong."""

import contextlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from flm_scale.data.images import decode_image
from flm_scale.errors import DataError


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_image_of_the_right_size_keeps_every_pixel() -> None:
    pixels = noise(16, 16)
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(pixels)), size=16), pixels.transpose(2, 0, 1))


def test_longer_side_is_cut_in_the_centre_without_resampling() -> None:
    pixels = noise(16, 26)
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(pixels)), size=16), pixels[:, 5:21].transpose(2, 0, 1))


def test_resize_equals_pillows_antialiased_bicubic_then_centre_crop() -> None:
    image = Image.fromarray(noise(32, 64))
    expected = np.asarray(image.resize((32, 16), Image.Resampling.BICUBIC))[:, 8:24]
    np.testing.assert_array_equal(decode_image(encoded(image), size=16), expected.transpose(2, 0, 1))


def test_thin_image_needs_no_more_memory_than_its_centre() -> None:
    """Scaled before it is cut, this one would be 224 x 13 million pixels."""
    assert decode_image(encoded(Image.new("RGB", (1, 60_000), "red")), size=224).shape == (3, 224, 224)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(mode: str) -> None:
    image = Image.new("RGBA", (8, 8), (10, 10, 10, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    array = decode_image(encoded(image.convert(mode)), size=8)
    assert (array[:, :, 4:] == 255).all()
    assert (array[:, :, :4] < 20).all()


def test_half_transparent_black_becomes_grey() -> None:
    assert abs(int(decode_image(encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 128))), size=8)[0, 0, 0]) - 127) <= 1


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    image = Image.fromarray(np.full((8, 8), 0x4000, np.uint16))
    assert (decode_image(encoded(image), size=8) == 0x40).all()


def test_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert decode_image(data, size=8)[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("data", [b"", b"not an image", encoded(Image.new("RGB", (64, 64)))[:-30], encoded(Image.new("RGB", (8, 8)), "BMP")],
                         ids=["empty", "text", "truncated", "other format"])
def test_what_is_no_image_is_a_data_error(data: bytes) -> None:
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_image(data, size=8)


def test_every_single_damaged_byte_gives_an_image_or_a_data_error() -> None:
    data = encoded(Image.fromarray(noise(12, 12)), "JPEG")
    for place in range(0, len(data), 3):
        with contextlib.suppress(DataError):
            assert decode_image(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1:], size=8).shape == (3, 8, 8)


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_000, 11_000, 60_000], ids=["above our limit", "where Pillow warns", "where Pillow refuses"])
def test_bomb_is_refused_by_its_header(side: int) -> None:
    with warnings.catch_warnings(record=True) as printed:
        warnings.simplefilter("always")
        with pytest.raises(DataError, match=r"exceeds the limit of 64000000|DecompressionBomb"):
            decode_image(png_that_claims(side, side), size=8)
    assert not printed
