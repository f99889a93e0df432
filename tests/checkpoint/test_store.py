"""Checkpoints: any layout reads what any other wrote, damage is found, and no crash or full disk costs the last good one."""

import errno
import itertools
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flm_scale.checkpoint import store
from flm_scale.checkpoint.reader import Checkpoint
from flm_scale.checkpoint.reshard import StoredPiece, read_piece
from flm_scale.checkpoint.store import begin, commit, describe, last_good, open_checkpoint, prune, write_rank
from flm_scale.errors import CheckpointError
from flm_scale.model.parts import Piece, Shard

SHAPES = {"scale": (7,), "one": (1,), "up.weight": (7, 5), "down.weight": (4, 9), "patch.weight": (4, 5, 2, 3)}
KINDS = ("weight", "exp_avg")


class Layout(NamedTuple):
    """How every weight is cut: along dim over `tensor` ranks (a 1-D weight along 0), each shard over `data` ranks."""

    dim: int
    tensor: int
    data: int


LAYOUTS = [Layout(*sizes) for sizes in itertools.product((0, 1), (1, 2, 3), (1, 2, 3)) if sizes[:2] != (1, 1)]
Weights = dict[tuple[str, str], Tensor]
real_fsync = os.fsync


def random_weights(seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {(kind, name): torch.randn(shape, generator=generator) for kind in KINDS for name, shape in SHAPES.items()}


def shard_values(whole: Tensor, shard: Shard | None, *, fill: float) -> Tensor:
    """One shard of a weight, filled up where the weight ends."""
    if shard is None:
        return whole
    length = -(-shard.size // shard.count)
    padding = length * shard.count - shard.size
    filled = torch.cat([whole, torch.full_like(whole.narrow(shard.dim, 0, 1), fill).repeat_interleave(padding, shard.dim)], shard.dim)
    return filled.narrow(shard.dim, shard.index * length, length).contiguous()


def cut(weights: Weights, layout: Layout, *, fill: float = 0.0, seed: int = 0) -> list[list[Piece]]:
    """The pieces of each rank, of unequal length. Every rank's values are its own memory."""
    lengths = random.Random(f"{layout} {seed}")
    ranks: list[list[Piece]] = [[] for _ in range(layout.tensor * layout.data)]
    for (kind, name), whole in weights.items():
        for index in range(layout.tensor):
            dim = min(layout.dim, whole.dim() - 1)
            shard = Shard(dim, index, layout.tensor, whole.shape[dim]) if layout.tensor > 1 else None
            values = shard_values(whole, shard, fill=fill)
            cuts = [0, *sorted(lengths.randint(0, values.numel()) for _ in range(layout.data - 1)), values.numel()]
            for replica, (start, end) in enumerate(itertools.pairwise(cuts)):
                run = values.flatten()[start:end].clone()
                ranks[index * layout.data + replica].append(Piece(name, kind, tuple(values.shape), shard, start, run))
    return ranks


def save(run_dir: Path, step: int, ranks: Sequence[Sequence[Piece]]) -> Path:
    return save_into(begin(run_dir, step=step), ranks, step=step)


def save_into(partial: Path, ranks: Sequence[Sequence[Piece]], *, step: int) -> Path:
    for rank, pieces in enumerate(ranks):
        write_rank(partial, rank=rank, pieces=pieces, state={"rng": rank})
    return commit(partial, num_ranks=len(ranks), run_json='{"name": "é"}', state={"step": step, "layout": "tensor 2"}, timeout_seconds=5)


def read(checkpoint: Checkpoint) -> Weights:
    return {(kind, name): checkpoint.weight(name, kind)[:] for kind in KINDS for name in checkpoint.names(kind)}


def is_equal(left: Weights, right: Weights) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_every_layout_reads_bit_for_bit_what_every_other_layout_wrote(tmp_path: Path) -> None:
    """Filled-up rows come back as zeros, whatever was in them."""
    weights = random_weights(0)
    wanted = {layout: cut(weights, layout, seed=1) for layout in LAYOUTS}
    for written in LAYOUTS:
        checkpoint = open_checkpoint(save(tmp_path / str(written), 1, cut(weights, written, fill=torch.nan)), full=True)
        assert checkpoint.num_ranks == written.tensor * written.data
        for layout in LAYOUTS:
            for pieces in wanted[layout]:
                empty = [Piece(one.name, one.kind, one.shape, one.shard, one.start, torch.full_like(one.values, torch.nan)) for one in pieces]
                checkpoint.fill(empty)
                assert all(torch.equal(one.values, right.values) for one, right in zip(empty, pieces, strict=True)), (written, layout)


def test_a_checkpoint_says_what_it_was_given(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(tmp_path, 12, cut(random_weights(0), Layout(0, 2, 2))), full=True)
    assert (checkpoint.step, checkpoint.num_ranks, checkpoint.folder.name) == (12, 4, "step-000012")
    assert checkpoint.run_json == '{"name": "é"}'
    assert checkpoint.state == {"step": 12, "layout": "tensor 2"}
    assert checkpoint.rank_state(3) == {"rng": 3}
    assert (tmp_path / "checkpoints/latest").read_text() == "step-000012"
    assert {path.name for path in checkpoint.folder.parent.iterdir()} == {"step-000012", "latest"}


def test_a_weight_is_indexed_as_the_whole_that_it_was(tmp_path: Path) -> None:
    weights = random_weights(0)
    checkpoint = open_checkpoint(save(tmp_path, 1, cut(weights, Layout(1, 3, 2))), full=True)
    assert checkpoint.names() == checkpoint.names("exp_avg") == SHAPES
    assert checkpoint.names("momentum") == {}
    weight, right = checkpoint.weight("up.weight"), weights["weight", "up.weight"]
    assert weight.shape == right.shape
    for index in (slice(None), slice(2, 5), (slice(None), slice(3, 7)), 3):
        assert torch.equal(weight[index], right[index])
    with pytest.raises(CheckpointError, match="'weight/gate' is missing"):
        checkpoint.weight("gate")


def test_a_rank_file_is_one_that_safetensors_reads(tmp_path: Path) -> None:
    ranks = cut(random_weights(0), Layout(0, 2, 3))
    folder = save(tmp_path, 1, ranks)
    for rank, pieces in enumerate(ranks):
        loaded = load_file(folder / f"rank-{rank:05d}.safetensors")
        assert {key: values.tolist() for key, values in loaded.items()} == {f"{one.kind}/{one.name}": one.values.tolist() for one in pieces}


@pytest.mark.parametrize("same", [True, False])
def test_no_more_is_read_than_needed_where_both_cuts_are_along_dim_0(same: bool) -> None:
    amounts = []

    class File:
        def get_slice(self, key: str) -> Any:
            return self

        def __getitem__(self, index: slice) -> Tensor:
            amounts.append(index.stop - index.start)
            return torch.zeros(amounts[-1])

    stored = [StoredPiece(Path("f"), "weight/w", (50, 4), Shard(0, index, 2, 100), 0, 200) for index in range(2)]
    shape, shard = ((50, 4), Shard(0, 1, 2, 100)) if same else ((25, 4), Shard(0, 2, 4, 100))
    assert read_piece(Piece("w", "weight", shape, shard, 10, torch.empty(30)), stored, {Path("f"): File()}) is not None
    assert amounts == [30]


def test_pieces_that_the_checkpoint_lacks_are_named(tmp_path: Path) -> None:
    ranks = cut({("weight", "w"): torch.randn(6, 4)}, Layout(1, 2, 2))
    partly = open_checkpoint(save(tmp_path, 1, ranks[:3]), full=True)
    for name, shape, shard, said in [("w", (6, 4), None, "'weight/w' is missing in part"), ("v", (6, 4), None, "'weight/v' is missing"),
                                     ("w", (6, 2), Shard(1, 1, 2, 4), "'weight/w' is missing in part"),
                                     ("w", (6, 5), None, r"'weight/w' has another shape \(\[6, 4\], the model's is \[6, 5\]\)")]:
        numel = torch.Size(shape).numel()
        with pytest.raises(CheckpointError, match=said) as caught:
            partly.fill([Piece(name, "weight", shape, shard, 0, torch.empty(numel))])
        assert "\n" not in str(caught.value)
    partly.fill([Piece("w", "weight", (6, 2), Shard(1, 0, 2, 4), 0, torch.empty(12))])


@pytest.mark.slow
def test_every_altered_byte_and_every_truncation_is_found(tmp_path: Path) -> None:
    """All bytes of the manifest, and 200 places in other files."""
    folder = save(tmp_path, 1, cut(random_weights(0), Layout(0, 2, 1)))
    chance = random.Random(0)
    manifest, others = folder / "manifest.json", [path for path in sorted(folder.iterdir()) if path.name != "manifest.json"]
    places = [(manifest, place) for place in range(manifest.stat().st_size)]
    places += [(path, chance.randrange(path.stat().st_size)) for path in chance.choices(others, k=200)]
    for path, place in places:
        right = path.read_bytes()
        altered = bytearray(right)
        altered[place] ^= chance.randrange(1, 256)
        for wrong in (bytes(altered), right[:place]):
            path.write_bytes(wrong)
            with pytest.raises(CheckpointError, match=path.name):
                open_checkpoint(folder, full=True)
        path.write_bytes(right)
    open_checkpoint(folder, full=True)


@pytest.mark.parametrize("name", ["rank-00001.safetensors", "rank-00000.json", "run.json", "state.json", "manifest.json"])
def test_a_file_that_is_gone_is_found_without_reading_the_others(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, 1, cut(random_weights(0), Layout(0, 2, 1)))
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}.* cannot be read"):
        open_checkpoint(folder, full=False)


def test_a_rank_file_too_much_and_a_later_format_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path, 1, cut(random_weights(0), Layout(0, 2, 1)))
    (folder / "rank-00002.json").touch()
    with pytest.raises(CheckpointError, match=r"rank-00002\.json is too much"):
        open_checkpoint(folder, full=False)
    (folder / "rank-00002.json").unlink()
    monkeypatch.setattr(store, "FORMAT", 2)
    with pytest.raises(CheckpointError, match="is of format 1"):
        open_checkpoint(folder, full=False)


def is_killed_before_change(number: int, action: Callable[[], object]) -> bool:
    """Run a command in a process that is killed before its number-th change of the disk; return whether it came that far."""
    child = os.fork()
    if child == 0:
        try:
            _kill_before_change(number)
            action()
        except BaseException:  # noqa: BLE001 - a forked child must not go on with the test run
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in {0, signal.SIGKILL}
    return status != 0


def _kill_before_change(number: int) -> None:
    numbers = itertools.count()

    def change() -> None:
        if next(numbers) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, args: tuple[Any, ...]) -> None:
        is_opened_to_write = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if is_opened_to_write or event in {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}:
            change()

    def between_blocks(*arguments: Any) -> Iterator[bytes | memoryview]:
        for block in encode(*arguments):
            yield block
            change()

    encode = store.encode_pieces
    store.encode_pieces, os.fsync = between_blocks, lambda _descriptor: change()
    sys.addaudithook(watch)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2])
def test_a_save_killed_at_any_change_of_the_disk_leaves_the_old_or_the_new_checkpoint_and_can_be_done_again(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], step: int) -> None:
    """Over an older step, and over an older checkpoint of the same step."""
    old, new = ({("weight", "w"): torch.randn(4000), ("weight", "v"): torch.randn(4, 3)} for _ in range(2))
    save(tmp_path / "before", 1, cut(old, Layout(0, 1, 3)))
    found = []
    for number in itertools.count():
        run_dir = shutil.copytree(tmp_path / "before", tmp_path / str(number))
        is_killed = is_killed_before_change(number, lambda: save(run_dir, step, cut(new, Layout(0, 2, 1))))  # noqa: B023 - called at once
        held = read(last_good(run_dir, full=True))
        assert is_equal(held, old) or is_equal(held, new)
        found.append(is_equal(held, new))
        save(run_dir, step, cut(new, Layout(0, 1, 2)))
        assert is_equal(read(last_good(run_dir, full=True)), new)
        prune(run_dir, keep_last=1, keep_every=0)
        assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {f"step-{step:06d}", "latest"}
        if not is_killed:
            break
    assert number > 35
    assert found == sorted(found)
    assert found[-1]
    assert capsys.readouterr().err == ""


def test_a_prune_killed_at_any_change_of_the_disk_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path / "before", step, cut({("weight", "w"): torch.randn(3)}, Layout(0, 1, 2)))
    for number in itertools.count():
        run_dir = shutil.copytree(tmp_path / "before", tmp_path / str(number))
        is_killed = is_killed_before_change(number, lambda: prune(run_dir, keep_last=1, keep_every=0))  # noqa: B023 - called at once
        assert all(open_checkpoint(folder, full=True) for folder in (run_dir / "checkpoints").glob("step-*"))
        assert last_good(run_dir, full=True).step == 3
        prune(run_dir, keep_last=1, keep_every=0)
        assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"step-000003", "latest"}
        if not is_killed:
            break
    assert number > 10


def test_everything_is_flushed_to_the_disk_before_the_folder_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, flushed, at_rename = Path.rename, [], {}

    def note_flush(descriptor: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real_fsync(descriptor)

    def note_rename(path: Path, target: Path) -> Path:
        at_rename[target.name] = list(flushed)
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_flush)
    monkeypatch.setattr(Path, "rename", note_rename)
    folder = save(tmp_path, 1, cut(random_weights(0), Layout(0, 2, 1)))
    assert set(at_rename["step-000001"]) >= {path.name for path in folder.iterdir()}
    assert at_rename["step-000001"][-2:] == ["manifest.json", ".step-000001.partial"]
    assert flushed[-3:] == ["checkpoints", ".latest", "checkpoints"]


def test_commit_waits_for_the_slowest_rank_and_names_it_when_it_never_comes(tmp_path: Path) -> None:
    ranks = cut(random_weights(0), Layout(0, 1, 2))
    partial = begin(tmp_path, step=1)
    write_rank(partial, rank=0, pieces=ranks[0], state={})
    with pytest.raises(CheckpointError, match=r"rank-00001 not written after 0 s; is the run directory"):
        commit(partial, num_ranks=2, run_json="{}", state={}, timeout_seconds=0)
    late = threading.Timer(0.2, lambda: write_rank(partial, rank=1, pieces=ranks[1], state={}))
    late.start()
    commit(partial, num_ranks=2, run_json="{}", state={}, timeout_seconds=20)
    late.join()
    assert is_equal(read(last_good(tmp_path, full=True)), random_weights(0))


def test_an_unfinished_save_of_more_ranks_does_not_get_into_the_next_one(tmp_path: Path) -> None:
    partial = begin(tmp_path, step=1)
    for rank, pieces in enumerate(cut(random_weights(1), Layout(0, 3, 1))):
        write_rank(partial, rank=rank, pieces=pieces, state={})
    save(tmp_path, 1, cut(random_weights(0), Layout(0, 2, 1)))
    assert last_good(tmp_path, full=True).num_ranks == 2
    assert is_equal(read(last_good(tmp_path, full=True)), random_weights(0))


def test_an_unfinished_save_of_any_step_makes_room_for_the_next_one(tmp_path: Path) -> None:
    write_rank(begin(tmp_path, step=1), rank=0, pieces=cut(random_weights(0), Layout(0, 1, 1))[0], state={})
    partial = begin(tmp_path, step=2)
    assert list(partial.parent.iterdir()) == [partial]


def test_files_of_a_rank_that_is_not_of_this_save_are_not_committed(tmp_path: Path) -> None:
    partial = begin(tmp_path, step=1)
    for rank, pieces in enumerate(cut(random_weights(1), Layout(0, 3, 1))):
        write_rank(partial, rank=rank, pieces=pieces, state={})
    with pytest.raises(CheckpointError, match=r"rank-00002.* is too much"):
        commit(partial, num_ranks=2, run_json="{}", state={}, timeout_seconds=1)
    assert not (tmp_path / "checkpoints/step-000001").exists()


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "rank-00001.json", ".rank-00001.entry", "run.json", "state.json", "manifest.json"])
def test_a_full_disk_is_one_line_and_costs_nothing_that_was_there(tmp_path: Path, name: str) -> None:
    """/dev/full refuses what is written to it with the very error of a full disk."""
    save(tmp_path, 1, cut(random_weights(0), Layout(0, 2, 1)))
    partial = begin(tmp_path, step=2)
    (partial / name).symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be written \(No space left on device\); .*room") as caught:
        save_into(partial, cut(random_weights(1), Layout(0, 2, 1)), step=2)
    assert "\n" not in str(caught.value)
    assert is_equal(read(last_good(tmp_path, full=True)), random_weights(0))
    save(tmp_path, 2, cut(random_weights(1), Layout(0, 2, 1)))
    assert is_equal(read(last_good(tmp_path, full=True)), random_weights(1))


def test_a_read_only_disk_and_a_vanished_folder_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *args: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    save(tmp_path, 1, cut(random_weights(0), Layout(0, 1, 1)))
    partial = begin(tmp_path, step=2)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(CheckpointError, match=r"checkpoints: cannot be written \(Read-only file system\)"):
            begin(tmp_path, step=2)
        patch.setattr(Path, "open", refuse)
        with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors: cannot be written \(Read-only file system\)"):
            write_rank(partial, rank=0, pieces=[], state={})
    shutil.rmtree(partial, ignore_errors=True)
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors: cannot be written \(No such file or directory\)"):
        write_rank(partial, rank=0, pieces=[], state={})
    with pytest.raises(CheckpointError, match=r"step-000002\.partial: cannot be written \(No such file or directory\)"):
        commit(partial, num_ranks=1, run_json="{}", state={}, timeout_seconds=1)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="Not a directory"):
        begin(tmp_path / "file", step=1)
    assert last_good(tmp_path, full=True).step == 1


def test_last_good_passes_over_damaged_ones_and_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (9, 1_000_000, 20, 30):
        save(tmp_path, step, cut(random_weights(step), Layout(0, 1, 2)))
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "latest").write_text("step-000009")
    assert last_good(tmp_path, full=True).step == 1_000_000
    (checkpoints / "step-1000000/manifest.json").unlink()
    with (checkpoints / "step-000030/rank-00001.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    assert last_good(tmp_path, full=True).step == 20
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "step-1000000/manifest.json: cannot be read" in lines[0]
    assert "step-000030: rank-00001.safetensors is damaged" in lines[1]


def test_without_a_good_checkpoint_nothing_is_returned(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint under checkpoints/; train first"):
        last_good(tmp_path, full=True)
    (save(tmp_path, 1, cut(random_weights(0), Layout(0, 1, 2))) / "rank-00001.json").unlink()
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints is good"):
        last_good(tmp_path, full=True)


@pytest.mark.parametrize(("keep_last", "keep_every", "kept"), [(2, 0, {50, 60}), (1, 30, {30, 60}), (2, 20, {20, 40, 50, 60}),
                                                               (9, 0, {10, 20, 30, 40, 50, 60})])
def test_prune_keeps_the_newest_and_every_nth(tmp_path: Path, keep_last: int, keep_every: int, kept: set[int]) -> None:
    for step in range(10, 70, 10):
        save(tmp_path, step, cut({("weight", "w"): torch.randn(3)}, Layout(0, 1, 1)))
    shutil.copytree(tmp_path / "checkpoints/step-000060", tmp_path / "checkpoints/.step-000060.replaced")
    (tmp_path / "checkpoints/.step-000007.partial").mkdir()
    (tmp_path / "checkpoints/.step-000005.trash").mkdir()
    prune(tmp_path, keep_last=keep_last, keep_every=keep_every)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {f"step-{step:06d}" for step in kept} | {"latest"}


def test_prune_counts_no_damaged_checkpoint_and_leaves_the_save_in_progress(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, cut({("weight", "w"): torch.randn(3)}, Layout(0, 1, 1)))
    for step in (1, 4):
        (tmp_path / f"checkpoints/step-{step:06d}/manifest.json").unlink()
    begin(tmp_path, step=5)
    prune(tmp_path, keep_last=1, keep_every=0)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-000003", "step-000004", ".step-000005.partial", "latest"}
    prune(tmp_path / "nothing", keep_last=1, keep_every=0)


def test_describe_lists_the_newest_first_and_what_is_wrong(tmp_path: Path) -> None:
    for step in (1, 2):
        folder = save(tmp_path, step, cut(random_weights(0), Layout(0, 2, 1)))
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    (folder / "run.json").write_text("{")
    os.utime(tmp_path / "checkpoints/step-000001", (time.time() - 60, time.time() - 60))
    newer, older = describe(tmp_path)
    assert (newer.step, older.step) == (2, 1)
    assert "run.json has 1 bytes instead of 14" in newer.problem
    assert older.problem == ""
    assert older.layout == "tensor 2"
    assert older.num_bytes == num_bytes
    assert 59 < older.age_seconds < 70
    assert describe(tmp_path / "nothing") == []
