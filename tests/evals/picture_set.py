"""A dataset of coloured squares with captions and questions, and an untrained or briefly trained run on it."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from flm_scale.config import Run
from flm_scale.data.shards import Dataset, Sample, open_dataset, write_dataset
from flm_scale.data.sidecars import give_tokenizer
from flm_scale.data.tokens import train_tokenizer
from flm_scale.model.assemble import build_model
from tests.synthetic import objective_of, tiny_run, write_weights

COLORS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220)}


def png(color: str, rng: np.random.Generator) -> bytes:
    pixels = np.clip(np.array(COLORS[color]) + rng.integers(-20, 21, (16, 16, 3)), 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def picture_set(folder: Path) -> Dataset:
    """48 train, 6 val and 24 test pictures; one test picture has no caption."""
    rng = np.random.default_rng(0)

    def samples(split: str, count: int) -> list[Sample]:
        made = []
        for number in range(count):
            color = list(COLORS)[number % 3]
            asked = str(rng.choice(list(COLORS)))
            captions = [] if split == "test" and number == 23 else [f"a {color} square"]
            made.append(Sample(f"{split}-{number:04d}", png(color, rng), "png", captions, ["what color is this?", f"is it {asked}?"],
                               [color, "yes" if asked == color else "no"], color, 16, 16))
        return made

    splits = {split: samples(split, count) for split, count in (("train", 48), ("val", 6), ("test", 24))}
    dataset = write_dataset(folder, name="squares", sources=[], splits=splits, readme="squares")
    train_tokenizer([text for sample in splits["train"] for text in sample.captions + sample.questions], vocab_size=60,
                    model_file=dataset.tokenizer_file)
    give_tokenizer(dataset)
    return open_dataset(folder)


def trained_run(run_dir: Path, dataset: Dataset, *, objective: str = "flm") -> Run:
    """Write run.json and the initial weights."""
    run = tiny_run(objective)
    run = run.replace(data=run.data.replace(path=dataset.folder, workers=0), text=run.text.replace(max_length=24))
    model = build_model(run, objective_of(run))
    run_dir.mkdir()
    (run_dir / "run.json").write_text(run.model_dump_json())
    write_weights(run_dir, dict(model.layers.named_parameters()), run)
    return run
