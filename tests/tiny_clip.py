"""An open_clip model small enough for tests, which this process and the workers of a preparation get to know."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from flm_scale import cli_data
from flm_scale.cli import main
from flm_scale.data.manifest import Shard
from flm_scale.data.prepare.spec import ScoreConfig
from flm_scale.score import ShardScorer

NAME = "tiny"
TINY = {"embed_dim": 24, "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}}
BATCH_SECONDS = "FLM_TEST_BATCH_SECONDS"
"""How long TinyScorer rests behind each batch, so that a test can come in between."""


def know_tiny() -> None:
    """Make open_clip know the model, to the end of this process."""
    import open_clip

    open_clip.factory._MODEL_CONFIGS[NAME] = TINY


def write_weights(file: Path, *, seed: int) -> Path:
    """Write random weights; open_clip must know the model."""
    import open_clip

    torch.manual_seed(seed)
    torch.save({"state_dict": open_clip.create_model(NAME).state_dict()}, file)
    return file


class TinyScorer(ShardScorer):
    """A ShardScorer in whose process open_clip knows the model."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        know_tiny()
        super().__setstate__(state)

    def __call__(self, folder: Path, shard: Shard, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        for scores in super().__call__(folder, shard, numbers):
            time.sleep(float(os.environ.get(BATCH_SECONDS, "0")))
            yield scores


def tiny_scorer(config: ScoreConfig, device: Literal["cpu", "cuda"]) -> ShardScorer:
    """Stand in for cli_data._scorer."""
    return TinyScorer(config, device)


def flm() -> None:
    """Be the command, where open_clip knows the model."""
    know_tiny()
    cli_data._scorer = tiny_scorer
    sys.exit(main())
