"""Clips end to end on real shards: pictures first, then clips from there, scored, captioned, and gone on with to the bit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flm_scale.checkpoint.store import last_good
from flm_scale.cli import main
from flm_scale.data.clips import encode_clip
from flm_scale.data.shards import Dataset
from tests.language import write_language_model
from tests.moving import clip_set, frames_of
from tests.test_simvlg import SIZES, TOWER
from tests.test_train import lines_of

CLIPS = ["--vision.frames", "4", "--vision.temporal.width", "16", "--vision.temporal.heads", "4", "--vision.temporal.position"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return clip_set(tmp_path_factory.mktemp("clips") / "data", bad=frozenset({3}))


@pytest.fixture(scope="module")
def train(clips: Dataset) -> Callable[..., int]:
    def run(run_dir: Path, *more: str) -> int:
        return main(["train", "debug", "--data.path", str(clips.folder), "--run-dir", str(run_dir), "--text.vocab-size", "60", "--steps", "4",
                     "--log.save-every-steps", "2", "--log.validate-every-steps", "4", "--objective.kind", "ar", *more])

    return run


@pytest.fixture(scope="module")
def runs(train: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One on the frames in the middle, and one on clips that starts from it."""
    folder = tmp_path_factory.mktemp("runs")
    assert train(folder / "pictures") == 0
    assert train(folder / "clips", *CLIPS, "--init-from", str(folder / "pictures")) == 0
    return folder / "pictures", folder / "clips"


def test_a_run_on_clips_goes_on_where_one_on_pictures_ended(runs: tuple[Path, Path], clips: Dataset) -> None:
    first, then = ([line["loss"] for line in lines_of(run_dir) if "loss" in line] for run_dir in runs)
    assert len(then) == 4
    assert then[0] < first[0]
    account = json.loads((runs[1] / "pretrained.json").read_text())["init_from"]
    assert str(runs[0]) in account["source"]
    assert {fate["fate"] for fate in account["tensors"].values()} == {"used"}
    assert {name for name, tensors in account["weights"].items() if not tensors} == {
        f"vision_0.temporal.{weight}" for weight in ("query.weight", "query.bias", "key.weight", "key.bias", "alpha", "position_embedding")}
    assert "vision_0.temporal.alpha" in last_good(runs[1], full=True).names()


def test_a_damaged_clip_is_left_out_counted_and_named(train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "run", *CLIPS, "--batch.micro-batches", "4", "--steps", "3") == 0
    assert "left out, not readable: 0003" in capsys.readouterr().err
    assert max(line.get("bad_images", 0) for line in lines_of(tmp_path / "run")) >= 1


def test_a_resumed_run_on_clips_is_the_unbroken_one_to_the_bit(runs: tuple[Path, Path], train: Callable[..., int], tmp_path: Path) -> None:
    broken = shutil.copytree(runs[1], tmp_path / "broken")
    shutil.rmtree(broken / "checkpoints/step-000004")
    assert train(broken, *CLIPS, "--init-from", str(runs[0]), "--resume") == 0
    (one, other) = ((run_dir / "checkpoints/step-000004/rank-00000.safetensors").read_bytes() for run_dir in (runs[1], broken))
    assert one == other


def test_clips_are_scored_and_captioned_by_both(runs: tuple[Path, Path]) -> None:
    for run_dir in runs:
        for task in ("caption", "retrieval"):
            assert main(["eval", str(run_dir), "--task", task]) == 0
            assert json.loads((run_dir / f"evals/{task}.json").read_text())
        assert len(list((run_dir / "samples").glob("*.png"))) == 8
        (run_dir / "clip.mp4").write_bytes(encode_clip(frames_of("left")))
        assert main(["caption", str(run_dir), str(run_dir / "clip.mp4")]) == 0
        assert (run_dir / "samples/clip.caption.png").is_file()


def test_a_frozen_language_model_speaks_and_answers_of_clips(clips: Dataset, tmp_path: Path) -> None:
    data, model, run_dir = shutil.copytree(clips.folder, tmp_path / "data"), write_language_model(tmp_path / "model"), tmp_path / "run"
    assert main(["tokenizer", "encode", str(data), "--tokenizer", str(model)]) == 0
    assert main(["train", "simvlg_video_demo", "--data.path", str(data), "--text.name", str(model), "--run-dir", str(run_dir), *TOWER, *SIZES, *CLIPS,
                 "--text.bridge.reducer.merged", "1", "--steps", "3"]) == 0
    for task in ("caption", "vqa"):
        assert main(["eval", str(run_dir), "--task", task]) == 0
    controls = json.loads((run_dir / "evals/caption.json").read_text())["controls"]
    assert len({score["log_likelihood"] for score in controls.values()}) == 3, "the model sees the clip, another one, and none"
    assert len(json.loads((run_dir / "evals/vqa.json").read_text())["rows"]) == 5


@pytest.mark.slow
def test_a_model_of_clips_learns_which_way_things_go_and_its_control_cannot(train: Callable[..., int], tmp_path: Path) -> None:
    """On clips that it has not seen. The direction is one of a caption's three tokens to predict, EOS aside: ln 2 / 3 is what guessing it costs."""
    sizes = ["--vision.patch-size", "4", "--vision.width", "64", "--vision.layers", "3", "--vision.heads", "4", "--vision.output", "final",
             "--batch.micro-batches", "1", "--batch.images", "16", "--batch.captions", "16", "--batch.text-tokens", "128", "--steps", "350",
             "--optim.lr", "2e-3", "--optim.schedule", "constant", "--log.validate-every-steps", "350", "--log.save-every-steps", "0",
             "--data.max-bad-share", "1"]
    losses = {}
    for name, more in (("clips", [*CLIPS, "--vision.temporal.width", "32"]), ("middle", ["--vision.frames", "1"])):
        assert train(tmp_path / name, *sizes, *more) == 0
        losses[name] = next(line["validation/loss/forward"] for line in lines_of(tmp_path / name) if "validation/loss/forward" in line)
    assert losses["clips"] < 0.05
    assert losses["middle"] > 0.2


def test_mistakes_with_clips_are_one_line(runs: tuple[Path, Path], train: Callable[..., int], toy_dataset: Dataset, tmp_path: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(toy_dataset.index("train").read_image(0))
    for words, line in (
            (["caption", str(runs[1]), str(picture)], "is no MP4, and vision.frames (4) needs clips"),
            (["checkpoint", "export", str(runs[1]), "--out", str(tmp_path / "out")], "reads pictures, and this run has seen clips"),
            (["data", "demo", str(tmp_path / "demo"), "--large", "--clips"], "exclude each other")):
        assert main(words) == 2
        error = capsys.readouterr().err.strip()
        assert line in error
        assert len(error.splitlines()) == 1
    for more, line in ((["--data.path", str(toy_dataset.folder), *CLIPS], "holds pictures"), (["--init-from", str(tmp_path / "none")], "none")):
        assert train(tmp_path / "run", *more) == 2
        assert line in capsys.readouterr().err.strip().splitlines()[-1]
        assert not (tmp_path / "run").exists()
