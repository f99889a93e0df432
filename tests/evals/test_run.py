"""`flm eval` and `flm caption` on a small dataset: files are written whole, and mistakes are one clear line."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flm_scale.cli import main
from flm_scale.config import MlmConfig
from flm_scale.data.order import keyed_rng
from flm_scale.errors import CheckpointError, ConfigError, DataError
from flm_scale.evals.run import evaluate
from flm_scale.evals.samples import hidden_from
from flm_scale.evals.show import caption_files
from flm_scale.objectives.mlm import Mlm
from tests.evals.picture_set import picture_set, trained_run
from tests.synthetic import MASK_ID, caption_ids, objective_of, tiny_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    trained_run(folder / "flm", picture_set(folder / "squares"))
    return folder / "flm"


def test_caption_scores_pictures_with_captions_and_writes_samples(run_dir: Path) -> None:
    evaluate(run_dir, task="caption", split="test")
    result = json.loads((run_dir / "evals/caption.json").read_text())
    assert result["num_images"] == 23, "one of the 24 has no caption"
    assert set(result["greedy"]) == set(result["beam"]) == {"CIDEr", "BLEU-1", "BLEU-4", "exact"}
    samples = json.loads((run_dir / "samples/samples.json").read_text())
    assert len(samples) == 12
    for sample in samples:
        with Image.open(run_dir / sample["image"]) as picture:
            assert min(picture.size) >= 192
        assert "".join(token["piece"] for token in sample["tokens"]).replace("▁", " ").strip() == sample["truth"]
        assert all(token["piece"] in token["hidden"] and 0 < token["probability"] <= 1 for token in sample["tokens"])
        assert all(token["correct"] == (token["piece"] == token["predicted"]) for token in sample["tokens"])


def test_retrieval_ranks_distinct_texts_and_repeats(run_dir: Path) -> None:
    found = []
    for _ in range(2):
        evaluate(run_dir, task="retrieval", split="test")
        found.append((run_dir / "evals/retrieval.json").read_text())
    assert found[0] == found[1]
    result = json.loads(found[0])
    assert (result["num_images"], result["num_texts"]) == (23, 3)
    assert result["image_to_text"]["R@5"] == 1.0


def test_masked_language_model_ranks_but_does_not_say_captions(run_dir: Path) -> None:
    other = run_dir.with_name("mlm")
    trained_run(other, picture_set(run_dir.with_name("squares-mlm")), objective="mlm")
    evaluate(other, task="retrieval", split="val")
    with pytest.raises(ConfigError, match="cannot say a caption"):
        evaluate(other, task="caption", split="test")
    assert not (other / "evals/caption.json").exists()


@pytest.mark.parametrize(("objective", "expected"), [("flm", None), ("ar", "rest"), ("mlm", "masked")])
def test_hidden_positions_are_those_the_target_does_not_see(objective: str, expected: str | None) -> None:
    ids = caption_ids(6, np.random.default_rng(0))
    task = Mlm(MlmConfig(mask_rate=0.5), mask_id=MASK_ID) if objective == "mlm" else objective_of(tiny_run(objective))
    view = task.corrupt(ids, keyed_rng("x"))[0]
    for row, target in zip(view.target_rows[view.target_parts == 0], view.target_ids, strict=False):
        hidden = hidden_from(view, ids, row=int(row))
        assert target in ids[hidden]
        if expected == "rest":
            assert hidden.tolist() == list(range(int(row) + 1, 7))
        elif expected == "masked":
            assert hidden.tolist() == np.flatnonzero(view.ids == MASK_ID).tolist()
        else:
            query = int(row) - 2 * len(ids)
            assert hidden.tolist() == list(range(view.span_first[query], view.span_last[query] + 1))


def test_caption_files_prints_and_draws_every_file(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "a" / "cat.png", tmp_path / "b" / "cat.jpg"]
    for number, path in enumerate(files):
        path.parent.mkdir()
        Image.new("RGB", (40, 30), (number * 90, 20, 20)).save(path)
    caption_files(run_dir, files, out=tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cat-2.caption.png", "cat.caption.png"]
    printed = capsys.readouterr().out
    assert all(str(path) in printed for path in files)
    assert printed.count("greedy:") == printed.count("beam:") == 2


def test_missing_and_damaged_pictures_are_named(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.png: No such file"):
        caption_files(run_dir, [tmp_path / "nowhere.png"], out=tmp_path)
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"bad\.png.*cannot be decoded"):
        caption_files(run_dir, [tmp_path / "bad.png"], out=tmp_path)


@pytest.mark.parametrize(("size", "options", "message"), [
    (1, ["--tensor", "2"], r"1 process\(es\) cannot be cut into parallel.tensor \(2\) x parallel.pipe \(1\); start a multiple of 2"),
    (4, ["--tensor", "3"], r"text.heads \(4\) must be a multiple of parallel.tensor \(3\)"),
    (6, ["--tensor", "2", "--pipe", "2"], r"6 process\(es\) cannot be cut into parallel.tensor \(2\) x parallel.pipe \(2\)"),
    (20, ["--pipe", "20"], r"parallel.pipe \(20\) must be from 1 to the model's number of layers \(\d+\)"),
    (1, ["--pipe", "0"], r"ParallelConfig.pipe \(0\)"),
])
@pytest.mark.parametrize("verb", ["caption", "retrieval", "vqa", "flm caption"])
def test_a_layout_that_does_not_fit_is_one_line_before_processes_meet(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                     capsys: pytest.CaptureFixture[str], verb: str, size: int,
                                                                     options: list[str], message: str) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(picture)
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    arguments = ["caption", str(run_dir), str(picture)] if verb == "flm caption" else ["eval", str(run_dir), "--task", verb]
    assert main([*arguments, *options]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"flm: .*{message}.*\n", error), error
    assert not torch.distributed.is_initialized()


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a run directory"):
        evaluate(tmp_path, task="retrieval", split="test")
