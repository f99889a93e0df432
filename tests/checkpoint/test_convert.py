"""`flm checkpoint reshard`: the same values to the bit in other files, whole or not at all, in little memory."""

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flm_scale.checkpoint import store
from flm_scale.checkpoint.convert import rank_pieces, reshard
from flm_scale.checkpoint.store import begin, commit, last_good, open_checkpoint, write_rank
from flm_scale.cli import main
from flm_scale.config import Run
from flm_scale.config_vision import SmallVisionConfig
from flm_scale.data.shards import Dataset
from flm_scale.engine.local import LocalEngine
from flm_scale.errors import CheckpointError, ConfigError
from flm_scale.model.assemble import build_model
from flm_scale.model.outline import named_outline
from flm_scale.model.parts import Piece, whole_shape
from flm_scale.observe.cost import shape_of
from flm_scale.observe.layer_cost import stage_bounds
from flm_scale.parallel.mesh import Layout
from tests.synthetic import objective_of, random_batch, tiny_run, write_weights
from tests.test_resume import arguments, state_at


def small_run(*, frozen: bool) -> Run:
    """61 tokens: shards of the vocabulary are filled up."""
    run = tiny_run(vision=SmallVisionConfig(image_size=16, patch_size=8, width=32, layers=2, heads=2, trainable=not frozen))
    return run.replace(text=run.text.replace(tied=not frozen, vocab_size=61))


def bounds_of(run: Run) -> list[int]:
    return stage_bounds(run, shape_of(run.vision))


@pytest.fixture(scope="module", params=[False, True], ids=["tied", "frozen"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with the checkpoint that one process leaves after two steps."""
    run, run_dir = small_run(frozen=request.param), tmp_path_factory.mktemp("trained")
    engine = LocalEngine(run, build_model(run, objective_of(run)), objective_of(run))
    for step in range(2):
        engine.train_step([random_batch(run, seed=10 * step + i) for i in range(2)], step=step)
    write_rank(begin(run_dir, step=2), rank=0, pieces=engine.saved_pieces(), state={"torch": "00"})
    commit(store.partial_folder(run_dir, step=2), num_ranks=1, run_json=run.model_dump_json(), timeout_seconds=1,
           state={"layout": "tensor 1, pipe 1, data 1, local", "loader": {"cursor": 3}})
    return run_dir


def values(folder: Path) -> bytes:
    return (folder / "checkpoints/step-000002/rank-00000.safetensors").read_bytes()


@pytest.mark.parametrize("layout", [(2, 2, 2), (4, 1, 3), (1, 4, 1)], ids=str)
def test_there_and_back_every_weight_and_moment_is_the_same_to_the_bit(trained: Path, tmp_path: Path, layout: tuple[int, int, int]) -> None:
    """On the way there each value is in one file alone."""
    folder = reshard(trained, tmp_path / "there", Layout(*layout), step=None, bounds_of=bounds_of, workers=3)
    there = open_checkpoint(folder, full=True)
    assert there.num_ranks == Layout(*layout).size
    held = sum(one.count for stored in there._stored.values() for one in stored)
    filled_up = sum(torch.Size(one.shape).numel() * one.shard.count - torch.Size(whole_shape(one.shape, one.shard)).numel()
                    for stored in there._stored.values() for one in stored if one.shard and one.shard.index == 0 and one.start == 0)
    assert held == sum(torch.Size(shape).numel() for kind in there.kinds for shape in there.names(kind).values()) + filled_up
    reshard(tmp_path / "there", tmp_path / "back", Layout(1, 1, 1), step=2, bounds_of=bounds_of, workers=1)
    back = last_good(tmp_path / "back", full=True)
    before = last_good(trained, full=True)
    assert {kind: before.names(kind) for kind in before.kinds} == {kind: back.names(kind) for kind in back.kinds}
    for kind in before.kinds:
        assert all(torch.equal(before.weight(name, kind)[:], back.weight(name, kind)[:]) for name in before.names(kind))
    assert back.state | {"layout": ""} == before.state | {"layout": ""}
    assert (back.run_json, back.rank_state(0)) == (before.run_json, before.rank_state(0))


def test_a_layout_that_goes_on_finds_what_is_its_own_in_one_run_of_one_file(trained: Path, tmp_path: Path) -> None:
    """At (2, 2, 1): each shard's values lie in this rank's file, in the order in which they are asked for, with nothing between them."""
    layout = Layout(2, 2, 1)
    checkpoint = open_checkpoint(reshard(trained, tmp_path, layout, step=None, bounds_of=bounds_of, workers=1), full=True)
    run = Run.model_validate_json(checkpoint.run_json)
    run = run.replace(parallel=run.parallel.replace(engine="deepspeed", tensor=2, pipe=2))
    for rank, pieces in enumerate(rank_pieces(run, layout, bounds=bounds_of(run), checkpoint=checkpoint)):
        path = checkpoint.folder / f"rank-{rank:05d}.safetensors"
        stored = {one.key: one for found in checkpoint._stored.values() for one in found if one.path == path}
        assert [(one.kind, one.name, one.shape, one.shard, one.start, one.values.numel()) for one in pieces] == [
            (*key.split("/", 1), one.shape, one.shard, one.start, one.count) for key, one in stored.items()]


def test_a_converted_run_resumes_to_the_bit(toy_dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(toy_dataset, tmp_path / "unbroken", steps=4)) == 0
    assert main(["checkpoint", "reshard", str(tmp_path / "unbroken"), "--out", str(tmp_path / "cut"), "--step", "2", "--tensor", "2", "--data", "2",
                 "--workers", "2"]) == 0
    said = capsys.readouterr()
    assert f"--run-dir {tmp_path / 'cut'} --resume --parallel.engine deepspeed --parallel.tensor 2 --parallel.pipe 1, in 4 process" in said.out
    assert "4/4 ranks written" in said.err
    assert main(["checkpoint", "verify", str(tmp_path / "cut")]) == 0
    assert main(arguments(toy_dataset, tmp_path / "cut", "--resume", steps=4)) == 0
    assert state_at(tmp_path / "cut", 4) == state_at(tmp_path / "unbroken", 4)


def test_a_folder_that_holds_something_is_left_alone(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").touch()
    for out in (trained, tmp_path, tmp_path / "notes"):
        with pytest.raises(ConfigError, match=r"is not empty; choose another --out"):
            reshard(trained, out, Layout(1, 1, 1), step=None, bounds_of=bounds_of, workers=1)


def test_what_cannot_be_converted_is_one_line(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]
    write_weights(tmp_path / "other", {"weights.of.another.model": torch.ones(2)}, small_run(frozen=False))
    for words, message in [((trained, "--step", "3"), f"{trained}: no checkpoint of step 3; there is: 2"),
                           ((trained, "--tensor", "3"), "text.heads (4) must be a multiple of parallel.tensor (3)"),
                           ((trained, "--pipe", "40"), "parallel.pipe (40) must be from 1 to"),
                           ((trained, "--data", "0"), "--tensor, --pipe, --data and --workers must be at least 1"),
                           ((tmp_path / "other",), "has weights that the model of its own run.json has not: weights.of.another.model"),
                           ((tmp_path / "nowhere",), "no checkpoint under checkpoints/")]:
        assert main(["checkpoint", "reshard", *map(str, words), *out]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing_and_it_can_be_done_again(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, numbers = store.encode_pieces, iter(range(9))

    def full(*arguments: object) -> Iterator[bytes | memoryview]:
        blocks = encode(*arguments)
        yield next(blocks)
        if next(numbers) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield from blocks

    monkeypatch.setattr(store, "encode_pieces", full)
    with pytest.raises(CheckpointError, match=r"safetensors: cannot be written \(No space left on device\)"):
        reshard(trained, tmp_path / "out", Layout(2, 1, 2), step=None, bounds_of=bounds_of, workers=2)
    assert [*(tmp_path / "out").rglob("*")] == [tmp_path / "out/checkpoints"]
    reshard(trained, tmp_path / "out", Layout(2, 1, 2), step=None, bounds_of=bounds_of, workers=2)
    assert last_good(tmp_path / "out", full=True).num_ranks == 4


@pytest.mark.slow
def test_memory_holds_a_weight_or_two_a_thread_and_never_the_state(tmp_path: Path) -> None:
    """In a process of its own, whose memory is looked at every millisecond; pages of files do not count, the system takes those back."""
    call = f"from tests.checkpoint.test_convert import convert_watched; from pathlib import Path; convert_watched(Path({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    state, grown = map(int, done.stdout.splitlines()[-1].split())
    assert state > 100e6
    assert grown < state / 4


def convert_watched(folder: Path) -> None:
    """Print the bytes of a checkpoint's weights and moments, and by how much memory grew while two threads converted it."""
    os.fsync = lambda _descriptor: None
    run = tiny_run()
    run = run.replace(text=run.text.replace(width=384, bottom_layers=2, fusion_layers=2))
    shapes = {name: tuple(weight.shape) for layer, module in named_outline(run, objective_of(run)).items()
              for name, weight in module.named_parameters(prefix=layer)}
    pieces = [Piece(name, kind, shape, None, 0, torch.empty(torch.Size(shape).numel(), device="meta"))
              for name, shape in shapes.items() for kind in ("weight", "exp_avg", "exp_avg_sq")]

    def random_values(piece: Piece) -> Tensor:
        return torch.rand(piece.values.numel())

    write_rank(begin(folder / "whole", step=1), rank=0, pieces=pieces, state={}, values_of=random_values)
    commit(store.partial_folder(folder / "whole", step=1), num_ranks=1, run_json=run.model_dump_json(), state={}, timeout_seconds=1)
    seen, ends = [anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not ends.is_set():
            seen.append(anonymous_bytes())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    reshard(folder / "whole", folder / "cut", Layout(2, 2, 2), step=None, bounds_of=bounds_of, workers=2)
    ends.set()
    watcher.join()
    print(4 * sum(piece.values.numel() for piece in pieces), max(seen) - seen[0])


def anonymous_bytes() -> int:
    """Return this process's memory that is no file's."""
    return next(1024 * int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
