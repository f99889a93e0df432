"""What we write, the field's own packages read; what img2dataset writes, we read. The packages are the real ones, and so is the shard."""

import gc
import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from flm_scale.data.images import ImageFormat, decode_image, fit_image, read_header
from flm_scale.data.shards import Dataset, Sample, write_dataset
from flm_scale.data.sources import Package, fetch
from flm_scale.data.tar import ShardError, TarSample, list_members, read_json, read_shard
from flm_scale.errors import DataError

THEIRS = Path(__file__).parent / "img2dataset"
FORMATS: tuple[ImageFormat, ImageFormat] = ("jpg", "png")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files open


@pytest.fixture(autouse=True)
def leave_no_file_to_a_later_test() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """48 pictures, every second one a JPEG, the rest PNGs; keys and captions as odd as they may be."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 24, 32, 3), dtype=np.uint8)
    made = []
    for number, array in enumerate(pixels):
        file, image_format = io.BytesIO(), FORMATS[number % 2]
        Image.fromarray(array).save(file, "PNG")
        picture = fit_image(file.getvalue(), size=24, mode="keep_ratio", image_format=image_format)
        made.append(Sample(f"a-{number:03d}_B", picture.data, image_format, [f"caption {number}, «ünïcode»\n", "another"], [], [], "",
                           picture.width, picture.height, extras={"source": "drawn"}))
    return made


@pytest.fixture(scope="module")
def ours(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("interop") / "data", name="interop", sources=[], readme="Drawn.", splits={"train": samples})


def pixels_of(sample: Sample) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(sample.image)).convert("RGB"))


def test_webdataset_finds_every_file_of_every_sample(samples: list[Sample], ours: Dataset) -> None:
    import webdataset

    found = list(webdataset.WebDataset(str(ours.folder / "train" / "00000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in found] == [sample.key for sample in samples]
    assert [sample.get("jpg", sample.get("png")) for sample in found] == [sample.image for sample in samples]
    assert [sample["txt"].decode() for sample in found] == [sample.captions[0] for sample in samples]
    assert [json.loads(sample["json"])["captions"] for sample in found] == [sample.captions for sample in samples]


def test_webdataset_decodes_every_picture_and_caption(samples: list[Sample], ours: Dataset) -> None:
    import webdataset

    pairs = webdataset.WebDataset(str(ours.folder / "train" / "00000.tar"), shardshuffle=False).decode("pil").to_tuple("jpg;png", "txt")
    for sample, (picture, caption) in zip(samples, pairs, strict=True):
        assert caption == sample.captions[0]
        np.testing.assert_array_equal(np.asarray(picture), pixels_of(sample))


READ_WITH_OPEN_CLIP = """
import hashlib, json, sys
import numpy as np, torch
from open_clip_train.data import get_wds_dataset
from open_clip_train.params import parse_args

tar, captions = sys.argv[1], json.loads(sys.argv[2])
args = parse_args(["--train-data", tar, "--train-num-samples", str(len(captions)), "--val-data", tar, "--val-num-samples", str(len(captions)),
                   "--dataset-type", "webdataset", "--batch-size", "16", "--workers", "0"])
args.world_size = 1
for is_train in (True, False):
    info = get_wds_dataset(args, lambda picture: torch.from_numpy(np.array(picture)), is_train=is_train,
                           tokenizer=lambda caption: [torch.tensor(captions.index(caption))])
    pairs = [(int(number), hashlib.sha256(picture.numpy().tobytes()).hexdigest())
             for pictures, numbers in info.dataloader for picture, number in zip(pictures, numbers)]
    print(json.dumps(pairs))
"""


@pytest.fixture(scope="module")
def older_webdataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What open_clip's training asks for: it cannot read any tar with webdataset 1.0. Skipped where it cannot be fetched, but not in CI."""
    package = Package("pip", "webdataset", "0.2.86", "843a2b57c6356ebba25e811adf38a476da8e176f1b192f8bd5c8270daf1a6989", "BSD-3-Clause")
    try:
        return fetch(package, tmp_path_factory.mktemp("older"))
    except DataError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"webdataset 0.2.86 cannot be fetched: {error}")


@pytest.mark.slow
def test_open_clips_pipelines_of_training_and_validation_read_every_pair_once(samples: list[Sample], ours: Dataset, older_webdataset: Path) -> None:
    captions = [sample.captions[0] for sample in samples]
    done = subprocess.run([sys.executable, "-c", READ_WITH_OPEN_CLIP, str(ours.folder / "train" / "00000.tar"), json.dumps(captions)],
                          env=os.environ | {"PYTHONPATH": str(older_webdataset)}, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    expected = [[number, hashlib.sha256(pixels_of(sample).tobytes()).hexdigest()] for number, sample in enumerate(samples)]
    trained, validated = (json.loads(line) for line in done.stdout.splitlines())
    assert sorted(trained) == validated == expected


def read_theirs() -> Iterator[tuple[TarSample, dict[str, Any]]]:
    stats = json.loads((THEIRS / "00000_stats.json").read_text())
    for sample in read_shard(THEIRS / "00000.tar", expected_count=stats["successes"]):
        fields, num_null = read_json(sample.members["json"])
        assert not num_null
        yield sample, fields


def test_every_sample_of_an_img2dataset_shard_is_read_with_its_row() -> None:
    rows = {row["key"]: row for row in parquet.read_table(THEIRS / "00000.parquet").to_pylist()}
    kept = {key for key, row in rows.items() if row["status"] == "success"}
    found = {sample.key: (sample, fields) for sample, fields in read_theirs()}
    assert (len(rows), len(kept)) == (18, 16)
    assert found.keys() == kept
    for key, (sample, fields) in found.items():
        assert not sample.rejected
        assert sample.members.keys() == {"jpg", "txt", "json"}
        assert fields == rows[key]
        assert sample.members["txt"].decode() == rows[key]["caption"]
        header = read_header(sample.members["jpg"])
        assert (header.format, header.width, header.height) == ("JPEG", rows[key]["width"], rows[key]["height"])
        assert decode_image(sample.members["jpg"], size=64).std() > 5
    assert {row["status"] for row in rows.values()} == {"success", "failed_to_download", "failed_to_resize"}


def test_an_img2dataset_shard_that_a_killed_job_left_is_refused(tmp_path: Path) -> None:
    """Cut where a member ends: webdataset reads what is there and says nothing."""
    members = list(list_members(THEIRS / "00000.tar"))
    end = members[8].offset + members[8].size + -members[8].size % 512
    cut = tmp_path / "00000.tar"
    cut.write_bytes((THEIRS / "00000.tar").read_bytes()[:end])
    with pytest.raises(ShardError, match="ends without its two zero blocks"):
        list(read_shard(cut))


def test_what_img2dataset_hashes_is_what_was_downloaded() -> None:
    """Its `sha256` is of the original file, not of the stored one: nothing of ours may compare it with the shard's bytes."""
    assert all(hashlib.sha256(sample.members["jpg"]).hexdigest() != fields["sha256"] for sample, fields in read_theirs())
