"""Clips: which frames, the same for all workers; headers checked before a decoder; damaged ones left out by name; prepared from files and folders."""

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flm_scale.config import AugmentConfig, DataConfig, Run
from flm_scale.data import clips
from flm_scale.data.augment import decode_augmented
from flm_scale.data.clips import decode_clip, decode_sample, encode_clip, fit_clip, middle_frame, read_clip_header, spread
from flm_scale.data.images import ImageError
from flm_scale.data.motions import FRAMES, MOTIONS, moved
from flm_scale.data.order import keyed_rng
from flm_scale.data.prepare.finish import finish
from flm_scale.data.prepare.inputs import open_inputs
from flm_scale.data.prepare.rewrite import read_table
from flm_scale.data.prepare.spec import FilterConfig, ImageConfig, InputConfig, Spec
from flm_scale.data.prepare.stages import plan_work, prepare_shard
from flm_scale.data.reshard import reshard
from flm_scale.data.shards import Dataset, read_committed_shard
from flm_scale.data.subset import filter_dataset
from flm_scale.data.verify import verify
from flm_scale.errors import ConfigError
from flm_scale.opening import open_data
from tests.data.test_loader import assert_equal, loader_of
from tests.moving import clip_set, damaged, frames_of
from tests.synthetic import tiny_run

LEVELS = [20 * number for number in range(12)]


def grey_clip(*, side: int = 32) -> bytes:
    """Twelve frames, each of one grey that says its number."""
    return encode_clip(np.full((side, side, 3), level, np.uint8) for level in LEVELS)


def numbers_of(pixels: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 20) for frame in pixels]


@pytest.mark.parametrize(("frames", "expected"), [(1, [6]), (2, [3, 9]), (4, [1, 4, 7, 10]), (12, list(range(12))),
                                                  (24, [n // 2 for n in range(24)])])
def test_frames_are_the_middles_of_equal_pieces_of_the_clip(frames: int, expected: list[int]) -> None:
    assert spread(12, frames) == expected
    pixels = decode_clip(grey_clip(), size=8, frames=frames)
    assert pixels.shape == (frames, 3, 8, 8)
    assert numbers_of(pixels) == expected


def test_a_run_on_pictures_sees_the_frame_in_the_middle() -> None:
    assert decode_sample(grey_clip(), size=8).shape == (3, 8, 8)
    assert numbers_of(decode_sample(grey_clip(), size=8)[None]) == numbers_of(middle_frame(grey_clip())[None]) == [6]


def test_all_frames_of_a_clip_are_cut_mirrored_and_changed_alike() -> None:
    rng = np.random.default_rng(0)
    still = encode_clip([np.kron(rng.integers(0, 256, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)] * 4)
    plain, augment = decode_sample(still, size=24, frames=4), AugmentConfig(crop_scale=(0.2, 0.5), flip=True, randaugment_layers=2)
    for key in range(4):
        changed = decode_augmented(still, size=24, frames=4, augment=augment, rng=keyed_rng("augment", key))
        assert np.abs(changed.astype(int) - changed[0]).max() <= 12, "no more than the codec's own differences"
        assert np.abs(changed.astype(int) - plain).mean() > 10


def patched(box: bytes, offset: int, form: str, *values: int) -> Callable[[bytes], bytes]:
    """Return what writes other numbers behind the name of a box."""
    def change(clip: bytes) -> bytes:
        at = clip.index(box) + 4 + offset
        new = struct.pack(form, *values)
        return clip[:at] + new + clip[at + len(new):]

    return change


HOSTILE = {
    "no clip": (lambda clip: b"\x89PNG" + clip, "format"), "cut": (lambda clip: clip[:len(clip) // 2], "header"),
    "cut at the end": (lambda clip: clip[:-1], "header"), "another codec": (patched(b"stsd", 12, ">4s", b"rle "), "format"),
    "large": (patched(b"stsd", 40, ">HH", 60_000, 60_000), "pixels"), "empty": (patched(b"stsd", 40, ">HH", 0, 0), "pixels"),
    "many frames": (patched(b"stsz", 8, ">I", 2**31), "frames"), "fragments": (patched(b"stsz", 8, ">I", 0), "header"),
    "more frames than there are": (patched(b"stsz", 8, ">I", 13), "damaged"), "another size": (patched(b"stsd", 40, ">HH", 48, 48), "damaged"),
    "a box of no size": (patched(b"mdia", -8, ">I", 4), "header"), "noise": (damaged, "damaged"),
    "long boxes": (patched(b"mdia", -8, ">I", 2**32 - 1), "header"), "no video": (patched(b"hdlr", 8, ">4s", b"soun"), "header"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_wrong_with_a_clip_is_one_line_and_one_word(name: str) -> None:
    change, reason = HOSTILE[name]
    with pytest.raises(ImageError) as raised:
        decode_sample(change(encode_clip(frames_of("left", frames=12))), size=16, frames=12)
    assert raised.value.reason == reason
    assert len(str(raised.value).splitlines()) == 1


def test_headers_are_refused_before_any_decoder_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clips, "_frames", lambda *_: pytest.fail("decoded"))
    for name, (change, reason) in HOSTILE.items():
        if reason != "damaged":
            with pytest.raises(ImageError):
                decode_sample(change(grey_clip()), size=16, frames=2), name


def test_a_clip_is_scaled_for_storage_and_else_keeps_its_bytes() -> None:
    clip = encode_clip([np.asarray(Image.fromarray(frame).resize((96, 64))) for frame in frames_of("left", frames=6)], rate=6)
    kept = fit_clip(clip, size=64, mode="keep_ratio", pass_through=True)
    assert kept.data == clip
    smaller = fit_clip(clip, size=33, mode="keep_ratio", pass_through=True)
    assert (smaller.width, smaller.height, smaller.original_width, smaller.original_height) == (50, 32, 96, 64)
    header = read_clip_header(smaller.data)
    assert (header.width, header.height, header.frames, header.seconds) == (50, 32, 6, 1.0)
    assert fit_clip(clip, size=33, mode="keep_ratio").data == smaller.data
    assert np.abs(decode_clip(smaller.data, size=16, frames=3).astype(int) - decode_clip(clip, size=16, frames=3)).mean() < 6


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two MP4s, a folder of frames, one of several sizes, a damaged MP4, and a picture that is none of them."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "a.mp4").write_bytes(grey_clip())
    (folder / "b.mp4").write_bytes(damaged(encode_clip(frames_of("left"))))
    (folder / "sub").mkdir()
    (folder / "sub/c.mp4").write_bytes(grey_clip(side=64))
    for name, sides in (("d.v1", [32] * 4), ("e", [32, 16])):
        (folder / name).mkdir()
        for number, side in enumerate(sides):
            Image.new("RGB", (side, side), (40 * number,) * 3).save(folder / name / f"{number:03d}.png")
    for key in ("a", "b", "sub/c", "d.v1", "e"):
        (folder / f"{key}.txt").write_text(f"caption of {key}\n")
    Image.new("RGB", (32, 32)).save(folder / "picture.png")
    return folder


def prepared(given: Path, folder: Path, **changes: object) -> Dataset:
    spec = Spec(input=InputConfig(kind="folder", clips=True), image=ImageConfig(size=32), filter=FilterConfig(duplicates=False)).replace(**changes)
    inputs = open_inputs(spec, [given])
    for work in plan_work(spec, inputs):
        prepare_shard(folder, spec, inputs, work, attempt=0)
    return finish(folder, spec, inputs, [read_committed_shard(folder, work.name) for work in plan_work(spec, inputs)])


def test_clips_are_prepared_from_files_and_from_folders_of_frames(clip_folder: Path, tmp_path: Path) -> None:
    dataset = prepared(clip_folder, tmp_path / "data")
    table = read_table(dataset.folder, dataset.shards()[0]).to_pydict()
    assert dict(zip(table["url"], [word or "success" for word in table["error_message"]], strict=True)) == {
        "a.mp4": "success", "b.mp4": "damaged", "d.v1": "success", "e": "size", "sub/c.mp4": "success"}
    index = dataset.index("train")
    assert index.holds_clips
    assert list(index.captions) == [["caption of a"], ["caption of d.v1"], ["caption of sub/c"]]
    assert index.values(1, ["frames", "seconds", "width"]) == [4, 0.5, 32]
    assert index.read_image(0) == (clip_folder / "a.mp4").read_bytes()
    assert numbers_of(decode_sample(index.read_image(1), size=32, frames=4)) == [0, 2, 4, 6]
    assert read_clip_header(index.read_image(2))[:3] == (32, 32, 12)
    assert not verify(dataset)
    assert json.loads((tmp_path / "data/dataset.json").read_text())["preparation"]["versions"]["av"]
    again = prepared(clip_folder, tmp_path / "again")
    assert again.root == dataset.root
    # Tars of clips, as video2dataset writes them, are an input too, and may stay as they are.
    for adopt in (False, True):
        given = InputConfig(kind="shards", clips=True, adopt=adopt)
        taken = prepared(dataset.folder / "train", tmp_path / f"tars{adopt}", input=given, image=ImageConfig(size=32) if not adopt else ImageConfig())
        assert [taken.index("train").read_image(number) for number in range(3)] == [index.read_image(number) for number in range(3)]
        assert taken.index("train").holds_clips


def test_what_would_take_clips_for_pictures_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"filter.near_duplicates compares single pictures"):
        Spec(input=InputConfig(kind="folder", clips=True), filter=FilterConfig(near_duplicates=True))
    with pytest.raises(ConfigError, match=r"input.clips does not go with input.kind coco"):
        InputConfig(kind="coco", clips=True)
    assert "clips" not in Spec().decisive()["input"], "what was begun before there were clips goes on"


def clips_run(dataset: Dataset, *, frames: int = 4, workers: int = 0) -> Run:
    run = tiny_run(batch=tiny_run().batch.replace(micro_batches=2, images=8))
    augment = AugmentConfig(crop_scale=(0.5, 1.0))
    return run.replace(vision=run.vision.replace(frames=frames), data=DataConfig(path=dataset.folder, workers=workers, augment=augment))


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_batches_of_clips_are_the_same_for_any_number_of_workers_and_damaged_ones_are_named(tmp_path: Path) -> None:
    dataset = clip_set(tmp_path / "data", bad=frozenset({3, 17}))
    steps = [[batch for _ in range(3) for batch in loader_of(dataset, clips_run(dataset, workers=workers)).next_step()] for workers in (0, 2)]
    assert_equal(*steps)
    loader = loader_of(dataset, clips_run(dataset))
    batches = [batch for _ in range(2) for batch in loader.next_step()]
    assert sorted(key for batch in batches for key in batch.keys) == [f"{number:04d}" for number in range(32)]
    assert sorted(key for batch in batches for key in batch.bad_keys) == ["0003", "0017"]
    for batch in batches:
        assert batch.state.rows.shape == (8, 4, 3, 16, 16)
        for row, key in enumerate(batch.keys):
            assert bool((batch.state.rows[row] == 128).all()) == (key in batch.bad_keys)
    assert sum(int(batch.part_counts.sum()) for batch in batches) < sum(
        int(batch.part_counts.sum()) for batch in loader_of(clip_set(tmp_path / "whole"), clips_run(dataset)).next_step()) * 2


def test_clips_stay_clips_when_a_dataset_is_filtered_or_written_into_other_shards(tmp_path: Path) -> None:
    dataset = clip_set(tmp_path / "data")
    subset = filter_dataset(dataset, tmp_path / "subset", where=["seconds >= 0.5", "frames == 4"])
    written = reshard(subset, tmp_path / "written", samples_per_shard=10, seed=1)
    assert len(written.index("train")) == 32
    assert subset.index("train").holds_clips
    assert written.index("train").holds_clips
    key = written.index("train").keys[0]
    assert written.index("train").read_image(0) == dataset.index("train").read_image(list(dataset.index("train").keys).index(key))


def test_clips_are_asked_of_a_dataset_that_has_them(toy_dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vision.frames \(4\): dataset .* holds pictures"):
        open_data(clips_run(toy_dataset))
    with pytest.raises(ImageError, match=r"is no MP4, and vision.frames \(2\) needs clips"):
        decode_sample(toy_dataset.index("train").read_image(0), size=8, frames=2)
    middles = loader_of(dataset := clip_set(tmp_path / "data"), clips_run(dataset, frames=1)).next_step()
    assert all(batch.state.rows.shape == (8, 3, 16, 16) and not batch.bad_keys for batch in middles)
    assert all(torch.is_tensor(batch.state.rows) for batch in middles)


def test_the_frame_in_the_middle_of_a_demo_clip_is_the_picture_whatever_moves() -> None:
    picture = np.full((64, 64, 3), 200, np.uint8)
    picture[20:40, 25:35] = (0, 128, 128)
    centres, areas = {}, {}
    for motion, direction in MOTIONS.items():
        frames = moved(picture, direction)
        assert len(frames) == FRAMES
        assert np.array_equal(frames[FRAMES // 2], picture)
        assert np.abs(decode_clip(encode_clip(frames), size=64, frames=1)[0].transpose(1, 2, 0).astype(int) - picture).mean() < 3
        masks = [np.argwhere((frame != 200).any(-1)) for frame in (frames[0], frames[-1])]
        centres[motion], areas[motion] = masks[1].mean(0) - masks[0].mean(0), len(masks[1]) / len(masks[0])
    assert centres["moves to the left"][1] < -10
    assert centres["moves to the right"][1] > 10
    assert centres["moves up"][0] < -10
    assert centres["moves down"][0] > 10
    assert areas["grows"] > 2
    assert areas["shrinks"] < 0.5
    assert areas["stays still"] == 1
    assert not centres["stays still"].any()


def test_a_clip_in_a_picture_is_read_by_nobody() -> None:
    """Only MP4's own demuxer is ever asked: a playlist, or a picture named MP4, is no clip."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    for content in (buffer.getvalue(), b"#EXTM3U\nfile:///etc/passwd\n"):
        with pytest.raises(ImageError, match="no MP4"):
            decode_clip(content, size=8, frames=2)
