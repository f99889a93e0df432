"""Pictures that look like something, by number: a gradient with coarse and fine structure, the same on every machine with one Pillow."""

import io

import numpy as np
from PIL import Image


def picture(number: int, *, width: int = 400, height: int = 300, kind: str = "JPEG", **options: object) -> bytes:
    """One encoded picture; another number gives another one."""
    drawn(number, width, height).save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def drawn(number: int, width: int = 400, height: int = 300) -> Image.Image:
    """The same, not encoded."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    fine = np.asarray(coarse, np.int16) + rng.integers(-12, 13, (height, width, 1))
    return Image.fromarray(fine.clip(0, 255).astype(np.uint8))
