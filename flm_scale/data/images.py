"""From the bytes of one image file to a square RGB array; the loader calls this once a sample.

The bytes are hostile until proven otherwise: the header's pixel count is checked before anything is decoded, and whatever
goes wrong is one DataError, so that the loader can skip the sample and count it.
"""

import io
import warnings
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flm_scale.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP")


def decode_image(data: bytes, *, size: int, max_pixels: int = 64_000_000) -> NDArray[np.uint8]:
    """Return the centre square of the image, scaled to [3, size, size] (red, green, blue; 0 to 255).

    The shorter side becomes `size` (bicubic, antialiased). Transparency is laid on white; of an animation, the first frame counts.
    Raises DataError when the data is not a PNG, JPEG or WebP, is damaged, or its header states more than `max_pixels`.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height <= max_pixels:
            return np.ascontiguousarray(np.asarray(_centre_square(on_white(image), size=size)).transpose(2, 0, 1))
    except Exception as error:  # Pillow's decoders raise almost any class on damaged data
        raise DataError(f"image of {len(data)} bytes cannot be decoded ({type(error).__name__}: {error}); replace or drop it") from error
    raise DataError(f"image of {width} x {height} pixels exceeds the limit of {max_pixels} pixels; scale it down or drop it")


def on_white(image: "Image.Image") -> "Image.Image":
    """Return the image as RGB, with whatever is transparent laid on white."""
    from PIL import Image

    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey to white instead of scaling it
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours)
    return image.convert("RGB")


def _centre_square(image: "Image.Image", *, size: int) -> "Image.Image":
    """Cut, then scale: a 1 x 60000 image scaled first would need gigabytes."""
    from PIL import Image

    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    if side == size:
        return image.crop((int(left), int(top), int(left) + size, int(top) + size))
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
