"""Questions in words: the bridge learns to let a language model answer, controls fall back to guessing, and mistakes are one line."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from flm_scale.config import Run
from flm_scale.data.shards import Dataset
from flm_scale.data.tokens import LmTokenizer
from flm_scale.errors import DataError
from flm_scale.evals import answers, vqa
from flm_scale.evals.answers import PROMPT, ask_questions, encode_questions, line_breaks, normal, say_answers, score_answers
from flm_scale.evals.run import evaluate, open_run
from flm_scale.model.assemble import build_model
from flm_scale.objectives.captioning import Captioning
from flm_scale.parallel.processes import start_processes
from tests.distributed.launch import Launch
from tests.evals.picture_set import COLORS, picture_set
from tests.language import write_language_model
from tests.synthetic import tiny_language_run, write_weights

END = 2


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return picture_set(tmp_path_factory.mktemp("data") / "squares")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_language_model(tmp_path_factory.mktemp("language_model") / "llama")
    teach(folder)
    return folder


@pytest.fixture(scope="module")
def write_run(dataset: Dataset, language_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def write(name: str, **changes: object) -> Path:
        """Write a run whose bridge has learnt nothing yet."""
        run = tiny_language_run(language_model)
        run = Run.model_validate_json(run.replace(data=run.data.replace(path=dataset.folder, workers=0), **changes).model_dump_json())
        model, run_dir = build_model(run, Captioning(np.empty(0, np.int32))), tmp_path_factory.mktemp(name)
        (run_dir / "run.json").write_text(run.model_dump_json())
        write_weights(run_dir, {name: weight for name, weight in model.layers.named_parameters() if not name.startswith("head")}, run)
        return run_dir

    return write


def teach(folder: Path) -> None:
    """Train the language model to answer by the colour that stands in front of a question."""
    from transformers import AutoModelForCausalLM

    asked = [(color, "what color is this?", color) for color in COLORS]
    asked += [(color, f"is it {other}?", "yes" if color == other else "no") for color in COLORS for other in COLORS]
    prompts = [f"{color} {PROMPT.format(text)}" for color, text, _ in asked]
    whole = [f"{prompt} {answer}" for prompt, (*_, answer) in zip(prompts, asked, strict=True)]
    encode, pad = LmTokenizer(folder).encode_all, partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    read = pad([torch.tensor(ids) for ids in encode(whole)], padding_value=END)
    labels = pad([torch.tensor([-100] * (len(ids) - 1) + both[len(ids) - 1:]) for ids, both in zip(encode(prompts), encode(whole), strict=True)],
                 padding_value=-100)
    model = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        model(read, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder, max_shard_size="40KB")


def ask(run_dir: Path) -> None:
    """`flm eval` with small batches; in a process of its own, too."""
    with patch.object(vqa, "PASSES", 6), patch.object(vqa, "BATCH", vqa.BATCH.replace(images=8)), \
            patch.object(vqa, "OPTIM", vqa.OPTIM.replace(lr=3e-3)):
        evaluate(run_dir, task="vqa", split="test")


def test_the_bridge_learns_to_let_the_language_model_answer(write_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = write_run("run")
    ask(run_dir)
    result = json.loads((run_dir / "evals/vqa.json").read_text())
    rows = {row["start"]: row for row in result["rows"]}
    assert list(rows) == ["zero-shot", "zero-shot, no picture", "pretrained", "pretrained, another picture", "random"]
    assert result["num_questions"] == 48
    assert result["floor"]["other"] == pytest.approx(1 / 3), "three colours, equally frequent"
    assert 0 < rows["zero-shot"]["other"] < 0.5, "it guesses a colour"
    assert min(rows["pretrained"]["other"], rows["random"]["other"]) > 0.9, "colours cannot be told without looking"
    assert rows["pretrained, another picture"]["other"] < 0.1, "that picture has another colour"
    printed = capsys.readouterr().out
    assert all(start in printed for start in rows)


@pytest.mark.slow
def test_two_processes_say_what_one_says(write_run: Callable[..., Path], tmp_path: Path) -> None:
    """Answers before and after fine-tuning in bf16, and captions; likelihoods to rounding."""
    found = []
    for name in ("alone", "both"):
        run_dir = write_run(name, precision="bf16")
        if name == "alone":
            ask_and_caption(run_dir)
        else:
            with Launch(ask_and_caption, run_dir, processes=2, folder=tmp_path) as launch:
                assert launch.wait(200) == [0, 0], launch.said()
            assert "zero-shot" in (tmp_path / "rank_0.out").read_text()
            assert "zero-shot" not in (tmp_path / "rank_1.out").read_text()
        answered, captioned = (json.loads((run_dir / f"evals/{task}.json").read_text()) for task in ("vqa", "caption"))
        likelihoods = [row.pop("log_likelihood") for row in captioned["controls"].values()]
        found.append(([row["overall"] for row in answered["rows"]], captioned, likelihoods))
    assert found[0][:2] == found[1][:2]
    assert found[0][2] == pytest.approx(found[1][2], abs=1e-2)


def ask_and_caption(run_dir: Path) -> None:
    ask(run_dir)
    evaluate(run_dir, task="caption", split="test")


def test_an_answer_ends_at_a_line_break_and_counts_but_for_its_dress(language_model: Path) -> None:
    tokenizer = LmTokenizer(language_model)
    assert line_breaks(tokenizer), "a byte, where the vocabulary has no piece for it"
    assert all(tokenizer.pieces([token]) == ["\n"] for token in line_breaks(tokenizer))
    assert normal(" The Red one. ") == "red 1"
    assert score_answers(["Yes.", "a red", "three", "blue"], ["yes", "Red", "3", "green"]) == {
        "overall": 0.75, "yes_no": 1.0, "other": pytest.approx(2 / 3)}


def test_training_reads_what_is_asked_and_predicts_the_answer(dataset: Dataset, language_model: Path) -> None:
    """What stands in front of the answer in training is the prompt of the scoring, to the token."""
    index, tokenizer = dataset.index("test"), LmTokenizer(language_model)
    encoded = [ids for several in encode_questions(index, tokenizer).token_ids for ids in several]
    for ids, asked in zip(encoded, ask_questions(index, tokenizer), strict=True):
        assert ids[:ids[-1]].tolist() == asked.prompt_ids
        assert tokenizer.decode(ids[ids[-1]:-1]).strip() == asked.answer
        assert ids[-2] == tokenizer.eos_id


def test_answers_do_not_depend_on_the_questions_around(write_run: Callable[..., Path]) -> None:
    """Several of one picture, of unlike lengths, in any order."""
    trained = open_run(write_run("run"))
    processes, index = start_processes(trained.run.parallel), trained.dataset.index("test")
    model, asked = trained.model(processes), ask_questions(index, trained.tokenizer)[:9]
    pictures = [question.image for question in asked]
    backwards = list(reversed(range(9)))

    def say(numbers: list[int]) -> list[list[int]]:
        return say_answers(trained.run, model, [asked[number] for number in numbers], [pictures[number] for number in numbers], index=index,
                           end_ids=[END], processes=processes)

    together = say(backwards)
    assert together == [ids for number in backwards for ids in say([number])]
    assert len({len(question.prompt_ids) for question in asked}) > 1


def test_a_question_that_does_not_fit_is_one_line(write_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MAX_ANSWER_TOKENS", 90)
    with pytest.raises(DataError, match=r"squares: a question with its answer has \d+ tokens, and behind 3 tokens of a picture .* for 93; leave"):
        evaluate(write_run("run"), task="vqa", split="test")
