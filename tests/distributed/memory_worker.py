"""Trains small runs on layouts of this launch's processes and saves the bytes that every rank held; started by a launcher.

usage: python -m tests.distributed.memory_worker OUT_FOLDER
"""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from flm_scale.config import BatchConfig, ParallelConfig, Run, TextConfig
from flm_scale.config_vision import SmallVisionConfig
from flm_scale.train import build_engine
from tests.distributed.worker import close_groups
from tests.synthetic import objective_of, random_batch, tiny_language_run, tiny_run

# By number of processes: (tensor, pipe, ZeRO stage, precision), and `language` for a run around a frozen language model.
LAYOUTS = {2: [(1, 1, 0, "fp32"), *((1, 1, zero, precision) for precision in ("fp32", "bf16") for zero in (1, 2, 3)),
               (2, 1, 1, "fp32"), (1, 2, 1, "fp32"), (1, 2, 1, "bf16"),
               (1, 1, 1, "fp32", "language"), (1, 1, 2, "bf16", "language"), (1, 1, 3, "bf16", "language")]}
LANGUAGE_SIZES = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4}


def small_run(out: Path, tensor: int, pipe: int, zero: int, precision: str, kind: str = "") -> Run:
    """Some 3 million weights: enough that padding is nothing beside them. The tower is frozen, so not all weights have gradients.

    out: where the test has put `language_model`, of LANGUAGE_SIZES.
    """
    parallel = ParallelConfig(engine="deepspeed", tensor=tensor, pipe=pipe, zero=zero)
    vision = SmallVisionConfig(image_size=16, patch_size=8, width=128, layers=3, heads=2, trainable=False)
    if kind == "language":
        run = tiny_language_run(out / "language_model", vision=vision, precision=precision, parallel=parallel)
        return run.replace(text=run.text.replace(bridge=run.text.bridge.replace(width=192)))
    return tiny_run(
        vision=vision,
        text=TextConfig(width=192, heads=4, bottom_layers=1, fusion_layers=2, reconstructor_bottom_layers=1, reconstructor_fusion_layers=1,
                        vocab_size=1001, max_length=16),
        batch=BatchConfig(micro_batches=4, text_tokens=200, captions=16, images=16), precision=precision, parallel=parallel)


def bytes_of(tensors: Iterable[Any], seen: set[int]) -> int:
    """Memory of tensors, in lists and alone, that was not counted before."""
    total = 0
    for tensor in tensors:
        if isinstance(tensor, list):
            total += bytes_of(tensor, seen)
        elif isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in seen:
            seen.add(tensor.untyped_storage().data_ptr())
            total += tensor.untyped_storage().nbytes()
    return total


def resident_bytes(engine: Any) -> dict[str, int]:
    """What DeepSpeed's engine holds at this moment."""
    zero = engine.engine.optimizer
    parameters, inner = list(engine.layers.parameters()), getattr(zero, "optimizer", zero)
    seen: set[int] = {torch.empty(0).untyped_storage().data_ptr()}
    weights = bytes_of([tensor for parameter in parameters for tensor in (parameter.data, getattr(parameter, "ds_tensor", None))], seen)
    masters = [parameter for group in inner.param_groups for parameter in group["params"]] + getattr(zero, "fp32_partitioned_groups_flat", [])
    optimizer = bytes_of([*masters, *(tensor for state in inner.state.values() for tensor in state.values())], seen)
    kept = [getattr(zero, name, None) for name in ("grads_in_partition", "fp32_groups_gradients_flat", "grad_partitions_flat_buffer")]
    gradients = bytes_of([*(parameter.grad for parameter in parameters), *getattr(zero, "averaged_gradients", {}).values(), *kept], seen)
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer}


def look_before(engine: Any, method: str, found: list[dict[str, int]]) -> None:
    """Let a method of DeepSpeed's engine write down first what is held."""
    proceed = getattr(engine.engine, method)

    def look_and_proceed(*args: Any, **kwargs: Any) -> Any:
        found.append(resident_bytes(engine))
        return proceed(*args, **kwargs)

    setattr(engine.engine, method, look_and_proceed)


def main(out: Path) -> None:
    for cut in LAYOUTS[int(os.environ["WORLD_SIZE"])]:
        run = small_run(out, *cut)
        engine = build_engine(run, objective_of(run))
        found: list[dict[str, int]] = []
        look_before(engine, "_take_model_step", found)
        if run.parallel.zero < 2:  # gradients are exchanged after the backward passes, and only then are there fewer of them
            look_before(engine, "allreduce_gradients", found)
        for step in range(2):  # the moments are there from the second step on
            batches = [random_batch(run, seed=10 * step + i) for i in range(run.batch.micro_batches)]
            engine.train_step(batches[engine.data_index :: engine.layout.data], step=step)
        most = {part: max(moment[part] for moment in found) for part in found[0]}
        (out / f"{'-'.join(map(str, cut))}-rank{engine.rank}.json").write_text(json.dumps(most))
        close_groups()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
