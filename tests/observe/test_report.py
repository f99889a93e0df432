"""The page of a run: self-contained, complete where there is something, silent where there is not."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from flm_scale.config import ArConfig, FlmConfig, Run
from flm_scale.errors import ConfigError, DataError
from flm_scale.observe.report import readable, smoothed, write_report

PICTURE = b"\x89PNG not decoded by anyone here"
TOKENS = [{"piece": "▁cat", "hidden": ["▁a"], "predicted": "▁dog", "probability": 0.25, "correct": False},
          {"piece": "s", "hidden": [], "predicted": "s", "probability": 0.98, "correct": True}]
VQA: dict[str, Any] = {
    "task": "vqa", "num_questions": 9673, "floor": {"overall": 0.671, "yes_no": 0.825, "other": 0.233},
    "rows": [{"start": "pretrained", "overall": 0.941, "yes_no": 0.968, "other": 0.862, "by_pass": [0.8, 0.941], "passes": 2, "seconds": 61.0},
             {"start": "random", "overall": 0.713, "yes_no": 0.84, "other": 0.341, "by_pass": [0.65, 0.713], "passes": 2, "seconds": 60.0}]}


def write(path: Path, content: object) -> None:
    """Write JSON, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Return a folder with run.json alone."""
    (tmp_path / "run.json").write_text(Run(name="my first run", objective=FlmConfig()).model_dump_json())
    return tmp_path


def write_metrics(run_dir: Path, *, num_steps: int) -> None:
    """Write plausible lines, one of them with a loss that was not a number."""
    lines: list[dict[str, Any]] = [{"step": 0, "parameters": 4.31e6}]
    for step in range(1, num_steps + 1):
        lines += [{"step": step, "loss": 5 / step, "loss/reconstruction": None if step == 3 else 6 / step,
                   "accuracy/reconstruction": 1 - 1 / step, "grad_norm": 2.0, "lr": 1e-3, "pairs_per_s": 212.0,
                   "tokens_per_s": 1530.0, "mfu": 0.425, "data_wait_s": 0.1, "seconds": 1.0, "time/data_wait": 0.1, "time/compute": 0.9}]
    lines.append({"step": num_steps, "validation/loss": 0.7, "validation/loss/reconstruction": 0.77,
                  "validation/accuracy/reconstruction": 0.893})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_everything(run_dir: Path) -> None:
    """Write all that a report can show."""
    write_metrics(run_dir, num_steps=30)
    write(run_dir / "evals/vqa.json", VQA)
    write(run_dir / "evals/caption.json", {"split": "val", "num_images": 500, "greedy": {"CIDEr": 3.214, "BLEU-4": 0.612},
                                           "beam": {"CIDEr": 3.377, "BLEU-4": 0.64}})
    write(run_dir / "evals/retrieval.json", {"split": "val", "num_images": 500, "num_texts": 2500, "score": "likelihood",
                                             "image_to_text": {"R@1": 0.421}, "text_to_image": {"R@1": 0.363}})
    write(run_dir / "samples/samples.json", [{"image": "samples/000.png", "key": "k0", "truth": "two <script>alert(1)</script> cats",
                                              "greedy": "two dogs", "beam": "one dog", "tokens": TOKENS}])
    (run_dir / "samples/000.png").write_bytes(PICTURE)


class Reader(HTMLParser):
    """Collects what a browser would show and what it would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self._hidden = "", False
        self.links: list[str] = []
        self.open_tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag and what it refers to."""
        self.links += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href", "srcset", "data", "action"}]
        self._hidden = tag in {"style", "title"}
        self.open_tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Text after a style sheet is text again."""
        self._hidden = False

    def handle_data(self, data: str) -> None:
        """Collect text."""
        self.text += "" if self._hidden else f" {data}"


def read(run_dir: Path) -> Reader:
    """Write the report and read it."""
    reader = Reader(write_report(run_dir).read_text())
    reader.text = re.sub(r"\s+", " ", reader.text)
    return reader


def test_the_page_fetches_nothing(run_dir: Path) -> None:
    """It opens from disk, offline, in ten years: pictures are inside, links stay inside, nothing runs."""
    write_everything(run_dir)
    reader = read(run_dir)
    assert f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}" in reader.links
    assert [link[:30] for link in reader.links if not link.startswith(("#", "data:"))] == []
    page = (run_dir / "report.html").read_text()
    assert not re.search(r"@import|url\((?!#)|<script|<link", page)
    assert set(re.findall(r"https?://[\w./]+", page)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_text_from_the_data_is_shown_and_never_interpreted(run_dir: Path) -> None:
    """Captions come from the web."""
    write_everything(run_dir)
    assert "two <script>alert(1)</script> cats" in read(run_dir).text


def test_a_whole_run_shows_all_its_numbers(run_dir: Path) -> None:
    """Header, headline, curves, what was said of a picture, and the three tables."""
    write_everything(run_dir)
    reader = read(run_dir)
    for shown in ("my first run", "Free Language Modeling reads each caption once", "4.3 million", "flm train my first run --run-dir",
                  "89.3% accuracy, reconstruction validation, step 30", "212 pairs a second", "42.5% of peak FLOPs",
                  "0:30 training time 10.0% of it waiting for data", "321.4", "64.0", "42.1", "36.3", "data wait 10.0%",
                  "reconstruction 0.2 validation 0.77", "greedy two dogs beam one dog"):
        assert shown in reader.text
    assert reader.open_tags.count("svg") == 8, "loss, accuracy, rate, gradient, throughput, utilisation, time, VQA by pass"


def test_the_floor_stands_in_the_same_table_as_the_scores(run_dir: Path) -> None:
    """A VQA score says nothing without what one gets for not looking."""
    write(run_dir / "evals/vqa.json", VQA)
    table = read(run_dir).text.partition("Start overall")[2]
    assert table.startswith(" yes / no other pretrained 2 passes, 61 s 94.1 96.8 86.2 random 2 passes, 60 s 71.3 84.0 34.1 floor 67.1 82.5 23.3")


def test_each_token_says_what_was_hidden_with_it_what_was_predicted_and_how_sure(run_dir: Path) -> None:
    """Right and wrong are signs, not colours alone."""
    write_everything(run_dir)
    table = read(run_dir).text.partition("How sure")[2]
    assert table.startswith(" cat a ✗ dog 25 % -s nothing ✓ -s 98 %")


@pytest.mark.parametrize("num_steps", [0, 1, 2, 1000])
def test_what_is_missing_is_left_out(run_dir: Path, num_steps: int) -> None:
    """A run that has just started, a run without evaluations, a sample whose picture is gone."""
    if num_steps:
        write_metrics(run_dir, num_steps=num_steps)
    write(run_dir / "samples/samples.json", [{"image": "samples/gone.png", "key": "k0", "truth": "a cat", "greedy": "a dog"}])
    reader = read(run_dir)
    assert reader.open_tags.count("svg") == (7 if num_steps > 1 else 0)
    assert "Scores" not in reader.text
    assert "img" not in reader.open_tags
    assert "beam" not in reader.text
    assert ("pairs a second" in reader.text) == (num_steps > 0)


def test_the_same_run_gives_the_same_page(run_dir: Path) -> None:
    """A report under version control changes only when the run does; no id stands in it twice with another meaning."""
    write_everything(run_dir)
    page = write_report(run_dir).read_text()
    assert write_report(run_dir).read_text() == page
    ids = re.findall(r'<(?:clipPath|g|path)[^>]* id="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 0


def test_charts_follow_the_colours_of_the_page(run_dir: Path) -> None:
    """A dark page has light curves: no colour of matplotlib's own is left in a picture."""
    write_everything(run_dir)
    pictures = re.findall(r"<svg.*?</svg>", write_report(run_dir).read_text(), flags=re.DOTALL)
    assert all("var(--quiet)" in picture for picture in pictures)
    assert {color for picture in pictures for color in re.findall(r"#[0-9a-f]{6}\b", picture)} == set()


def test_other_objectives_are_explained_as_what_they_are(run_dir: Path) -> None:
    """A baseline's report does not call it FLM."""
    (run_dir / "run.json").write_text(Run(name="baseline", objective=ArConfig()).model_dump_json())
    assert "Autoregressive language modelling predicts" in read(run_dir).text


def test_a_folder_without_a_run_is_refused_with_the_remedy(tmp_path: Path) -> None:
    """Whether it does not exist or holds something else."""
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"has no run\.json; name the folder of a run"):
            write_report(folder)


def test_damaged_files_are_named(run_dir: Path) -> None:
    """One line each, with the file and what to do."""
    (run_dir / "evals").mkdir()
    (run_dir / "evals/vqa.json").write_text('{"rows": [')
    with pytest.raises(DataError, match=r"vqa\.json is not JSON.*flm eval"):
        write_report(run_dir)
    (run_dir / "run.json").write_text('{"name": "x", "nmae": 1}')
    with pytest.raises(ConfigError, match="nmae"):
        write_report(run_dir)
    (run_dir / "run.json").write_text('{"name": ')
    with pytest.raises(DataError, match=r"run\.json is not JSON; restore it"):
        write_report(run_dir)


def test_smoothing_keeps_ends_and_straight_lines() -> None:
    """A curve that lags behind its noise tells the wrong story of the first steps."""
    line = [float(i) for i in range(300)]
    assert smoothed(line) == pytest.approx(line)
    noisy = [value + (-1) ** i for i, value in enumerate(line)]
    assert abs(smoothed(noisy)[150] - 150) < 0.1


def test_tokens_are_written_as_one_reads_them() -> None:
    """Words without sentencepiece's mark, continuations with a hyphen, punctuation as it is."""
    assert [readable(piece) for piece in ("▁dog", "s", ".", "▁")] == ["dog", "-s", ".", "␣"]
