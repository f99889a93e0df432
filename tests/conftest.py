"""Datasets that tests share: a small drawn one, and the real easy-vqa demo."""

import fcntl
import io
import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from PIL import Image, ImageDraw

from flm_scale.data.demo import EASY_VQA, read_easy_vqa, train_dataset_tokenizer
from flm_scale.data.manifest import DATASET
from flm_scale.data.shards import Dataset, Sample, open_dataset, write_dataset
from flm_scale.data.sidecars import give_tokenizer
from flm_scale.data.tokens import train_tokenizer
from flm_scale.errors import DataError

hypothesis.settings.register_profile("any machine", deadline=None)  # how long an example takes is no claim
hypothesis.settings.load_profile("any machine")

COLORS = ("red", "green", "blue", "black")
SHAPES = ("circle", "square")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Bit-equal results, and no fight over two cores; before any other fixture trains."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def no_wait_for_the_disk() -> Iterator[None]:
    """A busy disk takes seconds for what no test can see: only a loss of power tells flushed from written. Other processes do flush."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _descriptor: None)
        yield


def drawn_sample(number: int, *, color: str, shape: str, image: bytes | None = None) -> Sample:
    picture = Image.new("RGB", (20, 16), "white")
    draw = ImageDraw.Draw(picture)
    box = (3 + number % 5, 3, 13 + number % 5, 13)
    (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=color)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    captions = [f"a {color} {shape}", f"the {shape} that you see here is {color}", f"{color} on white"][: 1 + number % 3]
    return Sample(key=f"{number:06d}", image=image or buffer.getvalue(), image_format="png", captions=captions,
                  questions=[f"what color is the {shape}?", f"is it {COLORS[number % 4]}?"],
                  answers=[color, "yes" if color == COLORS[number % 4] else "no"], concept=f"{color} {shape}", width=20, height=16)


def write_toy(folder: Path, *, bad: frozenset[int] = frozenset()) -> Dataset:
    """64 + 8 + 8 drawn pictures with one to three captions each; those numbered in `bad` are no pictures at all."""
    samples = [drawn_sample(i, color=COLORS[i % 4], shape=SHAPES[i // 4 % 2], image=b"not a picture" if i in bad else None)
               for i in range(80)]
    dataset = write_dataset(folder, name="toy", sources=[], readme="Drawn.",
                            splits={"train": samples[:64], "val": samples[64:72], "test": samples[72:]})
    texts = (text for sample in samples for text in sample.captions + sample.questions)
    train_tokenizer(texts, vocab_size=80, model_file=dataset.tokenizer_file)
    give_tokenizer(dataset)
    return open_dataset(folder)


@pytest.fixture(scope="session")
def toy_dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_toy(tmp_path_factory.mktemp("toy") / "data")


@pytest.fixture(scope="session")
def demo_dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The real easy-vqa as shards, without a fleet, once for all test processes. Skipped where it cannot be fetched, but not in CI."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (shared / "demo.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            if not (shared / "demo" / DATASET).exists():
                write_easy_vqa(shared / "demo", downloads=tmp_path_factory.mktemp("downloads"))
        except DataError as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"easy-vqa cannot be fetched: {error}")
    return open_dataset(shared / "demo")


def write_easy_vqa(folder: Path, *, downloads: Path) -> None:
    material, numbers = read_easy_vqa(downloads, progress=print), count()

    def sample(image: bytes, about: dict[str, Any]) -> Sample:
        own = {name: about[name] for name in ("captions", "questions", "answers", "concept")}
        return Sample(key=f"{next(numbers):08d}", image=image, image_format="png", width=64, height=64, **own)

    splits = {split: (sample(*picture) for picture in pictures) for split, pictures in material.splits.items()}
    write_dataset(folder, name="easy-vqa", sources=[EASY_VQA.source()], splits=splits, readme=material.readme)
    train_dataset_tokenizer(folder, vocab_size=512)
