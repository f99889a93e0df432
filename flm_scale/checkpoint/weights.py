"""What others want of a saved run: its weights without the optimizer, for evaluation; and the checkpoint to resume from."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flm_scale.checkpoint.reader import Checkpoint
from flm_scale.checkpoint.store import last_good, open_checkpoint
from flm_scale.config import Run
from flm_scale.errors import CheckpointError, ConfigError
from flm_scale.model.parts import fill, whole_shape

FIXED = ("seed", "objective", "vision", "text", "data.manifest_hash", "data.tokenizer_hash", "data.captions_per_image", "batch.text_tokens",
         "batch.captions", "batch.images")
"""What a resumed run must have alike: the model, and the order of its data. Layout, rates, lengths and numbers of micro-batches may change."""


def last_weights(run_dir: Path) -> Path:
    """Return the folder of a run's latest checkpoint whose files are all there. Raises CheckpointError when there is none."""
    return last_good(run_dir, full=False).folder


def read_run(run_dir: Path) -> Run:
    """Return the Run of a run directory. Raises CheckpointError when there is none."""
    path = run_dir / "run.json"
    if not path.is_file():
        raise CheckpointError(f"{run_dir}: not a run directory (no run.json); train first with: flm train RECIPE --run-dir {run_dir}")
    return Run.model_validate_json(path.read_text())


def load_weights(layers: nn.Module, folder: Path, *, elsewhere: Collection[str] = (), except_for: str = "") -> None:
    """Fill the layers from a checkpoint.

    elsewhere: the model's other layers, which other processes hold.   except_for: a module that keeps what it has.
    Strict: raises CheckpointError that names the first weights that are missing, left over or of another shape.
    """
    checkpoint = open_checkpoint(folder, full=False)
    wanted = {getattr(parameter, "tied_to", name): parameter for name, parameter in layers.named_parameters()
              if not (except_for and name.startswith(f"{except_for}."))}
    shapes = {name: list(shape) for name, shape in checkpoint.names("weight").items()
              if name in wanted or not (name.split(".", 1)[0] in elsewhere or (except_for and name.startswith(f"{except_for}.")))}
    wrong = [f"'{name}' {'is missing' if name not in shapes else 'is not in the model' if name not in wanted else 'has another shape'}"
             for name in sorted(wanted.keys() | shapes.keys())
             if name not in shapes or name not in wanted or shapes[name] != whole_shape(wanted[name])]
    if wrong:
        raise CheckpointError(f"{folder}: weights of another model: {', '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''}")
    for name, parameter in wanted.items():
        fill(parameter, checkpoint.weight(name))


def read_weight(folder: Path, name: str) -> Tensor:
    """Return one weight of a checkpoint, whole. Raises CheckpointError when it is not there."""
    return open_checkpoint(folder, full=False).weight(name)[:]


def find_checkpoint(run_dir: Path, which: str) -> Checkpoint | None:
    """Return the checkpoint to resume from: the `latest` good one of a run directory, that of a step, or that in a folder.

    `or-start` is `latest`, and None where none was ever committed: what a job wants that is queued again.
    Raises CheckpointError, so that nothing starts from random unasked, when there is none or the one that was named is damaged.
    """
    if which == "or-start" and not list((run_dir / "checkpoints").glob("step-*")):
        return None
    if which in {"latest", "or-start"}:
        return last_good(run_dir, full=True)
    return open_checkpoint(run_dir / "checkpoints" / f"step-{int(which):06d}" if which.isdecimal() else Path(which), full=True)


def check_resumable(run: Run, checkpoint: Checkpoint) -> None:
    """Raise ConfigError that lists what a resumed run has otherwise than the saved one and must have alike."""
    then, now = Run.model_validate_json(checkpoint.run_json).model_dump(), run.model_dump()

    def value(values: Any, path: str) -> Any:  # noqa: ANN401 - any value of a Run
        for key in path.split("."):
            values = values[key]
        return values

    changed = [path for path in FIXED if value(then, path) != value(now, path)]
    for path in [path for path in changed if isinstance(value(now, path), dict)]:
        old, new = value(then, path), value(now, path)
        changed += [f"{path}.{key}" for key in new if old.get(key) != new[key]]
        changed.remove(path)
    if changed:
        differences = ", ".join(f"{path} {value(then, path)!r} there and {value(now, path)!r} here" for path in changed)
        raise ConfigError(f"{checkpoint.folder}: was saved with {differences}; resume with what it had, or train anew in another --run-dir")
    if run.steps <= checkpoint.step:
        raise ConfigError(f"{checkpoint.folder}: has {checkpoint.step} steps already and --steps is {run.steps}; ask for more")
