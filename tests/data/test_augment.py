"""Augmentation: off is off to the bit, a key decides everything, crops are of the sizes asked for and no more is decoded than they need."""

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from flm_scale.config import AugmentConfig
from flm_scale.data.augment import decode_augmented, random_part
from flm_scale.data.images import decode_image
from flm_scale.data.order import keyed_rng
from flm_scale.errors import ConfigError, DataError
from tests.data.test_images import encoded, exact, noise, photograph, psnr

ALL = AugmentConfig(crop_scale=(0.3, 1.0), flip=True, randaugment_layers=2)
PICTURE = encoded(photograph(70, 90), "JPEG")


def pixels(augment: AugmentConfig, *key: object, data: bytes = PICTURE, size: int = 32) -> np.ndarray:
    return decode_augmented(data, size=size, augment=augment, rng=keyed_rng("augment", *key))


@pytest.mark.parametrize("data", [PICTURE, encoded(photograph(70, 90)), encoded(photograph(70, 90), "WEBP")], ids=["jpeg", "png", "webp"])
def test_augmentation_is_off_unless_asked_for_and_then_decodes_as_ever(data: bytes) -> None:
    np.testing.assert_array_equal(pixels(AugmentConfig(), 0, data=data), decode_image(data, size=32))


@pytest.mark.parametrize("augment", [AugmentConfig(crop_scale=(0.3, 1.0)), AugmentConfig(flip=True), AugmentConfig(randaugment_layers=2)],
                         ids=["crop", "flip", "randaugment"])
def test_each_part_changes_pictures_from_epoch_to_epoch(augment: AugmentConfig) -> None:
    seen = {pixels(augment, 0, epoch, "key").tobytes() for epoch in range(12)}
    assert len(seen) == 2 if augment.flip else len(seen) > 6


IN_ANOTHER_PROCESS = """
import hashlib, sys
from tests.data.test_augment import ALL, pixels
pixels(ALL, "something else")
print(hashlib.sha256(b"".join(pixels(ALL, 3, epoch, "0/000123").tobytes() for epoch in range(8))).hexdigest())
"""


@pytest.mark.slow
def test_the_same_key_gives_the_same_pixels_in_another_process() -> None:
    here = hashlib.sha256(b"".join(pixels(ALL, 3, epoch, "0/000123").tobytes() for epoch in range(8))).hexdigest()
    there = subprocess.run([sys.executable, "-c", IN_ANOTHER_PROCESS], cwd=Path(__file__).parents[2], check=True, capture_output=True, text=True)
    assert there.stdout.strip() == here


def test_the_processes_own_generators_neither_decide_nor_notice() -> None:
    torch.manual_seed(1)
    before, first = torch.get_rng_state(), pixels(ALL, 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    np.testing.assert_array_equal(pixels(ALL, 5), first)


def test_crops_have_the_areas_and_ratios_asked_for_and_come_from_everywhere() -> None:
    augment = AugmentConfig(crop_scale=(0.2, 0.6), crop_ratio=(0.5, 2.0))
    rng = keyed_rng("crops")
    left, top, right, bottom = np.array([random_part(400, 400, augment=augment, rng=rng) for _ in range(3000)]).T
    assert min(left.min(), top.min()) == 0
    assert right.max() == bottom.max() == 400
    areas, ratios = (right - left) * (bottom - top) / 400**2, (right - left) / (bottom - top)
    assert 0.195 < areas.min() < 0.21
    assert 0.55 < areas.max() < 0.605
    assert 0.49 < ratios.min() < 0.55
    assert 1.85 < ratios.max() < 2.02
    assert abs(np.log(ratios).mean()) < 0.05  # as often wide as narrow
    assert abs(((left + right) / 2).mean() - 200) < 5


@pytest.mark.parametrize(("width", "height", "expected"), [(1000, 10, (493, 0, 507, 10)), (1, 50, (0, 24, 1, 25)), (1, 1, (0, 0, 1, 1))])
def test_strip_that_no_crop_fits_gives_its_middle(width: int, height: int, expected: tuple[int, ...]) -> None:
    augment = AugmentConfig(crop_scale=(0.9, 1.0), crop_ratio=(0.75, 1.4))
    found = random_part(width, height, augment=augment, rng=keyed_rng("strip"))
    assert found == expected
    data = encoded(Image.fromarray(noise(height, width)), "JPEG")
    assert decode_augmented(data, size=8, augment=augment, rng=keyed_rng("strip")).shape == (3, 8, 8)


def pixels_of_crop(data: bytes, augment: AugmentConfig) -> np.ndarray:
    return decode_augmented(data, size=128, augment=augment, rng=keyed_rng("crop", 0)).transpose(1, 2, 0)


def test_crop_is_the_part_of_the_picture_that_was_drawn() -> None:
    augment = AugmentConfig(crop_scale=(0.3, 0.6))
    part = random_part(400, 300, augment=augment, rng=keyed_rng("crop", 0))
    assert part != random_part(400, 300, augment=augment, rng=keyed_rng("crop", 1))
    for kind in ("JPEG", "PNG"):
        data = encoded(photograph(300, 400), kind)
        assert psnr(pixels_of_crop(data, augment), exact(data, 128, 128, part)) > 45


def test_small_crop_of_a_large_jpeg_is_decoded_as_large_as_it_needs_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, decode = [], simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *args, **more: decoded.append(decode(*args, **more)) or decoded[-1])
    data = encoded(photograph(640, 640), "JPEG")
    for share in (1 / 16, 1 / 4, 1.0):
        pixels(AugmentConfig(crop_scale=(share, share + 1e-9 if share < 1 else 1.0), crop_ratio=(1.0, 1.0)), 0, data=data, size=64)
    assert [array.shape[0] for array in decoded] == [320, 160, 80]


def test_flip_mirrors_half_of_the_pictures() -> None:
    plain = decode_image(PICTURE, size=32)
    found = [pixels(AugmentConfig(flip=True), number) for number in range(200)]
    mirrored = [np.array_equal(one, plain[:, :, ::-1]) for one in found]
    assert all(one or np.array_equal(other, plain) for one, other in zip(mirrored, found, strict=True))
    assert 75 < sum(mirrored) < 125


def test_magnitude_says_how_strong_the_changes_are() -> None:
    plain = decode_image(PICTURE, size=32).astype(int)
    levels = [AugmentConfig(randaugment_layers=1, randaugment_magnitude=magnitude) for magnitude in (0, 9, 30)]
    gaps = [np.mean([np.abs(pixels(augment, number) - plain).mean() for number in range(60)]) for augment in levels]
    assert gaps[0] < gaps[1] < gaps[2]


def test_what_is_no_image_is_a_data_error_here_too() -> None:
    with pytest.raises(DataError, match="cannot be decoded"):
        pixels(ALL, 0, data=b"no picture")


@pytest.mark.parametrize(("values", "message"), [
    ({"crop_scale": (0.5, 0.2)}, "the smaller first"), ({"crop_scale": (0.0, 1.0)}, "two shares"), ({"crop_scale": (0.5, 1.5)}, "two shares"),
    ({"crop_ratio": (2.0, 0.5)}, "the smaller first"), ({"crop_ratio": (0.0, 1.0)}, "two ratios"), ({"randaugment_magnitude": 31}, "31"),
    ({"randaugment_layers": -1}, "-1"), ({"crop": (0.5, 1.0)}, "did you mean 'crop_")])
def test_ranges_that_are_none_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AugmentConfig(**values)
    assert AugmentConfig.model_validate_json(ALL.model_dump_json()) == ALL
