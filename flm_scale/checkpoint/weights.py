"""What others want of a saved run: its weights without the optimizer, for evaluation; and the checkpoint to resume from."""

import json
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from flm_scale.checkpoint.reader import Checkpoint, first_of
from flm_scale.checkpoint.store import folders_of, last_good, last_good_together, open_checkpoint, open_together, step_of
from flm_scale.config import Run
from flm_scale.errors import CheckpointError, ConfigError
from flm_scale.model.parts import fill, shard_of, whole_shape
from flm_scale.model.pretrained import Account, Fate
from flm_scale.model.vision import tower_hash
from flm_scale.parallel.processes import together

FIXED = ("seed", "objective", "vision", "text", "data.manifest_hash", "data.also_hashes", "data.weights", "data.tokenizer_hash",
         "data.captions_per_image", "batch.text_tokens", "batch.captions", "batch.images", "optim.kind")
"""What a resumed run must have alike: the model, the order of its data, the kind of its moments. Layout, rates and lengths may change."""
MOVABLE = ("text.name", "text.revision", "text.gguf_file", "text.attention")
"""Where a frozen language model lies and how it attends; text.weights_hash says which one it is."""


class Weights(Protocol):
    """Whole weights by their canonical names: a Checkpoint's, or those of an exported folder."""

    @property
    def folder(self) -> Path:
        """Where they are."""
        ...

    def names(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every weight by name."""
        ...

    def weight(self, name: str) -> Any:  # noqa: ANN401 - a tensor once it is indexed
        """Return a weight that is read when it is indexed. Raises CheckpointError when there is none of that name."""
        ...


class ExportedWeights:
    """The weights of a folder that `flm checkpoint export` wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def tower_hash(self) -> str:
        """That of a frozen vision tower which the folder names instead of holding it; else empty."""
        try:
            config = json.loads((self.folder / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.folder / 'config.json'}: cannot be read ({error}); export it again") from error
        return str(config.get("tower_hash", ""))

    def names(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every weight by name."""
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()}

    def weight(self, name: str) -> Any:  # noqa: ANN401 - safetensors' slices have no type of their own
        """Return a weight that is read when it is indexed. Raises CheckpointError when there is none of that name."""
        if name not in self._files:
            raise CheckpointError(f"{self.folder}: '{name}' is missing: weights of another model")
        return self._files[name].get_slice(name)

    @cached_property
    def _files(self) -> dict[str, Any]:
        """The open file of each weight."""
        from safetensors import SafetensorError, safe_open

        files: dict[str, Any] = {}
        for path in sorted(self.folder.glob("model*.safetensors")):
            try:
                file = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: cannot be read ({error}); export it again") from error
            files |= dict.fromkeys(file.keys(), file)
        return files


class StartingWeights:
    """Weights of another run that a run starts from, where it has some of the same name and shape: pictures' before clips', say."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self._shapes = weights, weights.names()
        self.asked: dict[str, bool] = {}
        """Each weight that this process holds, and whether it came from there."""

    def __call__(self, name: str, shape: tuple[int, ...]) -> Any:  # noqa: ANN401 - a tensor once it is indexed
        """Return a whole weight, which is read when it is indexed; None when there is none of that name and shape."""
        self.asked[name] = self._shapes.get(name) == shape
        return self.weights.weight(name) if self.asked[name] else None

    def account(self, asked: Mapping[str, bool]) -> Account:
        """Return what became of them. asked: by all processes. Raises CheckpointError when none was of use."""
        if not any(asked.values()):
            raise CheckpointError(f"--init-from {self.weights.folder}: no weight of it has a name and shape of this model's; name a run like it")
        why = {True: "another shape", False: "not in this model"}
        fates = {name: Fate("used") if asked.get(name) else Fate("left out", why[name in asked]) for name in self._shapes}
        return Account(str(self.weights.folder), fates, {name: (name,) if taken else () for name, taken in asked.items()})


def open_weights(run_dir: Path) -> Weights:
    """Return the weights of an exported folder, or those of the last good checkpoint of a run. Raises CheckpointError when there are none."""
    return ExportedWeights(run_dir) if (run_dir / "config.json").is_file() else last_good_together(run_dir)


def read_run(run_dir: Path) -> Run:
    """Return the Run of a run directory. Raises CheckpointError when there is none."""
    path = run_dir / "run.json"
    if not path.is_file():
        raise CheckpointError(f"{run_dir}: not a run directory (no run.json); train first with: flm train RECIPE --run-dir {run_dir}")
    return Run.model_validate_json(path.read_text())


def load_weights(layers: nn.Module, checkpoint: Weights, *, elsewhere: Collection[str] = ()) -> None:
    """Fill the layers from a checkpoint. elsewhere: the model's other layers, which other processes hold.

    A frozen language model's weights (`is_elsewhere`) are in no checkpoint and stay as they are; so does a tower that an exported folder names.

    Strict: raises CheckpointError that names the first weights that are missing, left over or of another shape, or for another tower.
    """
    wanted = {getattr(parameter, "tied_to", name): parameter for name, parameter in layers.named_parameters()
              if not hasattr(parameter, "is_elsewhere")}
    if isinstance(checkpoint, ExportedWeights) and checkpoint.tower_hash:
        tower = {name: wanted.pop(name) for name in list(wanted) if name.startswith("vision_")}
        if (found := tower_hash(tower)) != checkpoint.tower_hash:
            raise CheckpointError(f"{checkpoint.folder}: was trained with a vision tower of sha256 {checkpoint.tower_hash[:12]}, and what "
                                  f"vision.pretrained names now has {found[:12]}; name the one of before in run.json")
    shapes = {name: shape for name, shape in checkpoint.names().items() if name in wanted or name.split(".", 1)[0] not in elsewhere}
    wrong = [f"'{name}' {'is missing' if name not in shapes else 'is not in the model' if name not in wanted else 'has another shape'}"
             for name in sorted(wanted.keys() | shapes.keys())
             if name not in shapes or name not in wanted or shapes[name] != whole_shape(wanted[name].shape, shard_of(wanted[name]))]
    if wrong:
        raise CheckpointError(f"{checkpoint.folder}: weights of another model: {first_of(wrong)}")
    for name, parameter in wanted.items():
        fill(parameter, checkpoint.weight(name))


def find_checkpoint(run_dir: Path, which: str, run: Run) -> Checkpoint:
    """Return the checkpoint that a run resumes from: the `latest` good one of a run directory, that of a step, or that in a folder; collective.

    Raises CheckpointError, so that nothing starts from random unasked, when there is none or the one that was named is damaged; ConfigError
    when it is of a run that is too different.
    """
    checkpoint = last_good_together(run_dir) if which == "latest" else named_checkpoint(run_dir, which)
    check_resumable(run, checkpoint)
    return checkpoint


def named_checkpoint(run_dir: Path, which: str) -> Checkpoint:
    """Return the checkpoint of a step, or that in a folder, after reading all of it; collective.

    Raises CheckpointError when it is not there or damaged.
    """
    return open_together(together(lambda: _named_folder(run_dir, which)))


def _named_folder(run_dir: Path, which: str) -> Path:
    folder = run_dir / "checkpoints" / f"step-{int(which):06d}" if which.isdecimal() else Path(which)
    if not which or not folder.is_dir():
        raise CheckpointError(f"--resume {which}: no such checkpoint; give latest, a step of {run_dir} (there is: {steps_in(run_dir)}) or a "
                              "checkpoint's folder")
    if (folder / "checkpoints").is_dir():
        raise CheckpointError(f"--resume {which}: is a run, not a checkpoint; to go on with it use --run-dir {which} --resume")
    return folder


def checkpoint_at(path: Path, step: int | None = None) -> Checkpoint:
    """Return the checkpoint in a folder; or of a run directory that of a step, or its latest good one. Reads all of it.

    Raises CheckpointError when it is not there or damaged.
    """
    if (path / "manifest.json").is_file() and step is None:
        return open_checkpoint(path, full=True)
    if step is None:
        return last_good(path, full=True)
    folder = path / "checkpoints" / f"step-{step:06d}"
    if not folder.is_dir():
        raise CheckpointError(f"{path}: no checkpoint of step {step}; there is: {steps_in(path)}")
    return open_checkpoint(folder, full=True)


def steps_in(run_dir: Path) -> str:
    """Return the steps of a run's checkpoints, newest first, for a message."""
    return ", ".join(str(step_of(folder)) for folder in folders_of(run_dir)) or "none yet"


def check_resumable(run: Run, checkpoint: Checkpoint) -> None:
    """Raise ConfigError that lists what a resumed run has otherwise than the saved one and must have alike."""
    differences = [f"{path} {then!r} there and {now!r} here" for path, (then, now) in changes(run, checkpoint).items()
                   if any(f"{path}.".startswith(f"{fixed}.") for fixed in FIXED) and path not in MOVABLE]
    if differences:
        raise ConfigError(f"{checkpoint.folder}: was saved with {', '.join(differences)}; resume with what it had, or train anew in another "
                          "--run-dir")
    if run.steps <= checkpoint.step:
        raise ConfigError(f"{checkpoint.folder}: has {checkpoint.step} steps already and --steps is {run.steps}; ask for more")


def changes(run: Run, checkpoint: Checkpoint) -> dict[str, tuple[Any, Any]]:
    """Return what a run has otherwise than the saved one: its value there and here, by its path."""
    then, now = (flat_values(one.model_dump(mode="json")) for one in (Run.model_validate_json(checkpoint.run_json), run))
    return {path: (then.get(path), now.get(path)) for path in {**now, **then} if then.get(path) != now.get(path)}


def flat_values(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by their dotted paths."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flat_values(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
