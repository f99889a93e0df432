"""An exported model in transformers' hands: its logits and captions are the packed model's, also where only its own libraries are installed."""

import os
import re
import subprocess
import sys
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from PIL import Image
from torch import Tensor

from flm_scale.batch import Example
from flm_scale.checkpoint.publish import export
from flm_scale.config import Run
from flm_scale.config_vision import OpenClipVisionConfig
from flm_scale.data.images import decode_image
from flm_scale.data.pack import pack
from flm_scale.data.shards import Dataset
from flm_scale.data.tokens import Tokenizer
from flm_scale.evals.caption import write_captions
from flm_scale.model.assemble import VisionLanguageModel, build_model
from flm_scale.model.generate import encode_images
from flm_scale.model.vision import named_sizes
from tests.evals.picture_set import picture_set
from tests.model.test_vision import shrunk  # noqa: F401 - a fixture
from tests.synthetic import caption_ids, objective_of, random_pixels, tiny_run, write_weights

EXACT = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return picture_set(tmp_path_factory.mktemp("data") / "squares")


def random_model(run: Run) -> VisionLanguageModel:
    """All weights are random, norms and biases too, and the model has opinions that depend on the picture."""
    model = build_model(run, objective_of(run))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.layers.named_parameters():
            if "image_attention" in name or name in {"text_entry.tokens.weight", "head.decoder.weight"}:
                weight.mul_(4)
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    return model


def exported(run: Run, dataset: Dataset, folder: Path) -> tuple[VisionLanguageModel, Any]:
    """A random model of the run, and what transformers loads of its export, which lies in FOLDER/out."""
    from flm_scale.export import FlmScaleForCausalLM

    run = run.replace(data=run.data.replace(path=dataset.folder), text=run.text.replace(max_length=24))
    model = random_model(run)
    write_weights(folder / "run", dict(model.layers.named_parameters()), run)
    export(folder / "run", folder / "out")
    theirs, loading = FlmScaleForCausalLM.from_pretrained(folder / "out", output_loading_info=True)
    assert not loading["missing_keys"] | loading["unexpected_keys"]
    assert not theirs.training
    return model, theirs


def padded(views: list[Example]) -> dict[str, Tensor]:
    """The views' ids, and what is padding behind them."""
    ids = torch.zeros(len(views), max(view.length for view in views), dtype=torch.long)
    for row, view in zip(ids, views, strict=True):
        row[:view.length] = torch.from_numpy(view.ids)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def spans_of(views: list[Example], length: int) -> Tensor:
    """Each query's hidden span at its own place."""
    spans = torch.zeros(len(views), length, 2, dtype=torch.long)
    for row, view in zip(spans, views, strict=True):
        row[view.queries] = torch.from_numpy(np.stack([view.span_first, view.span_last], -1)).long()
    return spans


def compare_logits(theirs: Any, views: list[Example], pixels: Tensor, expected: Tensor) -> int:
    """Hold the packed model's logits of all targets, one view a picture, against what transformers' model has; it gives none of the reverse stream.

    Returns the number of rows compared.
    """
    inputs = {"pixel_values": pixels, **padded(views)}
    streams, reconstructed, compared = theirs(**inputs).logits, None, 0
    if theirs.config.objective == "flm":
        reconstructed = theirs.reconstruct(**inputs, spans=spans_of(views, streams.shape[1]))
    for number, (view, rows) in enumerate(zip(views, expected.split([len(view.target_rows) for view in views]), strict=True)):
        for row, logits in zip(view.target_rows, rows, strict=True):
            stream, position = divmod(int(row), view.length)
            if stream == 0:
                torch.testing.assert_close(streams[number, position], logits, **EXACT)
            elif stream >= len(view.first):
                query = int(row) - len(view.first) * view.length
                torch.testing.assert_close(reconstructed[number, view.queries[query]], logits, **EXACT)
            compared += stream != 1
    return compared


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("objective", ["flm", "mlm", "ar", "prefix_lm"])
def test_all_logits_are_the_packed_models(dataset: Dataset, tmp_path: Path, objective: str, norm: str) -> None:
    """Captions of several lengths, side by side with padding. PrefixLM's forward stream, as it says captions; tied where norms come behind."""
    run = tiny_run(objective)
    ours, theirs = exported(run.replace(text=run.text.replace(norm=norm, tied=norm == "post")), dataset, tmp_path)
    rng, task = np.random.default_rng(0), objective_of(run)
    captions = [caption_ids(size, rng) for size in (9, 1, 4, 6)]
    views = [task.likelihood(ids)[0] if objective == "prefix_lm" else task.corrupt(ids, rng)[0] for ids in captions]
    pixels = random_pixels(len(views), rng)
    with torch.no_grad():
        expected = ours.logits(pack([[view] for view in views], pixels))
        compared = compare_logits(theirs, views, torch.from_numpy(pixels), expected)
    assert compared == len(expected) - (20 if objective == "flm" else 0)


def test_no_weight_of_an_export_is_idle(dataset: Dataset, tmp_path: Path) -> None:
    _, theirs = exported(tiny_run("flm"), dataset, tmp_path)
    inputs = {"pixel_values": torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "input_ids": torch.tensor([[1, 7, 8, 2]])}
    (theirs(**inputs).logits.sum() + theirs.reconstruct(**inputs).sum()).backward()
    assert not [name for name, weight in theirs.named_parameters() if weight.grad is None]


@pytest.mark.parametrize("output", ["penultimate", "final"])
@pytest.mark.parametrize("name", ["own", "own, sines, no single norm", "ViT-B-16-SigLIP", "MobileCLIP2-L-14", "EVA02-B-16"])
def test_pictures_are_read_as_by_any_tower_of_open_clip(shrunk: None, monkeypatch: pytest.MonkeyPatch, dataset: Dataset,  # noqa: F811
                                                        tmp_path: Path, name: str, output: str) -> None:
    """At a resolution that is not the tower's own; rotary positions, sines and cosines come from no file."""
    import open_clip

    own = {"layers": 3, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 64, "ls_init_value": 0.1}
    for known, more in (("own", {}), ("own, sines, no single norm", {"pos_embed_type": "sin_cos_2d", "final_ln_after_pool": True})):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, known, {"embed_dim": 8, "vision_cfg": own | more, "text_cfg": {}})
    image_size = 5 * named_sizes(name)["patch_size"]
    run = tiny_run("ar", vision=OpenClipVisionConfig(name=name, image_size=image_size, output=output))
    ours, theirs = exported(run, dataset, tmp_path)
    pixels = torch.from_numpy(random_pixels(2, np.random.default_rng(0), size=image_size))
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode_images(pixels), encode_images(ours, pixels).rows, **EXACT)


@pytest.fixture(scope="module", params=["flm", "ar", "prefix_lm"])
def speaker(request: pytest.FixtureRequest, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, VisionLanguageModel, Any]:
    """One row of the decoder is more than the tokenizer has."""
    run = tiny_run(request.param)
    run = run.replace(text=run.text.replace(vocab_size=61, max_length=24))
    return run, *exported(run, dataset, tmp_path_factory.mktemp("speaker"))


def test_greedy_captions_are_the_packed_models(dataset: Dataset, speaker: tuple[Run, VisionLanguageModel, Any]) -> None:
    run, ours, theirs = speaker
    tokenizer, pixels = Tokenizer(dataset.tokenizer_file), random_pixels(12, np.random.default_rng(1))
    with torch.no_grad():
        ours.head.decoder.bias[-1] = theirs.head.decoder.bias[-1] = 100.0
    expected = write_captions(run, ours, pixels, tokenizer=tokenizer, objective=objective_of(run), beams=1)
    said = theirs.generate(pixel_values=torch.from_numpy(pixels))
    assert [tokenizer.decode(ids) for ids in said.tolist()] == [caption.text for caption in expected]
    assert len({caption.text for caption in expected}) > 1, "the pictures must matter, or this test shows little"


def test_beams_keep_their_own_past_and_share_the_picture(speaker: tuple[Run, VisionLanguageModel, Any]) -> None:
    """What is kept of keys and values changes nothing but the time, and the tower runs once."""
    theirs, pixels, runs = speaker[2], torch.from_numpy(random_pixels(4, np.random.default_rng(2))), []
    hook = theirs.vision_exit.register_forward_hook(lambda _layer, _inputs, rows: runs.append(len(rows)))
    cached = theirs.generate(pixel_values=pixels, num_beams=4)
    hook.remove()
    assert runs == [4]
    assert torch.equal(cached, theirs.generate(pixel_values=pixels, num_beams=4, use_cache=False))
    assert not torch.equal(cached, theirs.generate(pixel_values=pixels))


def test_the_loss_is_that_of_training(dataset: Dataset, tmp_path: Path) -> None:
    rng, task = np.random.default_rng(3), objective_of(tiny_run("ar"))
    ours, theirs = exported(tiny_run("ar"), dataset, tmp_path)
    views, pixels = [task.likelihood(caption_ids(size, rng))[0] for size in (5, 2)], random_pixels(2, rng)
    inputs = padded(views)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    loss, _ = ours(pack([[view] for view in views], pixels))
    found = theirs(**inputs, pixel_values=torch.from_numpy(pixels), labels=labels).loss
    torch.testing.assert_close(found, loss.mean(), rtol=1e-5, atol=0)


def test_what_a_model_cannot_do_is_refused_with_the_reason(dataset: Dataset, tmp_path: Path) -> None:
    pixels, ids = torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.tensor([[1, 7, 2]])
    models = {kind: exported(tiny_run(kind), dataset, tmp_path / kind)[1] for kind in ("mlm", "ar")}
    with pytest.raises(ValueError, match=r"'mlm' has no stream that reads from the left.*use flm, ar or prefix_lm"):
        models["mlm"].generate(pixel_values=pixels)
    with pytest.raises(ValueError, match=r"'ar' has no reconstructor; only flm has one"):
        models["ar"].reconstruct(pixels, ids)
    with pytest.raises(ValueError, match=r"pixel_values are torch.float32, .* use FlmScaleImageProcessor"):
        models["ar"](ids, pixels.float())


def test_a_model_of_another_open_clip_is_refused_with_the_reason() -> None:
    from flm_scale.export import FlmScaleConfig, FlmScaleForCausalLM

    with pytest.raises(ValueError, match=r"open_clip \S+ has no model 'ViT-X-99'.*update it"):
        FlmScaleForCausalLM(FlmScaleConfig(vision={"kind": "open_clip", "name": "ViT-X-99", "image_size": 64, "output": "final"}))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "L", "I;16", "1", "CMYK"])
@pytest.mark.parametrize("size", [(40, 30), (17, 64), (32, 32), (32, 50), (5, 9)])
def test_the_processor_makes_of_a_file_what_training_makes_of_it(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    from flm_scale.export import FlmScaleImageProcessor

    values = np.random.default_rng(0).integers(0, 2**16, (size[1], size[0], 4), dtype=np.uint16)
    picture = Image.fromarray(values[..., 0]) if mode == "I;16" else Image.fromarray(values.astype(np.uint8)).convert(mode)
    path = tmp_path / f"picture.{'jpg' if mode == 'CMYK' else 'png'}"
    picture.save(path, **({"transparency": 3} if mode == "P" else {}))
    found = FlmScaleImageProcessor(image_size=32)(Image.open(path))["pixel_values"]
    assert np.array_equal(found.numpy()[0], decode_image(path.read_bytes(), size=32))


def closure(*names: str) -> dict[str, Distribution]:
    """The distributions that these need, themselves included, by name."""
    found: dict[str, Distribution] = {}
    wanted = list(names)
    while wanted:
        one = distribution(wanted.pop())
        if one.metadata["Name"] not in found:
            found[one.metadata["Name"]] = one
            needs = [Requirement(line) for line in one.requires or []]
            wanted += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture
def clean_libraries(tmp_path: Path) -> Path:
    """A folder with the four libraries that an exported model needs, and what they need, and nothing else."""
    folder = tmp_path / "libraries"
    folder.mkdir()
    for one in closure("torch", "transformers", "safetensors", "open_clip_torch").values():
        for top in {file.parts[0] for file in one.files or () if file.parts[0] not in {"..", "__pycache__"}}:
            if not (folder / top).exists():
                (folder / top).symlink_to(one.locate_file(top))
    return folder


@pytest.mark.slow
def test_the_cards_script_says_the_same_where_nothing_else_is_installed(dataset: Dataset, tmp_path: Path, clean_libraries: Path) -> None:
    """First without flm_scale, then with flm_scale.export alone, and from what that saves; logits to 1e-5."""
    run = tiny_run()
    ours, _ = exported(run, dataset, tmp_path)
    Image.fromarray(random_pixels(1, np.random.default_rng(5), size=40)[0].transpose(1, 2, 0)).save(tmp_path / "picture.png")
    pixels = decode_image((tmp_path / "picture.png").read_bytes(), size=16)[None]
    view = objective_of(run).likelihood(caption_ids(5, np.random.default_rng(5)))[0]
    with torch.no_grad():
        logits = ours.logits(pack([[view]], pixels))
    torch.save({"ids": torch.from_numpy(view.ids).long()[None, :-1], "pixels": torch.from_numpy(pixels), "logits": logits}, tmp_path / "expected.pt")
    said = write_captions(run.replace(text=run.text.replace(max_length=24)), ours, pixels, tokenizer=Tokenizer(dataset.tokenizer_file),
                          objective=objective_of(run), beams=1)[0].text
    script = re.search(r"```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), re.DOTALL)
    assert script
    code = f"""
import importlib.util, sys
sys.path.append({str(clean_libraries)!r})
there = [name for name in ("flm_scale", "deepspeed", "megatron", "ray", "sentencepiece", "jaxtyping", "tyro", "webdataset", "pyarrow")
         if importlib.util.find_spec(name)]
assert not there, there
{script[1]}
sys.path.append({str(Path(__file__).parents[1])!r})
import torch
from flm_scale.export import FlmScaleForCausalLM, FlmScaleImageProcessor
expected = torch.load("expected.pt")
again = FlmScaleForCausalLM.from_pretrained("out")
again.save_pretrained("again", max_shard_size="100KB")
for one in (model, again, AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True)):
    with torch.no_grad():
        logits = one(expected["ids"], expected["pixels"]).logits[0]
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=1e-5)
assert {{name for name in sys.modules if name.startswith("flm_scale")}} == {{"flm_scale", "flm_scale.export"}}
"""
    environ = {"PATH": os.environ["PATH"], "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-I", "-S", "-W", "error", "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True,
                          timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == said
