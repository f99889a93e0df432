"""The loader: the same batches for any number of workers and ranks, and after any resume."""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from flm_scale.batch import Batch
from flm_scale.config import AugmentConfig, BatchConfig, DataConfig, FlmConfig, MlmConfig, Run
from flm_scale.data.loader import Loader, mixture_shares, one_pass, open_mixture, place_in_mixture
from flm_scale.data.shards import Dataset, open_dataset, write_dataset
from flm_scale.data.sidecars import give_tokenizer
from flm_scale.data.tokens import Tokenizer
from flm_scale.errors import ConfigError, DataError
from flm_scale.objectives.objective import Objective, build_objective
from tests.conftest import COLORS, SHAPES, drawn_sample, write_toy
from tests.synthetic import tiny_run


def toy_run(dataset: Dataset, **changes) -> Run:
    run = tiny_run(batch=BatchConfig(micro_batches=4, text_tokens=64, captions=8, images=5))
    return run.replace(data=DataConfig(path=dataset.folder, workers=0), text=run.text.replace(vocab_size=200), **changes)


def parts_of(dataset: Dataset, run: Run) -> tuple[Tokenizer, Objective]:
    tokenizer = Tokenizer(dataset.tokenizer_file)
    return tokenizer, build_objective(run.objective, mask_id=tokenizer.mask_id)


def loader_of(dataset: Dataset, run: Run, **where) -> Loader:
    return Loader(run, [dataset, *open_mixture(run.data)[1:]], *parts_of(dataset, run), **where)


@pytest.fixture(scope="module")
def second(toy_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Forty pictures, whose keys are also the toy dataset's, in its words."""
    samples = [drawn_sample(number, color=COLORS[number % 3], shape=SHAPES[number % 2]) for number in range(40)]
    dataset = write_dataset(tmp_path_factory.mktemp("second") / "data", name="second", sources=[], readme="Drawn.", splits={"train": samples})
    shutil.copy(toy_dataset.tokenizer_file, dataset.tokenizer_file)
    give_tokenizer(dataset)
    return dataset


def mixed_run(dataset: Dataset, second: Dataset, **changes) -> Run:
    """24 micro-batches a step, of two augmented datasets, with at most two of an image's one to three captions: more than one epoch of each."""
    run, augment = toy_run(dataset), AugmentConfig(crop_scale=(0.3, 1.0), flip=True)
    return run.replace(data=run.data.replace(also=(second.folder,), weights=(2.0, 1.0), captions_per_image=2, augment=augment, **changes),
                       batch=run.batch.replace(micro_batches=24))


def assert_equal(left: Sequence[Batch], right: Sequence[Batch]) -> None:
    assert [batch.keys for batch in left] == [batch.keys for batch in right]
    for a, b in zip(left, right, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.state, b.state, strict=True))


@pytest.fixture(scope="module")
def straight(toy_dataset: Dataset, second: Dataset) -> list[list[Batch]]:
    """Ten steps of one process that decodes for itself."""
    loader = loader_of(toy_dataset, mixed_run(toy_dataset, second))
    return [loader.next_step() for _ in range(10)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_any_number_of_workers_gives_the_same_batches(toy_dataset: Dataset, second: Dataset, straight: list[list[Batch]], workers: int) -> None:
    loader = loader_of(toy_dataset, mixed_run(toy_dataset, second, workers=workers))
    for step in straight[:3]:
        assert_equal(step, loader.next_step())


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4, 6, 8])
def test_ranks_share_a_step_out_among_them(toy_dataset: Dataset, second: Dataset, straight: list[list[Batch]], size: int) -> None:
    ranks = [loader_of(toy_dataset, mixed_run(toy_dataset, second), rank=rank, size=size) for rank in range(size)]
    for step in straight:
        shares = [loader.next_step() for loader in ranks]
        assert_equal(step, [batch for column in zip(*shares, strict=True) for batch in column])
        assert all(loader.state == ranks[0].state for loader in ranks)


def test_a_resumed_loader_repeats_no_sample_and_skips_none_on_any_layout(toy_dataset: Dataset, second: Dataset, straight: list[list[Batch]]) -> None:
    """From ten places, with other numbers of micro-batches a step."""
    run = mixed_run(toy_dataset, second)
    row = [batch for step in straight for batch in step]
    places = np.random.default_rng(0).choice(200, 10, replace=False).tolist()
    before = loader_of(toy_dataset, run, rank=3, size=4)
    for micro_batches, place in enumerate(places, start=3):
        other = run.replace(batch=run.batch.replace(micro_batches=micro_batches))
        resumed = loader_of(toy_dataset, other, state=before.state | {"micro_batch": place})
        assert_equal(row[place:place + micro_batches], resumed.next_step())
        assert resumed.state["micro_batch"] == place + micro_batches
        assert resumed.keys_of_last(1) == [[list(batch.keys) for batch in row[place:place + micro_batches]]]


def test_a_mixture_gives_each_dataset_its_share_and_each_sample_once_an_epoch(toy_dataset: Dataset, second: Dataset,
                                                                              straight: list[list[Batch]]) -> None:
    """Weights 2 and 1; both have a sample 000000, and the number of the dataset tells them apart."""
    row = [batch.keys for step in straight for batch in step]
    of = [{key.split("/")[0] for key in keys} for keys in row]
    assert all(len(sources) == 1 for sources in of)
    for number, size in ((0, 64), (1, 40)):
        own = [keys for keys, sources in zip(row, of, strict=True) if sources == {str(number)}]
        assert len(own) == (160, 80)[number]
        seen = Counter(key for keys in own for key in keys)
        assert len(seen) == size
        assert max(seen.values()) - min(seen.values()) <= 1, "the last epoch is not at its end"


def test_without_weights_every_image_of_a_mixture_comes_equally_often(toy_dataset: Dataset, second: Dataset) -> None:
    run = mixed_run(toy_dataset, second)
    loader = loader_of(toy_dataset, run.replace(data=run.data.replace(weights=())))
    row = [keys for step in range(1, 9) for keys in loader.keys_of_step(step)]
    seen = Counter(key for keys in row[:sum(shuffle.length(0) for shuffle in loader._shuffles)] for key in keys)
    assert len(seen) == 104
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("weights", [(1,), (1, 1), (2.0, 1.0), (5, 3, 1, 0.5), (1e-3, 1)])
def test_a_mixture_is_spread_evenly_and_each_place_is_told_by_the_counter(weights: tuple[float, ...]) -> None:
    """Of any k micro-batches in a row each dataset has its share of them, give or take two."""
    shares = mixture_shares(weights)
    row = [place_in_mixture(number, shares) for number in range(3000)]
    for source, weight in enumerate(weights):
        places = [place for of, place in row if of == source]
        assert places == list(range(len(places)))
        had = np.cumsum([of == source for of, _ in row])
        assert np.abs(had - np.arange(1, 3001) * weight / sum(weights)).max() <= 2


def test_a_weight_however_small_is_a_share() -> None:
    assert all(mixture_shares([1, 1e-9, 1]))
    assert all(mixture_shares([1e-9, 1]))


def test_a_mixture_has_one_tokenizer(toy_dataset: Dataset, tmp_path: Path) -> None:
    shutil.copytree(toy_dataset.folder, tmp_path / "data")
    other = open_dataset(tmp_path / "data")
    other.drop_tokenizer()
    with pytest.raises(DataError, match=rf"{other.folder} has the tokenizer \(none\); .* has {toy_dataset.tokenizer_fingerprint[:12]}"):
        open_mixture(DataConfig(path=toy_dataset.folder, also=(other.folder,)))


def test_each_dataset_of_a_mixture_can_be_pinned(toy_dataset: Dataset, second: Dataset) -> None:
    config = DataConfig(path=toy_dataset.folder, also=(second.folder,), manifest_hash=toy_dataset.root, also_hashes=(second.root,))
    assert [dataset.root for dataset in open_mixture(config)] == [toy_dataset.root, second.root]
    with pytest.raises(DataError, match=str(second.folder)):
        open_mixture(config.replace(also_hashes=(toy_dataset.root,)))


@pytest.mark.parametrize(("values", "message"), [({"weights": (1.0,)}, "one for each of the 1"), ({"weights": (1.0, 0.0)}, "positive"),
                                                 ({"also_hashes": ("a", "b")}, "one for each of the 1")])
def test_lists_of_a_mixture_that_do_not_match_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(also=(Path("b"),), **values)


def test_the_state_is_small_and_knows_no_rank(toy_dataset: Dataset, second: Dataset) -> None:
    loader = loader_of(toy_dataset, mixed_run(toy_dataset, second), rank=1, size=2)
    loader.next_step()
    assert loader.state == {"seed": 0, "data": [toy_dataset.root[:16], second.root[:16]], "tokenizer": toy_dataset.tokenizer_fingerprint[:16],
                            "micro_batch": 24}
    assert len(json.dumps(loader.state)) < 1000


def test_a_state_of_other_data_is_refused(toy_dataset: Dataset, second: Dataset) -> None:
    state = loader_of(toy_dataset, mixed_run(toy_dataset, second)).state
    for other in (state | {"seed": 1}, {"seed": 0, "epoch": 0, "cursor": 4}):
        with pytest.raises(DataError, match="place in the data"):
            loader_of(toy_dataset, mixed_run(toy_dataset, second), state=other)
    with pytest.raises(DataError, match=second.root[:16]):
        loader_of(toy_dataset, toy_run(toy_dataset), state=state)


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
        loader, epochs, seen = loader_of(toy_dataset, run), [{}, {}, {}], Counter()
        for _ in range(steps):
            for batch in loader.next_step():
                if batch.num_captions == 1:
                    epochs[seen[batch.keys[0]]][batch.keys[0]] = batch.state.ids.tolist()
                seen.update(batch.keys)
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


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_that_a_worker_meets_is_told_in_one_line(toy_dataset: Dataset, tmp_path: Path, workers: int) -> None:
    """Token ids that turn out not to be those of the captions end the run; a picture would be left out."""
    dataset = open_dataset(shutil.copytree(toy_dataset.folder, tmp_path / "data"))
    (sidecar,) = (dataset.folder / "tokens").rglob("train/*.arrow")
    content = bytearray(sidecar.read_bytes())
    content[len(content) // 2] ^= 1
    run = toy_run(dataset)
    loader = loader_of(dataset, run.replace(data=run.data.replace(workers=workers)))
    sidecar.write_bytes(content)
    with pytest.raises(DataError, match=r"^dataset .*train/00000\.arrow cannot be read .*; write them again: flm tokenizer encode .*$") as caught:
        loader.next_step()
    assert "\n" not in str(caught.value)


def test_an_evaluation_scores_every_caption_once_and_keeps_ranks_in_step(toy_dataset: Dataset) -> None:
    run = toy_run(toy_dataset, objective=FlmConfig())
    tokenizer, objective = parts_of(toy_dataset, run)
    batches = [list(one_pass(run, toy_dataset, "val", tokenizer, objective, rank=rank, size=3)) for rank in range(3)]
    assert len({len(share) for share in batches}) == 1
    counts = sum(batch.part_counts for share in batches for batch in share)
    captions = [caption for captions in toy_dataset.index("val").captions for caption in captions]
    assert counts[objective.parts.index("eos")] == len(captions)


def test_a_caption_that_is_shown_in_several_views_counts_once(toy_dataset: Dataset) -> None:
    """Pairs per second would otherwise grow with MLM's passes."""
    run = toy_run(toy_dataset, objective=MlmConfig(mask_rate=0.6, passes=3))
    batches = list(one_pass(run, toy_dataset, "val", *parts_of(toy_dataset, run)))
    num_captions = sum(map(len, toy_dataset.index("val").captions))
    assert sum(batch.num_captions for batch in batches) == num_captions < sum(len(batch.state.lengths) for batch in batches)


def test_packing_fills_batches(toy_dataset: Dataset) -> None:
    """Next-fit over random captions leaves little room."""
    run = toy_run(toy_dataset, batch=BatchConfig(micro_batches=1, text_tokens=128, captions=64, images=64))
    loader = loader_of(toy_dataset, run)
    fill = np.mean([loader.next_step()[0].num_tokens / 128 for _ in range(5)])
    assert fill > 0.8


def test_training_pictures_change_with_the_epoch_and_those_of_validation_never(toy_dataset: Dataset) -> None:
    run = toy_run(toy_dataset)
    changed = run.replace(data=run.data.replace(augment=AugmentConfig(crop_scale=(0.3, 1.0))))
    loader, pictures = loader_of(toy_dataset, changed), dict[str, set[bytes]]()
    for _ in range(20):
        for batch in loader.next_step():
            for key, pixels in zip(batch.keys, batch.state.rows.numpy(), strict=True):
                pictures.setdefault(key, set()).add(pixels.tobytes())
    assert min(len(seen) for seen in pictures.values()) > 1
    plain, also = (list(one_pass(one, toy_dataset, "val", *parts_of(toy_dataset, one))) for one in (run, changed))
    assert_equal(plain, also)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_any_place_is_the_same_on_any_number_of_ranks_with_any_number_of_workers(toy_dataset: Dataset, second: Dataset,
                                                                                 straight: list[list[Batch]]) -> None:
    """A step from each of ten places, of a mixture with grouped captions and augmentation; no rank and no worker has seen what came before."""
    row, run = [batch for step in straight for batch in step], mixed_run(toy_dataset, second)
    state, places = loader_of(toy_dataset, run).state, np.random.default_rng(2).choice(200, 10, replace=False).tolist()
    layouts = [(1, 4), (2, 3), (3, 2), (4, 1), (6, 1), (8, 1), (2, 4), (3, 3), (8, 0), (6, 0)]
    for (size, workers), place in zip(layouts, places, strict=True):
        run = mixed_run(toy_dataset, second, workers=workers)
        shares = [loader_of(toy_dataset, run, rank=rank, size=size, state=state | {"micro_batch": place}).next_step() for rank in range(size)]
        assert_equal(row[place:place + 24], [batch for column in zip(*shares, strict=True) for batch in column])
