"""Trains a run over this launch's processes, evaluates it and small ones on every layout, and saves what rank 0 found; started by a launcher.

usage: python -m tests.distributed.eval_worker RUNS_FOLDER OUT_FOLDER
"""

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

from flm_scale.batch import Example
from flm_scale.cli import main as flm
from flm_scale.data.pack import pack
from flm_scale.evals import vqa
from flm_scale.evals.caption import read_pixels, write_captions
from flm_scale.evals.retrieval import score_pairs
from flm_scale.evals.run import open_run
from flm_scale.evals.samples import describe
from flm_scale.evals.show import caption_files
from flm_scale.parallel.processes import start_processes

# (tensor, pipe), and the run that is cut that way over four processes.
LAYOUTS = {(2, 2): "tied", (2, 1): "plain", (1, 2): "tied"}


def train_sharded(data: Path, run_dir: Path) -> None:
    """`flm train` on (tensor 2, pipe 2): its checkpoint is of four processes."""
    assert flm(["train", "debug", "--data.path", str(data), "--run-dir", str(run_dir), "--text.vocab-size", "61", "--steps", "20",
                "--parallel.engine", "deepspeed", "--parallel.tensor", "2", "--parallel.pipe", "2"]) == 0


def sharded_logits(run_dir: Path, *, tensor: int = 1, pipe: int = 1) -> dict[str, Any]:
    """The logits of all targets of a few test captions, and greedy captions of all test pictures."""
    trained = open_run(run_dir, tensor=tensor, pipe=pipe)
    run, _, dataset, tokenizer, objective = trained
    processes, index = start_processes(run.parallel), dataset.index("test")
    model = trained.model(processes)
    pixels = read_pixels(run, index, range(23))
    texts = ("a red square", "what color is this? green or blue", "square")
    rng = np.random.default_rng(0)
    views: list[Example] = [objective.corrupt(np.array(tokenizer.encode(text, max_length=run.text.max_length), np.int32), rng)[0] for text in texts]
    with torch.no_grad():
        logits = model.logits(pack([[view] for view in views], pixels[:3]))
    captions = write_captions(run, model, pixels, tokenizer=tokenizer, objective=objective, beams=1)
    return {"views": views, "pixels": torch.from_numpy(pixels), "logits": logits, "captions": [caption.text for caption in captions]}


def findings(run_dir: Path, *, tensor: int = 1, pipe: int = 1) -> dict[str, Any]:
    """Captions, likelihoods and filled-in tokens of the test pictures, the same on every process."""
    trained = open_run(run_dir, tensor=tensor, pipe=pipe)
    run, _, dataset, tokenizer, objective = trained
    processes, index = start_processes(run.parallel), dataset.index("test")
    model = trained.model(processes)
    images = [image for image, captions in enumerate(index.captions) if captions]
    texts = sorted({text for image in images for text in index.captions[image]})
    pixels = read_pixels(run, index, processes.share(images))
    said = {beams: processes.gather(write_captions(run, model, pixels, tokenizer=tokenizer, objective=objective, beams=beams)) for beams in (1, 5)}
    samples = processes.gather(list(describe(run, model, processes.share(images[:4]), index=index, tokenizer=tokenizer, objective=objective)))
    return {"texts": {beams: [one.text for one in captions] for beams, captions in said.items()},
            "scores": torch.tensor([[one.score for one in captions] for captions in said.values()]),
            "likelihoods": torch.from_numpy(score_pairs(run, model, images, texts, index=index, tokenizer=tokenizer, objective=objective,
                                                        processes=processes)),
            "pieces": [[token["predicted"] for token in sample["tokens"]] for sample in samples],
            "probabilities": torch.tensor([token["probability"] for sample in samples for token in sample["tokens"]]),
            "weights": sum(parameter.numel() for parameter in model.parameters())}


def answers(run_dir: Path, *, tensor: int = 1, pipe: int = 1) -> list[dict[str, Any]]:
    """The rows of VQA. 53 of the 54 pictures fill a batch, so in every second step one of two replicas has none."""
    run, weights, dataset, tokenizer, objective = open_run(run_dir, tensor=tensor, pipe=pipe)
    with patch.object(vqa, "PASSES", 3), patch.object(vqa, "BATCH", vqa.BATCH.replace(images=53)), \
            patch.object(vqa, "OPTIM", vqa.OPTIM.replace(lr=3e-3)):
        result = vqa.evaluate_vqa(run, weights, dataset=dataset, tokenizer=tokenizer, objective=objective, split="test")
    return [{name: value for name, value in row.items() if name != "seconds"} for row in result["rows"]]


def main(runs: Path, out: Path) -> None:
    from tests.distributed.worker import close_groups

    with contextlib.redirect_stdout(io.StringIO()):
        train_sharded(runs / "squares", runs / "trained")
    close_groups()
    found = sharded_logits(runs / "trained", tensor=2, pipe=2)
    if dist.get_rank() == 0:
        torch.save(found, out / "trained.pt")
    printed = io.StringIO()
    for (tensor, pipe), name in LAYOUTS.items():
        found = findings(runs / name, tensor=tensor, pipe=pipe)
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, found)
        with contextlib.redirect_stdout(printed):
            caption_files(runs / name, sorted(runs.glob("*.png")), out=out / f"{tensor}{pipe}", tensor=tensor, pipe=pipe)
            rows = answers(runs / name, tensor=tensor, pipe=pipe)
        if dist.get_rank() == 0:
            torch.save({"found": everywhere, "rows": rows}, out / f"{tensor}{pipe}.pt")
    assert bool(printed.getvalue()) == (os.environ["RANK"] == "0"), "rank 0 prints, and no other"


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
