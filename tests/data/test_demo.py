"""The demo data: captions follow from questions and answers, held-out concepts stay out, packages are checked."""

import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flm_scale.cli import main
from flm_scale.data import demo, drawings
from flm_scale.data.demo import build_demo, caption, caption_facts, train_dataset_tokenizer, write_input
from flm_scale.data.images import decode_image
from flm_scale.data.manifest import DATASET
from flm_scale.data.prepare.finish import finish
from flm_scale.data.prepare.fleet import FleetOptions
from flm_scale.data.prepare.inputs import open_inputs
from flm_scale.data.prepare.ledger import read_ledger
from flm_scale.data.prepare.spec import Spec
from flm_scale.data.prepare.stages import plan_work, prepare_shard
from flm_scale.data.shards import Dataset, open_dataset, read_committed_shard
from flm_scale.data.sources import Material, Package, fetch, members
from flm_scale.data.tokens import Tokenizer
from flm_scale.data.verify import verify
from flm_scale.errors import DataError
from tests.data.killed import is_killed_before_change

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("asked", "facts"), [
    ([], (None, None)),
    ([("what color is the shape?", "blue")], ("blue", None)),
    ([("what shape is present?", "circle")], (None, "circle")),
    ([("what is the teal shape?", "triangle")], ("teal", "triangle")),
    ([("what is the color of the rectangle?", "red")], ("red", "rectangle")),
    ([("is there a red shape?", "yes"), ("is a circle present?", "yes")], ("red", "circle")),
    ([("is there a red shape?", "no")], (None, None)),
    ([("is no red shape present?", "no"), ("does the image not contain a circle?", "no")], ("red", "circle")),
    ([("is there not a red shape in the image?", "yes")], (None, None)),
    ([("is a circle present?", "no"), ("is no triangle present?", "yes")], (None, "rectangle")),
    ([(f"is there a {color} shape?", "no") for color in sorted(demo.COLORS - {"gray"})], ("gray", None)),
])
def test_facts_follow_from_answers(asked: list[tuple[str, str]], facts: tuple[str | None, str | None]) -> None:
    assert caption_facts([question for question, _ in asked], [answer for _, answer in asked]) == facts


def test_answers_that_contradict_each_other_are_an_error() -> None:
    with pytest.raises(DataError, match="contradict"):
        caption_facts(["is there a red shape?", "is there not a red shape?"], ["yes", "yes"])


def test_article_follows_the_first_letter() -> None:
    assert caption("teal", "triangle") == "a teal triangle"
    assert caption("orange", "circle") == "an orange circle"


def test_easy_vqa_has_the_stated_captions(demo_dataset: Dataset) -> None:
    counts = {split: (part.images, part.captions) for split, part in demo_dataset.manifest.splits.items()}
    assert {split: counts[split] for split in ("train", "val", "test")} == {"train": (3568, 3146), "val": (432, 432), "test": (1000, 888)}


def test_held_out_concepts_are_in_no_train_caption(demo_dataset: Dataset) -> None:
    train, val = demo_dataset.index("train"), demo_dataset.index("val")
    assert sorted(set(val.concepts)) == sorted(demo.HELD_OUT)
    assert {words for concept in demo.HELD_OUT for words in concept.split()} >= demo.SHAPES
    assert not {f"a {concept}" for concept in demo.HELD_OUT} & {text for captions in train.captions for text in captions}
    assert len({text for captions in train.captions for text in captions}) == 24 - 3


def test_every_question_is_kept_and_captions_agree_with_the_pixels(demo_dataset: Dataset) -> None:
    questions = 0
    for split in demo_dataset.splits:
        index = demo_dataset.index(split)
        questions += sum(map(len, index.questions))
        assert all(len(asked) == len(told) for asked, told in zip(index.questions, index.answers, strict=True))
    assert questions == 48_248
    index = demo_dataset.index("val")
    for number in range(0, len(index), 40):
        red, _, blue = (int(value) for value in _shape_color(decode_image(index.read_image(number), size=64)))
        assert {"red": red > blue, "blue": blue > red, "teal": blue > red}[index.concepts[number].split()[0]]


def _shape_color(image: np.ndarray) -> np.ndarray:
    """The colour farthest from the ground, which the corner shows."""
    pixels = image.reshape(3, -1).T.astype(int)
    return pixels[np.abs(pixels - pixels[0]).sum(1).argmax()]


def test_demo_tokenizer_has_whole_words(demo_dataset: Dataset) -> None:
    tokenizer = Tokenizer(demo_dataset.tokenizer_file)
    assert tokenizer.fingerprint == demo_dataset.tokenizer_fingerprint
    for text in ("a teal triangle", "yes", "is there not a gray shape in the image?"):
        assert len(tokenizer.encode(text, max_length=50)) - 2 == len(text.replace("?", " ?").split())


def test_complete_demo_is_left_alone(demo_dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "fetch", None)
    said: list[str] = []
    before = (demo_dataset.folder / "dataset.json").stat().st_mtime_ns
    assert build_demo(demo_dataset.folder, progress=said.append).root == demo_dataset.root
    assert "already there" in said[0]
    assert (demo_dataset.folder / "dataset.json").stat().st_mtime_ns == before


def test_foreign_folder_is_refused_before_anything_is_fetched(tmp_path: Path, toy_dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "fetch", None)
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(DataError, match="thesis"):
        build_demo(tmp_path, overwrite=True)
    with pytest.raises(DataError, match="another dataset"):
        build_demo(toy_dataset.folder)


def test_tokenizer_training_is_repeatable(tmp_path: Path) -> None:
    from tests.conftest import write_toy

    dataset = write_toy(tmp_path / "toy")
    roots = []
    for _ in range(2):
        assert "pieces" in train_dataset_tokenizer(dataset.folder, vocab_size=70)
        roots.append(demo.open_dataset(dataset.folder).root)
    assert roots[0] == roots[1] != dataset.root


@pytest.mark.slow
def test_killed_tokenizer_training_leaves_a_dataset_that_opens_and_is_finished_by_the_same_command(tmp_path: Path) -> None:
    from tests.conftest import write_toy

    toy, roots = write_toy(tmp_path / "toy").folder, set()
    for number in count():
        folder = shutil.copytree(toy, tmp_path / str(number))
        is_killed = is_killed_before_change(number, lambda: train_dataset_tokenizer(folder, vocab_size=70))  # noqa: B023 - called at once
        open_dataset(folder)
        train_dataset_tokenizer(folder, vocab_size=70)
        roots.add(open_dataset(folder).root)
        if not is_killed:
            break
    assert number > 5
    assert len(roots) == 1


def small_material(*_: object, **__: object) -> Material:
    """Three pictures in two splits and none in the third; one has questions alone."""
    from tests.conftest import drawn_sample

    pictures = []
    for number in range(3):
        sample = drawn_sample(number, color="red", shape="circle")
        pictures.append((sample.image, {"captions": sample.captions[:number], "questions": sample.questions, "answers": sample.answers,
                                        "concept": sample.concept, "source": f"{number}.png", "license": "MIT"}))
    return Material({"train": pictures[:2], "val": pictures[2:], "test": []}, "Drawn.")


def prepare_here(inputs: Sequence[Path], folder: Path, spec: Spec, _: FleetOptions) -> bool:
    """Do in this process what prepare lets a fleet do."""
    found = open_inputs(spec, inputs)
    for work in plan_work(spec, found):
        prepare_shard(folder, spec, found, work, attempt=0)
    shards = [read_committed_shard(folder, work.name) for work in plan_work(spec, found)]
    finish(folder, spec, found, [shard for shard in shards if shard])
    return True


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_build_is_finished_by_the_same_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool) -> None:
    from tests.conftest import write_toy

    monkeypatch.setattr(demo, "read_easy_vqa", small_material)
    monkeypatch.setattr(demo, "prepare", prepare_here)
    toy, roots = write_toy(tmp_path / "toy").folder, set()
    for number in count():
        folder = tmp_path / str(number)
        if overwrite:
            shutil.copytree(toy, folder)
        is_killed = is_killed_before_change(number, lambda: build_demo(folder, overwrite=overwrite))  # noqa: B023 - called at once
        roots.add(build_demo(folder, overwrite=overwrite).root)
        if not is_killed:
            break
    assert number > 30
    assert len(roots) == 1


def test_a_finished_layout_of_the_packages_is_used_again_and_a_killed_one_is_not(tmp_path: Path) -> None:
    said: list[str] = []
    for number in count():
        folder = tmp_path / str(number)
        is_killed = is_killed_before_change(number, lambda: write_input(folder, small_material, progress=said.append))  # noqa: B023 - called at once
        assert folder.exists() != is_killed
        if not is_killed:
            break
        write_input(folder, small_material, progress=said.append)
    listed = {tuple(sorted((str(path.relative_to(folder)), path.read_bytes()) for path in folder.rglob("*") if path.is_file()))
              for folder in tmp_path.iterdir() if not folder.suffix}
    assert len(listed) == 1
    assert [name for name, _ in listed.pop()] == ["README.md", "test/metadata.jsonl", "train/00000.png", "train/00001.png", "train/metadata.jsonl",
                                                  "val/00000.png", "val/metadata.jsonl"]


@pytest.mark.slow
def test_the_fleet_builds_what_the_package_holds_whatever_the_workers_kills_and_repairs(demo_dataset: Dataset, tmp_path: Path) -> None:
    """One worker undisturbed; two whose driver is killed in the middle; and a shard lost afterwards."""
    whole = build_demo(tmp_path / "one", workers=1)
    assert not verify(whole)
    assert whole.tokenizer_fingerprint == demo_dataset.tokenizer_fingerprint
    assert whole.manifest.sources == demo_dataset.manifest.sources
    assert (whole.folder / "README.md").read_text() == (demo_dataset.folder / "README.md").read_text()
    for split in ("train", "val", "test"):
        ours, theirs = whole.index(split), demo_dataset.index(split)
        for column in ("captions", "questions", "answers", "concepts"):
            assert list(getattr(ours, column)) == list(getattr(theirs, column))
        hashes = [[index.values(number, ["sha256"]) for number in range(len(index))] for index in (ours, theirs)]
        assert hashes[0] == hashes[1]

    folder = tmp_path / "two"
    words = ["data", "demo", str(folder), "--workers", "2"]
    process = subprocess.Popen([sys.executable, "-m", "flm_scale", *words], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not any(line["event"] == "committed" for line in read_ledger(folder)):
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (folder / DATASET).exists()
    assert main(words) == 0
    assert open_dataset(folder).root == whole.root

    (folder / "index/val/00000.arrow").unlink()
    assert main(["data", "repair", str(folder), "--workers", "1"]) == 0
    assert open_dataset(folder).root == whole.root


@pytest.mark.slow
def test_a_machine_on_which_ray_does_not_start_gets_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    """Ray's sockets need short names."""
    monkeypatch.setattr(demo, "read_easy_vqa", small_material)
    temporary = tmp_path / ("long" * 30)
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    assert main(["data", "demo", str(tmp_path / "demo")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("flm: Ray does not start on this machine: ")
    assert "; it needs " in line


def fake_client(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """An `npm` that runs a shell script."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def npm_package(content: bytes) -> Package:
    return Package("npm", "thing", "1.0.0", hashlib.sha256(content).hexdigest(), "MIT")


def test_package_with_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_client(tmp_path / "bin", monkeypatch, "printf good > thing.tgz")
    assert fetch(npm_package(b"good"), tmp_path / "one").read_bytes() == b"good"
    with pytest.raises(DataError, match="has the sha256"):
        fetch(npm_package(b"expected"), tmp_path / "two")


def test_failing_client_is_one_line_with_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_client(tmp_path / "bin", monkeypatch, "echo 'npm error network is down' >&2; echo 'a log is in x' >&2; exit 1")
    with pytest.raises(DataError) as caught:
        fetch(npm_package(b""), tmp_path / "one")
    assert str(caught.value) == "package thing 1.0.0 cannot be fetched with npm: npm error network is down; check the network and run again"


def test_missing_client_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="needs npm"):
        fetch(npm_package(b""), tmp_path / "one")


def test_archive_members_are_read_without_touching_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with tarfile.open("a.tgz", "w:gz") as tar:
        for name in ("../outside", "package/inside"):
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"hi"))
        link = tarfile.TarInfo("package/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with zipfile.ZipFile("a.whl", "w") as wheel:
        wheel.writestr("folder/", "")
        wheel.writestr("folder/file", "hi")
    assert dict(members(tmp_path / "a.tgz")) == {"../outside": b"hi", "package/inside": b"hi"}
    assert dict(members(tmp_path / "a.whl")) == {"folder/file": b"hi"}
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tgz", "a.whl"]


def test_styles_and_skin_tones_of_one_emoji_share_a_base() -> None:
    files = {"package/meta/groups.json": b'{"groups": {"1": "people-body"}}', "package/en/data.json": b"""[
        {"label": "regional indicator A", "hexcode": "1F1E6"}, {"label": "flag: Romania", "hexcode": "1F1F7-1F1F4", "group": 9},
        {"label": "keycap: #", "hexcode": "0023-FE0F-20E3"}, {"label": "waving hand", "hexcode": "1F44B", "tags": ["hello"], "group": 1,
         "skins": [{"label": "waving hand: dark skin tone", "hexcode": "1F44B-1F3FF"}]}]"""}
    labels = drawings.read_labels(files)
    assert set(labels) == {"1f1f7-1f1f4", "23-20e3", "1f44b", "1f44b-1f3ff"}
    assert labels["1f1f7-1f1f4"]["caption"] == "Romania flag"
    assert labels["1f44b-1f3ff"] == {"caption": "waving hand, dark skin tone", "base": "waving hand", "tags": ["hello"], "category": "people-body"}
    assert drawings.emoji_key("0023-FE0F-20E3") == drawings.emoji_key("0023-20e3") == "23-20e3"


def test_clipart_caption_prefers_a_sentence_then_the_title_then_the_file_name() -> None:
    def svg(inner: str) -> str:
        publisher = "<dc:publisher><cc:Agent><dc:title>Open Clip Art</dc:title></cc:Agent></dc:publisher>"
        return f'<svg><cc:Work rdf:about="">{publisher}{inner}</cc:Work></svg>'

    subject = "<dc:subject><rdf:Bag><rdf:li>bird</rdf:li><rdf:li>hash(0x8a)</rdf:li></rdf:Bag></dc:subject>"
    title = "<dc:title>Cat &amp;amp; dog</dc:title>"
    described = drawings.describe_clipart("a/x_01.svg", svg(title + "<dc:description>a cat and a dog</dc:description>" + subject))
    assert described == {"caption": "a cat and a dog", "base": "a cat and a dog", "tags": ["bird"]}
    for text, expected in ((title + "<dc:description>see http://a.b for more</dc:description>", "Cat & dog"), ("<dc:title/>", "red fox"),
                           ("<dc:title>Various birds</dc:title>", "red fox")):
        about = drawings.describe_clipart("a/red_fox_01.svg", svg(text))
        assert about is not None
        assert about["caption"] == expected
    assert drawings.describe_clipart("a/x_01.svg", "<svg/>") is None


def test_split_depends_on_the_concept_alone() -> None:
    assert drawings.split_of(drawings.concept_of("Comet!")) == drawings.split_of("comet")
    shares = [drawings.split_of(f"concept {number}") for number in range(4000)]
    assert {split: round(shares.count(split) / 4000, 2) for split in ("train", "val", "test")} == pytest.approx(
        {"train": 0.9, "val": 0.05, "test": 0.05}, abs=0.011)


def test_drawing_is_centred_on_white_and_blank_ones_are_dropped() -> None:
    def png(image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    wide = drawings._square(png(Image.new("RGBA", (64, 32), (0, 0, 0, 255))), None)
    assert wide is None  # one flat colour is blank
    half = Image.new("RGBA", (64, 32), (0, 0, 0, 0))
    half.paste((255, 0, 0, 255), (0, 0, 32, 32))
    drawn = drawings._square(png(half), None)
    assert drawn is not None
    pixels = decode_image(drawn, size=128)
    assert (pixels[:, :32] == 255).all()
    assert (pixels[:, 96:] == 255).all()
    assert pixels[:, 64, 20].tolist() == [255, 0, 0]
    assert pixels[:, 64, 100].tolist() == [255, 255, 255]


def test_reading_data_imports_neither_torch_nor_webdataset() -> None:
    code = ("import sys, flm_scale.data.demo, flm_scale.data.drawings, flm_scale.data.images, flm_scale.data.shards as s, flm_scale.data.tokens;"
            "print([name for name in ('torch', 'webdataset', 'sentencepiece', 'pyarrow') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
