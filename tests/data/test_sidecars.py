"""Token ids beside the shards: what the tokenizer says, bound to tokenizer, library, captions and themselves."""

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from itertools import count, pairwise
from pathlib import Path

import numpy as np
import pytest

from flm_scale.cli import main
from flm_scale.config import BatchConfig, DataConfig
from flm_scale.data import shards
from flm_scale.data.loader import Loader, one_pass
from flm_scale.data.reshard import reshard
from flm_scale.data.shards import Dataset, Sample, open_dataset, write_dataset
from flm_scale.data.sidecars import TokenIds, folder_of, read_sidecar, write_sidecar, write_sidecars
from flm_scale.data.subset import filter_dataset
from flm_scale.data.tokens import LmTokenizer, Tokenizer, train_tokenizer
from flm_scale.data.verify import verify
from flm_scale.errors import DataError
from flm_scale.objectives.ar import Ar
from tests.data.killed import is_killed_before_change
from tests.data.lm_folder import write_lm_folder
from tests.synthetic import tiny_run

CAPTIONS = [["a red circle", "", "the circle that you see here is red"], ["  "], [], ["a blue square"], ["un café noir"]]


def write(folder: Path, captions: list[list[str]], *, words: str = "the circle that you see here is red, a blue square, un café noir") -> Dataset:
    """25 pictures in three train shards, three in val; a tokenizer, but no token ids."""
    def sample(number: int, split: str) -> Sample:
        return Sample(f"{split}{number}", b"picture", "png", captions[number % len(captions)], [], [], "", 8, 8)

    splits = {"train": [sample(number, "t") for number in range(25)], "val": [sample(number, "v") for number in range(3)]}
    dataset = write_dataset(folder, name="captions", sources=[], splits=splits, readme="")
    train_tokenizer(words.split() * 3, vocab_size=60, model_file=dataset.tokenizer_file)
    tokenizer = Tokenizer(dataset.tokenizer_file)
    dataset.set_tokenizer(tokenizer.fingerprint, tokenizer.vocab_size)
    return dataset


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SAMPLES_PER_SHARD", 10)
        dataset = write(tmp_path_factory.mktemp("sidecars") / "data", CAPTIONS)
        write_sidecars(dataset, Tokenizer(dataset.tokenizer_file))
        return dataset


@pytest.fixture
def dataset(whole: Dataset, tmp_path: Path) -> Dataset:
    shutil.copytree(whole.folder, tmp_path / "data")
    return open_dataset(tmp_path / "data")


def tokenizer_of(dataset: Dataset) -> Tokenizer:
    return Tokenizer(dataset.tokenizer_file)


def tokens_folder(dataset: Dataset) -> Path:
    return folder_of(dataset.folder, dataset.tokenizer_fingerprint)


def files_of(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("max_length", [5, 60])
def test_token_ids_are_the_tokenizers_of_every_caption_with_content(whole: Dataset, max_length: int) -> None:
    tokenizer = tokenizer_of(whole)
    tokens = TokenIds(whole, "train", tokenizer, max_length=max_length)
    encoded = [[ids for text in CAPTIONS[number % 5] if len(ids := tokenizer.encode(text, max_length)) > 2] for number in range(25)]
    assert [[ids.tolist() for ids in tokens[image]] for image in range(len(tokens))] == encoded
    assert tokens.starts is not None
    assert np.diff(tokens.starts).tolist() == [2, 0, 0, 1, 1] * 5
    assert np.minimum(tokens.lengths, max_length).tolist() == [len(ids) for captions in encoded for ids in captions]


def test_one_caption_a_picture_needs_no_starts(tmp_path: Path) -> None:
    dataset = write(tmp_path / "data", [["a red circle"]])
    write_sidecars(dataset, tokenizer_of(dataset))
    tokens = TokenIds(dataset, "val", tokenizer_of(dataset))
    assert tokens.starts is None
    assert [len(tokens[image]) for image in range(3)] == [1, 1, 1]
    assert not list(tokens_folder(dataset).glob("*.starts.*"))


def test_a_large_vocabulary_gets_wider_numbers(dataset: Dataset) -> None:
    tokenizer, (shard, *_) = tokenizer_of(dataset), dataset.shards("train")
    narrow = read_sidecar(dataset.folder, shard, tokenizer)
    assert (tokenizer.canary, narrow.ids.dtype) == (tokenizer.canary, np.uint16)
    tokenizer.vocab_size = 70_000
    write_sidecar(dataset.folder, shard, tokenizer)
    wide = read_sidecar(dataset.folder, shard, tokenizer)
    assert wide.ids.dtype == np.uint32
    assert wide.ids.tolist() == narrow.ids.tolist()


def test_opening_encodes_nothing_but_the_canary(whole: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    encode_all = Tokenizer.encode_all
    monkeypatch.setattr(Tokenizer, "encode_all", lambda self, texts, **options: seen.extend(texts) or encode_all(self, texts, **options))
    tokens = TokenIds(whole, "train", tokenizer_of(whole))
    assert [len(tokens[image]) for image in range(25)] == [2, 0, 0, 1, 1] * 5
    assert len(set(seen)) > 900
    assert not set(seen) & {text for texts in CAPTIONS for text in texts if len(text) > 2}


def test_token_ids_go_to_another_process_without_their_maps(whole: Dataset) -> None:
    tokens = TokenIds(whole, "train", tokenizer_of(whole), max_length=5)
    copy = pickle.loads(pickle.dumps(tokens))
    assert [ids.tolist() for ids in copy[0]] == [ids.tolist() for ids in tokens[0]]
    assert copy.lengths.tolist() == tokens.lengths.tolist()


def test_a_kill_at_any_moment_costs_no_more_than_a_second_run(whole: Dataset, tmp_path: Path) -> None:
    """Whoever opens what is left reads whole token ids or is told that there are none."""
    expected = files_of(tokens_folder(whole))
    for number in count():
        dataset = open_dataset(shutil.copytree(whole.folder, tmp_path / str(number), ignore=shutil.ignore_patterns("tokens")))
        tokenizer = tokenizer_of(dataset)
        is_killed = is_killed_before_change(number, lambda: write_sidecars(dataset, tokenizer))  # noqa: B023 - called at once
        for split in dataset.splits:
            with suppress(DataError):
                tokens = TokenIds(dataset, split, tokenizer)
                assert sum(len(tokens[image]) for image in range(len(tokens))) == len(tokens.lengths)
        write_sidecars(dataset, tokenizer, workers=2)
        assert files_of(tokens_folder(dataset)) == expected
        if not is_killed:
            break
    assert number > 15


def test_missing_token_ids_name_the_command_that_writes_them(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(dataset.folder / "tokens")
    with pytest.raises(DataError, match=rf"no token ids of 'train'.*: flm tokenizer encode {dataset.folder}"):
        TokenIds(dataset, "train", tokenizer_of(dataset))
    assert main(["tokenizer", "encode", str(dataset.folder)]) == 0
    assert ": token ids of train (20 captions), val (2 captions) by the tokenizer " in capsys.readouterr().out
    assert len(TokenIds(dataset, "train", tokenizer_of(dataset))) == 25


def test_a_tokenizer_that_is_trained_anew_takes_its_old_token_ids_away(dataset: Dataset, model: Path) -> None:
    old = tokens_folder(dataset)
    encode(dataset, model)
    assert main(["tokenizer", "train", str(dataset.folder), "--vocab-size", "30"]) == 0
    again = open_dataset(dataset.folder)
    assert not old.exists()
    assert len(TokenIds(again, "train", LmTokenizer(model))) == 25
    assert verify(again) == []
    assert len(TokenIds(again, "val", tokenizer_of(again))) == 3


def test_another_librarys_cuts_are_refused_naming_both(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of the tokenizer is the same; what reads it joins one pair of letters less."""
    before = tokenizer_of(dataset).canary
    encode_all = Tokenizer.encode_all

    def cuts_otherwise(self: Tokenizer, texts: list[str], **options: int) -> list[list[int]]:
        return [ids if "red" not in text else [*ids[:-2], self.unk_id, *ids[-2:]]
                for text, ids in zip(texts, encode_all(self, texts, **options), strict=True)]

    monkeypatch.setattr(Tokenizer, "encode_all", cuts_otherwise)
    after = tokenizer_of(dataset).canary
    with pytest.raises(DataError, match=f"canary.* {before[:12]}; .* {after[:12]}; write them again: flm tokenizer encode"):
        TokenIds(dataset, "train", tokenizer_of(dataset))
    write_sidecars(dataset, tokenizer_of(dataset))
    assert len(TokenIds(dataset, "train", tokenizer_of(dataset))) == 25


def flipped(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def edited(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no sidecar": (lambda tokens: (tokens / "train/00001.arrow").unlink(), r"train/00001\.arrow cannot be read \(.*No such file"),
    "cut sidecar": (lambda tokens: (tokens / "train/00001.arrow").write_bytes((tokens / "train/00001.arrow").read_bytes()[:300]),
                    r"train/00001\.arrow cannot be read"),
    "another shard's": (lambda tokens: shutil.copy(tokens / "val/00000.arrow", tokens / "train/00001.arrow"),
                        r"train/00001\.arrow are of the captions \(index\) [0-9a-f]{12}; the dataset and this process have [0-9a-f]{12}"),
    "flipped id": (lambda tokens: flipped(tokens / "train/00001.arrow", (tokens / "train/00001.arrow").read_bytes().index(b"\1\0", 900)),
                   r"train/00001\.arrow cannot be read"),
    "flipped length": (lambda tokens: flipped(tokens / "train.lengths.u16", 30), r"token ids of train/00001\.tar are of other lengths"),
    "cut lengths": (lambda tokens: (tokens / "train.lengths.u16").write_bytes(b"\3\0"), r"lengths\.u16 cannot be read \(2 bytes; 40 are stated"),
    "no starts": (lambda tokens: (tokens / "train.starts.i64").unlink(), r"train\.starts\.i64 cannot be read"),
    "moved start": (lambda tokens: flipped(tokens / "train.starts.i64", 8 * 14), r"token ids of train/00001\.tar are of other lengths"),
    "falling start": (lambda tokens: flipped(tokens / "train.starts.i64", 8 * 13 + 6), "lengths of 'train' are not those of captions"),
    "empty length": (lambda tokens: (tokens / "train.lengths.u16").write_bytes(bytes(40)), "lengths of 'train' are not those of captions"),
    "other counts": (lambda tokens: edited(tokens / "train.json", images=24), "has 24 images and 20 captions; the split has 25 images"),
    "other tokenizer": (lambda tokens: edited(tokens / "train.json", tokenizer="f" * 64), "of the tokenizer ffffffffffff; the dataset and this"),
    "other shards": (lambda tokens: edited(tokens / "train.json", shards="f" * 64), r"of the shards \(shards\.parquet\) ffffffffffff"),
    "unknown statement": (lambda tokens: edited(tokens / "train.json", more=1), r"train\.json is damaged"),
    "no JSON": (lambda tokens: (tokens / "train.json").write_text("{"), r"train\.json is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_or_foreign_token_ids_are_refused_by_name(dataset: Dataset, damage: str) -> None:
    """By the loader, at the latest when it needs them, and by `flm data verify`; `flm tokenizer encode` mends them."""
    change, message = DAMAGES[damage]
    change(tokens_folder(dataset))
    with pytest.raises(DataError, match=message) as caught:
        TokenIds(dataset, "train", tokenizer_of(dataset))[12]
    assert "\n" not in str(caught.value)
    assert str(caught.value) in verify(dataset)
    write_sidecars(dataset, tokenizer_of(dataset))
    assert verify(dataset) == []


def test_ids_beyond_the_vocabulary_are_refused(dataset: Dataset) -> None:
    tokenizer, (shard, *_) = tokenizer_of(dataset), dataset.shards("train")
    assert tokenizer.canary
    tokenizer.vocab_size = 20
    with pytest.raises(DataError, match="not what they state"):
        read_sidecar(dataset.folder, shard, tokenizer)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model's folder."""
    return write_lm_folder(tmp_path_factory.mktemp("model") / "gpt2")


def encode(dataset: Dataset, model: Path, *more: str) -> None:
    assert main(["tokenizer", "encode", str(dataset.folder), "--tokenizer", str(model), *more]) == 0


def test_a_language_models_token_ids_stand_beside_the_datasets_own(dataset: Dataset, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, lm = files_of(dataset.folder), LmTokenizer(model)
    encode(dataset, model, "--workers", "2")
    assert capsys.readouterr().out == (f"{folder_of(dataset.folder, lm.fingerprint)}: token ids of train (20 captions), val (2 captions) by {model} "
                                       f"{lm.fingerprint[:12]}\n")
    again = open_dataset(dataset.folder)
    assert (again.root, again.tokenizer_fingerprint) == (dataset.root, dataset.tokenizer_fingerprint)
    after = files_of(dataset.folder)
    assert {name: after[name] for name in before} == before
    assert {name.rpartition("/")[0] for name in after.keys() - before} == {f"tokens/{lm.fingerprint[:8]}{split}" for split in ("", "/train", "/val")}
    tokens = TokenIds(again, "train", lm)
    encoded = [[lm.encode(text, 100) for text in CAPTIONS[number % 5] if text.strip()] for number in range(25)]
    assert [[ids.tolist() for ids in tokens[image]] for image in range(len(tokens))] == encoded
    assert len(TokenIds(again, "train", tokenizer_of(again))) == 25


def test_a_dataset_without_a_tokenizer_takes_a_language_models(tmp_path: Path, model: Path) -> None:
    splits = {"train": [Sample("0", b"picture", "png", ["a red circle"], [], [], "", 8, 8)]}
    dataset = write_dataset(tmp_path / "data", name="bare", sources=[], splits=splits, readme="")
    encode(dataset, model)
    lm = LmTokenizer(model)
    assert [ids.tolist() for ids in TokenIds(open_dataset(dataset.folder), "train", lm)[0]] == [lm.encode("a red circle", 9)]


def test_a_killed_encoding_for_a_language_model_goes_on_where_it_was(whole: Dataset, model: Path, tmp_path: Path) -> None:
    copies = [open_dataset(shutil.copytree(whole.folder, tmp_path / name)) for name in ("undisturbed", "killed")]
    lm = LmTokenizer(model)
    write_sidecars(copies[0], lm)
    undisturbed, killed = (folder_of(dataset.folder, lm.fingerprint) for dataset in copies)
    assert is_killed_before_change(9, lambda: write_sidecars(copies[1], lm))
    there = {file: file.stat().st_ino for file in killed.rglob("*.arrow")}
    assert 0 < len(there) < len(list(undisturbed.rglob("*.arrow")))
    with pytest.raises(DataError, match=f"flm tokenizer encode {copies[1].folder} --tokenizer {model}$"):
        TokenIds(copies[1], "train", lm)
    encode(copies[1], model)
    assert files_of(killed) == files_of(undisturbed)
    assert {file: file.stat().st_ino for file in there} == there


def test_a_swapped_language_models_tokenizer_finds_no_ids_and_says_whose_there_are(dataset: Dataset, tmp_path: Path) -> None:
    model = write_lm_folder(tmp_path / "model")
    encode(dataset, model)
    before, own = LmTokenizer(model).fingerprint[:8], dataset.tokenizer_fingerprint[:8]
    (model / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes() + b" ")
    after = LmTokenizer(model).fingerprint[:12]
    with pytest.raises(DataError, match=rf"tokenizer {after} \(there is: {', '.join(sorted([before, own]))}\); write them: .* --tokenizer {model}$"):
        TokenIds(dataset, "train", LmTokenizer(model))


@pytest.mark.parametrize("damage", ["cut sidecar", "flipped length", "no JSON"])
def test_damaged_ids_of_a_language_model_are_refused_and_mended(dataset: Dataset, model: Path, damage: str) -> None:
    encode(dataset, model)
    lm, (change, message) = LmTokenizer(model), DAMAGES[damage]
    change(folder_of(dataset.folder, lm.fingerprint))
    with pytest.raises(DataError, match=rf"{message}.*; write them again: flm tokenizer encode {dataset.folder} --tokenizer {model}$"):
        TokenIds(dataset, "train", lm)[12]
    encode(dataset, model)
    assert len(TokenIds(dataset, "train", lm)[13]) == 1


def test_what_is_made_of_a_dataset_leaves_a_language_models_ids_behind(dataset: Dataset, model: Path, tmp_path: Path) -> None:
    """Verified, filtered and cut anew it is as ever, and the command writes them for what was made."""
    made = [filter_dataset(dataset, tmp_path / "plain filtered", captions_at_least=1), reshard(dataset, tmp_path / "plain cut", samples_per_shard=7)]
    encode(dataset, model)
    assert verify(dataset) == []
    again = [filter_dataset(dataset, tmp_path / "filtered", captions_at_least=1), reshard(dataset, tmp_path / "cut", samples_per_shard=7)]
    lm = LmTokenizer(model)
    for one, other in zip(made, again, strict=True):
        assert files_of(one.folder) == files_of(other.folder)
        with pytest.raises(DataError, match="has no token ids"):
            TokenIds(other, "train", lm)
        encode(other, model)
        assert verify(open_dataset(other.folder)) == []
        assert len(TokenIds(other, "train", lm).lengths) == 20


def test_the_loader_feeds_a_language_models_ids(toy_dataset: Dataset, model: Path, tmp_path: Path) -> None:
    """In training and in one pass: the texts of a batch are the captions of its pictures."""
    dataset = open_dataset(shutil.copytree(toy_dataset.folder, tmp_path / "data"))
    encode(dataset, model)
    lm = LmTokenizer(model)
    run = tiny_run("ar", batch=BatchConfig(micro_batches=4, text_tokens=200, captions=8, images=5))
    run = run.replace(data=DataConfig(path=dataset.folder, workers=0), text=run.text.replace(vocab_size=lm.vocab_size, max_length=60))

    loader, index = Loader(run, [dataset], lm, Ar()), dataset.index("train", "val")
    captions = dict(zip(index.keys, index.captions, strict=True))
    assert loader.state["tokenizer"] == lm.fingerprint[:16]
    seen = 0
    for batch in [*loader.next_step(), *one_pass(run, dataset, "val", lm, Ar())]:
        begins = [0, *batch.state.lengths.cumsum(0).tolist()]
        ids = batch.state.ids.tolist()
        texts = [ids[begin:end] for begin, end in pairwise(begins)]
        expected = [lm.encode(text, 60) for key in batch.keys for text in captions[key]]
        assert sorted(texts) == sorted(expected)
        seen += len(texts)
    assert seen > 20
