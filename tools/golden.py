"""Writes tests/golden/losses.json: the first ten losses of every objective's tiny run, on a CPU with one thread.

Run it only after a change that is meant to change the mathematics, and say so in the commit: python -m tools.golden
"""

import json

import torch

from tests.engine.test_local import GOLDEN, curve
from tests.synthetic import OBJECTIVES, tiny_run

if __name__ == "__main__":
    torch.set_num_threads(1)
    losses = {kind: curve(tiny_run(kind), steps=10) for kind in OBJECTIVES}
    (GOLDEN / "losses.json").write_text(json.dumps(losses, indent=2) + "\n")
