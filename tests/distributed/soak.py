"""Kills -9 runs on every layout, at every place of a save and at moments by the clock, and wants each to go on to the bit: `make test-soak`.

usage: python -m tests.distributed.soak [--trials 30] [--seed 0] [--layouts 211-zero3 ...]
"""

import argparse
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random
from tempfile import mkdtemp

from tests.conftest import write_toy
from tests.distributed.kills import BY_ANY_RANK, EVERY, LAST_KILL, PLACES, Kill, Layout, Reference, trial, whole_run

CUTS = [((1, 1, 1), (1, 2, 3)), ((2, 1, 1), (1, 2, 3)), ((1, 2, 1), (0, 1)), ((2, 2, 1), (0, 1)), ((1, 1, 2), (1, 2, 3))]
"""Pipelines know ZeRO 0 and 1."""
LAYOUTS = {str(layout): layout for cut, zeros in CUTS for zero in zeros for layout in [Layout(*cut, zero)]}


def kills_of(chance: Random, number: int, places: list[str], layout: Layout, reference: Reference) -> list[Kill | float]:
    """Every second trial is aimed, at each place in turn; the others come by the clock. Every third one is killed once more while it goes on."""
    clock = chance.uniform(0, reference.seconds)
    if number % 2 == 0:
        place = places[number // 2 % len(places)]
        # The first thing to go is that of the third save.
        kill = Kill(place, step=chance.randrange(3 * EVERY, LAST_KILL + 1, EVERY), rank=chance.randrange(layout.size) if place in BY_ANY_RANK else 0,
                    everybody=chance.random() < 0.5)
        return [kill, *([clock] if number % 3 == 0 else [])]
    return [clock, *([chance.uniform(0, reference.seconds)] if number % 3 == 0 else [])]


def soak(folder: Path, *, trials: int, seed: int, layouts: list[str]) -> int:
    """Return the number of failures; what those left stays in the folder."""
    data, failures, rows = write_toy(folder / "data").folder, 0, list[str]()
    for name in layouts:
        started, layout, counts, failed = time.monotonic(), LAYOUTS[name], Counter[str](), 0
        reference, places = whole_run(data, folder / name / "whole", layout), Random(f"{seed} {name}").sample(PLACES, len(PLACES))
        for number in range(trials):
            chance = Random(f"{seed} {name} {number}")
            outcome = trial(data, folder / name / str(number), layout, reference, chance=chance,
                            kills=kills_of(chance, number, places, layout, reference))
            counts.update(outcome.places)
            failed += bool(outcome.problem)
            if not outcome.problem:
                shutil.rmtree(folder / name / str(number))
            print(f"{name}, trial {number + 1} of {trials}: {', then '.join(outcome.places) or 'not killed in time'}"
                  f"{outcome.problem and f'; FAILED, see {folder / name / str(number)}: {outcome.problem}'}", file=sys.stderr, flush=True)
        failures += failed
        rows.append(f"| {name} | {trials} | {failed} | {', '.join(f'{place} {count}' for place, count in sorted(counts.items()))} | "
                    f"{time.monotonic() - started:.0f} |")
    print("\n".join(["| layout | trials | failures | kills | seconds |", "|---|---|---|---|---|", *rows]))
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=30, help="on each layout (default 30)")
    parser.add_argument("--seed", type=int, default=0, help="of places and moments (default 0)")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), metavar="LAYOUT", help=f"of {', '.join(LAYOUTS)}")
    options = parser.parse_args()
    return min(soak(Path(mkdtemp(prefix="soak-")), trials=options.trials, seed=options.seed, layouts=options.layouts), 1)


if __name__ == "__main__":
    sys.exit(main())
