"""Rates of a step and the peak they are compared with."""

import pytest
import torch

from flm_scale.observe.throughput import Meter, known_peak, measured_peak, peak_flops


def test_a_step_counts_all_its_micro_batches_and_none_of_the_last_step() -> None:
    """Two micro-batches in two seconds on four devices, then a lighter step."""
    meter = Meter(peak_flops=1e9, world_size=4)
    meter.add(pairs=10, tokens=100, flops=1e9)
    meter.add(pairs=30, tokens=300, flops=3e9)
    numbers = meter.finish_step(seconds=2.0, data_wait_s=0.5)
    assert numbers == {"pairs_per_s": 20.0, "tokens_per_s": 200.0, "mfu": 0.5, "data_wait_s": 0.5, "seconds": 2.0, "time/data_wait": 0.25,
                       "time/compute": 0.75}
    meter.add(pairs=1, tokens=2, flops=4e9)
    assert meter.finish_step(seconds=1.0, data_wait_s=0.0)["pairs_per_s"] == 1.0


@pytest.mark.parametrize(("name", "tflops"), [
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("NVIDIA B200", 2250),
    ("NVIDIA L40S", 362), ("NVIDIA GeForce RTX 4090", 165)])
def test_known_gpus_have_their_dense_bf16_peak(name: str, tflops: float) -> None:
    """Names as torch.cuda.get_device_name gives them."""
    assert known_peak(name, "bf16") == tflops * 1e12


def test_what_is_not_that_gpu_is_measured_instead() -> None:
    """A slice of a GPU, a laptop's chip of the same name and an unknown one would all get a wrong peak from the table."""
    names = ["NVIDIA A100-SXM4-40GB MIG 3g.20gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "Some New GPU"]
    assert [known_peak(name, "bf16") for name in names] == [None] * 3


def test_float32_peak_depends_on_whether_tf32_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain float32 cannot reach the tensor cores, so its utilisation must not be held against them."""
    assert known_peak("NVIDIA H200", "fp32") == pytest.approx(66.9e12)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert known_peak("NVIDIA H200", "fp32") == pytest.approx(494e12)


def test_a_cpu_is_measured_with_a_plausible_result() -> None:
    """A gigaflop a second at least, and not more than any machine has; twice measured is nearly twice the same."""
    first, second = peak_flops(torch.device("cpu"), "fp32"), measured_peak(torch.device("cpu"), "fp32")
    assert 1e9 < first < 1e14
    assert 0.2 < first / second < 5
