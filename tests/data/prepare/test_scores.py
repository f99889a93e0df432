"""Scores in a preparation: those of `flm data score`, made once, by workers that may die, and a minimum that drops what is below."""

import hashlib
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from flm_scale import cli_data
from flm_scale.cli import main
from flm_scale.data.manifest import Shard
from flm_scale.data.prepare.finish import finish
from flm_scale.data.prepare.inputs import Input, open_inputs
from flm_scale.data.prepare.ledger import read_ledger
from flm_scale.data.prepare.rewrite import settle
from flm_scale.data.prepare.scores import Scorer, is_scored, score_shard
from flm_scale.data.prepare.spec import InputConfig, ScoreConfig, Spec
from flm_scale.data.prepare.stages import plan_work, prepare_shard
from flm_scale.data.prepare.status import read_status
from flm_scale.data.shards import Dataset, open_dataset, read_committed_shard
from flm_scale.data.sidecars import TokenIds
from flm_scale.data.tokens import Tokenizer, train_tokenizer
from flm_scale.data.verify import verify
from flm_scale.score import score
from tests.data.prepare.pictures import picture
from tests.data.prepare.test_finish import killed_before_change
from tests.tiny_clip import BATCH_SECONDS, NAME, TINY, TinyScorer, tiny_scorer, write_weights

ROOT = Path(__file__).parents[3]
ROWS, SHARD = 24, 6
COPY, ASKED = 13, 8  # a picture like the one before it, and one with questions alone


@pytest.fixture(autouse=True)
def known_to_open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, NAME, TINY)


@pytest.fixture(scope="module")
def weight_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        import open_clip

        patch.setitem(open_clip.factory._MODEL_CONFIGS, NAME, TINY)
        return write_weights(tmp_path_factory.mktemp("weights") / "weights.pt", seed=0)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a metadata.jsonl: one or two captions each, one picture with a question and none."""
    return draw(tmp_path_factory.mktemp("pictures"), range(ROWS))


def draw(folder: Path, numbers: Iterable[int]) -> Path:
    lines = []
    for number in numbers:
        name, shown = f"{number:02d}.jpg", number - (number == COPY)
        (folder / name).write_bytes(picture(shown, width=48 + shown, height=64))
        captions = [] if number == ASKED else [f"picture {number}", f"the {number}th"][:1 + number % 2]
        asked = {"questions": ["what is it?"], "answers": ["a picture"]} if number == ASKED else {}
        lines.append(json.dumps({"file_name": name, "captions": captions, **asked}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def spec_of(weight_file: Path | None, **changes: Any) -> Spec:
    minimum = changes.pop("minimum", None)
    weights = ScoreConfig(model=NAME, pretrained=str(weight_file), minimum=minimum, batch=4) if weight_file else ScoreConfig()
    return Spec(samples_per_shard=SHARD, input=InputConfig(kind="folder"), score=weights).replace(**changes)


def prepared(folder: Path, spec: Spec, inputs: list[Input], *, scorer: Scorer | None = None) -> Dataset:
    """What is not done yet, as a driver would do it."""
    settle(folder)
    for work in plan_work(spec, inputs):
        if read_committed_shard(folder, work.name) is None:
            prepare_shard(folder, spec, inputs, work, attempt=0)
        if spec.score.pretrained:
            score_shard(folder, spec.score.minimum, scorer or scorer_of(spec.score), work, attempt=0, skip=(), beat=lambda _row, _stage: None)
    shards = [read_committed_shard(folder, work.name) for work in plan_work(spec, inputs)]
    finish(folder, spec, inputs, [shard for shard in shards if shard])
    return open_dataset(folder)


@cache
def scorer_of(config: ScoreConfig) -> Scorer:
    """As it arrives in a worker."""
    return pickle.loads(pickle.dumps(TinyScorer(config, "cpu")))  # type: ignore[no-any-return]


def scores_of(dataset: Dataset, *splits: str) -> list[float]:
    index = dataset.index(*splits)
    return [index.values(number, ["clip_score"])[0] for number in range(len(index))]


def rows_of(dataset: Dataset) -> list[dict[str, Any]]:
    return [row for shard in dataset.shards() for row in parquet.read_table(dataset.folder / shard.table_name).to_pylist()]


@pytest.fixture(scope="module")
def paths(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of two splits, with a picture in both."""
    return [pictures, Path(f"val={draw(tmp_path_factory.mktemp('val'), [3, *range(30, 35)])}")]


@pytest.fixture(scope="module")
def whole(paths: list[Path], weight_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Scored, and nothing dropped but copies."""
    spec = spec_of(weight_file)
    return prepared(tmp_path_factory.mktemp("whole") / "data", spec, open_inputs(spec, paths))


def test_scores_are_those_of_flm_data_score_and_tars_are_as_without(whole: Dataset, paths: list[Path], weight_file: Path, tmp_path: Path) -> None:
    plain = prepared(tmp_path / "plain", spec_of(None), open_inputs(spec_of(None), paths))
    apart = score(plain, tmp_path / "apart", model=NAME, pretrained=str(weight_file), device="cpu")
    assert scores_of(whole, "train", "val") == pytest.approx(scores_of(apart, "train", "val"), abs=1e-6, nan_ok=True)
    assert np.nanstd(scores_of(whole)) > 1e-3
    assert [shard.sha256 for shard in whole.shards()] == [shard.sha256 for shard in plain.shards()]
    kept = [row for row in rows_of(whole) if row["status"] == "success"]
    assert [row["clip_score"] for row in kept] == pytest.approx(scores_of(whole, "train", "val"), nan_ok=True, abs=0)
    assert math.isnan(kept[ASKED]["clip_score"])  # nothing to score
    assert [row["clip_score"] is None for row in rows_of(whole)] == [False] * (ROWS + 6)  # copies were scored before they went
    assert whole.manifest.preparation.fates == {"duplicate": 2, "success": ROWS + 6 - 2}
    assert not verify(whole)
    assert whole.manifest.preparation.spec["score"] == {"model": NAME, "pretrained": hashed(weight_file), "minimum": None, "batch": 4}
    assert "open_clip_torch" in whole.manifest.preparation.versions
    assert "score" not in plain.manifest.preparation.spec


def hashed(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_minimum_drops_exactly_what_is_below_and_leaves_pictures_without_a_caption(whole: Dataset, pictures: Path, weight_file: Path,
                                                                                   tmp_path: Path) -> None:
    found = scores_of(whole, "train")
    minimum = sorted(score for score in found if not math.isnan(score))[10]
    spec = spec_of(weight_file, minimum=minimum)
    dataset = prepared(tmp_path, spec, open_inputs(spec, [pictures]))
    expected = [(key, score) for key, score in zip(whole.index("train").keys, found, strict=True) if math.isnan(score) or score >= minimum]
    assert 5 < len(expected) < ROWS - 5
    assert list(dataset.index("train").keys) == [key for key, _ in expected]
    assert scores_of(dataset) == pytest.approx([score for _, score in expected], nan_ok=True, abs=0)
    gone = [row for row in rows_of(dataset) if row["error_message"] == "clip_score"]
    assert {row["status"] for row in gone} == {"filtered"}
    assert all(row["clip_score"] < minimum for row in gone)
    assert dataset.manifest.preparation.fates == {"clip_score": len(gone), "success": len(expected),
                                                  **({"duplicate": 1} if len(gone) + len(expected) < ROWS else {})}
    assert not verify(dataset)
    images = {key: whole.index("train").read_image(number) for number, key in enumerate(whole.index("train").keys)}
    assert [dataset.index("train").read_image(number) for number in range(len(expected))] == [images[key] for key, _ in expected]


def given_scores(folder: Path, shard: Shard, numbers: Sequence[int]) -> Iterator[np.ndarray]:
    """0.1 as float32, then nothing that is a number, then a little less than 0.1, and so on; in twos."""
    of = np.array([0.1, math.nan, np.nextafter(np.float32(0.1), np.float32(0))], np.float32)
    for first in range(0, len(numbers), 2):
        yield of[np.array(numbers[first:first + 2]) % 3]


def test_the_minimum_compares_as_float32_and_what_cannot_be_scored_goes(pictures: Path, weight_file: Path, tmp_path: Path) -> None:
    spec = spec_of(weight_file, minimum=0.1)
    dataset = prepared(tmp_path, spec, open_inputs(spec, [pictures]), scorer=given_scores)
    stays = [number for number in range(ROWS) if number % SHARD % 3 == 0 or number == ASKED]
    assert list(dataset.index("train").keys) == [f"{number // SHARD * 10 + number % SHARD:06d}" for number in stays]


@pytest.mark.slow
def test_a_shard_killed_at_any_change_of_the_disk_while_it_is_scored_comes_to_the_same(pictures: Path, weight_file: Path, tmp_path: Path) -> None:
    spec = spec_of(weight_file, minimum=0.1)
    inputs = open_inputs(spec, [pictures])
    work, before = plan_work(spec, inputs)[1], tmp_path / "before"
    prepare_shard(before, spec, inputs, work, attempt=0)

    def scored(folder: Path) -> None:
        score_shard(folder, spec.score.minimum, given_scores, work, attempt=1, skip=(), beat=lambda _row, _stage: None)

    scored(shutil.copytree(before, tmp_path / "undisturbed"))
    wanted = read_committed_shard(tmp_path / "undisturbed", work.name)
    assert wanted
    number, is_killed = 0, True
    while is_killed:
        folder = shutil.copytree(before, tmp_path / str(number))
        is_killed = killed_before_change(number, lambda: scored(folder))  # noqa: B023 - called at once
        scored(folder)
        assert read_committed_shard(folder, work.name) == wanted
        assert is_scored(folder, wanted)
        number += 1
    assert number > 10


def test_adopted_tars_are_scored_and_stay_where_they_are(whole: Dataset, weight_file: Path, tmp_path: Path) -> None:
    spec = spec_of(weight_file).replace(samples_per_shard=10_000, input=InputConfig(kind="shards", adopt=True))
    inputs = open_inputs(spec, [whole.folder / "train"])
    every = scores_of(prepared(tmp_path / "all", spec, inputs))
    assert every == pytest.approx(scores_of(whole, "train"), nan_ok=True, abs=0)
    minimum = sorted(score for score in every if not math.isnan(score))[12]
    good = prepared(tmp_path / "good", spec.replace(score=spec.score.replace(minimum=minimum)), inputs)
    assert scores_of(good) == pytest.approx([score for score in every if math.isnan(score) or score >= minimum], nan_ok=True, abs=0)
    assert all((good.folder / shard.name).samefile(whole.folder / shard.name) for shard in good.shards())
    assert not verify(good)
    assert good.manifest.preparation.versions.keys() >= {"pillow", "open_clip_torch"}


def listed(folder: Path, *, missing: Iterable[int]) -> Path:
    """A table of the pictures, which are in a folder beside it but for some."""
    (folder / "images").mkdir()
    for number in set(range(ROWS)) - {*missing}:
        (folder / "images" / f"{number:02d}.jpg").write_bytes(picture(number, width=48 + number, height=64))
    table = folder / "table.csv"
    table.write_text("url,caption\n" + "".join(f"{number:02d}.jpg,picture {number}\n" for number in range(ROWS)))
    return table


@pytest.mark.parametrize("minimum", [None, 0.0])
def test_a_retry_scores_what_is_new_and_comes_to_what_one_run_would(pictures: Path, weight_file: Path, tmp_path: Path,
                                                                    minimum: float | None) -> None:
    late = [2, 3, 10, *range(18, 24)]  # all of the last shard
    table = listed(tmp_path, missing=late)
    model = tmp_path / "words.model"
    train_tokenizer([f"picture {number}" for number in range(40)], vocab_size=60, model_file=model)
    spec = spec_of(weight_file, minimum=minimum, input=InputConfig(images=tmp_path / "images"), tokenizer=model)
    inputs, folder = open_inputs(spec, [table]), tmp_path / "data"
    before, real, asked = prepared(folder, spec, inputs), scorer_of(spec.score), list[tuple[str, list[int]]]()
    assert before.manifest.preparation.fates["missing"] == len(late)
    assert "clip_score" in parquet.read_schema(folder / before.shards()[3].table_name).names  # of an empty shard too
    for number in late:
        shutil.copy(pictures / f"{number:02d}.jpg", tmp_path / "images")

    def noting(folder: Path, shard: Shard, numbers: Sequence[int]) -> Any:
        asked.append((shard.name, list(numbers)))
        return real(folder, shard, numbers)

    for work in plan_work(spec, inputs):
        prepare_shard(folder, spec, inputs, work, attempt=1, retry={"missing"})
        shard = read_committed_shard(folder, work.name)
        assert shard
        assert not is_scored(folder, shard)
    after = prepared(folder, spec, inputs, scorer=noting)
    assert after.root == prepared(tmp_path / "undisturbed", spec, inputs).root
    assert sum(len(numbers) for _, numbers in asked) == len(late)
    assert len(TokenIds(after, "train", Tokenizer(model)).lengths) == len(after.index("train"))
    assert not verify(after)


def values(given: Path, weight_file: Path, *more: str) -> list[str]:
    kind = ("--input.kind", "folder") if given.is_dir() else ("--input.images", str(given.with_name("images")))
    return [*kind, "--input", str(given), "--samples-per-shard", str(SHARD), "--score.model", NAME, "--score.pretrained", str(weight_file),
            "--score.batch", "4", *more]


def words(given: Path, folder: Path, weight_file: Path, *more: str) -> list[str]:
    return ["data", "prepare", "--output", str(folder), *values(given, weight_file, *more)]


def test_what_is_wrong_with_the_model_is_said_before_the_folder_remembers_it(pictures: Path, weight_file: Path, tmp_path: Path,
                                                                            capsys: pytest.CaptureFixture[str]) -> None:
    for options, problem in [(["--score.pretrained", "wieghts.pt"], "--score.pretrained ('wieghts.pt') is neither a file nor a tag of tiny"),
                             (["--score.model", "ViT-B-3"], "--score.model: open_clip has no model 'ViT-B-3'; did you mean 'ViT-B-32'?"),
                             (["--score.model", "ViT-B-32"], "does not load into ViT-B-32")]:
        assert main(words(pictures, tmp_path / "data", weight_file, *options)) == 2
        message = capsys.readouterr().err
        assert problem in message
        assert message.strip().count("\n") == 0
    assert not (tmp_path / "data").exists()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two CPUs, and a GPU that Ray believes in."""
    import ray

    ray.init("local", num_cpus=2, num_gpus=1, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def tiny_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_data, "_scorer", tiny_scorer)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster", "tiny_workers")
def test_the_fleet_scores_each_shard_once_whatever_is_killed_retried_or_repaired(pictures: Path, weight_file: Path, tmp_path: Path,
                                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    """The driver of one worker is killed while it scores; two workers go on, fetch what was missing, and make again what is damaged."""
    table, folder, on_cpus = listed(tmp_path, missing=[20]), tmp_path / "data", ("--gpu-workers", "0")
    command = [sys.executable, "-c", "from tests.tiny_clip import flm; flm()", *words(table, folder, weight_file, *on_cpus, "--workers", "1")]
    environ = os.environ | {BATCH_SECONDS: "1.5", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True)
    while not scored_shards(folder) or read_status(folder).state != "scoring":
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.kill()
    process.communicate()
    scored = {name: (folder / name).stat().st_mtime_ns for name in scored_shards(folder)}
    assert 1 <= len(scored) < 4
    assert main(words(table, folder, weight_file, *on_cpus, "--workers", "2")) == 0
    assert f"{4 - len(scored)} of 4 shards are scored, on cpu" in capsys.readouterr().err
    assert {name: (folder / name).stat().st_mtime_ns for name in scored} == scored
    status = read_status(folder)
    assert (status.state, status.rows_done, status.kept, status.stage_seconds.keys()) == ("done", ROWS, ROWS - 1, {"score"})

    spec = spec_of(weight_file, input=InputConfig(images=tmp_path / "images"))
    inputs = open_inputs(spec, [table])
    assert open_dataset(folder).root == prepared(tmp_path / "undisturbed", spec, inputs).root
    shutil.copy(pictures / "20.jpg", tmp_path / "images")
    assert main(["data", "retry", str(folder), "--failed", *on_cpus]) == 0
    whole = prepared(tmp_path / "whole", spec, inputs)
    assert open_dataset(folder).root == whole.root
    (folder / "index/train/00001.arrow").unlink()
    assert main(["data", "repair", str(folder), *on_cpus]) == 0
    assert capsys.readouterr().err.count("1 of 4 shards are scored, on cpu") == 2
    assert open_dataset(folder).root == whole.root

    other = write_weights(tmp_path / "other.pt", seed=1)
    assert main(words(table, folder, other)) == 2
    assert f'another spec: score.pretrained was "{hashed(weight_file)}", is "{hashed(other)}"' in capsys.readouterr().err
    assert main(words(table, folder, weight_file, "--score.minimum", "0.2")) == 2
    assert "score.minimum was null, is 0.2" in capsys.readouterr().err


def scored_shards(folder: Path) -> list[str]:
    """By the ledger."""
    return [line["shard"] for line in read_ledger(folder) if line["event"] == "committed" and "score" in line["report"]["seconds"]]


@pytest.mark.slow
@pytest.mark.usefixtures("cluster", "tiny_workers")
def test_a_cluster_with_gpus_scores_on_them_alone(pictures: Path, weight_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    """Ray has a GPU to give and torch finds none: nobody scores on the CPU beside it in silence, and what was prepared is not lost."""
    folder = tmp_path / "data"
    assert main(words(pictures, folder, weight_file, "--workers", "1", "--labels", "role=!gpu")) == 2
    said = capsys.readouterr().err
    assert "4 of 4 shards are scored, on cuda" in said
    assert said.splitlines()[-1].startswith("flm: no worker starts: ")
    assert "has a GPU, and torch finds none there; install a torch that does, or score on CPUs: --gpu-workers 0" in said
    monkeypatch.setattr(cli_data, "_scorer", OnGivenGpu)
    assert main(words(pictures, folder, weight_file, "--workers", "1")) == 0
    assert "4 shards of 24 rows, 4 of them done" in capsys.readouterr().err
    spec = spec_of(weight_file)
    assert open_dataset(folder).root == prepared(tmp_path / "here", spec, open_inputs(spec, [pictures])).root
    monkeypatch.setattr(cli_data, "_scorer", tiny_scorer)
    capsys.readouterr()
    rows = [row["clip_score"] for row in rows_of(open_dataset(folder))]
    minimum = sorted(score for score in rows if not math.isnan(score))[10]
    assert main(["data", "plan", *values(pictures, weight_file, "--score.minimum", str(minimum), "--rows", "12")]) == 0
    kept = sum(math.isnan(score) or score >= minimum for score in rows[6:18])
    said = capsys.readouterr().out
    assert f"of 12 rows from the middle: kept {kept / 12:.1%}, clip_score {1 - kept / 12:.1%}" in said
    assert "rows/s each, scored on CPUs, duplicates not looked for" in said


class OnGivenGpu(TinyScorer):
    """It knows that Ray gave it the GPU, and scores on the CPU."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        assert (state["device"], os.environ["CUDA_VISIBLE_DEVICES"]) == ("cuda", "0")
        super().__setstate__(state | {"device": "cpu"})
