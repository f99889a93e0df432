"""The loader: the same batches for any number of workers and ranks, and after any resume."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from flm_scale.batch import Batch
from flm_scale.config import BatchConfig, DataConfig, FlmConfig, MlmConfig, Run
from flm_scale.data.loader import Loader, one_pass
from flm_scale.data.shards import Dataset
from flm_scale.data.tokens import Tokenizer
from flm_scale.objectives.objective import Objective, build_objective
from tests.conftest import write_toy
from tests.synthetic import tiny_run


def toy_run(dataset: Dataset, **changes) -> Run:
    run = tiny_run(batch=BatchConfig(micro_batches=4, text_tokens=64, captions=8, images=5))
    return run.replace(data=DataConfig(path=dataset.folder, workers=0), text=run.text.replace(vocab_size=200), **changes)


def parts_of(dataset: Dataset, run: Run) -> tuple[Tokenizer, Objective]:
    tokenizer = Tokenizer(dataset.tokenizer_file)
    return tokenizer, build_objective(run.objective, mask_id=tokenizer.mask_id)


def loader_of(dataset: Dataset, run: Run, **where) -> Loader:
    return Loader(run, dataset.index("train"), *parts_of(dataset, run), **where)


def assert_equal(left: Sequence[Batch], right: Sequence[Batch]) -> None:
    assert [batch.keys for batch in left] == [batch.keys for batch in right]
    for a, b in zip(left, right, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.state, b.state, strict=True))


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_batches(toy_dataset: Dataset, workers: int) -> None:
    run = toy_run(toy_dataset)
    other = loader_of(toy_dataset, run.replace(data=run.data.replace(workers=workers)))
    loader = loader_of(toy_dataset, run)
    for _ in range(8):
        assert_equal(loader.next_step(), other.next_step())


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_share_a_step_out_among_them(toy_dataset: Dataset, size: int) -> None:
    run = toy_run(toy_dataset)
    whole, ranks = loader_of(toy_dataset, run), [loader_of(toy_dataset, run, rank=rank, size=size) for rank in range(size)]
    for _ in range(12):
        together, shares = whole.next_step(), [loader.next_step() for loader in ranks]
        assert_equal(together, [batch for column in zip(*shares, strict=True) for batch in column])
        assert all(loader.state == whole.state for loader in ranks)


@pytest.mark.parametrize("stop", [1, 3, 7])
def test_a_resumed_loader_repeats_no_sample_and_skips_none_on_any_layout(toy_dataset: Dataset, stop: int) -> None:
    """Seven steps are more than an epoch, so the state crosses one."""
    run = toy_run(toy_dataset)
    straight, first = loader_of(toy_dataset, run), loader_of(toy_dataset, run, rank=0, size=4)
    for _ in range(stop):
        straight.next_step()
        first.next_step()
    resumed = loader_of(toy_dataset, run, state=first.state)
    for _ in range(4):
        assert_equal(straight.next_step(), resumed.next_step())


def test_the_state_is_small_and_knows_no_rank(toy_dataset: Dataset) -> None:
    loader = loader_of(toy_dataset, toy_run(toy_dataset), rank=1, size=2)
    loader.next_step()
    assert loader.state == {"seed": 0, "epoch": 0, "cursor": 4}


def test_the_keys_of_a_step_are_known_without_training_to_it(toy_dataset: Dataset) -> None:
    run = toy_run(toy_dataset)
    loader = loader_of(toy_dataset, run)
    for step in range(1, 10):
        assert [list(batch.keys) for batch in loader.next_step()] == loader_of(toy_dataset, run).keys_of_step(step)


def test_corruption_is_keyed_by_sample_and_changes_with_the_epoch(toy_dataset: Dataset) -> None:
    """The same sample in another neighbourhood (other budgets) is corrupted alike; in the next epoch it is not."""
    run = toy_run(toy_dataset, objective=MlmConfig(mask_rate=0.4))

    def masked_ids(run: Run, *, steps: int) -> list[dict[str, list[int]]]:
        """For each epoch, the input ids of images that came with one caption only."""
        loader, epochs = loader_of(toy_dataset, run), [{}, {}, {}, {}, {}, {}]
        for _ in range(steps):
            epoch = loader.state["epoch"]
            for batch in loader.next_step():
                if len(batch.keys) == 1 and batch.num_captions == 1:
                    epochs[epoch].setdefault(batch.keys[0], batch.state.ids.tolist())
        return epochs

    one_by_one = run.replace(batch=BatchConfig(micro_batches=8, text_tokens=64, captions=8, images=1))
    smaller = run.replace(batch=BatchConfig(micro_batches=16, text_tokens=30, captions=3, images=1))
    left, right = masked_ids(one_by_one, steps=16), masked_ids(smaller, steps=8)
    common = left[0].keys() & right[0].keys()
    assert len(common) > 10
    assert all(left[0][key] == right[0][key] for key in common)
    assert any(left[0][key] != left[1][key] for key in left[0].keys() & left[1].keys())


def test_an_unreadable_picture_is_named_and_teaches_nothing_and_moves_nothing(tmp_path) -> None:
    good, damaged = write_toy(tmp_path / "good"), write_toy(tmp_path / "damaged", bad=frozenset({3, 17}))
    run = toy_run(good)
    left, right = loader_of(good, run), loader_of(damaged, run)
    bad = []
    for _ in range(5):
        for a, b in zip(left.next_step(), right.next_step(), strict=True):
            assert a.keys == b.keys
            assert a.num_tokens == b.num_tokens
            assert (b.part_counts.sum() < a.part_counts.sum()) == bool(b.bad_keys)
            bad += b.bad_keys
    assert set(bad) == {"000003", "000017"}


def test_an_evaluation_scores_every_caption_once_and_keeps_ranks_in_step(toy_dataset: Dataset) -> None:
    run = toy_run(toy_dataset, objective=FlmConfig())
    tokenizer, objective = parts_of(toy_dataset, run)
    batches = [list(one_pass(run, toy_dataset.index("val"), tokenizer, objective, rank=rank, size=3)) for rank in range(3)]
    assert len({len(share) for share in batches}) == 1
    counts = sum(batch.part_counts for share in batches for batch in share)
    captions = [caption for captions in toy_dataset.index("val").captions for caption in captions]
    assert counts[objective.parts.index("eos")] == len(captions)


def test_a_caption_that_is_shown_in_several_views_counts_once(toy_dataset: Dataset) -> None:
    """Pairs per second would otherwise grow with MLM's passes."""
    run = toy_run(toy_dataset, objective=MlmConfig(mask_rate=0.6, passes=3))
    batches = list(one_pass(run, toy_dataset.index("val"), *parts_of(toy_dataset, run)))
    num_captions = sum(map(len, toy_dataset.index("val").captions))
    assert sum(batch.num_captions for batch in batches) == num_captions < sum(len(batch.state.lengths) for batch in batches)


def test_packing_fills_batches(toy_dataset: Dataset) -> None:
    """Next-fit over random captions leaves little room."""
    run = toy_run(toy_dataset, batch=BatchConfig(micro_batches=1, text_tokens=128, captions=64, images=64))
    loader = loader_of(toy_dataset, run)
    fill = np.mean([loader.next_step()[0].num_tokens / 128 for _ in range(5)])
    assert fill > 0.8
