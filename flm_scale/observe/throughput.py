"""How fast a run goes, and how much of the hardware that is: counts of a step become the numbers of its metrics line.

Peak FLOPs are the vendor's dense figures where the GPU is known by name, else the fastest of a few measured matrix products.
"""

import re
from functools import cache
from time import perf_counter
from typing import Literal

import torch

# Dense TFLOP/s by device name: bf16 with float32 sums, TF32, plain float32. First match wins. Source: NVIDIA data sheets.
KNOWN_PEAKS: tuple[tuple[str, float, float, float], ...] = (
    (r"H100 PCIe", 756, 378, 51.2),
    (r"H(100|200) NVL", 835, 417, 60),
    (r"H100|H200|GH200", 989, 494, 66.9),
    (r"B200", 2250, 1125, 75),
    (r"A100", 312, 156, 19.5),
    (r"L40S", 362, 183, 91.6),
    (r"RTX 4090$", 165, 82.6, 82.6),
)


@cache
def peak_flops(device: torch.device, precision: Literal["fp32", "bf16"]) -> float:
    """Return the FLOP/s that one device can reach, of this process's threads on a CPU. Measured once, in a fraction of a second."""
    known = known_peak(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None
    return known or measured_peak(device, precision)


def known_peak(name: str, precision: Literal["fp32", "bf16"]) -> float | None:
    """Return the dense peak of a GPU by its name, or None when it is not in the table or only a slice of one (MIG)."""
    for pattern, bf16, tf32, fp32 in KNOWN_PEAKS:
        if re.search(pattern, name) and "MIG" not in name:
            single = fp32 if torch.get_float32_matmul_precision() == "highest" else tf32
            return 1e12 * (bf16 if precision == "bf16" else single)
    return None


def measured_peak(device: torch.device, precision: Literal["fp32", "bf16"]) -> float:
    """Return the FLOP/s of the fastest square matrix product among a few sizes."""
    best = 0.0
    for size in (512, 1024) if device.type == "cpu" else (4096, 8192):
        square = torch.ones(size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        for _ in range(5):
            start = perf_counter()
            torch.mm(square, square)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            best = max(best, 2 * size ** 3 / (perf_counter() - start))
    return best


class Meter:
    """Adds up the micro-batches of a step, of all processes together, and turns them into rates."""

    def __init__(self, *, peak_flops: float, world_size: int = 1) -> None:
        """peak_flops: FLOP/s of one device.   world_size: devices that share the step."""
        self.available_flops = peak_flops * world_size
        self._pairs = self._tokens = self._flops = 0.0

    def add(self, *, pairs: float, tokens: float, flops: float) -> None:
        """Count a micro-batch. pairs: its captions, each with its image.   flops: training FLOPs of the model (cost.training_flops)."""
        self._pairs, self._tokens, self._flops = self._pairs + pairs, self._tokens + tokens, self._flops + flops

    def finish_step(self, *, seconds: float, data_wait_s: float) -> dict[str, float]:
        """Return the step's numbers for metrics.py and start the next. seconds: the whole step, the wait for data included."""
        numbers = {
            "pairs_per_s": self._pairs / seconds, "tokens_per_s": self._tokens / seconds,
            "mfu": self._flops / (seconds * self.available_flops), "data_wait_s": data_wait_s, "seconds": seconds,
            "time/data_wait": data_wait_s / seconds, "time/compute": 1 - data_wait_s / seconds,
        }
        self._pairs = self._tokens = self._flops = 0.0
        return numbers
