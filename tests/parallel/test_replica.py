"""What the processes of a replica send each other; tests/distributed/test_replica.py starts them."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flm_scale import train
from flm_scale.batch import Batch, restored, without_pixels
from flm_scale.cli import main
from flm_scale.errors import DataError, ToldElsewhereError
from flm_scale.parallel.mesh import Layout
from flm_scale.parallel.replica import ReplicaLoader
from tests.synthetic import random_batch, tiny_run


def sent(batch: Batch, *, room_for_pixels: bool) -> Batch:
    return restored(pickle.loads(pickle.dumps(without_pixels(batch))), room_for_pixels=room_for_pixels)


@pytest.mark.parametrize("objective", ["flm", "mlm"])
@pytest.mark.parametrize("room_for_pixels", [True, False])
def test_all_of_a_batch_but_the_pixels_arrives_as_it_was(objective: str, room_for_pixels: bool) -> None:
    batch = random_batch(tiny_run(objective), seed=3)
    found = sent(batch, room_for_pixels=room_for_pixels)
    assert all(torch.equal(a, b) for a, b in zip(found.state[1:], batch.state[1:], strict=True))
    assert (found.keys, found.num_captions, found.num_tokens, found.bad_keys) == (batch.keys, batch.num_captions, batch.num_tokens, batch.bad_keys)
    assert torch.equal(found.part_counts, batch.part_counts)
    assert (found.state.rows.shape, found.state.rows.dtype) == (batch.state.rows.shape, torch.uint8)


def test_a_later_stage_holds_a_byte_for_all_pixels_and_the_first_has_room_for_them() -> None:
    batch = random_batch(tiny_run(), seed=3)
    pixels = batch.state.rows
    assert [sent(batch, room_for_pixels=room).state.rows.untyped_storage().nbytes() for room in (False, True)] == [1, pixels.numel()]
    larger = Batch(**vars(batch) | {"state": batch.state._replace(rows=torch.zeros(len(pixels), 3, 512, 512, dtype=torch.uint8))})
    assert len(pickle.dumps(without_pixels(larger))) < len(pickle.dumps(without_pixels(batch))) + 100


def test_a_replica_of_one_process_hands_on_the_very_batches_and_errors_of_its_loader() -> None:
    """torch.distributed is not up here, so nothing is sent."""
    step, validation = [random_batch(tiny_run(), seed=seed) for seed in (1, 2)], [random_batch(tiny_run(), seed=seed) for seed in (3, 4)]

    def one_pass() -> Iterator[Batch]:
        yield from validation
        raise DataError("a shard cannot be read")

    loader = ReplicaLoader(Layout(tensor=1, pipe=1, data=4), rank=3, build=lambda: SimpleNamespace(next_step=lambda: step, state={"cursor": 8}),
                           one_pass=one_pass)
    assert loader.reads
    assert loader.next_step() is step
    assert loader.state == {"cursor": 8}
    batches = loader.one_pass()
    assert [next(batches) is batch for batch in validation] == [True, True]
    with pytest.raises(DataError, match="a shard cannot be read"):
        next(batches)


@pytest.mark.parametrize(("rank", "lines"), [(2, 1), (3, 0), (6, 0)], ids=["reads", "another tensor rank", "another stage"])
def test_a_bad_picture_is_named_by_the_process_that_read_it_and_counted_by_all(rank: int, lines: int, tmp_path: Path,
                                                                             capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run()
    engine = SimpleNamespace(rank=rank, layout=Layout(tensor=2, pipe=2, data=2), device=torch.device("cpu"), sum_over_ranks=lambda values: values)
    recorder = train.Recorder(run, tmp_path, engine)
    batch = random_batch(run, seed=1)
    recorder.count([Batch(**vars(batch) | {"bad_keys": batch.keys[:1]})])
    assert recorder.bad_images == 1
    assert capsys.readouterr().err.count("1 picture(s) left out, not readable: 00000\n") == lines


def test_a_process_whose_reader_has_ended_exits_with_2_and_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*args: object, **more: object) -> None:
        raise ToldElsewhereError("rank 0, which reads for this one, has ended: DataError: ...")

    monkeypatch.setattr(train, "train", fail)
    assert main(["train", "debug"]) == 2
    assert capsys.readouterr().err == ""
