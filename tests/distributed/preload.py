"""What the server of launch.py imports once for all the processes that are forked from it.

None of it starts a thread, which a fork would lose, but pyarrow, which starts its threads anew in a fork.
"""

import gc

import open_clip  # noqa: F401
import pyarrow.dataset
import pyarrow.parquet  # noqa: F401
import pytest  # noqa: F401
import safetensors.torch  # noqa: F401
import sentencepiece  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
import webdataset  # noqa: F401

import flm_scale.cli
import flm_scale.engine.deepspeed
import flm_scale.engine.local
import flm_scale.parallel.tensor
import flm_scale.train  # noqa: F401

gc.freeze()  # a collection in a process would write to, and so copy, all of it
