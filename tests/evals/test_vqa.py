"""Questions: the answer is read off the pooled row, both starts learn, the floor looks at questions only, and numbers repeat."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from flm_scale.checkpoint.store import last_good
from flm_scale.data.order import Entry
from flm_scale.data.shards import Dataset, Index
from flm_scale.data.tokens import Tokenizer
from flm_scale.errors import ConfigError
from flm_scale.evals import vqa
from flm_scale.evals.vqa import VqaTask, answer_rows, answering_builders, evaluate_vqa, orders_of, score_floor
from flm_scale.model.assemble import assemble
from flm_scale.model.parts import PlainParts
from tests.evals.picture_set import picture_set, trained_run
from tests.synthetic import as_batch, caption_ids, objective_of, random_pixels, tiny_run


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return picture_set(tmp_path_factory.mktemp("data") / "squares")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vqa, "PASSES", 10)
    monkeypatch.setattr(vqa, "BATCH", vqa.BATCH.replace(images=8))
    monkeypatch.setattr(vqa, "OPTIM", vqa.OPTIM.replace(lr=3e-3))


def score(run_dir: Path, dataset: Dataset, *, split: str = "test") -> dict[str, Any]:
    run = trained_run(run_dir, dataset)
    return evaluate_vqa(run, last_good(run_dir, full=False), dataset=dataset, tokenizer=Tokenizer(dataset.tokenizer_file),
                        objective=objective_of(run), split=split)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_fine_tuning_learns_to_look_and_gives_the_same_numbers_twice(tmp_path: Path, dataset: Dataset) -> None:
    first, second = (score(tmp_path / name, dataset) for name in "ab")
    assert first["num_questions"] == 48
    assert first["floor"]["other"] == pytest.approx(1 / 3), "three colours, equally frequent"
    for row in first["rows"]:
        assert row["other"] > 0.9, "colours cannot be told without looking"
        assert row["by_pass"][-1] == row["overall"]
        assert len(row["by_pass"]) == row["passes"] == 10
    for result in (first, second):
        for row in result["rows"]:
            del row["seconds"]
    assert first == second


def test_the_split_that_trains_cannot_be_scored(tmp_path: Path, dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match=r"--split train.*test"):
        score(tmp_path / "run", dataset, split="train")


@pytest.mark.parametrize("objective", ["flm", "mlm", "ar", "prefix_lm"])
def test_the_answer_row_reads_every_token_of_the_question_and_the_picture(objective: str) -> None:
    run, rng = tiny_run(objective), np.random.default_rng(0)
    task = VqaTask(objective_of(run), ["no", "red", "yes"])
    rows = answer_rows(run, [[5], [6, 7], [8]], checkpoint=None)
    model = assemble(run, answering_builders(run, task, PlainParts(), rows=rows, checkpoint=None))
    question, pixels = caption_ids(5, rng), random_pixels(1, rng)

    def loss(ids: np.ndarray, pixels: np.ndarray) -> float:
        with torch.no_grad():
            return float(model(as_batch([task.corrupt(np.append(ids, 1), rng)], pixels, task).state)[0])

    reference = loss(question, pixels)
    for position in range(1, 6):
        changed = question.copy()
        changed[position] = 5 + (changed[position] - 4) % 50
        assert loss(changed, pixels) != pytest.approx(reference, abs=1e-7), position
    assert loss(question, 255 - pixels) != pytest.approx(reference, abs=1e-7)


def test_replicas_share_the_pictures_of_each_batch_and_one_without_any_does_not_count() -> None:
    plan = [tuple(Entry(image, (0,)) for image in images) for images in ([5, 3, 8], [7])]
    shares = [orders_of(plan, epoch=2, rank=rank, size=2) for rank in range(2)]
    assert [[[entry.image for entry in order.entries if order.counts] for order in share] for share in shares] == [[[5, 8], [7]], [[3], []]]
    assert all(order.entries and order.epoch == 2 for share in shares for order in share)
    assert [order.entries for order in orders_of(plan, epoch=0, rank=0, size=1)] == plan


def test_yes_and_no_are_counted_apart_from_other_answers() -> None:
    task = VqaTask(objective_of(tiny_run()), ["no", "red", "yes"])
    question = caption_ids(3, np.random.default_rng(0))
    views = [task.corrupt(np.append(question, answer), np.random.default_rng(0))[0] for answer in range(4)]
    assert [task.parts[int(view.target_parts[0])] for view in views] == ["yes_no", "other", "yes_no", "other"]
    assert [int(view.target_ids[0]) for view in views] == [0, 1, 2, 3]


def test_floor_answers_by_the_question_as_training_did() -> None:
    seen = SimpleNamespace(questions=[["is it red?"] * 3, ["which?"]], answers=[["yes", "no", "yes"], ["blue"]])
    scored = SimpleNamespace(questions=[["is it red?", "which?", "never asked"]], answers=[["no", "blue", "yes"]])
    assert score_floor(cast("Index", seen), cast("Index", scored)) == {"overall": pytest.approx(2 / 3), "yes_no": 0.5, "other": 1.0}
