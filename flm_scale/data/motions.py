"""Clips whose captions no single frame tells: the shape of an easy-vqa picture moves, grows, shrinks or stays. `flm data demo DIR --clips`.

The frame in the middle of a clip is the package's own picture whatever happens before and after it, so a model that sees that frame alone can name
colour and shape and has to guess the motion.
"""

import io
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flm_scale.data.clips import encode_clip
from flm_scale.data.order import keyed_rng
from flm_scale.data.sources import Material

FRAMES, STEP, GROWTH = 8, 3, 1.15
"""Frames of a clip; pixels, and times in size, from one to the next."""
MOTIONS = {"moves to the left": (-1, 0, 0), "moves to the right": (1, 0, 0), "moves up": (0, -1, 0), "moves down": (0, 1, 0), "grows": (0, 0, 1),
           "shrinks": (0, 0, -1), "stays still": (0, 0, 0)}
"""What a caption says, and the direction across, down and in size."""
CLIPS = {"train": 2000, "val": 200, "test": 400}

README = """# easy-vqa in motion, as clip-text shards

{counts} clips of {frames} frames (64 x 64, H.264), each made of one picture of the PyPI package easy-vqa 1.0 by Victor Zhou, MIT licence.
Its shape does one of {number} things: {motions}.

- The frame in the middle is the picture as it is. Captions ("a teal triangle moves to the left") name colour and shape, which it shows, and the
  motion, which it does not: guessing is right on 1 of {number}.
- train and val: pictures of the official train split, val's in no train clip; test: official test pictures.
- Prepared by `flm data demo DIR --clips` from the folders in ledger/, which may be deleted.

## Licence of the package

{license}
"""


def motion_material(pictures: Material, license_text: str, *, progress: Callable[[str], None]) -> Material:
    """Return the clips. pictures: of easy-vqa, by its official splits."""
    # The concepts that its val split holds out come first: they belong into training here.
    captioned = {part: iter([picture for split in of_part for picture in pictures.splits[split] if picture[1]["captions"]])
                 for part, of_part in (("train", ("val", "train")), ("test", ("test",)))}
    splits = {split: [_clip(image, about, split=split, number=number)
                      for number, (image, about) in enumerate(islice(captioned["test" if split == "test" else "train"], count))]
              for split, count in CLIPS.items()}
    progress(f"easy-vqa in motion: {sum(CLIPS.values())} clips of {FRAMES} frames")
    counts = ", ".join(f"{len(clips)} {split}" for split, clips in splits.items())
    return Material(splits, README.format(counts=counts, frames=FRAMES, motions=", ".join(MOTIONS), number=len(MOTIONS), license=license_text))


def _clip(image: bytes, about: dict[str, Any], *, split: str, number: int) -> tuple[bytes, dict[str, Any]]:
    motion = list(MOTIONS)[keyed_rng("motion", split, number).integers(len(MOTIONS))]
    picture = Image.open(io.BytesIO(image), formats=("PNG",)).convert("RGB")
    said = {"captions": [f"{caption} {motion}" for caption in about["captions"]], "concept": f"{about['concept']} {motion}",
            "source": about["source"], "license": about["license"]}
    return encode_clip(moved(np.asarray(picture), MOTIONS[motion])), said


def moved(picture: NDArray[np.uint8], direction: Sequence[int]) -> list[NDArray[np.uint8]]:
    """Return the frames of a clip. picture: one shape on a plain ground, [height, width, 3].   direction: of MOTIONS."""
    ground = picture[0, 0]
    rows, columns = (np.flatnonzero((picture != ground).any(-1).any(1 - axis)) for axis in (0, 1))
    left, top, right, bottom = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    shape = Image.fromarray(picture[top:bottom, left:right])
    frames = []
    for time in range(-(FRAMES // 2), FRAMES - FRAMES // 2):
        scale = GROWTH ** (direction[2] * time)
        size = max(1, round(shape.width * scale)), max(1, round(shape.height * scale))
        centre = (left + right) / 2 + STEP * direction[0] * time, (top + bottom) / 2 + STEP * direction[1] * time
        frame = Image.new("RGB", (picture.shape[1], picture.shape[0]), tuple(ground.tolist()))
        frame.paste(shape.resize(size, Image.Resampling.BICUBIC), (round(centre[0] - size[0] / 2), round(centre[1] - size[1] / 2)))
        frames.append(np.asarray(frame))
    return frames
