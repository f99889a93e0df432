"""Every (tensor, pipe, data, ZeRO) layout against one process of plain PyTorch. One launch a number of processes serves all checks.

The micro-batches hold different numbers of targets, so an average of averages would show.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from flm_scale.engine.local import LocalEngine
from flm_scale.model.assemble import build_model
from tests.distributed.launch import run_worker
from tests.distributed.worker import BF16, HAS_COMPILER, LAYOUTS, OFFLOAD, Case, case_run, file_name
from tests.synthetic import objective_of, random_batch, weights_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]  # the first test waits for four launches

ALL = [pytest.param(case, (tensor, pipe, size // (tensor * pipe)), zero, id=file_name(case, tensor=tensor, pipe=pipe, data=size // (tensor * pipe),
                                                                                    zero=zero).removesuffix(".pt"))
       for size, layouts in LAYOUTS.items() for (tensor, pipe, zero), cases in layouts for case in cases if case != BF16]


class Reference(NamedTuple):
    """What one process of plain PyTorch saw."""

    first: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    curve: list[tuple[float, float]]
    weights: dict[str, torch.Tensor]
    engine: LocalEngine


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What rank 0 of one, two, four and eight processes saw."""
    out = tmp_path_factory.mktemp("outcomes")
    for size in LAYOUTS:
        run_worker("worker", out, processes=size, timeout=900)
    return out


@cache
def reference(case: Case, data: int) -> Reference:
    torch.set_num_threads(1)
    run = case_run(case, data=data)
    objective = objective_of(run)
    engine = LocalEngine(run, build_model(run, objective), objective)
    first, curve, gradients = weights_of(engine), [], {}
    masters = dict(zip(engine.weights_in_model, engine.masters, strict=True))
    take_step = engine.optimizer.step

    def look_and_step() -> None:
        gradients.update({name: masters[parameter].grad.clone() for name, parameter in engine.model.layers.named_parameters()})
        take_step()

    engine.optimizer.step = look_and_step
    for step in range(case.steps):
        result = engine.train_step([random_batch(run, seed=1000 * step + i) for i in range(run.batch.micro_batches)], step=step)
        curve.append((result.loss, result.grad_norm))
    if case.clip_norm:  # the engines are looked at before they clip
        factor = min(1.0, case.clip_norm / (curve[-1][1] + 1e-6))
        gradients = {name: gradient / factor for name, gradient in gradients.items()}
    return Reference(first, gradients, curve, weights_of(engine), engine)


def assert_all_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, floor: float) -> None:
    """1e-5 relative in norm, weight by weight; `floor` is the smallest norm that counts, for weights that are zero but for rounding."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= 1e-5 * max(float(value.norm()), floor), name


@pytest.mark.parametrize(("case", "layout", "zero"), ALL)
def test_a_layout_trains_like_one_process(outcomes: Path, case: Case, layout: tuple[int, int, int], zero: int) -> None:
    """Initial weights to the bit; losses, gradient norms, every gradient and every weight to 1e-5; and an evaluation."""
    if case == OFFLOAD and not HAS_COMPILER:
        pytest.skip("DeepSpeed's CPU Adam needs g++")
    tensor, pipe, data = layout
    found = torch.load(outcomes / file_name(case, tensor=tensor, pipe=pipe, data=data, zero=zero))
    expected = reference(case, data)
    assert all(torch.equal(found["first"][name], weight) for name, weight in expected.first.items())
    torch.testing.assert_close(torch.tensor(found["curve"]), torch.tensor(expected.curve), rtol=1e-5, atol=0)
    assert_all_close(found["gradients"], expected.gradients, floor=0.1 * expected.curve[-1][1])
    assert_all_close(found["weights"], expected.weights, floor=0.1)
    sums = expected.engine.evaluate([random_batch(expected.engine.run, seed=7 + i) for i in range(data)])
    assert found["evaluation"]["count"].tolist() == sums.count.tolist()
    torch.testing.assert_close(found["evaluation"]["loss"], sums.loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replicated_weights_are_the_same_to_the_bit_after_many_steps(outcomes: Path, precision: str) -> None:
    """Over tensor ranks; and the tied table over the stages that hold a copy of it."""
    found = torch.load(outcomes / f"{precision}-22.pt")
    assert found["differ"] == []
    assert len(found["tables"]) == 2
    for copies in found["tables"]:
        assert len(copies) == 2
        assert torch.equal(*copies)


@pytest.mark.parametrize("layout", ["11", "22"], ids=["1,1,1", "2,2,1"])
def test_bf16_follows_the_float32_curve_for_a_hundred_steps(outcomes: Path, layout: str) -> None:
    bf16, fp32 = (torch.tensor(torch.load(outcomes / f"{name}.pt")["losses"]) for name in (f"bf16-{layout}", "fp32-11"))
    assert len(bf16) == 100
    assert float(((bf16 - fp32).abs() / fp32).max()) < 0.01


@pytest.mark.parametrize("zero", [1, 2])  # the hooks of ZeRO 3 reorder sums of bf16 within the backward pass
def test_replicas_sum_bf16_gradients_in_float32(outcomes: Path, zero: int) -> None:
    """Of the first step, from the same weights: sums that went through bf16 would be a thousandth off."""
    found, expected = torch.load(outcomes / file_name(BF16, tensor=1, pipe=1, data=2, zero=zero)), reference(BF16, 2)
    assert_all_close(found["gradients"], expected.gradients, floor=0.1 * expected.curve[-1][1])


@pytest.mark.parametrize("view", ["transposed", "expanded", "transposed sum"])
def test_a_reduction_sees_all_of_a_tensor_that_is_a_view(outcomes: Path, view: str) -> None:
    """megatron-core 0.16's own mappings give 1 here instead of 2."""
    assert torch.equal(torch.load(outcomes / "parts.pt")[view].contiguous().flatten(), torch.full((12,), 2.0))


def test_the_vocabulary_s_padding_never_wins_probability(outcomes: Path) -> None:
    found = torch.load(outcomes / "parts.pt")
    logits = found["rows"] @ found["weight"][:5].T
    targets = torch.arange(7) % 5
    torch.testing.assert_close(found["logits"], logits)
    torch.testing.assert_close(found["loss"], torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    assert found["correct"].tolist() == (logits.argmax(-1) == targets).tolist()
