"""A run's weights under `checkpoints/step-000123/`: the whole model in float32 under canonical names, the Run, and where the data stood.

    model.safetensors   every weight of the model's layers, by name
    run.json            the resolved Run
    state.json          step, and the loader's state
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flm_scale.config import Run
from flm_scale.errors import CheckpointError


def save_weights(run_dir: Path, weights: dict[str, Tensor], run: Run, *, step: int, loader_state: dict[str, Any]) -> Path:
    """Write the weights after `step` steps and return their folder; a crash on the way leaves no folder of that name."""
    from safetensors.torch import save_file

    folder = run_dir / "checkpoints" / f"step-{step:06d}"
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, aside / "model.safetensors")
    (aside / "run.json").write_text(run.model_dump_json(indent=2))
    (aside / "state.json").write_text(json.dumps({"step": step, "loader": loader_state}, indent=2))
    for path in (*aside.iterdir(), aside):
        _flush_to_disk(path)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    _flush_to_disk(folder.parent)
    return folder


def last_weights(run_dir: Path) -> Path:
    """Return the folder of a run's latest weights. Raises CheckpointError when there are none."""
    folders = sorted((run_dir / "checkpoints").glob("step-*"))
    if not folders:
        raise CheckpointError(f"{run_dir}: no weights under checkpoints/; train first with: flm train RECIPE --run-dir {run_dir}")
    return folders[-1]


def read_run(run_dir: Path) -> Run:
    """Return the Run of a run directory. Raises CheckpointError when there is none."""
    path = run_dir / "run.json"
    if not path.is_file():
        raise CheckpointError(f"{run_dir}: not a run directory (no run.json); train first with: flm train RECIPE --run-dir {run_dir}")
    return Run.model_validate_json(path.read_text())


def load_weights(layers: nn.Module, folder: Path, *, except_for: str = "") -> frozenset[str]:
    """Fill the layers from a folder and return the names filled; strict, but for layers named `except_for`, which keep what they have.

    Raises CheckpointError that names the first weights that are missing, left over or of another shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: weights cannot be read ({error}); use an older step") from error
    wanted = {name: parameter for name, parameter in layers.named_parameters() if not (except_for and name.startswith(f"{except_for}."))}
    weights = {name: tensor for name, tensor in weights.items() if not (except_for and name.startswith(f"{except_for}."))}
    wrong = [f"'{name}' {'is missing' if name not in weights else 'is not in the model' if name not in wanted else 'has another shape'}"
             for name in sorted(wanted.keys() | weights.keys())
             if name not in weights or name not in wanted or weights[name].shape != wanted[name].shape]
    if wrong:
        raise CheckpointError(f"{folder}: weights of another model: {', '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''}")
    for name, parameter in wanted.items():
        parameter.data.copy_(weights[name])
    return frozenset(wanted)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
