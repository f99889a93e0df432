"""Random changes of training pictures and clips: a crop, a mirror image, RandAugment. The only door to torchvision.

The generator is keyed by (seed, epoch, sample), so that a picture looks the same on any layout, in any worker, whatever was drawn before it.
All frames of a clip are changed alike.
"""

from functools import partial
from math import exp, log, sqrt

import numpy as np
from numpy.typing import NDArray

from flm_scale.config import AugmentConfig
from flm_scale.data.clips import decode_sample
from flm_scale.data.images import Part, centre_square

TRIES = 10


def decode_augmented(data: bytes, *, size: int, augment: AugmentConfig, rng: np.random.Generator, frames: int = 1) -> NDArray[np.uint8]:
    """Return what `decode_sample` does, of a part that is drawn, perhaps mirrored and changed. With all of it off, the same to the bit.

    Only the part is scaled, and a JPEG is decoded no larger than the part needs. Raises ImageError as `decode_sample` does.
    """
    part = centre_square if augment.crop_scale == (1, 1) else partial(random_part, augment=augment, rng=rng)
    pixels = decode_sample(data, size=size, frames=frames, part=part)
    if augment.flip and rng.random() < 0.5:
        pixels = np.ascontiguousarray(pixels[..., ::-1])
    return rand_augment(pixels, augment, rng) if augment.randaugment_layers else pixels


def random_part(width: int, height: int, *, augment: AugmentConfig, rng: np.random.Generator) -> Part:
    """Draw a part by its share of the area and its ratio of width to height; the largest in the middle where ten draws do not fit.

    Source: arXiv 1409.4842, Sec. 6, as torchvision draws it.
    """
    (smallest, largest), (narrow, wide) = augment.crop_scale, augment.crop_ratio
    for _ in range(TRIES):
        area = width * height * (smallest + (largest - smallest) * rng.random())
        ratio = exp(log(narrow) + (log(wide) - log(narrow)) * rng.random())
        across, down = round(sqrt(area * ratio)), round(sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            left, top = int((width - across + 1) * rng.random()), int((height - down + 1) * rng.random())
            return left, top, left + across, top + down
    ratio = min(max(width / height, narrow), wide)
    across, down = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down


def rand_augment(pixels: NDArray[np.uint8], augment: AugmentConfig, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Apply torchvision's RandAugment. Source: arXiv 1909.13719."""
    import torch
    from torchvision.transforms import v2

    change = v2.RandAugment(augment.randaugment_layers, augment.randaugment_magnitude)
    with torch.random.fork_rng(devices=[]):  # it draws from the process's generator, which must not notice
        torch.default_generator.manual_seed(int(rng.integers(2**63)))
        changed: NDArray[np.uint8] = change(torch.from_numpy(pixels)).numpy()
        return changed
