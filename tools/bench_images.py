"""What a picture costs one core to prepare and to load, against img2dataset and Pillow, and how far the fast ways' pixels are from exact ones.

The ways take turns, round by round, in one process on one thread; the core's seconds count, not the clock's. Pictures are real ones, from a folder:

    uv pip install --no-deps --target PHOTOS scikit-image scikit-learn ultralytics imgaug insightface      (packages with photographs in them)
    python -m venv VENV && VENV/bin/pip install img2dataset "setuptools<80"
    python -m tools.bench_images --photos PHOTOS [--img2dataset VENV]

Sets: `large`, the JPEGs of 0.8 to 2 million pixels as they are found; `near`, every photograph with a shorter side of 300; `prepared`, of 256.
The exact picture is decoded whole and scaled in float by Pillow (mode F, bicubic, antialiased).
"""

import io
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table

from flm_scale.config import AugmentConfig, DataConfig
from flm_scale.data.augment import decode_augmented
from flm_scale.data.images import centre_square, codec_versions, decode_image, fit_image
from flm_scale.data.loader import Loader
from flm_scale.data.order import keyed_rng
from flm_scale.data.shards import Sample, write_dataset
from flm_scale.data.sidecars import give_tokenizer
from flm_scale.data.tokens import train_tokenizer
from flm_scale.objectives.objective import build_objective
from flm_scale.recipes import flm_1b, flm_base

CONSOLE = Console(width=150)
TARGET, CROP = 256, 224
FED, GPU_RATE = 2048, 1000
"""Pictures of the dataset that micro-batches are made of, and how many a second a GPU is taken to want."""
BICUBIC = Image.Resampling.BICUBIC
Ways = dict[str, Callable[[int], object]]
"""What each does with the picture of a number."""


def encoded(image: Image.Image, *, quality: int = 90) -> bytes:
    """Return a JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def scaled_to(image: Image.Image, shorter: int) -> Image.Image:
    """Return the photograph with this shorter side."""
    scale = shorter / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def picture_sets(folder: Path) -> dict[str, list[bytes]]:
    """Return the sets by name. Pictures below 300 pixels, grey ones and drawings (few colours) are not taken."""
    found: dict[str, list[bytes]] = {"large": [], "near": [], "prepared": []}
    for file in sorted(path for path in folder.rglob("*") if path.suffix in {".jpg", ".png"}):
        image = Image.open(file)
        if min(image.size) < 300 or image.mode != "RGB" or len(set(scaled_to(image, 32).get_flattened_data())) < 300:
            continue
        if image.format == "JPEG" and 800_000 <= image.width * image.height <= 2_000_000:
            found["large"].append(file.read_bytes())
        found["near"].append(encoded(scaled_to(image.convert("RGB"), 300)))
        found["prepared"].append(fit_image(found["near"][-1], size=TARGET, mode="keep_ratio").data)
    return found


def resizer_of(venv: Path) -> Callable[[io.BytesIO], tuple[Any, ...]]:
    """Return img2dataset's own Resizer, from the environment that it is installed in."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    sys.path += [str(path) for path in venv.glob("lib/python*/site-packages")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from img2dataset.resizer import Resizer  # type: ignore[import-not-found]

    made: Callable[..., Any] = Resizer
    return partial(made, image_size=TARGET, resize_mode="keep_ratio", resize_only_if_bigger=True)


def by_pillow(data: bytes, *, quality: int) -> bytes:
    """Prepare a picture as one would with Pillow alone."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = TARGET / min(image.size)
    return encoded(image.resize((round(image.width * scale), round(image.height * scale)), BICUBIC), quality=quality)


def race(title: str, ways: Ways, *, pictures: int, rounds: int) -> None:
    """Time the ways in turn and print what one core does a second: of each picture in its quickest round, and the ratio in the median round too."""
    seconds = np.empty((len(ways), rounds + 1, pictures))
    for turn in range(rounds + 1):
        for number, way in enumerate(ways.values()):
            for picture in range(pictures):
                started = time.process_time()
                way(picture)
                seconds[number, turn, picture] = time.process_time() - started
    seconds = seconds[:, 1:]  # the first round warms up
    table = Table("", "pictures/s", "against the first", "in the median round", title=title)
    best, in_rounds = seconds.min(axis=1).sum(axis=1), seconds.sum(axis=2)
    for number, name in enumerate(ways):
        table.add_row(name, f"{pictures / best[number]:.0f}", f"{best[0] / best[number]:.2f}x",
                      f"{statistics.median((in_rounds[0] / in_rounds[number]).tolist()):.2f}x")
    CONSOLE.print(table)


def exact(data: bytes, *, width: int, height: int, square: bool = False) -> np.ndarray:
    """Return [height, width, 3] floats of the whole picture, or of its centre square."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    box = centre_square(*image.size) if square else None
    return np.stack([np.asarray(band.convert("F").resize((width, height), BICUBIC, box=box)) for band in image.split()], -1).clip(0, 255)


def compare(title: str, pairs: dict[str, Iterable[tuple[np.ndarray, np.ndarray]]]) -> None:
    """Print how far pixels are from the exact ones."""
    table = Table("", "PSNR: mean", "worst", "mean difference", "largest", title=title)
    for name, both in pairs.items():
        gaps = [np.abs(found.astype(np.float64) - wanted) for found, wanted in both]
        psnr = [10 * np.log10(255**2 / np.mean(gap**2)) for gap in gaps]
        table.add_row(name, f"{np.mean(psnr):.1f} dB", f"{min(psnr):.1f} dB", f"{np.mean([gap.mean() for gap in gaps]):.2f}",
                      f"{max(gap.max() for gap in gaps):.0f}")
    CONSOLE.print(table)


def prepare(name: str, pictures: list[bytes], *, venv: Path | None, rounds: int) -> None:
    """Decode, scale to a shorter side of 256 and encode."""
    fit = partial(fit_image, size=TARGET, mode="keep_ratio")
    resizer = resizer_of(venv) if venv else None
    for quality in (90, 95):
        theirs = resizer(encode_quality=quality) if resizer else None
        ways: Ways = {"img2dataset": partial(lambda theirs, number: theirs(io.BytesIO(pictures[number])), theirs)} if theirs else {}
        ways["Pillow"] = partial(lambda quality, number: by_pillow(pictures[number], quality=quality), quality)
        ways["flm_scale"] = partial(lambda quality, number: fit(pictures[number], quality=quality), quality)
        race(f"prepare: {len(pictures)} {name} pictures, to JPEG {quality}", ways, pictures=len(pictures), rounds=rounds)
    fitted = [fit(data, image_format="png") for data in pictures]
    wanted = [exact(data, width=one.width, height=one.height) for data, one in zip(pictures, fitted, strict=True)]
    stored = {"flm_scale": [one.data for one in fitted]}
    if resizer:
        png = resizer(encode_format="png", encode_quality=1)
        stored = {"img2dataset": [png(io.BytesIO(data))[0] for data in pictures]} | stored
    compare(f"pixels of {name} pictures at {TARGET}, before they are encoded",
            {way: [(np.asarray(Image.open(io.BytesIO(one))), goal) for one, goal in zip(files, wanted, strict=True)
                   if Image.open(io.BytesIO(one)).size == goal.shape[1::-1]] for way, files in stored.items()})


def load(pictures: list[bytes], *, rounds: int) -> None:
    """Read from a shard and make 224 x 224 pixels: webdataset and open_clip's transform to floats, ours to bytes, normalised on the device."""
    import open_clip
    import webdataset

    transform = open_clip.image_transform(CROP, is_train=False)
    crops = AugmentConfig(crop_scale=(0.5, 1.0))
    with tempfile.TemporaryDirectory() as folder:
        samples = [Sample(f"{number:05d}", data, "jpg", [""], [], [], "", 0, 0) for number, data in enumerate(pictures)]
        dataset = write_dataset(Path(folder) / "data", name="bench", sources=[], splits={"train": samples}, readme="")
        tar, index = str(dataset.folder / "train" / "00000.tar"), dataset.index("train")
        theirs = iter(webdataset.WebDataset(tar, shardshuffle=False).repeat().decode("pilrgb").to_tuple("jpg").map_tuple(transform))

        def augmented(augment: AugmentConfig) -> Callable[[int], object]:
            return lambda number: decode_augmented(index.read_image(number), size=CROP, augment=augment, rng=keyed_rng("augment", 0, 0, number))

        ways: Ways = {
            "webdataset, Pillow, CLIP's transform": lambda _: next(theirs),
            "flm_scale": augmented(AugmentConfig()),
            "flm_scale, random crops": augmented(crops),
            "flm_scale, random crops, RandAugment": augmented(crops.replace(randaugment_layers=2)),
        }
        race(f"load: {len(pictures)} prepared pictures, to {CROP} x {CROP}", ways, pictures=len(pictures), rounds=rounds)
    compare(f"pixels of prepared pictures at {CROP}", {"flm_scale": [
        (decode_image(data, size=CROP).transpose(1, 2, 0), exact(data, width=CROP, height=CROP, square=True)) for data in pictures]})


def feed(pictures: list[bytes], *, rounds: int) -> None:
    """Make whole micro-batches as training gets them, read, decoded, corrupted and packed, on one core."""
    table = Table("recipe", "pixels", "micro-batch", "micro-batches/s/core", "pictures/s/core", f"cores for {GPU_RATE:,} pictures/s",
                  title="packed micro-batches")
    words = [f"{word}{number}" for word in ("a", "big", "red", "old", "dog", "on", "the", "grass", "near", "house") for number in range(60)]
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        samples = [Sample(f"{number:05d}", pictures[number % len(pictures)], "jpg", [" ".join(rng.choice(words, 8))], [], [], "", 0, 0)
                   for number in range(FED)]
        dataset = write_dataset(Path(folder) / "data", name="bench", sources=[], splits={"train": samples}, readme="")
        train_tokenizer(words * 3, vocab_size=2000, model_file=dataset.tokenizer_file)
        tokenizer = give_tokenizer(dataset)
        for recipe in (flm_base, flm_1b):
            run = recipe().replace(data=DataConfig(path=dataset.writable_folder, workers=0))
            objective = build_objective(run.objective, mask_id=tokenizer.mask_id)
            loader = Loader(run, [dataset], tokenizer, objective, size=run.batch.micro_batches)
            loader.next_step()
            made, started = 0, time.process_time()
            for _ in range(rounds):
                (batch,) = loader.next_step()
                made += len(batch.keys)
            seconds = time.process_time() - started
            size = run.vision.image_size
            table.add_row(run.name, f"{size} x {size}", f"{made / rounds:.0f} pictures", f"{rounds / seconds:.1f}", f"{made / seconds:.0f}",
                          f"{GPU_RATE * seconds / made:.2f}")
    CONSOLE.print(table)


def main(*, photos: Path, img2dataset: Path | None = None, rounds: int = 20) -> None:
    """Print the tables.

    Args:
        photos: folder with real photographs.
        img2dataset: environment that img2dataset is installed in; without it Pillow is compared alone.
        rounds: how often each way takes its turn.
    """
    torch.set_num_threads(1)
    CONSOLE.print(", ".join(f"{name} {version}" for name, version in codec_versions().items()))
    sets = picture_sets(photos)
    for name in ("large", "near"):
        prepare(name, sets[name], venv=img2dataset, rounds=rounds)
    load(sets["prepared"], rounds=rounds)
    feed(sets["prepared"], rounds=rounds)


if __name__ == "__main__":
    tyro.cli(main)
