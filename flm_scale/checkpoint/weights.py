"""A run's weights under `checkpoints/step-000123/`: the whole model in float32 under canonical names, the Run, and where the data stood.

    model.safetensors   every weight of the model's layers, by name
    run.json            the resolved Run
    state.json          step, and the loader's state
"""

import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flm_scale.config import Run
from flm_scale.errors import CheckpointError
from flm_scale.model.parts import fill, whole_shape


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


def load_weights(layers: nn.Module, folder: Path, *, elsewhere: Collection[str] = (), except_for: str = "") -> None:
    """Fill the layers from a folder; of a weight that is cut over processes only the piece that is held here is read.

    elsewhere: the model's other layers, which other processes hold.   except_for: a module that keeps what it has.
    Strict: raises CheckpointError that names the first weights that are missing, left over or of another shape.
    """
    wanted = {getattr(parameter, "tied_to", name): parameter for name, parameter in layers.named_parameters()
              if not (except_for and name.startswith(f"{except_for}."))}
    with _opened(folder) as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()  # noqa: SIM118 - it is no dict
                  if name in wanted or not (name.split(".", 1)[0] in elsewhere or (except_for and name.startswith(f"{except_for}.")))}
        wrong = [f"'{name}' {'is missing' if name not in shapes else 'is not in the model' if name not in wanted else 'has another shape'}"
                 for name in sorted(wanted.keys() | shapes.keys())
                 if name not in shapes or name not in wanted or shapes[name] != whole_shape(wanted[name])]
        if wrong:
            raise CheckpointError(f"{folder}: weights of another model: {', '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''}")
        for name, parameter in wanted.items():
            fill(parameter, file.get_slice(name))


def read_weight(folder: Path, name: str) -> Tensor:
    """Return one weight of a folder, whole. Raises CheckpointError when it is not there."""
    with _opened(folder) as file:
        if name not in file.keys():  # noqa: SIM118
            raise CheckpointError(f"{folder}: weights of another model: '{name}' is missing")
        weight: Tensor = file.get_tensor(name)
        return weight


@contextmanager
def _opened(folder: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: weights cannot be read ({error}); use an older step") from error


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
