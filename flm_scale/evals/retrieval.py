"""Which caption belongs to which picture, by the likelihood that the run's own objective gives every pair.

The score of a pair is the caption's log-likelihood given the picture, exact where a stream reads from the left, the pseudo-likelihood
for masked models; texts that are common anyway are not discounted. Many-to-many: every picture with the same caption is a hit. A picture
is encoded once for all captions.
"""

import math
from typing import Any

import numpy as np
import torch

from flm_scale.config import Run
from flm_scale.data.index import Index
from flm_scale.data.pack import pack
from flm_scale.data.tokens import AnyTokenizer
from flm_scale.errors import DataError
from flm_scale.evals.caption import read_pixels
from flm_scale.model.assemble import VisionLanguageModel
from flm_scale.objectives.objective import Objective
from flm_scale.parallel.processes import Processes

MOST_IMAGES = 200
"""The split's first pictures with a caption: pairs grow with the square, and 200 are scored in seconds."""
TOKENS_PER_BATCH = 4096
RANKS = (1, 5, 10)


def evaluate_retrieval(run: Run, model: VisionLanguageModel, *, index: Index, tokenizer: AnyTokenizer, objective: Objective, split: str,
                       processes: Processes) -> dict[str, Any]:
    """Return the content of evals/retrieval.json; recalls are shares in [0, 1]. Raises DataError when no picture has a caption."""
    images = [image for image, captions in enumerate(index.captions) if captions][:MOST_IMAGES]
    if not images:
        raise DataError(f"--split {split}: no picture with a caption; score another split")
    texts = sorted({caption for image in images for caption in index.captions[image]})
    likelihoods = score_pairs(run, model, images, texts, index=index, tokenizer=tokenizer, objective=objective, processes=processes)
    hits = np.array([[text in captions for text in texts] for captions in (index.captions[image] for image in images)])
    return {"task": "retrieval", "split": split, "num_images": len(images), "num_texts": len(texts), "score": "likelihood",
            "image_to_text": recall(likelihoods, hits), "text_to_image": recall(likelihoods.T, hits.T),
            "chance": {"image_to_text": chance(hits), "text_to_image": chance(hits.T)}}


@torch.no_grad()
def score_pairs(run: Run, model: VisionLanguageModel, images: list[int], texts: list[str], *, index: Index, tokenizer: AnyTokenizer,
                objective: Objective, processes: Processes) -> np.ndarray:
    """Return the log-likelihood [pictures, texts] of every text given every picture, in nats."""
    from rich.progress import track

    views = [objective.likelihood(np.array(tokenizer.encode(text, max_length=run.text.max_length), np.int32)) for text in texts]
    together = [view for several in views for view in several]
    text_of_target = torch.tensor([text for text, several in enumerate(views) for view in several for _ in view.target_ids])
    images_per_batch = max(1, TOKENS_PER_BATCH // sum(view.length for view in together))
    rows: list[np.ndarray] = []
    mine, device = processes.share(images), next(model.parameters()).device
    for start in track(range(0, len(mine), images_per_batch), description="pairs", transient=True, disable=processes.rank > 0):
        chosen = mine[start:start + images_per_batch]
        pixels = read_pixels(run, index, chosen)
        loss, _ = model(pack([together] * len(chosen), pixels).to(device))
        rows.extend(-torch.zeros(len(chosen), len(texts)).index_add_(1, text_of_target, loss.cpu().view(len(chosen), -1)).numpy())
    return np.stack(processes.gather(rows))


def recall(scores: np.ndarray, hits: np.ndarray) -> dict[str, float]:
    """Return R@1, R@5 and R@10 of queries (rows) over candidates (columns).

    A query's rank is the number of wrong candidates that score as high as its best hit: among equals the wrong ones stand first.
    """
    best_hit = np.where(hits, scores, -np.inf).max(1, keepdims=True)
    rank = ((scores >= best_hit) & ~hits).sum(1)
    return {f"R@{k}": float((rank < k).mean()) for k in RANKS}


def chance(hits: np.ndarray) -> dict[str, float]:
    """Return the recalls of a random order: 1 - C(wrong, k) / C(all, k), averaged over the queries."""
    num_all = hits.shape[1]
    return {f"R@{k}": float(np.mean([1 - math.comb(num_all - int(count), k) / math.comb(num_all, k) if k <= num_all else 1.0
                                     for count in hits.sum(1)])) for k in RANKS}
