"""`flm eval`: open a trained run, score one task, print it and write RUN/evals/TASK.json. Every process of a launcher runs this; rank 0 writes."""

import json
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

from flm_scale.checkpoint.weights import ExportedWeights, Weights, load_weights, open_weights, read_run
from flm_scale.config import ParallelConfig, Run, TextConfig
from flm_scale.config_lm import LanguageModelConfig
from flm_scale.data.shards import Dataset, open_dataset
from flm_scale.data.tokens import AnyTokenizer, Tokenizer
from flm_scale.model.assemble import VisionLanguageModel, assemble, layer_builders
from flm_scale.objectives.objective import Objective
from flm_scale.observe.cost import shape_of
from flm_scale.observe.layer_cost import stage_bounds
from flm_scale.opening import objective_of, open_tokenizer
from flm_scale.parallel.mesh import find_layout, find_ranks
from flm_scale.parallel.processes import Processes, meet, start_processes, together


class TrainedRun(NamedTuple):
    """A run directory or an exported folder, opened."""

    run: Run
    """As it was trained, but for `parallel`, which says how its model is cut now."""
    weights: Weights
    dataset: Dataset
    tokenizer: AnyTokenizer
    objective: Objective

    def model(self, processes: Processes) -> VisionLanguageModel:
        """Return what this process holds of the trained model, on its device. Where stages are cut, every call of the model is collective."""
        run, names_tower = self.run, isinstance(self.weights, ExportedWeights) and bool(self.weights.tower_hash)
        if names_tower and isinstance(run.text, LanguageModelConfig):  # then the tower is opened, and nothing else that a run may start from
            run = run.replace(text=run.text.replace(bridge=run.text.bridge.replace(pretrained="")))
        builders = layer_builders(run, self.objective, processes.parts, load_pretrained=names_tower)
        names, bounds = list(builders), stage_bounds(self.run, shape_of(self.run.vision))
        stage = processes.layout.stage(processes.rank)
        own = names[bounds[stage]:bounds[stage + 1]]
        model = assemble(self.run, {name: builders[name] for name in own}, relay=processes.relay)
        load_weights(model.layers, self.weights, elsewhere=set(names) - set(own))
        return model.to(processes.device)


def open_run(run_dir: Path, *, tensor: int = 1, pipe: int = 1) -> TrainedRun:
    """Return the run with its last weights and the very dataset and tokenizer that it was trained on; UserErrors say what is missing.

    tensor, pipe: how its model is to be cut over this launch's processes. Raises ConfigError when it cannot be.
    """
    run = read_run(run_dir)
    run = run.replace(parallel=ParallelConfig(engine="deepspeed", tensor=tensor, pipe=pipe, vision=run.parallel.vision))
    find_layout(run.parallel, world_size=find_ranks(os.environ)[0].size)
    stage_bounds(run, shape_of(run.vision))  # more stages than layers are refused here, before the processes meet
    meet()
    weights = together(lambda: open_weights(run_dir))
    own_tokens = isinstance(run.text, TextConfig)
    dataset = open_dataset(run.data.path, manifest_hash=run.data.manifest_hash, tokenizer_hash=run.data.tokenizer_hash if own_tokens else "")
    tokenizer = open_tokenizer(run, dataset)
    return TrainedRun(run, weights, dataset, tokenizer, objective_of(run, tokenizer))


def evaluate(run_dir: Path, *, task: Literal["vqa", "caption", "retrieval"], split: str, tensor: int = 1, pipe: int = 1) -> None:
    """Score a task on a split of the run's dataset; `caption` also writes RUN/samples. The same run gives the same numbers.

    tensor, pipe: how the model is cut over this launch's processes; the replicas that are left share the pictures.
    """
    trained = open_run(run_dir, tensor=tensor, pipe=pipe)
    run, weights, dataset, tokenizer, objective = trained
    index = dataset.index(split)
    writes = find_ranks(os.environ)[0].rank == 0
    if writes:
        print(f"{task} on '{split}' of {dataset.folder}, weights {weights.folder}", flush=True)
    match task:
        case "vqa":
            if isinstance(tokenizer, Tokenizer):
                from flm_scale.evals.vqa import evaluate_vqa

                result = evaluate_vqa(run, weights, dataset=dataset, tokenizer=tokenizer, objective=objective, split=split)
            else:
                from flm_scale.evals.answers import evaluate_answers

                processes = start_processes(run.parallel)
                result = evaluate_answers(run, weights, trained.model(processes), dataset=dataset, tokenizer=tokenizer, split=split,
                                          processes=processes)
            rows = {row["start"]: row for row in result["rows"]} | {"floor": result["floor"]}
            columns = ["overall", "yes_no", "other"]
        case "caption":
            from flm_scale.evals.caption import evaluate_caption
            from flm_scale.evals.samples import write_samples

            processes = start_processes(run.parallel)
            model = trained.model(processes)
            result = evaluate_caption(run, model, index=index, tokenizer=tokenizer, objective=objective, split=split, processes=processes)
            samples = write_samples(run, model, run_dir, index=index, tokenizer=tokenizer, objective=objective, processes=processes)
            if writes:
                write_json(run_dir / "samples/samples.json", samples)
            controls = result.get("controls", {})
            rows = {kind: result[kind] for kind in ("greedy", "beam")} | {f"beam, {name}": controls[name] for name in list(controls)[1:]}
            columns = list(result["greedy"])
        case "retrieval":
            from flm_scale.evals.retrieval import evaluate_retrieval

            processes = start_processes(run.parallel)
            result = evaluate_retrieval(run, trained.model(processes), index=index, tokenizer=tokenizer, objective=objective, split=split,
                                        processes=processes)
            directions = ("image_to_text", "text_to_image")
            rows = {way: result[way] for way in directions} | {f"{way}, chance": result["chance"][way] for way in directions}
            columns = list(result["image_to_text"])
    if writes:
        path = run_dir / "evals" / f"{task}.json"
        write_json(path, result)
        print_table(rows, columns, title=f"{task}, split {split}, times 100")
        if task == "caption" and controls:
            print("log-likelihood of the references, nats a token: "
                  + ", ".join(f"{name} {row['log_likelihood']:.3f}" for name, row in controls.items()))
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
