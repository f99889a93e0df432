"""Real data in one command: `flm data demo DIR` turns easy-vqa, with --clips in motion, or with --large the drawings of drawings.py, into a dataset.

easy-vqa has pictures of one coloured shape and questions about it, no captions: `caption_facts` derives them from the questions and
answers alone. What the packages hold is laid out as folders of pictures, one a split, and prepared as anybody's would be, by a fleet of workers on
this machine. Building is idempotent: a complete dataset of the same sources is left alone, an unfinished one goes on.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from flm_scale.data.clips import is_clip
from flm_scale.data.manifest import DATASET
from flm_scale.data.prepare.driver import prepare
from flm_scale.data.prepare.fleet import FleetOptions
from flm_scale.data.prepare.ledger import FOLDER
from flm_scale.data.prepare.spec import FilterConfig, ImageConfig, InputConfig, Spec, TextConfig
from flm_scale.data.shards import UNFINISHED, Dataset, make_room, open_dataset
from flm_scale.data.sidecars import give_tokenizer
from flm_scale.data.sources import Material, Package, Source, fetch, members
from flm_scale.data.tokens import train_tokenizer
from flm_scale.errors import DataError

EASY_VQA = Package("pip", "easy-vqa", "1.0", "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f", "MIT")
COLORS = frozenset({"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"})
SHAPES = frozenset({"circle", "rectangle", "triangle"})
HELD_OUT = ("teal triangle", "red circle", "blue rectangle")  # the val split: seen in no train caption
SPLITS, README_FILE = ("train", "val", "test"), "README.md"

README = """# easy-vqa as image-text shards

5,000 pictures (64 x 64, one coloured shape) and 48,248 questions of the PyPI package easy-vqa 1.0 by Victor Zhou, MIT licence.
Drawn, not photographic: it shows that a pipeline learns and proves nothing about a benchmark.

- Captions ("a teal triangle") are derived from the questions and answers, never from the pixels. A picture whose questions leave its
  colour or shape open has none and serves question answering only.
- train: the official train pictures without three held-out concepts ({held_out}); val: these; test: the official test pictures.
- Prepared by `flm data demo DIR` from the folders in ledger/, which may be deleted; the same command builds the same bytes again.
- shards.parquet states every file's hash, dataset.json that of all.

The majority answer to each question, without looking, is right on 67.0 % of the test questions: a VQA result must beat that.

## Licence of the package

{license}
"""
LICENSE_TITLE = "## Licence of the package"


def build_demo(folder: Path, *, large: bool = False, clips: bool = False, overwrite: bool = False, workers: int = 0, vocab_size: int | None = None,
               progress: Callable[[str], None] = print) -> Dataset:
    """Fetch the packages, prepare the shards, train the tokenizer; return the opened dataset.

    large: the emoji and clip-art pairs.   clips: of motions.py.   overwrite: replace another dataset.
    workers: a CPU each; 0 takes all of this machine.   vocab_size: upper limit; None is 512, or 8000 for the large set.
    Raises DataError when a package cannot be fetched, the folder holds something else or a shard comes to nothing, FleetError when no worker starts.
    """
    from flm_scale.data import drawings

    read, packages = (drawings.read_drawings, drawings.PACKAGES) if large else (read_motions if clips else read_easy_vqa, [EASY_VQA])
    sources = tuple(Source(**package.source()) for package in packages)
    name = "drawings" if large else "easy-vqa in motion" if clips else "easy-vqa"
    dataset = None if overwrite or not (folder / DATASET).exists() else open_dataset(folder)
    if dataset and (tuple(dataset.manifest.sources), dataset.name) == (sources, name):
        progress(f"{folder}: the dataset {dataset.name} is already there")
    else:
        if overwrite or dataset or not ((folder / UNFINISHED).exists() and (folder / FOLDER).exists()):
            make_room(folder, overwrite=overwrite)  # before anything is fetched
        spec = demo_spec(name, sources, keep=drawings.KEPT if large else ("source", "license"), clips=clips)
        given = folder.resolve() / FOLDER / f"input-{spec.hash[:8]}"
        if not given.exists():
            write_input(given, read, progress=progress)
        inputs = [Path(f"{split}={given / split}") for split in SPLITS]
        if not prepare(inputs, folder, spec.replace(readme=given / README_FILE), FleetOptions(workers=workers, ray_address="local")):
            raise DataError(f"{folder}: shards are missing, for the reasons above; run the same command again")
    (folder / UNFINISHED).unlink(missing_ok=True)
    if vocab_size or not (dataset or open_dataset(folder)).tokenizer_fingerprint:
        progress(train_dataset_tokenizer(folder, vocab_size=vocab_size or (8000 if large else 512)))
    dataset = open_dataset(folder)
    counts = ", ".join(f"{split} {dataset.manifest.splits[split].images} images {dataset.manifest.splits[split].captions} captions"
                       for split in dataset.splits)
    progress(f"{folder}: {counts}; root {dataset.root[:12]}")
    return dataset


def demo_spec(name: str, sources: tuple[Source, ...], *, keep: tuple[str, ...], clips: bool) -> Spec:
    """Return what keeps every file byte for byte, with all its words: what is in the packages is good, and official splits stay what they are."""
    return Spec(name=name, sources=sources, samples_per_shard=1000, input=InputConfig(kind="folder", keep=keep, clips=clips),
                image=ImageConfig(mode="none", format="png"), text=TextConfig(normalise=False), filter=FilterConfig(duplicates=False))


def write_input(folder: Path, read: Callable[..., Material], *, progress: Callable[[str], None]) -> None:
    """Fetch packages and lay out what they hold, all or nothing: a folder of files with its metadata.jsonl for each split, and a README.md."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    with tempfile.TemporaryDirectory() as downloads:
        material = read(Path(downloads), progress=progress)
    for split, pictures in material.splits.items():
        (part / split).mkdir(parents=True)
        lines = []
        for number, (image, about) in enumerate(pictures):
            name = f"{number:05d}.{'mp4' if is_clip(image) else 'png'}"
            (part / split / name).write_bytes(image)
            lines.append(json.dumps({"file_name": name, **about}, ensure_ascii=False))
        (part / split / "metadata.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")
    (part / README_FILE).write_text(material.readme, encoding="utf-8")
    part.replace(folder)


def train_dataset_tokenizer(folder: Path, *, vocab_size: int) -> str:
    """Train on the train split's captions, questions and answers, write the token ids, and register the result; return a line that says so.

    Answers too: "yes" stands in no question.
    """
    dataset = open_dataset(folder)
    index = dataset.index("train")
    fresh = dataset.tokenizer_file.with_suffix(".new")
    train_tokenizer(chain.from_iterable(chain(index.captions, index.questions, index.answers)), vocab_size=vocab_size, model_file=fresh)
    dataset.drop_tokenizer()
    fresh.replace(dataset.tokenizer_file)
    tokenizer = give_tokenizer(dataset)
    return f"{dataset.tokenizer_file}: {tokenizer.vocab_size} pieces, fingerprint {tokenizer.fingerprint[:12]}"


def read_easy_vqa(downloads: Path, *, progress: Callable[[str], None]) -> Material:
    """Fetch easy-vqa, derive captions, hold three concepts out."""
    progress(f"fetching {EASY_VQA.name} {EASY_VQA.version} (3.2 MB) with {EASY_VQA.client}")
    files = dict(members(fetch(EASY_VQA, downloads)))
    train = list(_pictures(files, "train"))
    splits = {
        "train": [(image, about) for image, about in train if about["concept"] not in HELD_OUT],
        "val": [(image, about) for image, about in train if about["concept"] in HELD_OUT],
        "test": list(_pictures(files, "test")),
    }
    license_text = files["easy_vqa-1.0.dist-info/LICENSE"].decode().strip()
    return Material(splits, README.format(held_out=", ".join(HELD_OUT), license=license_text))


def read_motions(downloads: Path, *, progress: Callable[[str], None]) -> Material:
    """Fetch easy-vqa and let its shapes move."""
    from flm_scale.data.motions import motion_material

    pictures = read_easy_vqa(downloads, progress=progress)
    return motion_material(pictures, pictures.readme.partition(LICENSE_TITLE)[2].strip(), progress=progress)


def caption_facts(questions: Sequence[str], answers: Sequence[str]) -> tuple[str | None, str | None]:
    """Return the colour and the shape that questions and answers about one picture settle; None for what they leave open.

    A colour or shape as the answer is a fact, and so is one that such a question names ("what is the teal shape?"). A yes/no question
    confirms or excludes the one that it names, "no" and "not" turn it round, and what alone remains is a fact too.
    Raises DataError when they contradict each other.
    """
    open_values = COLORS | SHAPES
    for question, answer in zip(questions, answers, strict=True):
        words = question.lower().rstrip("?").split()
        named = (COLORS | SHAPES).intersection(words)
        is_true = answer not in {"yes", "no"} or (answer == "yes") != bool({"no", "not"}.intersection(words))
        for value in named | ({answer} & (COLORS | SHAPES)):
            kind = COLORS if value in COLORS else SHAPES
            open_values -= kind - {value} if is_true else {value}
    colors, shapes = open_values & COLORS, open_values & SHAPES
    if not colors or not shapes:
        raise DataError(f"easy-vqa: the answers contradict each other: {list(zip(questions, answers, strict=True))}; report it")
    return next(iter(colors)) if len(colors) == 1 else None, next(iter(shapes)) if len(shapes) == 1 else None


def caption(color: str, shape: str) -> str:
    """Return "a teal triangle", with "an" before a vowel."""
    return f"{'an' if color[0] in 'aeiou' else 'a'} {color} {shape}"


def _pictures(files: dict[str, bytes], part: str) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield one official split's pictures and what is said of them, in the order of their numbers."""
    asked: dict[int, tuple[list[str], list[str]]] = {}
    for question, answer, number in json.loads(files[f"easy_vqa/data/{part}/questions.json"]):
        questions, answers = asked.setdefault(number, ([], []))
        questions.append(question)
        answers.append(answer)
    for number, (questions, answers) in sorted(asked.items()):
        name = f"easy_vqa/data/{part}/images/{number}.png"
        color, shape = caption_facts(questions, answers)
        yield files[name], {"captions": [caption(color, shape)] if color and shape else [], "questions": questions, "answers": answers,
                            "concept": f"{color} {shape}" if color and shape else "", "source": name, "license": EASY_VQA.license}
