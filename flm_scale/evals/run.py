"""`flm eval`: open a trained run, score one task, print it and write RUN/evals/TASK.json."""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from flm_scale.checkpoint.weights import last_weights, load_weights, read_run
from flm_scale.config import Run
from flm_scale.data.shards import Dataset, open_dataset
from flm_scale.data.tokens import Tokenizer
from flm_scale.model.assemble import VisionLanguageModel, build_model
from flm_scale.objectives.objective import Objective, build_objective


class TrainedRun(NamedTuple):
    """A run directory, opened."""

    run: Run
    weights: Path
    dataset: Dataset
    tokenizer: Tokenizer
    objective: Objective

    def model(self) -> VisionLanguageModel:
        """Return the trained model, on the machine's accelerator where it has one."""
        import torch

        model = build_model(self.run, self.objective, load_pretrained=False)
        load_weights(model.layers, self.weights)
        return model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def open_run(run_dir: Path) -> TrainedRun:
    """Return the run with its last weights and the very dataset and tokenizer that it was trained on; UserErrors say what is missing."""
    run = read_run(run_dir)
    weights = last_weights(run_dir)
    dataset = open_dataset(run.data.path, manifest_hash=run.data.manifest_hash, tokenizer_hash=run.data.tokenizer_hash)
    tokenizer = Tokenizer(dataset.tokenizer_file)
    return TrainedRun(run, weights, dataset, tokenizer, build_objective(run.objective, mask_id=tokenizer.mask_id))


def evaluate(run_dir: Path, *, task: Literal["vqa", "caption", "retrieval"], split: str) -> None:
    """Score a task on a split of the run's dataset; `caption` also writes RUN/samples. The same run gives the same numbers."""
    trained = open_run(run_dir)
    run, weights, dataset, tokenizer, objective = trained
    index = dataset.index(split)
    print(f"{task} on '{split}' of {dataset.folder}, weights {weights}", flush=True)
    match task:
        case "vqa":
            from flm_scale.evals.vqa import evaluate_vqa

            result = evaluate_vqa(run, weights, dataset=dataset, tokenizer=tokenizer, objective=objective, split=split)
            rows = {row["start"]: row for row in result["rows"]} | {"floor": result["floor"]}
            columns = ["overall", "yes_no", "other"]
        case "caption":
            from flm_scale.evals.caption import evaluate_caption
            from flm_scale.evals.samples import write_samples

            model = trained.model()
            result = evaluate_caption(run, model, index=index, tokenizer=tokenizer, objective=objective, split=split)
            samples = write_samples(run, model, run_dir, index=index, tokenizer=tokenizer, objective=objective)
            write_json(run_dir / "samples/samples.json", samples)
            rows, columns = {kind: result[kind] for kind in ("greedy", "beam")}, list(result["greedy"])
        case "retrieval":
            from flm_scale.evals.retrieval import evaluate_retrieval

            result = evaluate_retrieval(run, trained.model(), index=index, tokenizer=tokenizer, objective=objective, split=split)
            directions = ("image_to_text", "text_to_image")
            rows = {way: result[way] for way in directions} | {f"{way}, chance": result["chance"][way] for way in directions}
            columns = list(result["image_to_text"])
    path = run_dir / "evals" / f"{task}.json"
    write_json(path, result)
    print_table(rows, columns, title=f"{task}, split {split}, times 100")
    print(path)


def write_json(path: Path, content: Any) -> None:  # noqa: ANN401 - whatever a task found
    """Write a JSON file whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    part.replace(path)


def print_table(rows: dict[str, dict[str, float]], columns: list[str], *, title: str) -> None:
    """Print scores times 100, a row each."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", *columns, title=title)
    for name, row in rows.items():
        table.add_row(name, *(f"{100 * row[column]:.1f}" for column in columns))
    Console().print(table)
