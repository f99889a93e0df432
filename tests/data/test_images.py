"""Decoding and storing: exact geometry on the fast way too, white behind transparency, and one kind of error for whatever is wrong."""

import contextlib
import importlib.util
import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from flm_scale.data.images import ImageError, codec_versions, decode_image, fit_image
from flm_scale.errors import DataError

REPOSITORY = Path(__file__).parents[2]
BICUBIC = Image.Resampling.BICUBIC


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def photograph(height: int, width: int) -> Image.Image:
    """A real one, stretched."""
    spec = importlib.util.find_spec("matplotlib")
    assert spec
    assert spec.origin
    return Image.open(Path(spec.origin).parent / "mpl-data" / "sample_data" / "grace_hopper.jpg").resize((width, height), Image.Resampling.LANCZOS)


def exact(data: bytes, height: int, width: int, box: tuple[int, int, int, int] | None = None) -> np.ndarray:
    """Decoded whole by Pillow and scaled in float."""
    bands = Image.open(io.BytesIO(data)).convert("RGB").split()
    return np.stack([np.asarray(band.convert("F").resize((width, height), BICUBIC, box=box)) for band in bands], -1).clip(0, 255)


def stored(data: bytes, **options: Any) -> np.ndarray:
    """What fit_image makes of it, as pixels."""
    fitted = fit_image(data, image_format="png", **options)
    pixels = np.asarray(Image.open(io.BytesIO(fitted.data)))
    assert pixels.shape == (fitted.height, fitted.width, 3)
    return pixels


def psnr(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((found - wanted) ** 2)))


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


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"quality": 30}, {"keep_rgb": True},
                                     {"restart_marker_blocks": 3}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_has_pillows_pixels_to_the_bit(mode: str, options: dict[str, Any]) -> None:
    data = encoded(photograph(37, 61).convert(mode), "JPEG", **options)
    np.testing.assert_array_equal(stored(data, size=0, mode="none"), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("size", [80, 100, 119])
def test_jpeg_that_is_scaled_down_is_within_two_levels_of_pillow(size: int) -> None:
    data = encoded(photograph(120, 161), "JPEG")
    wanted = np.asarray(Image.open(io.BytesIO(data)).crop((20, 0, 140, 120)).resize((size, size), BICUBIC)).transpose(2, 0, 1)
    gap = np.abs(decode_image(data, size=size).astype(int) - wanted)
    assert gap.max() <= 2
    assert gap.mean() < 0.02


def test_jpeg_that_is_scaled_up_is_as_near_to_exact_as_pillows() -> None:
    data = encoded(photograph(37, 37), "JPEG")
    wanted = exact(data, 80, 80)
    pillow = np.asarray(Image.open(io.BytesIO(data)).resize((80, 80), BICUBIC))
    assert psnr(decode_image(data, size=80).transpose(1, 2, 0), wanted) > psnr(pillow, wanted) - 0.1 > 50


@pytest.mark.parametrize(("height", "width", "size", "sides"), [(320, 401, 128, (160, 201)), (323, 410, 128, (162, 205)), (319, 400, 128, (319, 400)),
                                                                (645, 646, 128, (162, 162)), (1281, 1290, 128, (161, 162))])
def test_large_jpeg_is_decoded_small_and_stays_in_place(height: int, width: int, size: int, sides: tuple[int, int],
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """At a half, a quarter, an eighth; sides that do not divide end inside a pixel, and may not be stretched to its end."""
    decoded, decode = [], simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *args, **more: decoded.append(decode(*args, **more)) or decoded[-1])
    scale = size / min(height, width)
    target = round(height * scale), round(width * scale)
    data = encoded(photograph(height, width), "JPEG", quality=90)
    assert psnr(stored(data, size=size, mode="keep_ratio"), exact(data, *target)) > 38
    assert [array.shape[:2] for array in decoded] == [sides]


def test_part_of_a_large_jpeg_is_the_part_that_was_asked_for() -> None:
    data = encoded(photograph(900, 1200), "JPEG", quality=90)
    for left, top in ((0, 0), (16, 200), (700, 400), (699, 399)):
        part = (left, top, left + 500, top + 500)
        found = decode_image(data, size=100, part=lambda _width, _height, part=part: part).transpose(1, 2, 0)
        assert psnr(found, exact(data, 100, 100, part)) > (38 if left % 4 == top % 4 == 0 else 25)


@pytest.mark.parametrize(("data", "why"), [
    (encoded(Image.fromarray(noise(16, 16)).convert("CMYK"), "JPEG"), "colours"),
    (encoded(Image.fromarray(noise(16, 16)), "JPEG")[:-2] + b"\0\0\xff\xd9", "a warning of the decoder"),
])
def test_jpeg_that_simplejpeg_does_not_take_is_pillows(data: bytes, why: str) -> None:
    wanted = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(decode_image(data, size=16), wanted, err_msg=why)


@pytest.mark.parametrize(("mode", "only_if_larger", "size", "expected"), [
    ("keep_ratio", True, 20, (20, 33)), ("keep_ratio", True, 50, (37, 61)), ("keep_ratio", False, 74, (74, 122)), ("center_crop", True, 20, (20, 20)),
    ("center_crop", True, 50, (37, 37)), ("center_crop", False, 50, (50, 50)), ("none", True, 20, (37, 61))])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_stored_picture_has_the_size_of_its_mode(kind: str, mode: Any, only_if_larger: bool, size: int, expected: tuple[int, int]) -> None:
    fitted = fit_image(encoded(photograph(37, 61), kind), size=size, mode=mode, only_if_larger=only_if_larger)
    assert (fitted.height, fitted.width, fitted.original_height, fitted.original_width) == (*expected, 37, 61)
    assert Image.open(io.BytesIO(fitted.data)).size == expected[::-1]


@pytest.mark.parametrize(("image_format", "magic", "worst"), [("jpg", b"\xff\xd8", 25), ("webp", b"RIFF", 25), ("png", b"\x89PNG", 99)])
def test_stored_picture_is_of_the_format_asked_for(image_format: Any, magic: bytes, worst: float) -> None:
    picture = photograph(64, 80)
    fitted = fit_image(encoded(picture), size=64, mode="keep_ratio", image_format=image_format)
    assert fitted.data.startswith(magic)
    found = np.asarray(Image.open(io.BytesIO(fitted.data)))
    assert np.array_equal(found, np.asarray(picture)) if image_format == "png" else psnr(found, np.asarray(picture)) > worst


def test_quality_decides_how_many_bytes_are_stored() -> None:
    data = encoded(photograph(64, 80))
    sizes = [len(fit_image(data, size=64, mode="none", image_format=kind, quality=quality).data) for kind in ("jpg", "webp") for quality in (50, 95)]
    assert sizes[0] < sizes[1] / 2
    assert sizes[2] < sizes[3] / 2


def test_file_passes_through_only_where_no_pixel_changes() -> None:
    data = encoded(photograph(40, 40), "JPEG")

    def passed(file: bytes, **options: Any) -> bool:
        return fit_image(file, **{"size": 50, "mode": "keep_ratio", "pass_through": True} | options).data == file

    assert passed(data)
    assert not passed(data, pass_through=False)
    assert not passed(data, size=30)
    assert not passed(data, only_if_larger=False)
    assert not passed(encoded(photograph(40, 40)))
    assert passed(encoded(photograph(40, 40)), image_format="png")
    assert passed(data, mode="center_crop")
    assert not passed(encoded(photograph(40, 41), "JPEG"), mode="center_crop")
    with pytest.raises(ImageError) as refused:
        passed(data[:len(data) // 2])
    assert refused.value.reason == "damaged"


@pytest.mark.parametrize(("data", "options", "reason"), [
    (b"<html>", {}, "format"), (b"\xff\xd8\xff", {}, "header"), (encoded(Image.new("RGB", (101, 100))), {"max_pixels": 10_000}, "pixels"),
    (encoded(Image.new("RGB", (64, 64)))[:-30], {}, "damaged"),
    (encoded(Image.new("RGB", (1, 2000))), {"size": 10, "only_if_larger": False}, "side")])
def test_refusal_has_a_word_for_the_table(data: bytes, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ImageError) as refused:
        fit_image(data, **{"size": 8, "mode": "keep_ratio"} | options)
    assert refused.value.reason == reason


FITTED_HASH = """
import sys, hashlib
from flm_scale.data.images import decode_image, fit_image
data = open(sys.argv[1], "rb").read()
kinds = [fit_image(data, size=size, mode="keep_ratio", image_format=kind).data for kind in ("jpg", "png", "webp") for size in (100, 224, 500)]
print(hashlib.sha256(b"".join([*kinds, decode_image(data, size=96).tobytes()])).hexdigest())
"""


@pytest.mark.slow
def test_bytes_do_not_depend_on_the_instructions_that_the_cpu_has(tmp_path: Path) -> None:
    file = tmp_path / "picture.jpg"
    file.write_bytes(encoded(photograph(600, 511), "JPEG"))
    hashes = {subprocess.run([sys.executable, "-c", FITTED_HASH, str(file)], cwd=REPOSITORY, check=True, capture_output=True, text=True,
                             env=os.environ | changed).stdout
              for changed in ({}, {"ATEN_CPU_CAPABILITY": "default"}, {"ATEN_CPU_CAPABILITY": "avx2", "JSIMD_FORCENONE": "1"})}
    assert len(hashes) == 1


OUT_OF_MEMORY = """
import io
from PIL import Image
from flm_scale.data.images import ImageError, codec_versions, decode_image
from flm_scale.data.prepare.worker import limit_memory
file = io.BytesIO()
Image.new("L", (7_000, 7_000)).save(file, "JPEG")
codec_versions()  # libraries before the limit: they take more than the picture
limit_memory(60_000_000)
try:
    decode_image(file.getvalue(), size=6_000)
except ImageError as error:
    print(error.reason)
"""


@pytest.mark.slow
def test_picture_beyond_the_limit_of_memory_is_refused_and_the_process_goes_on() -> None:
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert done.stdout == "memory\n"


def test_versions_name_every_library_that_decides_the_bytes() -> None:
    assert list(codec_versions()) == ["simplejpeg", "torch", "pillow", "pillow libjpeg_turbo", "pillow webp", "pillow zlib"]
    assert all(version[0].isdigit() for version in codec_versions().values())
