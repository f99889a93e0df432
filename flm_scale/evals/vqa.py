"""Visual questions: fine-tune on the training questions, from the run's weights and from random, and score on the scored split.

A question is a caption whose one target is its answer, read off the pooled row of the run's own objective: so loader, packing, model
and engine are those of pretraining. Both starts see the same batches in the same order, and only the weights they start from differ.
Over several processes the pictures of each batch are shared between the replicas, so that the steps are those of one process.
"""

import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from flm_scale.batch import Batch, Example, LossSums, Term
from flm_scale.checkpoint.weights import Weights
from flm_scale.config import BatchConfig, OptimConfig, Run
from flm_scale.data.index import Index
from flm_scale.data.loader import MicroBatches, Order, costs_of, torch_loader
from flm_scale.data.order import Costs, MicroBatch, Shuffle, plan_in_order
from flm_scale.data.shards import Dataset
from flm_scale.data.tokens import Tokenizer
from flm_scale.engine.base import Engine
from flm_scale.engine.local import LocalEngine
from flm_scale.errors import BadStepError, ConfigError, DataError
from flm_scale.model.assemble import TIED_WITH, assemble, initialize, layer_builders
from flm_scale.model.parts import Decoder, Parts, PlainParts, fill
from flm_scale.model.text import Head
from flm_scale.objectives.objective import Objective
from flm_scale.observe.cost import shape_of
from flm_scale.observe.layer_cost import stage_bounds
from flm_scale.parallel.mesh import find_layout, find_ranks

PASSES = 2
QUESTIONS_PER_IMAGE = 4
"""A pass shows every training picture once, with at most this many of its questions, drawn anew: of easy-vqa's ten, at half the cost."""
BATCH = BatchConfig(micro_batches=1, text_tokens=3072, captions=512, images=12)
# Chosen on easy-vqa's val split, trained on `train` alone: 79.7 % overall from pretrained weights at this rate, 76.5 % at 5e-4.
OPTIM = OptimConfig(lr=2.5e-4, warmup_steps=20)
TRAIN_SPLITS = ("train", "val")
YES_NO = ("yes", "no")


class VqaTask:
    """An Objective whose captions are questions: `ids` are the question's, and the answer's class number behind them."""

    parts = ("yes_no", "other")
    terms = (Term(1.0, ("yes_no", "other")),)
    generates = False
    num_added = 0

    def __init__(self, objective: Objective, answers: Sequence[str]) -> None:
        """objective: of the pretrained run.   answers: those known from training; class len(answers) is any other."""
        self.objective = objective
        self.num_streams, self.has_queries = objective.num_streams, objective.has_queries
        self.yes_no_classes = {answers.index(answer) for answer in YES_NO if answer in answers}

    def num_views(self, length: int) -> int:  # noqa: ARG002 - one, however long
        """Return 1: a question goes into the batch once."""
        return 1

    def corrupt(self, ids: np.ndarray, rng: np.random.Generator) -> list[Example]:  # noqa: ARG002 - nothing is hidden
        """Return the question whole, with its answer as the target of the pooled row."""
        whole = self.objective.whole(ids[:-1])
        part = self.parts.index("yes_no" if int(ids[-1]) in self.yes_no_classes else "other")
        return [replace(whole, target_rows=np.array([whole.pooled_row], np.int32), target_ids=ids[-1:],
                        target_parts=np.array([part], np.int32))]

    def whole(self, ids: np.ndarray) -> Example:
        """Return the question without its answer."""
        return self.objective.whole(ids[:-1])

    def likelihood(self, ids: np.ndarray) -> list[Example]:
        """Return the view whose loss is the answer's negative log-likelihood."""
        return self.corrupt(ids, np.random.default_rng(0))


@dataclass(frozen=True)
class Questions:
    """The pictures of some splits and, for each, its questions as VqaTask or Answering reads them."""

    index: Index
    token_ids: list[list[np.ndarray]]

    @property
    def count(self) -> int:
        """Number of questions."""
        return sum(map(len, self.token_ids))

    def costs(self, task: Objective) -> Costs:
        """Return what each question takes in a batch."""
        lengths = np.array([len(ids) for questions in self.token_ids for ids in questions], np.int64)
        return costs_of(lengths, np.cumsum([0, *map(len, self.token_ids)]), task, longest=int(lengths.max(initial=0)))


def evaluate_vqa(run: Run, checkpoint: Weights, *, dataset: Dataset, tokenizer: Tokenizer, objective: Objective, split: str) -> dict[str, Any]:
    """Return the content of evals/vqa.json; scores are shares in [0, 1]. Every process of a launcher runs this, cut by run.parallel.

    checkpoint: of the run.   split: the one scored; it trains on the other ones of TRAIN_SPLITS.
    Raises DataError when a side has no questions, ConfigError for the split that must train.
    """
    seen, scored = open_questions(dataset, split=split)
    answers = sorted({answer for answers in seen.answers for answer in answers})
    task = VqaTask(objective, answers)
    train, test = (encode_questions(index, tokenizer, answers, max_length=run.text.max_length) for index in (seen, scored))
    floor = score_floor(seen, scored)
    if find_ranks(os.environ)[0].rank == 0:
        print(f"vqa: {train.count:,} questions to train on, {test.count:,} of '{split}' to score\n"
              f"{'floor':10}  without looking  {percentages(floor)}", flush=True)
    answer_ids = [tokenizer.encode(answer, max_length=run.text.max_length)[1:-1] or [tokenizer.mask_id] for answer in answers]
    rows = [fine_tune(run, checkpoint, task=task, answer_ids=answer_ids, train=train, test=test, start=start)
            for start in ("pretrained", "random")]
    return {"task": "vqa", "split": split, "floor": floor, "rows": rows, "num_questions": test.count}


def open_questions(dataset: Dataset, *, split: str) -> tuple[Index, Index]:
    """Return what is trained on and what is scored. Raises DataError and ConfigError as `evaluate_vqa`."""
    if split == TRAIN_SPLITS[0]:
        raise ConfigError(f"--split {split}: its questions are trained on; score another of {', '.join(dataset.splits)}")
    seen, scored = dataset.index(*(name for name in TRAIN_SPLITS if name != split and name in dataset.splits)), dataset.index(split)
    if not any(seen.questions) or not any(scored.questions):
        raise DataError(f"{dataset.folder}: no questions to train on or none in '{split}'; vqa needs a dataset with questions, such as that "
                        "of `flm data demo`")
    return seen, scored


def encode_questions(index: Index, tokenizer: Tokenizer, answers: Sequence[str], *, max_length: int) -> Questions:
    """Return the questions' token ids, each with the class of its answer behind them."""
    classes = {answer: number for number, answer in enumerate(answers)}
    encoded = {text: tokenizer.encode(text, max_length=max_length) for text in {text for texts in index.questions for text in texts}}
    return Questions(index, [[np.array([*encoded[text], classes.get(answer, len(classes))], np.int32)
                              for text, answer in zip(texts, replies, strict=True)]
                             for texts, replies in zip(index.questions, index.answers, strict=True)])


def score_floor(seen: Index, scored: Index) -> dict[str, float]:
    """Return the scores of answering each question with its most frequent training answer, without looking at the picture."""
    by_text: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for texts, replies in zip(seen.questions, seen.answers, strict=True):
        for text, answer in zip(texts, replies, strict=True):
            by_text[text][answer] += 1
            by_text[""][answer] += 1
    best = {text: counts.most_common(1)[0][0] for text, counts in by_text.items()}
    right, count = torch.zeros(2), torch.zeros(2)
    for texts, replies in zip(scored.questions, scored.answers, strict=True):
        for text, answer in zip(texts, replies, strict=True):
            part = 0 if answer in YES_NO else 1
            right[part] += best.get(text, best[""]) == answer
            count[part] += 1
    return shares(right, count)


def fine_tune(run: Run, checkpoint: Weights, *, task: VqaTask, answer_ids: Sequence[Sequence[int]], train: Questions, test: Questions,
              start: Literal["pretrained", "random"]) -> dict[str, Any]:
    """Train from one start and return its row of evals/vqa.json; `seconds` are those of training, without the scoring."""
    plans, run = plan_passes(run, train, task)
    test_plan = plan_in_order(test.costs(task), BATCH)
    if start == "random":  # the text side as if it had read nothing; the tower as pretraining had it
        run = run.replace(text=run.transformer.replace(pretrained=""))
    engine = answering_engine(run, task, answer_ids=answer_ids, checkpoint=checkpoint if start == "pretrained" else None)
    seconds, row = 0.0, dict[str, float]()
    by_pass = []
    for seconds in train_passes(engine, run, train, task, plans, start=start):
        orders = orders_of(test_plan, epoch=0, rank=engine.data_index, size=engine.layout.data)
        row = part_scores(engine.evaluate(question_batches(run, test, task, orders)))
        by_pass.append(row["overall"])
        if engine.rank == 0:
            print(f"{start:10}  pass {len(by_pass)}/{PASSES}  {percentages(row)}  {seconds:.0f} s", flush=True)
    return {"start": start, **row, "by_pass": by_pass, "passes": PASSES, "seconds": round(seconds, 1)}


def plan_passes(run: Run, train: Questions, task: Objective) -> tuple[list[list[MicroBatch]], Run]:
    """Return the micro-batches of each pass, and the run with as many steps and the optimizer that takes them."""
    shuffle = Shuffle(train.costs(task), [len(train.index)], BATCH, seed=run.seed, captions_per_image=QUESTIONS_PER_IMAGE)
    plans = [shuffle.plan(epoch) for epoch in range(PASSES)]
    steps = sum(map(len, plans))
    return plans, run.replace(steps=steps, optim=OPTIM.replace(warmup_steps=min(OPTIM.warmup_steps, steps // 10)))


def train_passes(engine: Engine, run: Run, train: Questions, task: Objective, plans: Sequence[Sequence[MicroBatch]], *,
                 start: str) -> Iterator[float]:
    """Train on one plan after another; yield, behind each, the seconds of training so far. start: what the user is told of it."""
    from rich.progress import track

    step, seconds = 0, 0.0
    for epoch, plan in enumerate(plans):
        began = time.perf_counter()
        batches = question_batches(run, train, task, orders_of(plan, epoch=epoch, rank=engine.data_index, size=engine.layout.data))
        for batch in track(batches, total=len(plan), description=f"{start}, pass {epoch + 1}", transient=True, disable=engine.rank > 0):
            result = engine.train_step([batch], step=step)
            if not result.is_taken:
                raise BadStepError(f"vqa, {start}, pass {epoch + 1}, step {step + 1}: loss is {result.loss}, gradient norm {result.grad_norm}; the "
                                   "run's weights may be damaged; evaluate another run")
            step += 1
        seconds += time.perf_counter() - began
        yield seconds


def answering_engine(run: Run, task: VqaTask, *, answer_ids: Sequence[Sequence[int]], checkpoint: Weights | None) -> Engine:
    """Return the engine that trains the run's model to answer. Arguments as for `answer_rows`."""
    rows = answer_rows(run, answer_ids, checkpoint=checkpoint)
    # The decoder is no longer the embedding table.
    return build_engine(run.replace(text=run.transformer.replace(tied=False)), task,
                        partial(answering_builders, run, task, rows=rows, checkpoint=checkpoint))


def build_engine(run: Run, task: Objective, builders: Callable[[Parts], dict[str, Callable[[], nn.Module]]]) -> Engine:
    """Return the engine that trains these layers, with one micro-batch a replica and step."""
    layout = find_layout(run.parallel, world_size=find_ranks(os.environ)[0].size)
    run = run.replace(batch=BATCH.replace(micro_batches=layout.data))
    if layout.size == 1:
        return LocalEngine(run, assemble(run, builders(PlainParts())), task)
    from flm_scale.engine.deepspeed import PipelineDeepSpeedEngine

    return PipelineDeepSpeedEngine(run, task, bounds=stage_bounds(run, shape_of(run.vision)), builders=builders)


def answer_rows(run: Run, answer_ids: Sequence[Sequence[int]], *, checkpoint: Weights | None) -> Tensor:
    """Return the decoder's rows [A + 1, D] before training: zeros for answers that training never gave, in the last one.

    answer_ids: the tokens of each answer; its row is the mean of theirs in the vocabulary's decoder, so that what the run knows of the words
    is not lost.   checkpoint: of the run; None starts from random.
    """
    name = "head.decoder.weight"
    name = TIED_WITH[name] if run.transformer.tied else name
    if checkpoint is None:
        vocabulary = torch.empty(run.transformer.vocab_size, run.transformer.width)
        initialize(vocabulary, name=name, seed=run.seed)
    else:
        vocabulary = checkpoint.weight(name)[:]
    return torch.stack([*(vocabulary[torch.tensor(ids)].mean(0) for ids in answer_ids), torch.zeros(run.transformer.width)])


def answering_builders(run: Run, task: VqaTask, parts: Parts, *, rows: Tensor,
                       checkpoint: Weights | None) -> dict[str, Callable[[], nn.Module]]:
    """Return what builds the run's layers with its weights, the decoder cut down to the answers. rows, checkpoint: of `answer_rows`."""
    builders = layer_builders(run, task.objective, parts, weight_of=checkpoint.weight if checkpoint else None)

    def answering_head() -> nn.Module:
        head = cast("Head", builders["head"]())
        head.decoder = decoder = cast("Decoder", parts.decoder(run.transformer.width, len(rows)))
        fill(decoder.weight, rows)
        fill(decoder.bias, torch.zeros(len(rows)))
        return head

    return builders | {"head": answering_head}


def orders_of(plan: Sequence[MicroBatch], *, epoch: int, rank: int, size: int) -> list[Order]:
    """Return a replica's share of each micro-batch's pictures. A replica without one takes another's, which does not count."""
    return [Order(epoch, entries[rank::size] or entries[:1], counts=rank < len(entries)) for entries in plan]


def question_batches(run: Run, questions: Questions, task: Objective, orders: list[Order]) -> Iterator[Batch]:
    """Yield the packed micro-batches."""
    dataset = MicroBatches(questions.index, questions.token_ids, task, seed=run.seed, image_size=run.vision.image_size,
                           frames=run.vision.frames)
    yield from torch_loader(dataset, orders, workers=run.data.workers)


def part_scores(sums: LossSums) -> dict[str, float]:
    """Return the shares of right answers, overall and by kind of question."""
    return shares(sums.correct, sums.count)


def shares(right: torch.Tensor, count: torch.Tensor) -> dict[str, float]:
    """Return right / count over all and by part, in the order of VqaTask.parts; 0 where there is no question."""
    yes_no, other = (right / count.clamp(min=1)).tolist()
    return {"overall": float(right.sum() / count.sum().clamp(min=1)), "yes_no": yes_no, "other": other}


def percentages(row: dict[str, float]) -> str:
    """Return the three scores as one line reads them."""
    return f"overall {row['overall']:.1%}  yes/no {row['yes_no']:.1%}  other {row['other']:.1%}"
