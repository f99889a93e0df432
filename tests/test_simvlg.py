"""A bridge trained into a frozen language model, end to end on real shards: one loss, exact resume, and weights that never move."""

import json
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from flm_scale.checkpoint.store import last_good
from flm_scale.checkpoint.weights import read_run
from flm_scale.cli import main
from flm_scale.data.shards import Dataset
from flm_scale.evals.caption import Caption, other_pictures, words
from flm_scale.evals.retrieval import score_pairs
from flm_scale.evals.run import evaluate, open_run
from flm_scale.evals.show import describe
from flm_scale.model.assemble import VisionLanguageModel
from flm_scale.model.convnet import ConvNetEntry
from flm_scale.model.frozen_lm import FrozenLm, content_hash
from flm_scale.objectives.captioning import Captioning
from flm_scale.parallel.processes import start_processes
from tests.distributed.kills import Kill, be_flm
from tests.distributed.launch import Launch
from tests.language import write_language_model
from tests.test_train import lines_of

TOWER = ("--vision.image-size", "16", "--vision.width", "32", "--vision.layers", "2", "--vision.heads", "2")
SIZES = ["--text.max-length", "16", "--text.bridge.width", "32", "--text.bridge.layers", "2", "--batch.text-tokens", "120", "--batch.captions", "8",
         "--batch.images", "8", "--data.workers", "0", "--parallel.engine", "local", "--optim.warmup-steps", "2"]
MERGES = ["--text.bridge.reducer.merged", "1", "--objective.prompt", "a picture of"]
SAVES = ["--steps", "6", "--log.validate-every-steps", "3", "--log.save-every-steps", "3"]


@pytest.fixture(scope="module")
def material(toy_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dataset with the token ids of a language model, and that model."""
    folder = tmp_path_factory.mktemp("simvlg")
    data, model = shutil.copytree(toy_dataset.folder, folder / "data"), write_language_model(folder / "model")
    assert main(["tokenizer", "encode", str(data), "--tokenizer", str(model)]) == 0
    return data, model


@pytest.fixture(scope="module")
def train(material: tuple[Path, Path]) -> Callable[..., int]:
    data, model = material

    def run(run_dir: Path, *more: str, name: Path = model, tower: Sequence[str] = TOWER) -> int:
        return main(["train", "simvlg_demo", "--data.path", str(data), "--text.name", str(name), "--run-dir", str(run_dir), *tower, *SIZES, *SAVES,
                     *more])

    return run


@pytest.fixture(scope="module")
def trained(train: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "simvlg"
    assert train(run_dir, *MERGES) == 0
    return run_dir


def opened(run_dir: Path) -> VisionLanguageModel:
    trained_run = open_run(run_dir)
    return trained_run.model(start_processes(trained_run.run.parallel))


def test_the_bridge_learns_and_the_language_model_stays_as_it_was(trained: Path, material: tuple[Path, Path]) -> None:
    losses = [line["loss"] for line in lines_of(trained) if "loss" in line]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    model = opened(trained)
    head = model.layers["head"]
    assert isinstance(head, FrozenLm)
    theirs = {name: weight for file in material[1].glob("*.safetensors") for name, weight in load_file(file).items()}
    assert all(torch.equal(weight, theirs[name]) for name, weight in head.lm.named_parameters())
    assert read_run(trained).text.weights_hash == content_hash(head)


def test_a_checkpoint_holds_tower_and_bridge_and_nothing_of_the_language_model(trained: Path) -> None:
    names = last_good(trained, full=True).names()
    assert {name.split("_")[0] for name in names} == {"vision", "bridge"}
    assert not any(name.startswith("head") for name in names)


def test_a_resumed_run_is_the_unbroken_one_to_the_bit(trained: Path, train: Callable[..., int], tmp_path: Path) -> None:
    broken = shutil.copytree(trained, tmp_path / "broken")
    shutil.rmtree(broken / "checkpoints/step-000006")
    assert train(broken, "--resume", *MERGES) == 0
    (one, other) = ((run_dir / "checkpoints/step-000006/rank-00000.safetensors").read_bytes() for run_dir in (trained, broken))
    assert one == other


@pytest.mark.slow
def test_two_processes_that_are_killed_in_a_step_go_on_to_the_bit(material: tuple[Path, Path], tmp_path: Path) -> None:
    data, model = material

    def train(name: str, *more: str, kill: Kill | None = None) -> list[int]:
        """Exit codes; a run directory beside what each start of it leaves."""
        folder = tmp_path / f"{name}{'-again' * bool(more)}"
        (folder / "notes").mkdir(parents=True)
        words = ["train", "simvlg_demo", "--data.path", str(data), "--text.name", str(model), "--run-dir", str(tmp_path / name / "run"), *TOWER,
                 *SIZES, *SAVES, *MERGES, "--parallel.engine", "deepspeed", "--parallel.zero", "2", *more]
        with Launch(be_flm, words, folder / "notes", kill, processes=2, folder=folder / "said") as launch:
            return launch.wait(200)

    assert train("whole") == [0, 0]
    assert -signal.SIGKILL in train("killed", kill=Kill("in a step", step=5, rank=1, everybody=False))
    assert train("killed", "--resume") == [0, 0]
    whole, killed = ((tmp_path / name / "run/checkpoints/step-000006/manifest.json").read_bytes() for name in ("whole", "killed"))
    assert killed == whole, "it has the sha256 of every file"


def test_recomputation_changes_no_bit(trained: Path, train: Callable[..., int], tmp_path: Path) -> None:
    assert train(tmp_path / "again", "--recompute", *MERGES) == 0
    files = [run_dir / "checkpoints/step-000006/rank-00000.safetensors" for run_dir in (trained, tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_it_says_captions_and_ranks_them(trained: Path) -> None:
    evaluate(trained, task="caption", split="test")
    assert set(json.loads((trained / "evals/caption.json").read_text())["greedy"]) >= {"CIDEr", "exact"}
    samples = json.loads((trained / "samples/samples.json").read_text())
    # Every token of the caption, and nothing of the prompt.
    for sample in samples:
        assert "".join(token["piece"] for token in sample["tokens"]).replace("\u2581", " ").strip() == sample["truth"]
    assert main(["report", str(trained)]) == 0
    page = (trained / "report.html").read_text()
    assert "a language model that never changes" in page
    assert "beam, another picture" in page
    assert "no picture -" in page
    Image.new("RGB", (20, 16), "red").save(trained / "red.png")
    assert main(["caption", str(trained), str(trained / "red.png")]) == 0
    assert (trained / "samples/red.caption.png").is_file()
    evaluate(trained, task="retrieval", split="test")
    assert 0 <= json.loads((trained / "evals/retrieval.json").read_text())["image_to_text"]["R@1"] <= 1


def test_controls_say_what_the_picture_is_worth(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Likelihoods are those of every pair of picture and text, and without a picture transformers' own of the text alone."""
    evaluate(trained, task="caption", split="test")
    found = json.loads((trained / "evals/caption.json").read_text())
    controls = found["controls"]
    assert {name: controls["picture"][name] for name in found["beam"]} == found["beam"]
    assert re.search(r"picture -\d+\.\d+, another picture -\d+\.\d+, no picture -", capsys.readouterr().out)
    run, _, dataset, tokenizer, objective = open_run(trained)
    index, model, processes = dataset.index("test"), opened(trained), start_processes(run.parallel)
    images = [image for image, captions in enumerate(index.captions) if captions]
    texts = sorted({text for image in images for text in index.captions[image]})
    pairs = score_pairs(run, model, images, texts, index=index, tokenizer=tokenizer, objective=objective, processes=processes)
    others = other_pictures([words(index.captions[image][0]) for image in images], seed=run.seed)
    written = [(number, texts.index(text)) for number, image in enumerate(images) for text in index.captions[image]]
    ids = [tokenizer.encode(text, max_length=run.text.max_length) for text in texts]
    count = sum(len(ids[text]) - 1 for _, text in written)
    assert controls["picture"]["log_likelihood"] == pytest.approx(sum(pairs[image, text] for image, text in written) / count)
    assert controls["another picture"]["log_likelihood"] == pytest.approx(sum(pairs[others[image], text] for image, text in written) / count)
    assert isinstance(objective, Captioning)
    alone = 0.0
    for _, text in written:
        read = torch.tensor([[ids[text][0], *objective.prompt.tolist(), *ids[text][1:]]])
        labels = read.masked_fill(torch.arange(read.shape[1]) <= len(objective.prompt), -100)
        with torch.no_grad():
            alone -= float(model.head.lm(read, labels=labels).loss) * (len(ids[text]) - 1)
    assert controls["no picture"]["log_likelihood"] == pytest.approx(alone / count, abs=1e-5)


def test_a_checkpoint_is_resharded_without_the_language_model(trained: Path, tmp_path: Path) -> None:
    assert main(["checkpoint", "reshard", str(trained), "--out", str(tmp_path / "two"), "--data", "2"]) == 0
    assert main(["checkpoint", "diff", str(trained), str(tmp_path / "two")]) == 0


def test_an_export_is_opened_like_the_run(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["checkpoint", "export", str(trained), "--out", str(out)]) == 0
    scores = []
    for folder in (trained, out):
        evaluate(folder, task="retrieval", split="test")
        scores.append(json.loads((folder / "evals/retrieval.json").read_text()))
    assert scores[0] == scores[1]


def test_the_bridge_may_start_from_a_bert_and_says_what_became_of_it(train: Callable[..., int], tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(vocab_size=30, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128,
                         max_position_embeddings=20)).save_pretrained(tmp_path / "bert")
    words = ["--text.bridge.pretrained", str(tmp_path / "bert"), "--steps", "3", "--optim.pretrained-lr-scale", "0"]
    assert train(tmp_path / "run", *MERGES, *words) == 0
    theirs = load_file(tmp_path / "bert/model.safetensors")
    ours = last_good(tmp_path / "run", full=True)
    assert torch.equal(ours.weight("bridge_1_mlp.mlp.up.weight")[:], theirs["encoder.layer.1.intermediate.dense.weight"])
    assert "layers from 2 on" in (tmp_path / "run/pretrained.json").read_text()


@pytest.mark.parametrize(("reducer", "more"), [
    ("pool", ["--text.bridge.reducer.rows", "1", "--text.bridge.reducer.columns", "2"]), ("unshuffle", ["--text.bridge.reducer.factor", "2"]),
    ("drop", ["--text.bridge.reducer.kept", "2"]), ("none", [])])
def test_every_reducer_trains(train: Callable[..., int], tmp_path: Path, reducer: str, more: list[str]) -> None:
    assert train(tmp_path / reducer, f"--text.bridge.reducer.kind={reducer}", *more) == 0


def test_line_breaks_that_a_language_model_says_are_drawn_as_blanks() -> None:
    assert describe(Caption("a red\n\ncircle\n", -0.5)) == "a red circle (-0.50)"


def test_other_weights_under_the_same_name_are_refused(trained: Path, material: tuple[Path, Path], train: Callable[..., int], tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, other = shutil.copytree(trained, tmp_path / "run"), shutil.copytree(material[1], tmp_path / "other")
    file = next(file for file in sorted(other.glob("*.safetensors")) if "model.norm.weight" in load_file(file))
    weights = load_file(file)
    weights["model.norm.weight"][0] += 1
    save_file(weights, file, metadata={"format": "pt"})
    run = json.loads((run_dir / "run.json").read_text())
    run["text"]["name"] = str(other)
    (run_dir / "run.json").write_text(json.dumps(run))
    assert main(["eval", str(run_dir), "--task", "retrieval"]) == 2
    assert "has weights with the sha256" in capsys.readouterr().err
    assert train(run_dir, "--resume", "--steps", "7", *MERGES, name=other) == 2
    assert "text.weights_hash" in capsys.readouterr().err
    moved = shutil.copytree(material[1], tmp_path / "moved")
    assert train(run_dir, "--resume", "--steps", "7", *MERGES, name=moved) == 0


def test_mistakes_are_one_line(trained: Path, material: tuple[Path, Path], train: Callable[..., int], toy_dataset: Dataset, tmp_path: Path,
                               capsys: pytest.CaptureFixture[str]) -> None:
    for more, line in ((["--data.path", str(toy_dataset.folder)], f"flm tokenizer encode {toy_dataset.folder} --tokenizer {material[1]}"),
                       (["--batch.text-tokens", "16", *MERGES], "must hold the prompt and one caption"),
                       (["--text.max-length", "95"], "positions"),
                       (["--parallel.tensor", "2", "--parallel.engine", "deepspeed"], "do not go with a frozen language model")):
        assert train(tmp_path / "run", *more) == 2
        error = capsys.readouterr().err.strip()
        assert line in error
        assert len(error.splitlines()) == 1
        assert not (tmp_path / "run").exists()


def test_a_frozen_convolutional_network_is_a_tower(train: Callable[..., int], tmp_path: Path) -> None:
    network = timm.create_model("test_efficientnet")
    save_file(network.state_dict(), file := tmp_path / "network.safetensors")
    tower = ["--vision.kind", "convnet", "--vision.name", "test_efficientnet", "--vision.pretrained", str(file), "--vision.image-size", "96"]
    assert train(tmp_path / "run", "--text.bridge.reducer.merged", "2", tower=tower) == 0
    file.unlink()  # the run has its weights
    tower_now = opened(tmp_path / "run").layers["vision_entry"]
    assert isinstance(tower_now, ConvNetEntry)
    assert all(torch.equal(weight, network.state_dict()[name]) for name, weight in tower_now.network.named_parameters())
    evaluate(tmp_path / "run", task="caption", split="test")
    assert (tmp_path / "run" / "evals" / "caption.json").is_file()
