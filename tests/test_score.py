"""A score is open_clip's own cosine, whatever the batches; it stays a column of the index, to be filtered by."""

import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flm_scale import score as module
from flm_scale.cli import main
from flm_scale.data import shards
from flm_scale.data.prepare.spec import ScoreConfig
from flm_scale.data.shards import Dataset, open_dataset, write_dataset
from flm_scale.data.subset import filter_dataset
from flm_scale.data.verify import verify
from flm_scale.errors import CheckpointError, ConfigError, DataError
from flm_scale.score import load_scorer, score
from tests.conftest import COLORS, SHAPES, drawn_sample
from tests.tiny_clip import NAME, TINY, write_weights

UNDECODABLE, WITHOUT_CAPTION = 5, 9


@pytest.fixture(autouse=True)
def known_to_open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, NAME, TINY)


@pytest.fixture
def weight_file(tmp_path: Path) -> Path:
    return write_weights(tmp_path / "weights.pt", seed=0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """20 + 4 pictures in shards of eight: noise of odd sizes, one to three captions, one picture damaged and one without a caption."""
    rng, samples = np.random.default_rng(0), []
    for number in range(24):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (20 + number, 60 - number, 3), dtype=np.uint8)).save(buffer, "PNG")
        drawn = drawn_sample(number, color=COLORS[number % 4], shape=SHAPES[number // 4 % 2])
        samples.append(replace(drawn, image=b"no picture" if number == UNDECODABLE else buffer.getvalue(),
                               captions=[] if number == WITHOUT_CAPTION else drawn.captions))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SAMPLES_PER_SHARD", 8)
        return write_dataset(tmp_path_factory.mktemp("whole") / "data", name="whole", sources=[], readme="Noise.",
                             splits={"train": samples[:20], "val": samples[20:]})


def scores_of(dataset: Dataset, split: str) -> list[float]:
    index = dataset.index(split)
    return [index.values(number, ["clip_score"])[0] for number in range(len(index))]


def their_scores(dataset: Dataset, split: str, weight_file: Path) -> list[float]:
    """By open_clip alone, a picture and a caption at a time."""
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(NAME, pretrained=str(weight_file))
    model.eval()
    tokenize, index, found = open_clip.get_tokenizer(NAME), dataset.index(split), []
    for number in range(len(index)):
        data, captions = index.read_image(number), index.captions[number]
        if data == b"no picture" or not captions:
            found.append(math.nan)
            continue
        with torch.no_grad():
            image = model.encode_image(preprocess(Image.open(io.BytesIO(data)))[None], normalize=True)
            found.append(max(float(image @ model.encode_text(tokenize([caption]), normalize=True).T) for caption in captions))
    return found


@pytest.mark.parametrize("batch", [3, 64])
def test_scores_are_open_clips_own_of_the_best_caption(whole: Dataset, weight_file: Path, tmp_path: Path, batch: int) -> None:
    made = open_dataset(score(whole, tmp_path / "scored", model=NAME, pretrained=str(weight_file), batch=batch, device="cpu").folder)
    for split in whole.splits:
        ours, theirs = scores_of(made, split), their_scores(whole, split, weight_file)
        assert ours == pytest.approx(theirs, abs=1e-5, nan_ok=True)
        assert np.nanstd(theirs) > 1e-3  # they do differ
    assert verify(made) == []
    assert made.root != whole.root
    (step,) = made.manifest.derivations
    assert step.counts == {"images": 24, "without a score": 2, "of which do not decode": 1}
    assert (step.values["model"], step.values["column"]) == (NAME, "clip_score")
    assert all((made.folder / shard.name).samefile(whole.folder / shard.name) for shard in made.shards())


def test_a_score_does_not_depend_on_what_is_scored_beside_it(whole: Dataset, weight_file: Path) -> None:
    """Kernels are chosen by size, with two threads at the latest; so a few pictures fill a batch up."""
    config, index = ScoreConfig(model=NAME, pretrained=str(weight_file), batch=16), whole.index("train")
    captions, scorer = list(index.captions), load_scorer(config, "cpu")

    def scored(numbers: Sequence[int]) -> np.ndarray:
        return np.concatenate([scores for scores, _ in scorer.scores(index, numbers, [captions[number] for number in numbers])])

    torch.set_num_threads(2)
    try:
        together = scored(range(20))
        assert np.array_equal(scored(range(19, -1, -1))[::-1], together, equal_nan=True)
        assert np.array_equal(np.concatenate([scored(range(first, first + 5)) for first in range(0, 20, 5)]), together, equal_nan=True)
    finally:
        torch.set_num_threads(1)


def test_a_killed_scoring_goes_on_and_refuses_other_weights(
        whole: Dataset, weight_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"model": NAME, "batch": 4, "device": "cpu"}
    undisturbed = score(whole, tmp_path / "undisturbed", pretrained=str(weight_file), **options)
    best, calls, out = module.Scorer.best_cosines, [], tmp_path / "scored"

    def dies(self: module.Scorer, *args: object) -> np.ndarray:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return best(self, *args)

    monkeypatch.setattr(module.Scorer, "best_cosines", dies)
    with pytest.raises(KeyboardInterrupt):
        score(whole, out, pretrained=str(weight_file), **options)
    other = write_weights(tmp_path / "other.pt", seed=1)
    with pytest.raises(DataError, match="unfinished build of something else"):
        score(whole, out, pretrained=str(other), **options)
    copy = weight_file.rename(tmp_path / "renamed.pt")  # what counts is in the file
    assert score(whole, out, pretrained=str(copy), **options).root == undisturbed.root
    assert len(calls) == 4 + 4  # of six batches, the first shard's two were there


def test_a_dataset_is_scored_anew_by_other_weights_and_filtered_by_what_it_says_now(whole: Dataset, weight_file: Path, tmp_path: Path) -> None:
    first = score(whole, tmp_path / "first", model=NAME, pretrained=str(weight_file), device="cpu")
    second = score(first, tmp_path / "second", model=NAME, pretrained=str(write_weights(tmp_path / "other.pt", seed=1)), device="cpu")
    before, now = scores_of(first, "train"), scores_of(second, "train")
    assert now != pytest.approx(before, abs=1e-3, nan_ok=True)
    bound = sorted(value for value in now if not math.isnan(value))[10]
    kept = filter_dataset(second, tmp_path / "kept", where=[f"clip_score >= {bound}"])
    assert list(kept.index("train").keys) == [f"{number:06d}" for number in range(20) if now[number] >= bound]
    assert [step.by for step in kept.manifest.derivations] == ["score", "score", "filter"]
    assert verify(open_dataset(kept.folder)) == []


def test_the_command_says_what_is_wrong_before_it_begins(
        whole: Dataset, weight_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "score", str(whole.folder), "--out", str(tmp_path / "scored"), "--device", "cpu"]
    assert main([*words, "--model", NAME, "--pretrained", str(weight_file), "--workers", "1"]) == 0
    assert "24 samples in 4 shards" in capsys.readouterr().out
    for model, pretrained, problem in [
            ("ViT-B-3", str(weight_file), "open_clip has no model 'ViT-B-3'; did you mean 'ViT-B-32'?"),
            ("ViT-B-32", "none", "'none') is neither a file nor a tag of ViT-B-32; its tags: openai"),
            ("ViT-B-32", str(weight_file), "does not load into ViT-B-32"), (NAME, __file__, "does not load into tiny")]:
        assert main([*words, "--model", model, "--pretrained", pretrained]) == 2
        message = capsys.readouterr().err
        assert problem in message
        assert message.strip().count("\n") == 0
    with pytest.raises(ConfigError, match=r"--batch \(0\)"):
        score(whole, tmp_path / "x", model=NAME, pretrained=str(weight_file), batch=0)
    with pytest.raises(CheckpointError):
        score(whole, tmp_path / "x", model=NAME, pretrained="")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(whole: Dataset, weight_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="torch finds no GPU; say --device cpu"):
        score(whole, tmp_path / "x", model=NAME, pretrained=str(weight_file), device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_gives_the_same_scores(whole: Dataset, weight_file: Path, tmp_path: Path) -> None:
    made = score(whole, tmp_path / "scored", model=NAME, pretrained=str(weight_file))
    assert scores_of(made, "train") == pytest.approx(their_scores(whole, "train", weight_file), abs=1e-4, nan_ok=True)
