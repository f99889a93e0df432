"""The `flm` command: one short function a verb. Work is imported inside the verb, so that `flm --help` answers at once.

Exit code 0 on success, 2 on a user's mistake (one line on standard error; --debug adds the traceback), 1 on a failure.
"""

import contextlib
import functools
import io
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from flm_scale.cli_data import SPEC_VERBS
from flm_scale.cli_data import VERBS as DATA_VERBS
from flm_scale.config import Run
from flm_scale.errors import ConfigError, ToldElsewhereError, UserError, did_you_mean
from flm_scale.recipes import RECIPES
from flm_scale.section import of_kinds

RunDir = Annotated[Path, tyro.conf.Positional]


def data_order(recipe: Annotated[str, tyro.conf.Positional], *, step: int) -> None:
    """Print the samples that a step of a recipe sees, on any layout.

    Args:
        recipe: a recipe's name, or a run directory.
        step: optimizer step, counted from 1.
    """
    from flm_scale.opening import step_keys

    print("\n".join(step_keys(_run_of(recipe), step=step)))


def tokenizer_train(folder: RunDir, *, vocab_size: int = 8000) -> None:
    """Train sentencepiece on the captions and questions of a dataset's train split and record it in the manifest.

    Args:
        folder: the dataset.
        vocab_size: pieces wanted; fewer when the texts have fewer.
    """
    from flm_scale.data.demo import train_dataset_tokenizer

    print(train_dataset_tokenizer(folder, vocab_size=vocab_size))


def tokenizer_encode(folder: RunDir, *, tokenizer: Path | None = None, workers: int = os.cpu_count() or 1) -> None:
    """Write the token ids of a dataset's captions beside its shards, by the tokenizer that it has (as `train` does) or by a language model's.

    Those that are there already stay, so a killed command goes on where it was.

    Args:
        folder: the dataset.
        tokenizer: folder of a language model from Hugging Face, with its tokenizer.json. The dataset's own tokenizer and root stay as they are.
        workers: threads that encode.
    """
    from flm_scale.data.shards import open_dataset
    from flm_scale.data.sidecars import folder_of, write_sidecars
    from flm_scale.data.tokens import LmTokenizer, Tokenizer

    dataset = open_dataset(folder)
    words = LmTokenizer(tokenizer) if tokenizer else Tokenizer(dataset.tokenizer_file)
    captions = write_sidecars(dataset, words, workers=workers)
    counts = ", ".join(f"{split} ({count:,} captions)" for split, count in captions.items())
    print(f"{folder_of(folder, words.fingerprint)}: token ids of {counts} by {tokenizer or 'the tokenizer'} {words.fingerprint[:12]}")


def tokenizer_show(folder: RunDir, texts: Annotated[list[str], tyro.conf.Positional] = []) -> None:  # noqa: B006 - tyro reads the default
    """Print the tokenizer of a dataset or of a language model's folder, and how it cuts the given texts."""
    from flm_scale.data.manifest import DATASET
    from flm_scale.data.tokens import LM_FILE, LmTokenizer, Tokenizer

    file = folder / ("tokenizer.model" if (folder / DATASET).exists() else LM_FILE)
    tokenizer = LmTokenizer(folder) if file.name == LM_FILE else Tokenizer(file)
    print(f"{file}: {tokenizer.vocab_size} pieces, fingerprint {tokenizer.fingerprint}")
    for text in texts:
        print(" ".join(tokenizer.pieces(tokenizer.encode(text, max_length=1000))))


def eval_run(run_dir: RunDir, *, task: Literal["vqa", "caption", "retrieval"], split: str = "test", tensor: int = 1, pipe: int = 1) -> None:
    """Score a trained run and write RUN/evals/TASK.json: alone, or in every process of torchrun, deepspeed or srun.

    Args:
        run_dir: of a trained run.
        task: vqa fine-tunes on the training questions first, from the run's weights and from random; a run around a frozen language model answers
            as it is, too. caption also says, for such a run, what another picture and none would score.
        split: of the run's dataset.
        tensor: processes that share the text layers' matrices, heads and vocabulary, whatever the layout was in training.
        pipe: pipeline stages that the layers are cut into. The processes / (tensor * pipe) replicas share the pictures.
    """
    from flm_scale.evals.run import evaluate

    evaluate(run_dir, task=task, split=split, tensor=tensor, pipe=pipe)


def caption(run_dir: RunDir, images: Annotated[list[Path], tyro.conf.Positional], *, out: Path | None = None, tensor: int = 1,
            pipe: int = 1) -> None:
    """Print what a trained run says of pictures, and draw it on them.

    Args:
        run_dir: of a trained run.
        images: picture files.
        out: folder for the pictures with their captions; RUN/samples by default.
        tensor: processes that share the text layers' matrices, heads and vocabulary.
        pipe: pipeline stages that the layers are cut into.
    """
    from flm_scale.evals.show import caption_files

    caption_files(run_dir, images, out=out or run_dir / "samples", tensor=tensor, pipe=pipe)


def checkpoint_list(run_dir: RunDir) -> None:
    """List the checkpoints of a run: step, size, layout, age, whole or not.

    Args:
        run_dir: of a run.
    """
    from flm_scale.checkpoint.show import list_checkpoints

    list_checkpoints(run_dir)


def checkpoint_verify(run_dir: RunDir) -> None:
    """Read every file of every checkpoint of a run and compare it with its manifest.

    Args:
        run_dir: of a run; or a checkpoint's folder.
    """
    from flm_scale.checkpoint.show import verify_checkpoints

    verify_checkpoints(run_dir)


def checkpoint_reshard(run_dir: RunDir, *, out: Path, step: int | None = None, tensor: int = 1, pipe: int = 1, data: int = 1,
                       workers: int = os.cpu_count() or 1) -> None:
    """Write a checkpoint anew, its files cut the way another layout will read them.

    Any layout reads any checkpoint without this; behind it, each process of that layout reads little more than one file.

    Args:
        run_dir: of a run; or a checkpoint's folder.
        out: the run directory to make, for: flm train RECIPE --run-dir OUT --resume
        step: of which checkpoint; the latest good one by default.
        tensor: processes that will share matrices, heads and vocabulary.
        pipe: pipeline stages.
        data: data-parallel replicas; 1 for ZeRO 0, where each holds everything.
        workers: ranks written at once.
    """
    from flm_scale.checkpoint.convert import reshard
    from flm_scale.observe.cost import shape_of
    from flm_scale.observe.layer_cost import stage_bounds
    from flm_scale.parallel.mesh import Layout

    if min(tensor, pipe, data, workers) < 1:
        raise ConfigError("--tensor, --pipe, --data and --workers must be at least 1")
    folder = reshard(run_dir, out, Layout(tensor, pipe, data), step=step, workers=workers,
                     bounds_of=lambda run: stage_bounds(run, shape_of(run.vision)))
    print(f"{folder}: go on with: flm train RECIPE --run-dir {out} --resume --parallel.engine deepspeed --parallel.tensor {tensor} "
          f"--parallel.pipe {pipe}, in {tensor * pipe * data} process(es)")


def checkpoint_diff(first: RunDir, second: RunDir) -> None:
    """Print what two checkpoints hold otherwise: run values, step, and every weight and moment that is not equal to the bit.

    Exit code 0 when they hold the same, whatever layouts wrote them, and 1 when not, as of diff and cmp; 2 as always for what cannot be read.

    Args:
        first: a checkpoint's folder; or a run directory, for its latest good one.
        second: likewise.
    """
    from flm_scale.checkpoint.diff import diff_checkpoints

    if not diff_checkpoints(first, second):
        raise SystemExit(1)


def checkpoint_export(run_dir: RunDir, *, out: Path, step: int | None = None, dtype: Literal["float32", "bfloat16"] = "float32") -> None:
    """Write a checkpoint as a folder for transformers, flm eval and flm caption: safetensors, config, tokenizer, code, model card.

    Args:
        run_dir: of a run.
        out: the new folder.
        step: of the checkpoint; the latest good one's by default.
        dtype: of the weights in the folder.
    """
    from flm_scale.checkpoint.publish import export

    export(run_dir, out, step=step, dtype=dtype)


def report(run_dir: RunDir) -> None:
    """Write RUN/report.html: one page with curves, pictures, reconstructions and scores."""
    from flm_scale.observe.report import write_report

    print(write_report(run_dir))


VERBS: dict[tuple[str, ...], Callable[..., None]] = {
    **DATA_VERBS, ("data", "order"): data_order,
    ("tokenizer", "train"): tokenizer_train, ("tokenizer", "encode"): tokenizer_encode, ("tokenizer", "show"): tokenizer_show,
    ("checkpoint", "list"): checkpoint_list, ("checkpoint", "verify"): checkpoint_verify, ("checkpoint", "reshard"): checkpoint_reshard,
    ("checkpoint", "diff"): checkpoint_diff, ("checkpoint", "export"): checkpoint_export,
    ("eval",): eval_run, ("caption",): caption, ("report",): report,
}


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in words
    # The deepspeed launcher puts its --local_rank=N in front; the rank is read from the environment, as with every launcher.
    words = [word for word in words if word != "--debug" and not word.startswith("--local_rank=")]
    try:
        _dispatch(words)
    except UserError as error:
        if debug:
            raise
        if not isinstance(error, ToldElsewhereError):
            rank = os.environ.get("RANK", "0")
            print(f"flm: {'' if rank == '0' else f'rank {rank}: '}{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _dispatch(words: list[str]) -> None:
    if not words or words[0] in {"-h", "--help"}:
        print(_overview())
        return
    if words[0] in RUN_VERBS:
        RUN_VERBS[words[0]](words[1:])
        return
    for size in (2, 1):
        verb = tuple(words[:size])
        if verb in VERBS:
            _parse(VERBS[verb], words[size:], prog=f"flm {' '.join(verb)}")
            return
        if verb in SPEC_VERBS:
            _parse(SPEC_VERBS[verb](words[size:]), words[size:], prog=f"flm {' '.join(verb)}")
            return
    groups = {verb[0] for verb in VERBS}
    if words[0] in groups and words[1:] in ([], ["-h"], ["--help"]):
        print(f"usage: flm {words[0]} COMMAND ...\n\n" + "\n".join(_verb_lines(words[0])) + f"\n\nflm {words[0]} COMMAND --help tells more.")
        return
    if words[0] in groups:
        choices = [" ".join(verb) for verb in SPEC_VERBS | VERBS if verb[0] == words[0]]
        raise ConfigError(f"flm {' '.join(words[:2])}: no such command; there is: {', '.join(choices)}")
    raise ConfigError(f"no command '{words[0]}'{did_you_mean(words[0], groups | RUN_VERBS.keys())} (flm --help lists them)")


def _train(words: list[str]) -> None:
    if not words or words[0] in {"-h", "--help"}:
        print("usage: flm train RECIPE [--run-dir DIR] [--overwrite | --resume | --requeued] [--group.key VALUE ...]\n\n"
              "Train a recipe: alone, or in every process of torchrun, deepspeed or srun.\n\nrecipes:\n"
              f"{_recipe_lines()}\n\nflm train RECIPE --help lists every value and its default.")
        return
    name, rest = words[0], words[1:]
    if name not in RECIPES:
        raise ConfigError(f"no recipe '{name}'{did_you_mean(name, RECIPES)} (there is: {', '.join(RECIPES)})")
    default = of_kinds(RECIPES[name](), rest)

    # A bare --resume stands for the latest checkpoint.
    rest = [part for word, after in itertools.zip_longest(rest, rest[1:], fillvalue="--")
            for part in ([word, "latest"] if word == "--resume" and after.startswith("--") else [word])]

    def train_recipe(run: Annotated[Run, tyro.conf.arg(name="")] = default, *, run_dir: Path = Path("runs") / name, overwrite: bool = False,
                     resume: str | None = None, requeued: bool = False) -> None:
        """Train.

        Args:
            run: the recipe's values.
            run_dir: where to write run.json, metrics, weights and samples.
            overwrite: replace an earlier run in that folder.
            resume: go on behind a checkpoint, on this layout whatever it was saved on: latest (or nothing), a step, or a folder.
            requeued: go on behind what an earlier start of this same command left in the run directory, if it left anything.
        """
        from flm_scale.train import train

        train(run, run_dir, overwrite=overwrite, resume=resume, requeued=requeued)

    train_recipe.__doc__ = RECIPES[name].__doc__
    _parse(train_recipe, rest, prog=f"flm train {name}")


def _plan(words: list[str]) -> None:
    if not words or words[0] in {"-h", "--help"}:
        print("usage: flm plan RECIPE|RUN [--nodes N] [--gpus-per-node G] [--gpu-gb GB] [--group.key VALUE ...]\n\n"
              "Say what a run needs on so many GPUs: weights, FLOPs, memory a GPU, and the quickest layouts that fit.\n\nrecipes:\n"
              f"{_recipe_lines()}\n\nflm plan RECIPE --help lists every value and its default.")
        return
    name = words[0]
    if name not in RECIPES and not Path(name).is_dir():
        raise ConfigError(f"no recipe or run directory '{name}'{did_you_mean(name, RECIPES)} (recipes: {', '.join(RECIPES)})")
    default = of_kinds(_run_of(name), words[1:])

    def plan_run(run: Annotated[Run, tyro.conf.arg(name="")] = default, *, nodes: int = 1, gpus_per_node: int = 8, gpu_gb: float = 80.0,
                 peak_tflops: float = 989.0, mfu: float = 0.35) -> None:
        """Say what a run needs on so many GPUs.

        Args:
            run: the recipe's values.
            nodes: how many machines.
            gpus_per_node: GPUs of each.
            gpu_gb: memory of a GPU in 10**9 bytes.
            peak_tflops: dense peak of a GPU in the run's precision.
            mfu: share of that peak that a GPU reaches while it computes.
        """
        from flm_scale.plan import Machine, print_plan

        print_plan(run, Machine(nodes, gpus_per_node, gpu_gb, peak_tflops, mfu))

    _parse(plan_run, words[1:], prog=f"flm plan {name}")


# Verbs whose options are the values of a recipe's Run.
RUN_VERBS: dict[str, Callable[[list[str]], None]] = {"train": _train, "plan": _plan}


def _recipe_lines() -> str:
    return "\n".join(f"  {name:16}{_first_line(recipe)}" for name, recipe in RECIPES.items())


def _parse(verb: Callable[..., None], words: list[str], *, prog: str) -> None:
    """Run a verb on what tyro reads from the words; tyro's boxed complaint becomes one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            call: Callable[[], None] = tyro.cli(_deferred(verb), args=words, prog=prog, config=(tyro.conf.AvoidSubcommands,))
    except SystemExit as stop:
        if not stop.code:
            return
        raise ConfigError(f"{prog}: {_one_line(complaint.getvalue())}") from None
    call()


def _deferred(verb: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """Return a function with the verb's signature and help that gives back the call instead of making it."""

    @functools.wraps(verb)
    def read(*args: object, **values: object) -> Callable[[], None]:
        return functools.partial(verb, *args, **values)

    return read


def _one_line(box: str) -> str:
    """Return what tyro's box complains of, and the option that it thinks was meant."""
    # A title, the complaint, a rule, more sections. The frame is of rounded lines, or blank where the terminal knows only ASCII.
    lines = [line.strip("│ ") for line in box.splitlines()]
    sections = [list(section) for is_rule, section in itertools.groupby(lines, lambda line: not line.strip("╭╮╰╯─- ")) if not is_rule]
    if lines and sections[0][0] == lines[0]:
        sections[0].pop(0)
    sections = [section for section in sections if section]
    meant = [line.split()[0] for section in sections for line in section if section[0].startswith("Perhaps") and line.startswith("--")]
    return " ".join(sections[0]) + (f"; did you mean {meant[0]}?" if meant else "; --help lists what there is")


def _first_line(function: Callable[..., object]) -> str:
    return (function.__doc__ or "").strip().splitlines()[0]


def _run_of(recipe: str) -> Run:
    if recipe in RECIPES:
        return RECIPES[recipe]()
    from flm_scale.checkpoint.weights import read_run

    return read_run(Path(recipe))


def _verb_lines(group: str = "") -> list[str]:
    return [f"  flm {' '.join(verb):19}{_first_line(function)}" for verb, function in (SPEC_VERBS | VERBS).items() if verb[0].startswith(group)]


def _overview() -> str:
    lines = _verb_lines()
    lines += [f"  flm {'train':19}Train a recipe.", f"  flm {'plan':19}Say what a run needs on so many GPUs."]
    return "usage: flm [--debug] COMMAND ...\n\nPretrain vision-language models.\n\n" + "\n".join(lines) + "\n\nflm COMMAND --help tells more."
