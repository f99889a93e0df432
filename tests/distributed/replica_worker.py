"""Is `flm train` in every process of a launch, once a layout and once a way to fail, and notes what each process read, held and said.

usage: python -m tests.distributed.replica_worker DATA_FOLDER OUT_FOLDER
"""

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from flm_scale import train
from flm_scale.cli import main
from flm_scale.data import loader
from flm_scale.errors import DataError
from tests.test_train import TINY

# (tensor, pipe, vision) of four processes.
LAYOUTS = {"two by two": (2, 2, "replicated"), "two tensor ranks, two replicas": (2, 1, "shard_batch"),
           "two stages, two replicas": (1, 2, "replicated")}
FAILURES = ("while it is built", "in the third step", "in the validation")
CANNOT_READ = "shard 00000.tar cannot be read; restore the file"


def arguments(data: Path, run_dir: Path, *more: str) -> list[str]:
    """Without decoding processes, so that who decodes can be counted."""
    return ["train", "debug", "--data.path", str(data), "--run-dir", str(run_dir), *TINY, "--data.workers", "0", *more]


def trained(words: list[str]) -> dict[str, Any]:
    """Train in this process, and return its exit code, the pictures it decoded, the bytes of pixels it held at a step and what it said."""
    decoded, pixel_bytes, console = 0, 0, io.StringIO()
    decode, count = loader.decode_augmented, train.Recorder.count

    def decode_and_count(*args: Any, **more: Any) -> Any:
        nonlocal decoded
        decoded += 1
        return decode(*args, **more)

    def look_and_count(self: train.Recorder, batches: list[Any]) -> None:
        nonlocal pixel_bytes
        pixel_bytes = max(pixel_bytes, *(batch.state.rows.untyped_storage().nbytes() for batch in batches))
        count(self, batches)

    with patch.object(loader, "decode_augmented", decode_and_count), patch.object(train.Recorder, "count", look_and_count), \
            contextlib.redirect_stderr(console):
        code = main(words)
    return {"code": code, "decoded": decoded, "pixel_bytes": pixel_bytes, "console": console.getvalue()}


class Breaks(train.Loader):
    """Reads two steps."""

    steps = 0

    def next_step(self) -> list[Any]:
        self.steps += 1
        return super().next_step() if self.steps < 3 else fail()


def fail(*_args: Any, **_more: Any) -> Any:
    raise DataError(CANNOT_READ)


def one_batch_and_no_more(*args: Any, **more: Any) -> Iterator[Any]:
    yield next(loader.one_pass(*args, **more))
    fail()


def breaking(place: str) -> contextlib.AbstractContextManager[Any]:
    name, broken = {"while it is built": ("Loader", fail), "in the third step": ("Loader", Breaks),
                    "in the validation": ("one_pass", one_batch_and_no_more)}[place]
    return patch.object(train, name, broken)


def note(out: Path, name: str, run: Callable[[], dict[str, Any]]) -> None:
    from tests.distributed.worker import close_groups

    outcome = run()
    (out / f"{name}-{os.environ['RANK']}.json").write_text(json.dumps(outcome))
    close_groups()


def everything(data: Path, out: Path) -> None:
    def words(name: str, tensor: int, pipe: int, vision: str) -> list[str]:
        return arguments(data, out / name, "--parallel.engine", "deepspeed", "--parallel.tensor", str(tensor), "--parallel.pipe", str(pipe),
                         "--parallel.vision", vision)

    for name, layout in LAYOUTS.items():
        note(out, name, lambda name=name, layout=layout: trained(words(name, *layout)))
    for name in FAILURES:
        with breaking(name):
            note(out, name, lambda name=name: trained(words(name, *LAYOUTS["two by two"])))


if __name__ == "__main__":
    everything(Path(sys.argv[1]), Path(sys.argv[2]))
