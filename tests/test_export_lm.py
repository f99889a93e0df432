"""An exported bridge in transformers' hands: the packed model's logits and captions, and no other language model or tower than the run's."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from flm_scale.checkpoint.publish import export
from flm_scale.cli import main
from flm_scale.config import OpenClipVisionConfig, Run
from flm_scale.config_lm import DropConfig, MergeConfig, NoReducerConfig, PoolConfig, Reducer, UnshuffleConfig
from flm_scale.data.pack import pack
from flm_scale.data.shards import Dataset
from flm_scale.data.tokens import LmTokenizer
from flm_scale.evals.caption import write_captions
from flm_scale.evals.run import open_run
from flm_scale.model.assemble import VisionLanguageModel, build_model
from flm_scale.model.frozen_lm import FrozenLm, content_hash
from flm_scale.opening import objective_of
from flm_scale.parallel.processes import start_processes
from tests.language import write_language_model
from tests.model.test_vision import shrunk  # noqa: F401 - a fixture
from tests.synthetic import random_pixels, tiny_language_run, write_weights

EXACT = {"rtol": 1e-5, "atol": 1e-5}
REDUCERS: list[Reducer] = [MergeConfig(merged=(1,), proportional=True), MergeConfig(merged=(1,), weighted=False), PoolConfig(rows=1, columns=2),
                           UnshuffleConfig(), DropConfig(kept=2), NoReducerConfig()]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_language_model(tmp_path_factory.mktemp("lm") / "model")


def export_random(run: Run, dataset: Dataset, folder: Path) -> tuple[Run, VisionLanguageModel]:
    """Export a random model of the run into FOLDER/out; return the run and the model."""
    run = run.replace(data=run.data.replace(path=dataset.folder), objective=run.objective.replace(prompt="a picture of"))
    tokenizer = LmTokenizer(Path(run.text.name))
    model = build_model(run, objective_of(run, tokenizer))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.layers.named_parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.5 if name.startswith("bridge_exit") else 0.1)
    assert isinstance(model.head, FrozenLm)
    run = run.replace(text=run.text.replace(weights_hash=content_hash(model.head)), data=run.data.replace(tokenizer_hash=tokenizer.fingerprint))
    write_weights(folder / "run", {name: weight for name, weight in model.layers.named_parameters() if not name.startswith("head.")}, run)
    export(folder / "run", folder / "out")
    return run, model


def load(folder: Path, **options: Any) -> Any:
    """What transformers makes of FOLDER/out by the copies of the code that lie in it."""
    from transformers import AutoModelForCausalLM

    theirs, loading = AutoModelForCausalLM.from_pretrained(folder / "out", trust_remote_code=True, output_loading_info=True, **options)
    assert type(theirs).__module__.startswith("transformers_modules."), "the copy in the folder is what runs"
    assert not loading["missing_keys"] | loading["unexpected_keys"]
    return theirs


def compare(run: Run, ours: VisionLanguageModel, theirs: Any) -> None:
    """Hold logits of two captions side by side, and greedy captions, against the packed model's."""
    tokenizer, rng = LmTokenizer(Path(run.text.name)), np.random.default_rng(0)
    objective, pixels = objective_of(run, tokenizer), random_pixels(2, rng, size=run.vision.image_size)
    views = [objective.likelihood(np.asarray(tokenizer.encode(text, max_length=16), np.int32))[0] for text in ("a red circle", "blue")]
    with torch.no_grad():
        expected = ours.logits(pack([[view] for view in views], pixels)).split([len(view.target_rows) for view in views])
        ids = torch.zeros(2, max(view.length for view in views), dtype=torch.long)
        valid = torch.zeros_like(ids)
        for row, view in enumerate(views):
            ids[row, :view.length], valid[row, :view.length] = torch.from_numpy(view.ids).long(), 1
        found = theirs(ids, torch.from_numpy(pixels), attention_mask=valid).logits
    for row, (view, logits) in enumerate(zip(views, expected, strict=True)):
        torch.testing.assert_close(found[row, view.target_rows], logits, **EXACT)
    said = theirs.generate(pixel_values=torch.from_numpy(pixels))
    captions = write_captions(run, ours, pixels, tokenizer=tokenizer, objective=objective, beams=1)
    assert [tokenizer.decode([token for token in ids if token != tokenizer.eos_id]) for ids in said.tolist()] == [one.text for one in captions]


@pytest.mark.parametrize("reducer", REDUCERS, ids=lambda one: f"{one.kind}{'' if getattr(one, 'weighted', True) else ' plain'}")
def test_logits_and_captions_are_the_packed_models(toy_dataset: Dataset, language_model: Path, tmp_path: Path, reducer: Reducer) -> None:
    run = tiny_language_run(language_model)
    run, ours = export_random(run.replace(text=run.text.replace(bridge=run.text.bridge.replace(reducer=reducer))), toy_dataset, tmp_path)
    theirs = load(tmp_path)
    compare(run, ours, theirs)
    if reducer == REDUCERS[0]:  # and what is saved again is the same
        theirs.save_pretrained(tmp_path / "again/out")
        compare(run, ours, load(tmp_path / "again"))


def test_an_exported_bridge_never_copies_the_output_embeddings_for_each_caption(toy_dataset: Dataset, language_model: Path, tmp_path: Path) -> None:
    run, _ = export_random(tiny_language_run(language_model), toy_dataset, tmp_path)
    theirs, met = load(tmp_path), list[bool]()
    theirs.frozen_lm.get_output_embeddings().register_forward_hook(lambda _, inputs, __: met.append(inputs[0].is_contiguous()))
    theirs.generate(pixel_values=torch.from_numpy(random_pixels(4, np.random.default_rng(0), size=run.vision.image_size)))
    assert met
    assert all(met)


def test_the_folder_holds_what_was_trained_and_names_the_language_model(toy_dataset: Dataset, language_model: Path, tmp_path: Path) -> None:
    run, _ = export_random(tiny_language_run(language_model), toy_dataset, tmp_path)
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert {name.split("_")[0] for name in file.keys()} == {"vision", "bridge"}  # noqa: SIM118 - no dictionary
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["language_model"] == str(language_model)
    assert config["language_model_hash"] == run.text.weights_hash
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "README.md", "config.json", "export.py", "export_lm.py", "model.safetensors", "preprocessor_config.json", "run.json"}
    assert run.text.weights_hash in (tmp_path / "out/README.md").read_text()


def test_a_missing_or_another_language_model_is_refused_in_one_line(toy_dataset: Dataset, language_model: Path, tmp_path: Path,
                                                                   capsys: pytest.CaptureFixture[str]) -> None:
    run, ours = export_random(tiny_language_run(shutil.copytree(language_model, tmp_path / "lm")), toy_dataset, tmp_path)
    moved = (tmp_path / "lm").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"language model '.*/lm' cannot be had .* from_pretrained\(FOLDER, language_model=...\)$"):
        load(tmp_path)
    other = write_language_model(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"has weights with the sha256 \w{12}, and this bridge was trained with \w{12}; name that one$"):
        load(tmp_path, language_model=str(other))
    compare(run.replace(text=run.text.replace(name=str(moved))), ours, load(tmp_path, language_model=str(moved)))
    assert main(["checkpoint", "export", str(tmp_path / "run"), "--out", str(tmp_path / "again")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "again").exists()


@pytest.fixture
def tower_file(shrunk: None, tmp_path: Path) -> Callable[[str], Path]:  # noqa: F811
    return lambda name: tmp_path / name


def test_a_frozen_tower_of_open_clips_is_named_and_checked(toy_dataset: Dataset, language_model: Path, tmp_path: Path,
                                                          tower_file: Callable[[str], Path]) -> None:
    """transformers' copy and `flm eval` both open it; other weights under its name are refused by both."""
    import open_clip

    file, run = tower_file("EVA02-B-16"), tiny_language_run(language_model)
    run = run.replace(vision=OpenClipVisionConfig(name=file.name, pretrained=str(file), image_size=32, trainable=False),
                      text=run.text.replace(bridge=run.text.bridge.replace(reducer=MergeConfig(merged=(1,)))))
    run, ours = export_random(run, toy_dataset, tmp_path)
    with safe_open(tmp_path / "out/model.safetensors", "pt") as weights:
        assert {name.split("_")[0] for name in weights.keys()} == {"bridge"}  # noqa: SIM118
    compare(run, ours, load(tmp_path))
    opened = open_run(tmp_path / "out")
    model = opened.model(start_processes(opened.run.parallel))
    assert all(torch.equal(weight, ours.layers.get_parameter(name)) for name, weight in model.layers.named_parameters())
    other = open_clip.create_model(file.name)
    torch.save({"state_dict": other.state_dict()}, file)
    with pytest.raises(ValueError, match=r"vision tower .* has weights with the sha256"):
        load(tmp_path)
    with pytest.raises(Exception, match="was trained with a vision tower of sha256"):
        opened.model(start_processes(opened.run.parallel))
    file.unlink()
    with pytest.raises(ValueError, match=r"vision tower EVA02-B-16 with the weights .* cannot be had"):
        load(tmp_path)
