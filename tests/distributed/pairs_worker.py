"""One of three acts of resharding there and back, on every layout of this launch; started by a launcher.

first: each layout trains, saves and trains on.   there: the other layout of each pair goes on behind that checkpoint, which it saves again at once.
back: the first layout of each pair reads what the other one saved, and saves it once more.

usage: python -m tests.distributed.pairs_worker ACT OUT_FOLDER
"""

import gc
import json
import os
import sys
from itertools import pairwise, product
from pathlib import Path

from flm_scale.config import ParallelConfig, Run
from tests.distributed.resume_worker import resumed, save, train
from tests.distributed.worker import Case, case_run, close_groups, engine_of

LAYOUTS = ("111", "222", "211", "122", "121", "212", "112", "221")
"""tensor, pipe, data; ZeRO 1."""
PAIRS = list(product(LAYOUTS, LAYOUTS)) if os.environ.get("ALL_PAIRS") else [*zip(LAYOUTS, LAYOUTS, strict=True), *pairwise((*LAYOUTS, LAYOUTS[0]))]
"""From each to itself and to another one; `make test-soak` takes all."""
SAVED_AT, STEPS = 3, 8


def size_of(layout: str) -> int:
    tensor, pipe, data = map(int, layout)
    return tensor * pipe * data


def run_of(layout: str) -> Run:
    tensor, pipe, _ = map(int, layout)
    parallel = ParallelConfig(engine="deepspeed", zero=1, tensor=tensor, pipe=pipe, vision="shard_batch")
    return case_run(Case("flm", "adamw", 0.5, 2, tied=True, shard_images=True), data=1, parallel=parallel).replace(steps=STEPS)


def note(out: Path, name: str, losses: list[tuple[float, float]]) -> None:
    if os.environ["RANK"] == "0":
        (out / f"{name}.json").write_text(json.dumps([loss for loss, _ in losses]))


def first(layout: str, out: Path) -> None:
    run = run_of(layout)
    engine = engine_of(run)
    train(engine, run, range(SAVED_AT))
    save(engine, out / layout, step=SAVED_AT)
    note(out, layout, train(engine, run, range(SAVED_AT, STEPS)))


def there(layout: str, source: str, out: Path) -> None:
    run = run_of(layout)
    engine = resumed(run, out / source, step=SAVED_AT)
    save(engine, out / f"{source}-{layout}", step=SAVED_AT)
    note(out, f"{source}-{layout}", train(engine, run, range(SAVED_AT, STEPS)))


def back(layout: str, other: str, out: Path) -> None:
    engine = resumed(run_of(layout), out / f"{layout}-{other}", step=SAVED_AT)
    save(engine, out / f"{layout}-{other}-{layout}", step=SAVED_AT)


def main(act: str, out: Path) -> None:
    size = int(os.environ["WORLD_SIZE"])
    gc.freeze()
    for layout in LAYOUTS:
        if act == "first" and size_of(layout) == size:
            first(layout, out)
            close_groups()
    for source, other in PAIRS:
        if act == "there" and size_of(other) == size:
            there(other, source, out)
            close_groups()
        if act == "back" and size_of(source) == size:
            back(source, other, out)
            close_groups()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
