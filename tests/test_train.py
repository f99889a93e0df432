"""`flm train` end to end, on real shards: the files it leaves, the launchers, bad input."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flm_scale.checkpoint.store import last_good
from flm_scale.checkpoint.weights import load_weights, read_run
from flm_scale.cli import main
from flm_scale.data.shards import Dataset
from flm_scale.model.assemble import build_model
from flm_scale.objectives.objective import build_objective
from tests.conftest import write_toy

ROOT = Path(__file__).parents[1]
TINY = ["--text.vocab-size", "200", "--steps", "6", "--log.validate-every-steps", "3"]


def train(dataset: Path, run_dir: Path, *more: str, recipe: str = "debug") -> int:
    return main(["train", recipe, "--data.path", str(dataset), "--run-dir", str(run_dir), *TINY, *more])


def lines_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(toy_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "first"
    assert train(toy_dataset.folder, run_dir) == 0
    return run_dir


def test_a_run_leaves_its_config_metrics_weights_and_a_board(trained: Path, toy_dataset: Dataset) -> None:
    run = read_run(trained)
    assert run.data.manifest_hash == toy_dataset.root
    assert run.data.tokenizer_hash == toy_dataset.tokenizer_fingerprint
    steps = [line for line in lines_of(trained) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert {"loss/reconstruction", "loss/forward", "loss/reverse", "loss/eos", "accuracy/reconstruction", "grad_norm", "lr", "pairs_per_s",
            "tokens_per_s", "mfu", "data_wait_s", "seconds"} <= steps[0].keys()
    assert [line["step"] for line in lines_of(trained) if "validation/loss" in line] == [3, 6]
    assert list((trained / "tensorboard").glob("events*"))
    model = build_model(run, build_objective(run.objective, mask_id=4))
    load_weights(model.layers, last_good(trained, full=True))


def test_the_same_seed_gives_the_same_losses_and_another_seed_does_not(trained: Path, toy_dataset: Dataset, tmp_path: Path) -> None:
    train(toy_dataset.folder, tmp_path / "again")
    train(toy_dataset.folder, tmp_path / "other", "--seed", "1")
    first, again, other = ([line["loss"] for line in lines_of(run_dir) if "loss" in line]
                           for run_dir in (trained, tmp_path / "again", tmp_path / "other"))
    assert first == again
    assert first != other


def test_a_finished_run_is_not_overwritten_unless_told(trained: Path, toy_dataset: Dataset, tmp_path: Path,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = shutil.copytree(trained, tmp_path / "copy")
    before = (run_dir / "metrics.jsonl").read_bytes()
    assert train(toy_dataset.folder, run_dir) == 2
    assert "add --resume to go on with it, --overwrite to replace it" in capsys.readouterr().err
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    assert train(toy_dataset.folder, run_dir, "--overwrite") == 0


@pytest.mark.parametrize(("damage", "message"), [
    ("truncated tar", r"00000.tar.*bytes"),
    ("altered manifest", r"dataset.json.*(hash|root)"),
    ("altered index", r"index/train/00000.arrow"),
    ("no token ids", r"flm tokenizer encode"),
    ("another tokenizer", r"tokenizer"),
    ("no tokenizer", r"tokenizer"),
])
def test_a_damaged_dataset_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, message: str) -> None:
    folder = write_toy(tmp_path / "data").folder
    tar, manifest, tokenizer = folder / "train" / "00000.tar", folder / "dataset.json", folder / "tokenizer.model"
    match damage:
        case "truncated tar":
            tar.write_bytes(tar.read_bytes()[:-5000])
        case "altered manifest":
            manifest.write_text(manifest.read_text().replace('"toy"', '"tou"'))
        case "altered index":
            index = folder / "index" / "train" / "00000.arrow"
            content = bytearray(index.read_bytes())
            content[100] ^= 1
            index.write_bytes(content)
        case "no token ids":
            shutil.rmtree(folder / "tokens")
        case "another tokenizer":
            shutil.copy(write_toy_tokenizer(tmp_path), tokenizer)
        case "no tokenizer":
            tokenizer.unlink()
    capsys.readouterr()
    assert train(folder, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def write_toy_tokenizer(folder: Path) -> Path:
    from flm_scale.data.tokens import train_tokenizer

    model_file = folder / "other.model"
    train_tokenizer(["quite another text", "than before"], vocab_size=40, model_file=model_file)
    return model_file


def test_a_dataset_or_tokenizer_that_the_run_did_not_pin_is_refused(toy_dataset: Dataset, tmp_path: Path,
                                                                   capsys: pytest.CaptureFixture[str]) -> None:
    assert train(toy_dataset.folder, tmp_path / "run", "--data.manifest-hash", "0123") == 2
    assert "0123" in capsys.readouterr().err
    assert train(toy_dataset.folder, tmp_path / "run", "--data.tokenizer-hash", "4567") == 2
    assert "4567" in capsys.readouterr().err


def test_a_validation_split_that_is_not_there_is_refused_before_training(toy_dataset: Dataset, tmp_path: Path,
                                                                        capsys: pytest.CaptureFixture[str]) -> None:
    assert train(toy_dataset.folder, tmp_path / "run", "--log.validation-split", "vall") == 2
    assert "vall" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_below_the_tokenizers_is_refused_with_the_remedy(toy_dataset: Dataset, tmp_path: Path,
                                                                     capsys: pytest.CaptureFixture[str]) -> None:
    assert train(toy_dataset.folder, tmp_path / "run", "--text.vocab-size", "20") == 2
    assert re.search(r"text.vocab_size \(20\) must be at least the tokenizer's \d+; add --text.vocab-size \d+", capsys.readouterr().err)


def test_unreadable_pictures_are_skipped_counted_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_toy(tmp_path / "data", bad=frozenset({3, 17})).folder
    assert train(folder, tmp_path / "run") == 0
    error = capsys.readouterr().err
    assert "not readable" in error
    assert "000003" in error
    assert [line for line in lines_of(tmp_path / "run") if "loss" in line][-1]["bad_images"] >= 2


def test_too_many_unreadable_pictures_stop_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_toy(tmp_path / "data", bad=frozenset(range(60))).folder
    assert train(folder, tmp_path / "run", "--data.max-bad-share", "0.01") == 2
    assert "more than data.max_bad_share (0.01)" in capsys.readouterr().err


def test_the_samples_of_a_step_are_told_without_training(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "order", str(trained), "--step", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == read_run(trained).batch.micro_batches
    assert all(re.fullmatch(r"micro-batch \d: (\d{6} ?)+", line) for line in lines)


LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    "torchrun, four processes": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"],
    "deepspeed": [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus=2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_any_launcher_and_a_cut_model_give_the_losses_of_one_process(launcher: str, trained: Path, toy_dataset: Dataset, tmp_path: Path) -> None:
    arguments = ["train", "debug", "--data.path", str(toy_dataset.folder), "--run-dir", str(tmp_path / "run"), *TINY,
                 "--parallel.engine", "deepspeed"]
    if launcher == "torchrun, four processes":
        arguments += ["--parallel.tensor", "2", "--parallel.pipe", "2"]
    start = ["--module" if launcher == "deepspeed" else "-m", "flm_scale"]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run([*LAUNCHERS[launcher], *start, *arguments], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    one, two = ([line["loss"] for line in lines_of(run_dir) if "loss" in line] for run_dir in (trained, tmp_path / "run"))
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_several_processes_on_the_local_engine_are_refused(toy_dataset: Dataset, tmp_path: Path) -> None:
    command = [*LAUNCHERS["torchrun"], "-m", "flm_scale", "train", "debug", "--data.path", str(toy_dataset.folder),
               "--run-dir", str(tmp_path / "run"), *TINY]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    assert "parallel.engine 'local' is one process, but the launcher started 2; add --parallel.engine deepspeed" in done.stderr
