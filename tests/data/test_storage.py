"""Datasets in object stores: the same batches as from disk, whatever the network does; one copy of what is mapped; errors in one line."""

import json
import os
import time
from collections.abc import Iterator
from importlib.util import find_spec
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Barrier

import pytest

from flm_scale.checkpoint.weights import read_run
from flm_scale.cli import main
from flm_scale.config import DataConfig
from flm_scale.data import ahead, index, loader, shards, storage
from flm_scale.data.ahead import Chunks, machines_of, tasks
from flm_scale.data.loader import Order, one_pass
from flm_scale.data.order import Entry
from flm_scale.data.shards import Dataset, open_dataset
from flm_scale.data.storage import Range, StorageError, Url, forget_range, keep_range, local_copy, read_bytes, read_kept, read_ranges, sizes_of
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


@pytest.mark.slow
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


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy dataset's 64 pictures are 8 chunks, though their tar is mostly headers."""
    monkeypatch.setattr(index, "CHUNK", 8)
    monkeypatch.setattr(ahead, "CHUNK", 8)
    monkeypatch.setattr(loader, "LEAST_SHARE", 0.01)


def kept(tmp_path: Path) -> list[str]:
    return [file.name for file in (tmp_path / "cache/ranges").glob("*")]


@pytest.mark.slow
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_chunk_is_read_once_for_all_its_pictures_and_removed_when_the_loader_goes(toy_dataset: Dataset, proxy: Proxy, tmp_path: Path,
                                                                                  workers: int) -> None:
    run = toy_run(toy_dataset)
    here = loader_of(toy_dataset, run)
    there = loader_of(far(toy_dataset), run.replace(data=run.data.replace(path=f"{BUCKET}/data", workers=workers)))
    for _ in range(100):
        assert_equal(here.next_step(), there.next_step())
        if len([name for name in kept(tmp_path) if not name.endswith(".part")]) == 8:
            break
    for _ in range(3):  # what was asked for before
        assert_equal(here.next_step(), there.next_step())
    proxy.reset()
    for _ in range(5):
        assert_equal(here.next_step(), there.next_step())
    assert proxy.requests == []
    del there
    assert kept(tmp_path) == []


@pytest.mark.usefixtures("small_chunks")
def test_a_chunk_is_asked_for_before_it_is_needed_and_removed_when_nothing_under_way_needs_it(toy_dataset: Dataset, tmp_path: Path,
                                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Orders of four pictures one behind the other: the next of the same process is told, and chunks are gone two orders behind their last."""
    monkeypatch.setattr(ahead, "LOOKED_AHEAD", 16)
    pictures = far(toy_dataset).index("train")
    orders = [Order(0, tuple(Entry(image, (0,)) for image in range(first, first + 4))) for first in range(0, 64, 4)]
    asked: list[int] = []
    for number, task in enumerate(tasks(orders, Chunks([pictures], replicas=1, least_share=0.01), processes=3, under_way=2)):
        assert task.order == orders[number]
        assert task.following == (orders[number + 3] if number + 3 < len(orders) else None)
        for _, first in task.chunks:
            pictures.keep_chunk(first, least_share=0.01)
            asked.append(first)
        live = {image // 8 * 8 for order in orders[max(number - 2, 0):] for image in (order.entries[0].image,)} & set(asked)
        assert sorted(kept(tmp_path)) == sorted(pictures._chunk_name(first) for first in live)
        assert number // 2 * 8 in asked
    assert asked == list(range(0, 64, 8))
    assert kept(tmp_path) == []


def test_a_chunk_is_left_where_too_little_of_it_is_needed(toy_dataset: Dataset, tmp_path: Path) -> None:
    pictures = far(toy_dataset).index("train")
    pictures.keep_chunk(0, least_share=0.25)  # a tenth are pictures
    assert kept(tmp_path) == []
    orders = [Order(0, (Entry(0, (0,)),)), Order(0, (Entry(1, (0,)),))]
    assert [task.chunks for task in tasks(orders, Chunks([pictures], replicas=8, least_share=0.25 * 5), processes=1, under_way=1)] == [(), ()]


def test_what_is_damaged_in_a_kept_chunk_is_read_from_the_store(toy_dataset: Dataset, proxy: Proxy, tmp_path: Path) -> None:
    pictures, own = far(toy_dataset).index("train"), toy_dataset.index("train")
    pictures.keep_chunk(0, least_share=0.01)
    (name,) = kept(tmp_path)
    proxy.reset()
    pictures.fetch(range(64))
    assert [pictures.read_image(number) for number in range(64)] == [own.read_image(number) for number in range(64)]
    assert proxy.requests == []
    (tmp_path / "cache/ranges" / name).write_bytes(bytes(50_000))
    pictures.fetch(range(64))
    assert [pictures.read_image(number) for number in range(64)] == [own.read_image(number) for number in range(64)]
    assert proxy.asked_for("train/00000.tar") == 64


def test_ranges_are_kept_while_there_is_room_and_what_killed_runs_left_goes(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = Range(Url(f"{BUCKET}/data/train/00000.tar"), 512, 1000)
    keep_range(part, "first")
    assert read_kept("first", 10, 20) == read_ranges([Range(part.file, 522, 20)])[0]
    monkeypatch.setattr(storage, "CACHE_BYTES", 1999)
    keep_range(part, "second")
    assert kept(tmp_path) == ["first"]
    for left in ("first", ".killed.part"):
        (tmp_path / "cache/ranges" / left).touch()
        os.utime(tmp_path / "cache/ranges" / left, (0, time.time() - 2 * storage.IN_USE_SECONDS))
    keep_range(part, "second")
    assert kept(tmp_path) == ["second"]
    forget_range("second")
    assert (kept(tmp_path), read_kept("second", 0, 10)) == ([], b"")
    monkeypatch.setattr(storage, "WAITS_SECONDS", ())
    proxy.cut_every = 1
    keep_range(part, "third")
    assert kept(tmp_path) == []


@pytest.mark.slow
def test_workers_that_wait_for_a_store_end_by_themselves_when_the_loader_is_dropped(toy_dataset: Dataset, proxy: Proxy,
                                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """torch waits for each, then sends a SIGTERM."""
    terminated: list[BaseProcess] = []
    monkeypatch.setattr(BaseProcess, "terminate", lambda process: terminated.append(process) or process.kill())
    monkeypatch.setattr(storage, "WAITS_SECONDS", (60.0,) * 3)
    run = toy_run(toy_dataset)
    there = loader_of(far(toy_dataset), run.replace(data=run.data.replace(path=f"{BUCKET}/data", workers=2)))
    proxy.cut_every = 1
    while not proxy.faults:
        time.sleep(0.01)
    workers = there._batches._batches._workers
    del there
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert terminated == []


@pytest.mark.parametrize(("environ", "machines"), [
    ({}, 1), ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 2), ({"WORLD_SIZE": "16"}, 16),
    ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "SLURM_STEP_NUM_NODES": "2"}, 2),
])
def test_the_launcher_says_how_many_machines_there_are(environ: dict[str, str], machines: int) -> None:
    assert machines_of(environ) == machines


def test_verify_hashes_each_file_once_and_with_fast_none(toy_dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    sha256_of = shards.file_sha256
    monkeypatch.setattr(shards, "file_sha256", lambda file: hashed.append(str(file)) or sha256_of(file))
    assert main(["data", "verify", str(toy_dataset.folder), "--fast"]) == 0
    assert hashed == []
    assert main(["data", "verify", str(toy_dataset.folder)]) == 0
    assert sorted(hashed) == sorted(str(toy_dataset.folder / name) for shard in toy_dataset.shards() for name, _, _ in shard.files)


def test_sizes_in_a_store_are_asked_for_at_once(toy_dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    both, size_of = Barrier(2, timeout=60), storage.size_of
    monkeypatch.setattr(storage, "size_of", lambda file: both.wait() + size_of(file) * 0 + 7 if "none" not in file else size_of(file))
    files = [Url(f"{BUCKET}/data/train/00000.tar"), Url(f"{BUCKET}/data/val/00000.tar"), Url(f"{BUCKET}/data/none")]
    assert sorted(size or 0 for size in sizes_of(files)) == [0, 7, 8]


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


@pytest.mark.usefixtures("small_chunks")
def test_a_chunk_that_nothing_needs_any_more_is_not_asked_for(toy_dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "LOOKED_AHEAD", 0)
    orders = [Order(0, tuple(Entry(image, (0,)) for image in range(0, 64, 8))), *(Order(0, (Entry(image, (0,)),)) for image in range(1, 6))]
    chunks = Chunks([far(toy_dataset).index("train")], replicas=1, least_share=0.01)
    assert [len(task.chunks) for task in tasks(orders, chunks, processes=1, under_way=1)] == [4, 1, 0, 0, 0, 0]


def test_ranges_of_nothing_ask_for_nothing_however_often_they_come() -> None:
    nowhere = Url("memory://nowhere/a.tar")
    assert read_ranges([Range(nowhere, 0, 0), Range(nowhere, 0, 0), Range(nowhere, 7, 0)]) == [b"", b"", b""]


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
