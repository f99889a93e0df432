"""Tiny clips of a square that goes left or right, which its frame in the middle does not tell."""

from pathlib import Path

import numpy as np

from flm_scale.data.clips import encode_clip
from flm_scale.data.shards import Dataset, Sample, open_dataset, write_dataset
from flm_scale.data.sidecars import give_tokenizer
from flm_scale.data.tokens import train_tokenizer

FRAMES, SIDE = 4, 16
DIRECTIONS = {"left": -1, "right": 1}


def frames_of(direction: str, *, place: int = 7, frames: int = FRAMES, side: int = SIDE) -> list[np.ndarray]:
    """A dark square on white, two pixels further with each frame; it is at `place` in the frame of the middle."""
    shown = []
    for time in range(frames):
        frame = np.full((side, side, 3), 240, np.uint8)
        left = place + 2 * DIRECTIONS[direction] * (time - frames // 2)
        frame[5:10, max(left, 0):max(left + 5, 0)] = 20
        shown.append(frame)
    return shown


def clip_set(folder: Path, *, bad: frozenset[int] = frozenset()) -> Dataset:
    """32 train, 8 val and 8 test clips; of those numbered in `bad` the frames are noise behind a good header."""
    samples = []
    for number in range(48):
        direction = list(DIRECTIONS)[number % 2]
        clip = encode_clip(frames_of(direction, place=4 + number // 2 % 4))
        if number in bad:
            clip = damaged(clip)
        samples.append(Sample(f"{number:04d}", clip, "mp4", [f"it goes {direction}"], ["which way does it go?"], [direction], direction,
                              SIDE, SIDE, columns={"frames": FRAMES, "seconds": FRAMES / 8}))
    dataset = write_dataset(folder, name="moving", sources=[], readme="Drawn.",
                            splits={"train": samples[:32], "val": samples[32:40], "test": samples[40:]})
    train_tokenizer([text for sample in samples for text in sample.captions], vocab_size=40, model_file=dataset.tokenizer_file)
    give_tokenizer(dataset)
    return open_dataset(folder)


def damaged(clip: bytes) -> bytes:
    """Return the clip with other bytes at the end of its frames."""
    end = clip.index(b"moov") - 4
    return clip[:end - 60] + bytes(60) + clip[end:]
