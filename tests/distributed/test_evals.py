"""Evaluation and generation on every layout against one process on the whole weights. One launch serves all checks but the command line's."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from flm_scale.checkpoint.publish import export
from flm_scale.config import ParallelConfig
from flm_scale.data.shards import Dataset
from flm_scale.data.tokens import Tokenizer
from flm_scale.engine.local import LocalEngine
from flm_scale.evals.show import caption_files
from flm_scale.model.assemble import build_model
from tests.distributed.eval_worker import LAYOUTS, answers, findings
from tests.distributed.launch import run_worker
from tests.evals.picture_set import picture_set
from tests.synthetic import objective_of, tiny_run, weights_of, write_weights
from tests.test_export import compare_logits

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
ENVIRON = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def write_run(run_dir: Path, dataset: Dataset, *, tied: bool) -> None:
    """A random model with opinions, so that pictures get captions of their own. 61 tokens cannot be halved, so tensor parallelism pads."""
    run = tiny_run(text=tiny_run().text.replace(tied=tied, vocab_size=61, max_length=24))
    run = run.replace(data=run.data.replace(path=dataset.folder, workers=0),
                      parallel=ParallelConfig(engine="deepspeed", vision="shard_batch" if tied else "replicated"))
    objective = objective_of(run)
    engine = LocalEngine(run, build_model(run, objective), objective)
    for name, parameter in engine.layers.named_parameters():
        if "image_attention" in name or name in {"text_entry.tokens.weight", "head.decoder.weight"}:
            parameter.data.mul_(4)
    run_dir.mkdir()
    (run_dir / "run.json").write_text(run.model_dump_json())
    write_weights(run_dir, weights_of(engine), run)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs on one dataset, and three pictures of somebody's own."""
    folder = tmp_path_factory.mktemp("runs")
    dataset = picture_set(folder / "squares")
    for name in ("plain", "tied"):
        write_run(folder / name, dataset, tied=name == "tied")
    for number, color in enumerate(("red", "navy", "olive")):
        Image.new("RGB", (40, 30), color).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def outcomes(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four processes found."""
    out = tmp_path_factory.mktemp("outcomes")
    run_worker("eval_worker", runs, out, processes=4, timeout=500)
    return out


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_says_what_one_process_says(runs: Path, outcomes: Path, layout: tuple[int, int]) -> None:
    """Captions and filled-in tokens are the same; scores, likelihoods and probabilities to 1e-5. Every process has all of it."""
    tensor, pipe = layout
    processes, expected = torch.load(outcomes / f"{tensor}{pipe}.pt")["found"], findings(runs / LAYOUTS[layout])
    assert len({tuple(texts) for texts in zip(*expected["texts"].values(), strict=True)}) > 1, "the pictures must matter, or this test shows little"
    for found in processes:
        assert found["texts"] == expected["texts"]
        assert found["pieces"] == expected["pieces"]
        for name in ("scores", "likelihoods", "probabilities"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_process_holds_its_piece_of_the_model_alone(runs: Path, outcomes: Path, layout: tuple[int, int]) -> None:
    whole = findings(runs / LAYOUTS[layout])["weights"]
    held = [found["weights"] for found in torch.load(outcomes / f"{layout[0]}{layout[1]}.pt")["found"]]
    assert max(held) < 0.9 * whole


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_learns_to_answer_as_one_process_does(runs: Path, outcomes: Path, layout: tuple[int, int]) -> None:
    expected = answers(runs / LAYOUTS[layout])
    assert torch.load(outcomes / f"{layout[0]}{layout[1]}.pt")["rows"] == expected
    assert len({score for row in expected for score in row["by_pass"]}) > 1


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_own_pictures_are_captioned_and_drawn_as_by_one_process(runs: Path, outcomes: Path, tmp_path: Path, layout: tuple[int, int]) -> None:
    caption_files(runs / LAYOUTS[layout], sorted(runs.glob("*.png")), out=tmp_path)
    drawn = {path.name: path.read_bytes() for path in (outcomes / f"{layout[0]}{layout[1]}").iterdir()}
    assert drawn == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(drawn) == 3


def test_a_run_of_four_processes_exports_to_the_same_logits_and_captions(runs: Path, outcomes: Path, tmp_path: Path) -> None:
    """Trained and evaluated as tensor 2 x pipe 2; exported and loaded by transformers in one process."""
    from flm_scale.export import FlmScaleForCausalLM

    found = torch.load(outcomes / "trained.pt", weights_only=False)
    assert len(list((runs / "trained/checkpoints/step-000020").glob("rank-*.safetensors"))) == 4
    export(runs / "trained", tmp_path / "out")
    model, tokenizer = FlmScaleForCausalLM.from_pretrained(tmp_path / "out"), Tokenizer(tmp_path / "out/tokenizer.model")
    said = model.generate(pixel_values=found["pixels"])
    assert [tokenizer.decode(ids) for ids in said.tolist()] == found["captions"]
    compared = compare_logits(model, found["views"], found["pixels"][:3], found["logits"])
    assert compared >= 2 * sum(len(view.queries) for view in found["views"])


def test_the_command_line_under_torchrun_writes_what_it_writes_alone(runs: Path, tmp_path: Path) -> None:
    """And alone it loads neither DeepSpeed nor megatron-core, and makes no process group."""
    alone, cut = (shutil.copytree(runs / "tied", tmp_path / name) for name in ("alone", "cut"))
    code = ("import sys; from flm_scale.cli import main; import torch.distributed as dist; "
            f"assert main(['eval', {str(alone)!r}, '--task', 'caption']) == 0; "
            "assert not dist.is_initialized() and not {'deepspeed', 'megatron'} & set(sys.modules)")
    for command in ([sys.executable, "-c", code], [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
                                                   "flm_scale", "eval", str(cut), "--task", "caption", "--tensor", "2"]):
        done = subprocess.run(command, cwd=ROOT, env=ENVIRON, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("caption, split test, times 100") == 1
    assert (cut / "evals/caption.json").read_text() == (alone / "evals/caption.json").read_text()
    one, two = (json.loads((run_dir / "samples/samples.json").read_text()) for run_dir in (alone, cut))
    probabilities = [[token.pop("probability") for sample in samples for token in sample["tokens"]] for samples in (one, two)]
    assert two == one
    assert probabilities[1] == pytest.approx(probabilities[0], abs=1e-5)
