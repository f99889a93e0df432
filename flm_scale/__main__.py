"""`python -m flm_scale` is the same command as `flm`, so that torchrun and srun can start it."""

import sys

from flm_scale.cli import main

sys.exit(main())
