"""Merging against a slow loop, what it conserves, and what it never touches; every reducer returns the rows that it declares."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flm_scale.config_lm import DropConfig, MergeConfig, NoReducerConfig, PoolConfig, UnshuffleConfig
from flm_scale.errors import ConfigError
from flm_scale.model.reducers import build_reducer, kept_patches, log_sizes, match, merge

SEED = 0
KINDS = {"merge": MergeConfig(), "pool": PoolConfig(), "unshuffle": UnshuffleConfig(), "drop": DropConfig(), "none": NoReducerConfig()}


def random_rows(num_images: int, num_tokens: int, width: int = 6, *, seed: int = SEED) -> Tensor:
    return torch.randn(num_images, num_tokens, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_sizes(num_images: int, num_tokens: int, *, protected: int = 1) -> Tensor:
    sizes = torch.randint(1, 9, (num_images, num_tokens), generator=torch.Generator().manual_seed(SEED))
    sizes[:, :protected] = 1
    return sizes


def slow_merge(rows: list[list[float]], metric: list[list[float]], sizes: list[int], *, merged: int, protected: int,
               weighted: bool) -> tuple[list[list[float]], list[int]]:
    """Bipartite merging of one image as ToMe and SimVLG describe it, a row at a time. Rows of size 0 neither go nor are gone into."""
    def cosine(a: int, b: int) -> float:
        x, y = torch.tensor(metric[a], dtype=torch.float64), torch.tensor(metric[b], dtype=torch.float64)
        return float(x @ y / x.norm() / y.norm())

    even, odd = ([i for i in range(protected, len(rows)) if i % 2 == parity] for parity in (0, 1))
    partner = {a: max((b for b in odd if sizes[b]), key=lambda b: cosine(a, b)) for a in even if sizes[a]}
    going = sorted(partner, key=lambda a: -cosine(a, partner[a]))[:merged]
    groups = [[i] for i in range(protected)] + [[a] for a in even if a not in going]
    groups += [[b, *(a for a in going if partner[a] == b)] for b in odd]
    means = []
    for group in groups:
        weights = [sizes[i] if weighted else min(sizes[i], 1) for i in group]
        means.append([sum(weight * rows[i][f] for i, weight in zip(group, weights, strict=True)) / max(sum(weights), 1)
                      for f in range(len(rows[0]))])
    return means, [sum(sizes[i] for i in group) for group in groups]


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("protected", [0, 1, 5])
@pytest.mark.parametrize(("num_tokens", "merged"), [(24, 7), (25, 10), (26, 1), (25, 0)])
def test_merging_equals_a_loop_over_rows(num_tokens: int, merged: int, protected: int, weighted: bool) -> None:
    rows, metric, sizes = random_rows(3, num_tokens), random_rows(3, num_tokens, seed=1), random_sizes(3, num_tokens)
    sizes[1, -6:] = 0
    sizes[1, 8:10] = 0
    slots = match(metric, sizes, merged=min(merged, 5), protected=protected)
    means, new_sizes = merge(rows, sizes, slots, num_tokens=num_tokens - min(merged, 5), weighted=weighted)
    for image in range(3):
        slow_means, slow_sizes = slow_merge(rows[image].tolist(), metric[image].tolist(), sizes[image].tolist(), merged=min(merged, 5),
                                            protected=protected, weighted=weighted)
        torch.testing.assert_close(means[image], torch.tensor(slow_means, dtype=torch.float64), rtol=1e-13, atol=1e-13)
        assert new_sizes[image].tolist() == slow_sizes


def test_the_worked_example_is_so() -> None:
    """Of 6 rows the first is protected; place 4 looks like place 1, place 2 like none."""
    metric = torch.tensor([[[1.0, 1.0], [1.0, 0.0], [-1.0, -1.0], [0.0, 1.0], [1.0, 0.1], [0.0, 1.0]]])
    assert match(metric, torch.ones(1, 6, dtype=torch.long), merged=1, protected=1).tolist() == [[0, 2, 1, 3, 2, 4]]


def merged_layer_by_layer(rows: Tensor, *, protected: int, merged: int, layers: int, weighted: bool = True) -> tuple[Tensor, Tensor]:
    sizes = torch.ones(rows.shape[:2], dtype=torch.long)
    schedule = build_reducer(MergeConfig(merged=(merged,)), prefix_tokens=protected, seed=SEED).schedule(rows.shape[1], layers)
    for before, after in pairwise(schedule):
        slots = match(rows, sizes, merged=before - after, protected=protected)
        rows, sizes = merge(rows, sizes, slots, num_tokens=after, weighted=weighted)
    return rows, sizes


@pytest.mark.parametrize("protected", [0, 1, 5])
def test_size_weighted_sum_and_patches_are_conserved_through_all_layers(protected: int) -> None:
    rows = random_rows(2, 257)
    merged, sizes = merged_layer_by_layer(rows, protected=protected, merged=19, layers=12)
    assert merged.shape[1] == 29
    assert sizes.sum(1).tolist() == [257, 257]
    torch.testing.assert_close((merged * sizes[..., None]).sum(1), rows.sum(1), rtol=1e-12, atol=1e-12)


def test_a_row_is_the_mean_of_exactly_the_patches_that_it_stands_for() -> None:
    """Features name patches, so what a merged row holds says which patches are in it and with which weight."""
    patches = torch.eye(41, dtype=torch.float64)[None]
    sizes, rows, standing_for = torch.ones(1, 41, dtype=torch.long), patches, [{i} for i in range(41)]
    for layer in range(4):
        slots = match(random_rows(1, rows.shape[1], seed=layer), sizes, merged=8, protected=1)
        standing_for = [set().union(*(standing_for[i] for i in (slots[0] == slot).nonzero()[:, 0].tolist())) for slot in range(rows.shape[1] - 8)]
        rows, sizes = merge(rows, sizes, slots, num_tokens=rows.shape[1] - 8, weighted=True)
    assert sizes[0].tolist() == [len(patches) for patches in standing_for]
    assert max(sizes[0].tolist()) > 3
    for row, patches in zip(rows[0], standing_for, strict=True):
        assert set(row.nonzero()[:, 0].tolist()) == patches
        torch.testing.assert_close(row[row > 0], torch.full((len(patches),), 1 / len(patches), dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("protected", [0, 1, 5])
def test_protected_rows_and_rows_that_stay_alone_are_the_same_to_the_bit_and_protected_ones_first(protected: int, dtype: torch.dtype) -> None:
    rows, sizes = random_rows(2, 50).to(dtype), random_sizes(2, 50, protected=protected)
    slots = match(rows, sizes, merged=15, protected=protected)
    for weighted in (True, False):
        means, _ = merge(rows, sizes, slots, num_tokens=35, weighted=weighted)
        assert torch.equal(means[:, :protected], rows[:, :protected])
        for image in range(2):
            alone = [i for i in range(50) if slots[image].tolist().count(int(slots[image, i])) == 1]
            assert len(alone) >= protected + 5
            assert torch.equal(means[image, slots[image, alone]], rows[image, alone])


def test_equal_rows_may_be_permuted_and_merge_in_the_order_of_their_places() -> None:
    """All rows alike: the first that may go go, all into the first odd place, and nothing changes but their number."""
    row = random_rows(1, 1)
    rows, sizes = row.expand(1, 12, 6), torch.ones(1, 12, dtype=torch.long)
    slots = match(rows, sizes, merged=3, protected=1)
    assert slots.tolist() == [[0, 3, 3, 4, 3, 5, 3, 6, 1, 7, 2, 8]]
    means, new_sizes = merge(rows, sizes, slots, num_tokens=9, weighted=True)
    torch.testing.assert_close(means, row.expand(1, 9, 6), rtol=1e-15, atol=0)
    assert new_sizes.tolist() == [[1, 1, 1, 4, 1, 1, 1, 1, 1]]


def test_a_permutation_within_the_even_and_the_odd_places_permutes_the_result() -> None:
    rows, order = random_rows(1, 40), torch.arange(40)
    order[2::2] = order[2::2][torch.randperm(19, generator=torch.Generator().manual_seed(1))]
    order[1::2] = order[1::2][torch.randperm(20, generator=torch.Generator().manual_seed(2))]
    sizes = random_sizes(1, 40)
    results = []
    for chosen in (torch.arange(40), order):
        slots = match(rows[:, chosen], sizes[:, chosen], merged=12, protected=1)
        means, new_sizes = merge(rows[:, chosen], sizes[:, chosen], slots, num_tokens=28, weighted=True)
        results.append(torch.cat([means, new_sizes[..., None]], dim=-1)[0])
    plain, permuted = (result[result[:, 0].argsort()] for result in results)
    assert not torch.equal(results[0], results[1])
    torch.testing.assert_close(permuted, plain, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("weighted", [True, False])
def test_gradients_of_merging_are_finite_differences(weighted: bool) -> None:
    rows, sizes = random_rows(2, 12, 3).requires_grad_(), random_sizes(2, 12)
    slots = match(rows, sizes, merged=4, protected=1)
    assert not slots.requires_grad
    assert torch.autograd.gradcheck(lambda x: merge(x, sizes, slots, num_tokens=8, weighted=weighted)[0], rows)


def test_near_ties_are_decided_alike_in_every_run() -> None:
    """Keys that differ in the last bits of float32 alone."""
    keys = random_rows(1, 4, 64).float().repeat(3, 33, 1) * (1 + 1e-7 * torch.arange(132)[:, None])
    sizes = torch.ones(3, 132, dtype=torch.long)
    first = match(keys, sizes, merged=30, protected=1)
    assert all(torch.equal(match(keys.clone(), sizes, merged=30, protected=1), first) for _ in range(5))


def test_matching_is_in_float32_whatever_the_precision_of_the_keys() -> None:
    keys = random_rows(2, 257, 64).bfloat16()
    sizes = torch.ones(2, 257, dtype=torch.long)
    assert torch.equal(match(keys, sizes, merged=19, protected=1), match(keys.double(), sizes, merged=19, protected=1))


def test_a_batch_equals_its_samples_one_by_one() -> None:
    rows = random_rows(5, 60, 16)
    merged, sizes = merged_layer_by_layer(rows, protected=1, merged=9, layers=4)
    for image in range(5):
        alone, own_sizes = merged_layer_by_layer(rows[image:image + 1], protected=1, merged=9, layers=4)
        torch.testing.assert_close(alone[0], merged[image], rtol=1e-13, atol=1e-13)
        assert torch.equal(own_sizes[0], sizes[image])


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("num_real", [4, 9, 12, 19])
def test_padding_never_merges_with_tokens(num_real: int, weighted: bool) -> None:
    """Padding that would match best, behind `num_real` of 20 rows; also when so many must go that padding goes too.

    A column counts the tokens, another the padding: no token's row may hold any padding, and tokens' patches stay all there.
    """
    rows, sizes = random_rows(2, 20), random_sizes(2, 20)
    sizes[:, num_real:] = 0
    rows[:, num_real:] = rows[:, :20 - num_real] if num_real >= 10 else rows[:, 1:2]
    rows[..., 0], rows[..., 1] = sizes > 0, sizes == 0
    means, new_sizes = merge(rows, sizes, match(rows[..., 2:], sizes, merged=9, protected=1), num_tokens=11, weighted=weighted)
    assert means[..., 1].count_nonzero() == 0
    assert torch.equal(new_sizes > 0, means[..., 0] > 0)
    assert torch.equal(new_sizes.sum(1), sizes.sum(1))


def test_tokens_merge_as_if_there_were_no_padding() -> None:
    rows, sizes = random_rows(1, 30), torch.ones(1, 30, dtype=torch.long)
    sizes[:, 20:] = 0
    padded, padded_sizes = merge(rows, sizes, match(rows, sizes, merged=6, protected=1), num_tokens=24, weighted=True)
    alone, own_sizes = merge(rows[:, :20], sizes[:, :20], match(rows[:, :20], sizes[:, :20], merged=6, protected=1), num_tokens=14, weighted=True)
    assert torch.equal(padded_sizes[padded_sizes > 0], own_sizes[0])
    torch.testing.assert_close(padded[padded_sizes > 0], alone[0], rtol=1e-14, atol=1e-14)


def test_attention_to_a_row_of_size_three_is_attention_to_three_equal_rows_and_none_to_padding() -> None:
    """Mean of the same row three times, with its size on the logits, against the three themselves."""
    q, k, v = (random_rows(1, 7, seed=seed)[:, None] for seed in range(3))
    k[:, :, [4, 5]], v[:, :, [4, 5]] = k[:, :, [3]], v[:, :, [3]]
    sizes = torch.tensor([[1, 1, 1, 3, 1, 0]])
    kept = [0, 1, 2, 3, 6, 5]
    merged = F.scaled_dot_product_attention(q, k[:, :, kept], v[:, :, kept], attn_mask=log_sizes(sizes).double())
    torch.testing.assert_close(merged, F.scaled_dot_product_attention(q, k, v), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("merged", "protected", "expected"), [
    ((19,), 1, (257, 238, 219, 200, 181, 162, 143, 124, 105, 86, 67, 48, 29)),
    ((16,), 1, (257, 241, 225, 209, 193, 177, 161, 145, 129, 113, 97, 81, 65)),
    ((22,) * 9 + (14,) * 3, 1, (257, 235, 213, 191, 169, 147, 125, 103, 81, 59, 45, 31, 17)),
    ((100,), 0, (257, 157, 79, 40, 20, 10, 5, 3, 2, 1, 1, 1, 1)),
    ((100,), 1, (257, 157, 79, 40, 21, 11, 6, 4, 3, 2, 2, 2, 2))])
def test_a_schedule_falls_by_what_merges_and_never_by_more_than_half(merged: tuple[int, ...], protected: int, expected: tuple[int, ...]) -> None:
    reducer = build_reducer(MergeConfig(merged=merged), prefix_tokens=protected, seed=SEED)
    assert reducer.schedule(257, 12) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protected", [0, 1, 5])
def test_every_reducer_returns_the_rows_and_the_width_that_it_declares(kind: str, protected: int) -> None:
    reducer = build_reducer(KINDS[kind], prefix_tokens=protected, seed=SEED)
    rows = random_rows(2, protected + 256)
    tokens = reducer.schedule(protected + 256, 3)
    entered = reducer.enter(rows)
    assert entered.shape == (2, tokens[0], 6 * reducer.width_factor)
    assert torch.equal(entered[:, :protected], rows[:, :protected].repeat(1, 1, reducer.width_factor))
    patches = {"merge": (256, 237, 218, 199), "pool": (28,) * 4, "unshuffle": (64,) * 4, "drop": (28,) * 4, "none": (256,) * 4}[kind]
    assert tokens == tuple(protected + count for count in patches)


@pytest.mark.parametrize(("rows", "columns"), [(4, 7), (8, 8), (1, 1), (16, 16), (5, 3)])
def test_pooling_is_torchs_adaptive_average_pooling(rows: int, columns: int) -> None:
    images = random_rows(2, 257)
    pooled = build_reducer(PoolConfig(rows=rows, columns=columns), prefix_tokens=1, seed=SEED).enter(images)
    theirs = F.adaptive_avg_pool2d(images[:, 1:].transpose(1, 2).unflatten(2, (16, 16)), (rows, columns))
    torch.testing.assert_close(pooled[:, 1:], theirs.flatten(2).transpose(1, 2), rtol=1e-13, atol=1e-13)


def test_unshuffling_puts_each_square_of_patches_into_one_row() -> None:
    """A grid of 4 x 4 whose features are row and column."""
    grid = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    squares = build_reducer(UnshuffleConfig(factor=2), prefix_tokens=0, seed=SEED).enter(grid[None])[0]
    assert squares[1].tolist() == [0, 2, 0, 3, 1, 2, 1, 3]
    assert squares[2].tolist() == [2, 0, 2, 1, 3, 0, 3, 1]


def test_dropping_keeps_the_same_random_patches_of_every_image_by_the_seed() -> None:
    rows = random_rows(3, 257)
    kept = kept_patches(256, num_kept=28, seed=0)
    entered = build_reducer(DropConfig(kept=28), prefix_tokens=1, seed=0).enter(rows)
    assert torch.equal(entered[:, 1:], rows[:, [1 + patch for patch in kept]])
    assert list(kept) == sorted(set(kept))
    assert kept != kept_patches(256, num_kept=28, seed=1)
    assert kept[:5] == (11, 13, 34, 44, 46), "the same in every process"


@pytest.mark.parametrize(("config", "num_tokens", "message"), [
    (PoolConfig(), 251, r"reducer.kind \('pool'\) wants a square grid, and the tower gives 250 patches; use merge, drop or none"),
    (UnshuffleConfig(), 251, r"reducer.kind \('unshuffle'\) wants a square grid"),
    (UnshuffleConfig(factor=3), 257, r"reducer.factor \(3\) must divide the patches on a side of the grid \(16\)"),
    (PoolConfig(rows=17, columns=2), 257, r"\(17 x 2\) must not exceed the grid of patches \(16 x 16\); lower them"),
    (DropConfig(kept=300), 257, r"reducer.kept \(300\) must not exceed the patches of a picture \(256\); lower it"),
    (MergeConfig(merged=(9, 9)), 257, r"reducer.merged \(2 numbers\) must be one number, or one for each of 12 layers")])
def test_what_cannot_be_reduced_is_refused_in_one_line(config: object, num_tokens: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        build_reducer(config, prefix_tokens=1, seed=SEED).schedule(num_tokens, 12)
    assert "\n" not in str(refused.value)
