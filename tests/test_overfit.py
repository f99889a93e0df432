"""The whole path learns: 32 real pairs by heart."""

import numpy as np
import pytest
import torch

from flm_scale.batch import Batch
from flm_scale.config import OptimConfig
from flm_scale.data.images import decode_image
from flm_scale.data.order import keyed_rng
from flm_scale.data.shards import Dataset
from flm_scale.data.tokens import Tokenizer
from flm_scale.engine.local import LocalEngine
from flm_scale.model.assemble import build_model
from flm_scale.model.generate import generate
from flm_scale.objectives.objective import build_objective
from flm_scale.recipes import demo
from tests.synthetic import as_batch

STEPS = 150


@pytest.mark.slow
def test_32_real_pairs_are_learnt_by_heart(demo_dataset: Dataset) -> None:
    """Content reconstruction below 0.05 nats, and greedy captions that say what was written."""
    run = demo().replace(steps=STEPS, optim=OptimConfig(lr=1e-3, warmup_steps=10))
    tokenizer, index = Tokenizer(demo_dataset.tokenizer_file), demo_dataset.index("train")
    objective = build_objective(run.objective, mask_id=tokenizer.mask_id)
    images = [image for image, captions in enumerate(index.captions) if captions][:32]
    pixels = np.stack([decode_image(index.read_image(image), size=run.vision.image_size) for image in images])
    ids = [np.array(tokenizer.encode(index.captions[image][0], max_length=run.text.max_length), np.int32) for image in images]

    def batch(step: int) -> Batch:
        return as_batch([objective.corrupt(caption, keyed_rng(step, number)) for number, caption in enumerate(ids)], pixels, objective)

    model = build_model(run, objective)
    engine = LocalEngine(run, model, objective)
    for step in range(STEPS):
        engine.train_step([batch(step)], step=step)
    sums = engine.evaluate([batch(STEPS)])
    part = objective.parts.index("reconstruction")
    assert float(sums.loss[part] / sums.count[part]) < 0.05
    said = generate(model, objective, torch.from_numpy(pixels), bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size,
                    max_length=run.text.max_length)
    assert [tokenizer.decode(caption.ids) for caption in said] == [index.captions[image][0] for image in images]
