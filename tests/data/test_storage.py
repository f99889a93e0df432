"""Datasets in object stores: the same batches as from disk, whatever the network does; one copy of what is mapped; errors in one line."""

import json
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from flm_scale.checkpoint.weights import read_run
from flm_scale.cli import main
from flm_scale.config import DataConfig
from flm_scale.data import storage
from flm_scale.data.loader import one_pass
from flm_scale.data.shards import Dataset, open_dataset
from flm_scale.data.storage import Range, StorageError, Url, local_copy, read_bytes, read_ranges
from flm_scale.errors import ConfigError, DataError
from tests.data.object_store import Proxy, open_store, serve_s3
from tests.data.prepare.server import Server, answer
from tests.data.test_loader import assert_equal, loader_of, parts_of, toy_run
from tests.test_train import lines_of, train

pytestmark = pytest.mark.skipif(not (find_spec("s3fs") and find_spec("moto")), reason="needs s3fs and moto: pip install flm_scale[dev]")
BUCKET = "s3://bucket"


@pytest.fixture(scope="module")
def proxy(toy_dataset: Dataset) -> Iterator[Proxy]:
    """The toy dataset as s3://bucket/data, behind a proxy."""
    from s3fs import S3FileSystem

    with serve_s3() as port, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-of-theirs")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        proxy = Proxy(port)
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        proxy.store = open_store(port)
        proxy.store.mkdir("bucket")
        proxy.store.put(str(toy_dataset.folder), "bucket/data", recursive=True)
        yield proxy
        S3FileSystem.clear_instance_cache()
        proxy.stop()


@pytest.fixture(autouse=True)
def fresh(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache and a proxy that behaves; tries follow each other quickly."""
    monkeypatch.setenv("FLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "WAITS_SECONDS", (0.05,) * 6)
    proxy.reset()


def far(dataset: Dataset) -> Dataset:
    return open_dataset(f"{BUCKET}/data", manifest_hash=dataset.root)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_a_store_that_drops_connections_are_those_from_disk(toy_dataset: Dataset, proxy: Proxy, workers: int) -> None:
    proxy.busy_every, proxy.cut_every = 5, 7
    run = toy_run(toy_dataset)
    here = loader_of(toy_dataset, run)
    there = loader_of(far(toy_dataset), run.replace(data=run.data.replace(path=f"{BUCKET}/data", workers=workers)))
    for _ in range(3):
        assert_equal(here.next_step(), there.next_step())
    assert proxy.faults > 10


def test_every_picture_and_caption_of_an_evaluation_comes_from_the_store(toy_dataset: Dataset, proxy: Proxy) -> None:
    run, parts = toy_run(toy_dataset), parts_of(toy_dataset, toy_run(toy_dataset))
    assert_equal(list(one_pass(run, toy_dataset, "test", *parts)), list(one_pass(run, far(toy_dataset), "test", *parts)))


def test_pictures_are_read_as_ranges_and_the_tar_never_whole(toy_dataset: Dataset, proxy: Proxy) -> None:
    index = far(toy_dataset).index("train")
    index.fetch(range(20))
    heads = [head for head in proxy.requests if "train/00000.tar" in head.partition("\r\n")[0]]
    assert len(heads) == 20
    assert all("range: bytes=" in head.lower() for head in heads)
    assert [index.read_image(number) for number in range(20)] == [toy_dataset.index("train").read_image(number) for number in range(20)]
    assert proxy.asked_for("train/00000.tar") == 20


@pytest.mark.slow
def test_train_and_verify_take_the_url_of_a_dataset(toy_dataset: Dataset, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert train(f"{BUCKET}/data", tmp_path / "there") == train(toy_dataset.folder, tmp_path / "here") == 0
    losses = [[line["loss"] for line in lines_of(tmp_path / name) if "loss" in line] for name in ("there", "here")]
    assert losses[0] == losses[1]
    assert json.loads((tmp_path / "there/run.json").read_text())["data"]["path"] == f"{BUCKET}/data"
    assert read_run(tmp_path / "there").data == read_run(tmp_path / "here").data.replace(path=f"{BUCKET}/data")
    assert main(["data", "verify", f"{BUCKET}/data"]) == main(["data", "verify", f"{BUCKET}/data", "--fast"]) == 0
    assert "every file is as the dataset states" in capfd.readouterr().out


def test_a_shard_that_was_changed_in_the_store_is_refused(toy_dataset: Dataset, proxy: Proxy, capfd: pytest.CaptureFixture) -> None:
    dataset, store = far(toy_dataset), proxy.store
    offset = dataset.index("train").values(3, ["image_offset"])[0] + 40
    content = bytearray(store.cat_file("bucket/data/train/00000.tar"))
    store.pipe_file("bucket/changed/train/00000.tar", bytes(content[:offset] + bytes([content[offset] ^ 1]) + content[offset + 1:]))
    for name in ("dataset.json", "shards.parquet", "tokenizer.model"):
        store.copy(f"bucket/data/{name}", f"bucket/changed/{name}")
    for name in ("index", "val", "test", "tokens"):
        store.copy(f"bucket/data/{name}/", f"bucket/changed/{name}/", recursive=True)
    index = open_dataset(f"{BUCKET}/changed").index("train")
    index.fetch(range(5))
    assert index.read_image(2)
    with pytest.raises(DataError, match=r"s3://bucket/changed/train/00000.tar: sample 000003 is not the picture that the index states"):
        index.read_image(3)
    assert main(["data", "verify", f"{BUCKET}/changed"]) == 2
    assert "shard train/00000.tar has the sha256" in capfd.readouterr().err


def test_an_index_is_copied_once_for_all_and_again_when_it_is_gone(toy_dataset: Dataset, proxy: Proxy, tmp_path: Path) -> None:
    file = Url(f"{BUCKET}/data/index/train/00000.arrow")
    stated = toy_dataset.shards("train")[0].index_sha256
    assert list(far(toy_dataset).index("train").keys) == list(far(toy_dataset).index("train").keys) == list(toy_dataset.index("train").keys)
    first = proxy.asked_for("index/train")
    copy = local_copy(file, sha256=stated)
    assert proxy.asked_for("index/train") == first
    assert {path.parent for path in (copy, local_copy(Url(f"{BUCKET}/data/tokenizer.model")))} == {tmp_path / "cache"}
    copy.unlink()
    assert local_copy(file, sha256=stated).read_bytes() == (toy_dataset.folder / "index/train/00000.arrow").read_bytes()
    assert proxy.asked_for("index/train") > first


def test_an_index_with_other_bytes_than_stated_is_refused_and_not_kept(toy_dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"s3://bucket/data/index/train/00000.arrow has the sha256 .*; the dataset states 0123"):
        local_copy(Url(f"{BUCKET}/data/index/train/00000.arrow"), sha256="0123")
    assert not list((tmp_path / "cache").iterdir())


def test_the_cache_keeps_to_its_size_and_drops_what_was_used_longest_ago(toy_dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, splits = Url(f"{BUCKET}/data/index"), ("train", "val", "test")
    sizes = {split: (toy_dataset.folder / f"index/{split}/00000.arrow").stat().st_size for split in splits}
    monkeypatch.setattr(storage, "CACHE_BYTES", sizes["train"] + sizes["test"])
    monkeypatch.setattr(storage, "IN_USE_SECONDS", 0.0)
    copies = {}
    for split in splits:
        time.sleep(0.02)
        if split == "test":
            local_copy(folder / "train/00000.arrow", sha256=toy_dataset.shards("train")[0].index_sha256)  # in use again
            time.sleep(0.02)
        copies[split] = local_copy(folder / f"{split}/00000.arrow", sha256=toy_dataset.shards(split)[0].index_sha256)
    assert {split for split in splits if copies[split].exists()} == {"train", "test"}


def test_token_ids_that_were_written_anew_are_copied_anew(proxy: Proxy) -> None:
    store, file = proxy.store, Url(f"{BUCKET}/other/ids.arrow")
    store.pipe_file(file, b"the first")
    assert local_copy(file).read_bytes() == b"the first"
    store.pipe_file(file, b"another")
    assert local_copy(file).read_bytes() == b"another"


def test_a_dataset_behind_a_web_server_that_knows_ranges_is_read(toy_dataset: Dataset, proxy: Proxy) -> None:
    proxy.busy_every = 4
    index = open_dataset(f"http://127.0.0.1:{proxy.port}/bucket/data").index("val")
    index.fetch(range(8))
    assert [index.read_image(number) for number in range(8)] == [toy_dataset.index("val").read_image(number) for number in range(8)]
    assert proxy.faults


def test_a_web_server_that_knows_no_ranges_is_refused() -> None:
    server = Server({"/a.tar": answer(b"0123456789")})
    with pytest.raises(StorageError, match=r"/a\.tar: the server sends whole files where a range is asked for"):
        read_ranges([Range(Url(server.url("/a.tar")), 2, 3)])
    server.stop()


@pytest.mark.slow
def test_a_store_that_does_not_come_back_ends_the_run_and_makes_no_bad_pictures(toy_dataset: Dataset, proxy: Proxy,
                                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    run = toy_run(toy_dataset)
    loader = loader_of(far(toy_dataset), run.replace(data=run.data.replace(path=f"{BUCKET}/data", workers=1)))
    monkeypatch.setattr(storage, "WAITS_SECONDS", (0.05,))
    proxy.cut_every = 1
    with pytest.raises(StorageError, match=r"^s3://bucket/data/\S+ cannot be read \(.*\); look at the network, the address and the credentials, "):
        loader.next_step()


@pytest.mark.parametrize(("place", "message"), [
    (f"{BUCKET}/nothing", r"^s3://bucket/nothing/dataset.json cannot be read \(it is not there\); restore the file or build the dataset again$"),
    ("gs://bucket/data", r"^gs://bucket/data/dataset.json cannot be read here \(.*install gcsfs.*\)$"),
    ("s4://bucket/data", r"^s4://bucket/data/dataset.json cannot be read here \(Protocol not known: s4\)$"),
    ("http://127.0.0.1:9/data", r"^http://127.0.0.1:9/data/dataset.json cannot be read \(Cannot connect"),
])
def test_what_cannot_be_had_is_said_in_one_line(place: str, message: str) -> None:
    with pytest.raises((DataError, StorageError), match=message):
        open_dataset(place)


def test_a_url_with_credentials_is_refused_and_they_are_not_repeated() -> None:
    for place in ("s3://somebody:hidden@bucket/data", "https://host/data?X-Amz-Signature=hidden"):
        with pytest.raises(ConfigError, match="must hold no user, password or query") as refused:
            open_dataset(place)
        assert "hidden" not in str(refused.value)


def test_a_dataset_elsewhere_is_not_written_to(toy_dataset: Dataset) -> None:
    with pytest.raises(DataError, match="can be read there but not written to"):
        far(toy_dataset).drop_tokenizer()


def test_paths_and_urls_survive_the_json_of_a_run() -> None:
    config = DataConfig(path=f"{BUCKET}/data", also=(Path("data/coco"), "https://host/sbu"))
    assert DataConfig.model_validate_json(config.model_dump_json()) == config
    assert DataConfig.model_validate_json('{"path": "data/demo"}').path == Path("data/demo")


def test_small_files_on_disk_are_read_where_they_are(toy_dataset: Dataset, tmp_path: Path) -> None:
    file = toy_dataset.folder / "dataset.json"
    assert local_copy(file) == file
    assert read_bytes(file) == file.read_bytes()
    assert not (tmp_path / "cache").exists()
