"""Prepare a dataset on a Ray cluster. On any of its nodes, or behind `ray job submit --`:

    python cluster/ray/prepare.py --input X --output D [--group.key VALUE ...]

It is `flm data prepare` on the cluster that it finds itself in: one driver, and a worker for every CPU of the cluster, or of the nodes that have
`--labels`. The output must be on a file system that all nodes share. Ended in any way, the same command goes on.
"""

import os
import sys

from flm_scale.cli import main

if __name__ == "__main__":
    os.environ.setdefault("RAY_ADDRESS", "auto")
    sys.exit(main(["data", "prepare", *sys.argv[1:]]))
