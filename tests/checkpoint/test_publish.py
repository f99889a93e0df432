"""An exported folder: whole or not at all, with the run's weights, tokenizer and scores; and flm opens it like the run."""

import json
import os
import random
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from PIL import Image

from flm_scale.checkpoint import publish
from flm_scale.checkpoint.publish import export, write_tokenizer
from flm_scale.checkpoint.store import last_good
from flm_scale.checkpoint.weights import ExportedWeights
from flm_scale.cli import main
from flm_scale.config import Run
from flm_scale.data.shards import Dataset
from flm_scale.data.tokens import Tokenizer, train_tokenizer
from flm_scale.errors import CheckpointError
from flm_scale.evals import vqa
from flm_scale.evals.run import evaluate
from tests.evals.picture_set import picture_set, trained_run
from tests.synthetic import write_weights


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    trained_run(folder / "run", picture_set(folder / "squares"))
    return folder / "run"


def test_weights_are_copied_to_the_bit_in_one_file_or_in_several(run_dir: Path, tmp_path: Path) -> None:
    from flm_scale.export import FlmScaleConfig

    checkpoint = last_good(run_dir, full=False)
    export(run_dir, tmp_path / "one")
    with patch.object(publish, "SHARD_BYTES", 100_000):
        export(run_dir, tmp_path / "several")
    export(run_dir, tmp_path / "half", dtype="bfloat16")
    index = json.loads((tmp_path / "several/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "several").glob("model-*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert index["metadata"]["total_size"] == sum(4 * checkpoint.weight(name)[:].numel() for name in checkpoint.names())
    assert max((tmp_path / "several" / name).stat().st_size for name in files) < 120_000
    for folder in ("one", "several", "half"):
        found = ExportedWeights(tmp_path / folder)
        assert found.names() == checkpoint.names()
        for name in found.names():
            whole = checkpoint.weight(name)[:]
            assert torch.equal(found.weight(name)[:], whole.bfloat16() if folder == "half" else whole), name
    assert FlmScaleConfig.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match=r"'head\.tail' is missing: weights of another model"):
        ExportedWeights(tmp_path / "one").weight("head.tail")


def test_a_folder_is_there_whole_or_not_at_all(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "out"
    with patch.object(publish, "model_card", side_effect=OSError(28, "No space left on device")):
        assert main(["checkpoint", "export", str(run_dir), "--out", str(out)]) == 2
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert not list(out.parent.iterdir())
    assert main(["checkpoint", "export", str(run_dir), "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "modeling_flm.py", "preprocessor_config.json", "run.json",
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json"}
    before = (out / "README.md").stat().st_mtime_ns
    assert main(["checkpoint", "export", str(run_dir), "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"flm: --out {out}: is there already; name a new folder, or remove it\n"
    assert (out / "README.md").stat().st_mtime_ns == before
    (tmp_path / "file").touch()
    assert main(["checkpoint", "export", str(run_dir), "--out", str(tmp_path / "file/out")]) == 2
    assert "cannot be written (Not a directory)" in capsys.readouterr().err


def test_a_step_can_be_named_and_a_damaged_checkpoint_is_refused(run_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run_dir, tmp_path / "run")
    checkpoint = last_good(copy, full=False)
    run = Run.model_validate_json(checkpoint.run_json)
    write_weights(copy, {name: checkpoint.weight(name)[:] + 1 for name in checkpoint.names()}, run, step=7)
    for step, added in ((None, 1), (0, 0)):
        export(copy, tmp_path / f"{step}", step=step)
        assert torch.equal(ExportedWeights(tmp_path / f"{step}").weight("head.norm.bias")[:], checkpoint.weight("head.norm.bias")[:] + added)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3; there is: 7, 0"):
        export(copy, tmp_path / "3", step=3)
    path = copy / "checkpoints/step-000007/rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors is damaged"):
        export(copy, tmp_path / "7", step=7)


def test_the_card_has_the_scores_of_these_very_weights(run_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run_dir, tmp_path / "run")
    checkpoint = last_good(copy, full=False)
    export(copy, tmp_path / "unscored")
    assert "None yet." in (tmp_path / "unscored/README.md").read_text()
    evaluate(copy, task="retrieval", split="test")
    export(copy, tmp_path / "scored")
    card = (tmp_path / "scored/README.md").read_text()
    result = json.loads((copy / "evals/retrieval.json").read_text())
    assert f"retrieval, split test: image_to_text R@1 {100 * result['image_to_text']['R@1']:.1f}, R@5 100.0" in card
    assert "squares" in card
    assert json.loads((tmp_path / "scored/run.json").read_text())["data"]["path"] in checkpoint.run_json
    os.utime(copy / "evals/retrieval.json", (0, 0))
    export(copy, tmp_path / "stale")
    assert "None yet." in (tmp_path / "stale/README.md").read_text()


@pytest.mark.slow
def test_flm_opens_the_folder_as_it_opens_the_run(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All tasks score the same, and `flm caption` says the same."""
    copy = shutil.copytree(run_dir, tmp_path / "run")
    export(copy, tmp_path / "out")
    Image.new("RGB", (40, 30), "olive").save(tmp_path / "picture.png")
    printed = []
    for folder in (copy, tmp_path / "out"):
        with patch.object(vqa, "PASSES", 1), patch.object(vqa, "BATCH", vqa.BATCH.replace(images=48)):
            for task in ("caption", "retrieval", "vqa"):
                assert main(["eval", str(folder), "--task", task]) == 0
        capsys.readouterr()
        assert main(["caption", str(folder), str(tmp_path / "picture.png"), "--out", str(tmp_path / "drawn")]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    for name in ("evals/caption.json", "evals/retrieval.json", "samples/samples.json"):
        assert (copy / name).read_text() == (tmp_path / "out" / name).read_text()
    rows = [[row | {"seconds": 0} for row in json.loads((folder / "evals/vqa.json").read_text())["rows"]] for folder in (copy, tmp_path / "out")]
    assert rows[0] == rows[1]


def random_texts(rng: random.Random, letters: str, count: int) -> list[str]:
    return ["".join(rng.choices(letters, k=rng.randint(0, 30))) for _ in range(count)]


@pytest.mark.parametrize("corpus", ["toy", "easy-vqa", "repeats"])
def test_the_converted_tokenizer_gives_the_same_ids_and_texts(corpus: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """For what the dataset says, for spaces, marks and special tokens in odd places, and for any characters; cut at 20 as well."""
    from transformers import AutoTokenizer

    rng = random.Random(0)
    if corpus == "repeats":
        train_tokenizer(random_texts(rng, "ab ", 300), vocab_size=300, model_file=tmp_path / "tokenizer.model")
        tokenizer, texts = Tokenizer(tmp_path / "tokenizer.model"), random_texts(rng, "ab ", 3000)
    else:
        dataset: Dataset = request.getfixturevalue("toy_dataset" if corpus == "toy" else "demo_dataset")
        tokenizer = Tokenizer(dataset.tokenizer_file)
        texts = sorted({text for split in ("train", "val", "test") for several in (dataset.index(split).captions, dataset.index(split).questions)
                        for one in several for text in one})
    texts += ["", " ", "▁", " a ▁ ", "a\n b", "<s>a</s><mask>", "cafe\u0301", "\ufb01\u2460", "\x00a"]
    texts += random_texts(rng, " ▁  aehtsr?<>/s\n\té\u0301日本\ufb01\u3000🙂👩‍🚀", 2000)
    texts += ["".join(map(chr, rng.choices([*range(1, 0xD800), *range(0xE000, 0x11000)], k=rng.randint(0, 12)))) for _ in range(500)]
    write_tokenizer(tmp_path, tokenizer, max_length=20)
    converted = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts:
        for length in (20, 1000):
            ids = tokenizer.encode(text, max_length=length)
            assert converted(text, truncation=True, max_length=length)["input_ids"] == ids, text
            assert converted.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids), text
    specials = [getattr(converted, f"{kind}_token_id") for kind in ("pad", "bos", "eos", "unk", "mask")]
    assert specials == [0, 1, 2, 3, 4]
