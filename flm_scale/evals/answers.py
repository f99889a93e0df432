"""Visual questions to a run around a frozen language model: it is asked in words, and what it says is the answer.

First as it was trained, then fine-tuned on the training questions as in vqa.py, from the run's weights and from random: the question is read,
its answer is predicted, and bridge and tower learn by the loss of captioning. An answer is right when it equals the given one but for case,
punctuation, articles and the spelling of small numbers. Two controls: a question without a picture, and with that of another sample.
"""

import os
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from flm_scale.checkpoint.weights import Weights
from flm_scale.config import Run
from flm_scale.config_lm import LanguageModelConfig
from flm_scale.data.index import Index
from flm_scale.data.order import keyed_rng
from flm_scale.data.shards import Dataset
from flm_scale.data.tokens import AnyTokenizer
from flm_scale.errors import DataError
from flm_scale.evals.caption import BEAMS, batches_of, other_pictures, read_pixels, words
from flm_scale.evals.vqa import PASSES, YES_NO, Questions, build_engine, open_questions, percentages, plan_passes, score_floor, shares, train_passes
from flm_scale.model.assemble import VisionLanguageModel, layer_builders, tower_sizes
from flm_scale.model.bridge import tokens_along
from flm_scale.model.frozen_lm import FrozenLm
from flm_scale.model.generate import encode_images
from flm_scale.objectives.captioning import Answering
from flm_scale.parallel.mesh import find_ranks
from flm_scale.parallel.processes import Processes

# As published: the prompt, the longest answer, and beams compared by their whole log-probability. Without a least length that finds no answer best.
PROMPT = "Question: {} Short answer:"
MAX_ANSWER_TOKENS = 10
LENGTH_PENALTY = 0.0
MOST_QUESTIONS = 2000
"""Questions that are scored, drawn from the split's: each is five beams of a language model, and 2,000 leave a standard error of one per cent."""
ARTICLES = ("a", "an", "the")
DIGITS = {word: str(number) for number, word in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))}


class Asked(NamedTuple):
    """One question of a split."""

    image: int
    prompt_ids: list[int]
    """BOS and the question in its prompt."""
    answer: str


def evaluate_answers(run: Run, checkpoint: Weights, model: VisionLanguageModel, *, dataset: Dataset, tokenizer: AnyTokenizer, split: str,
                     processes: Processes) -> dict[str, Any]:
    """Return the content of evals/vqa.json, as evaluate_vqa does; every process of a launcher runs this.

    model: the run's, with the weights of `checkpoint`.   split: the one scored; it trains on the other ones of TRAIN_SPLITS.
    Raises DataError when a side has no questions, or one does not fit into the language model; ConfigError for the split that must train.
    """
    seen, index = open_questions(dataset, split=split)
    train, questions = encode_questions(seen, tokenizer), ask_questions(index, tokenizer)
    asked = [questions[number] for number in sorted(keyed_rng("questions", run.seed).permutation(len(questions))[:MOST_QUESTIONS].tolist())]
    assert isinstance(model.head, FrozenLm)
    _check_room(run, model.head, [len(ids) - 1 for several in train.token_ids for ids in several] + [
        len(question.prompt_ids) + MAX_ANSWER_TOKENS for question in questions])
    end_ids = [tokenizer.eos_id, *line_breaks(tokenizer)]
    floor, writes = score_floor(seen, index), find_ranks(os.environ)[0].rank == 0
    labels = [(captions or [key])[0] for captions, key in zip(index.captions, index.keys, strict=True)]
    others = other_pictures([words(label) for label in labels], seed=run.seed)
    pictures: dict[str, list[int | None]] = {"": [one.image for one in asked], ", another picture": [others[one.image] for one in asked],
                                             ", no picture": [None] * len(asked)}
    rows: list[dict[str, Any]] = []

    def add_row(asked_model: VisionLanguageModel, start: str, control: str = "", **more: float) -> None:
        said = [tokenizer.decode(ids).strip().partition("\n")[0]
                for ids in say_answers(run, asked_model, asked, pictures[control], index=index, end_ids=end_ids, processes=processes)]
        rows.append({"start": start + control, **score_answers(said, [one.answer for one in asked]), **more})
        if writes:
            print(f"{start + control:27}  {percentages(rows[-1])}", flush=True)

    if writes:
        print(f"vqa: {train.count:,} questions to train on, {len(asked):,} of the {len(questions):,} of '{split}' to score\n"
              f"{'floor, without looking':27}  {percentages(floor)}", flush=True)
    add_row(model, "zero-shot")
    add_row(model, "zero-shot", ", no picture")
    for start, weights in (("pretrained", checkpoint), ("random", None)):
        tuned, seconds = fine_tune(run, weights, model.head, train=train)
        add_row(tuned, start, passes=PASSES, seconds=round(seconds, 1))
        if weights:
            add_row(tuned, start, ", another picture")
    return {"task": "vqa", "split": split, "floor": floor, "rows": rows, "num_questions": len(asked)}


def encode_questions(index: Index, tokenizer: AnyTokenizer) -> Questions:
    """Return the questions in their prompt with their answers, as Answering reads them."""
    pairs = [(PROMPT.format(text), answer) for texts, answers in zip(index.questions, index.answers, strict=True)
             for text, answer in zip(texts, answers, strict=True)]
    encoded = _ids_of({prompt for prompt, _ in pairs} | {f"{prompt} {answer}" for prompt, answer in pairs}, tokenizer)
    rows = iter(np.array([*encoded[f"{prompt} {answer}"], len(encoded[prompt]) - 1], np.int32) for prompt, answer in pairs)
    return Questions(index, [[next(rows) for _ in texts] for texts in index.questions])


def ask_questions(index: Index, tokenizer: AnyTokenizer) -> list[Asked]:
    """Return the questions of a split, one after another."""
    texts = [PROMPT.format(text) for several in index.questions for text in several]
    encoded = _ids_of(set(texts), tokenizer)
    images = [image for image, several in enumerate(index.questions) for _ in several]
    answers = [answer for several in index.answers for answer in several]
    return [Asked(image, encoded[text][:-1], answer) for image, text, answer in zip(images, texts, answers, strict=True)]


def fine_tune(run: Run, checkpoint: Weights | None, language_model: FrozenLm, *, train: Questions) -> tuple[VisionLanguageModel, float]:
    """Return a model that has learnt to answer, and the seconds that this took.

    checkpoint: of the run, to start from; None starts from random, but for a tower with weights of its own.
    """
    if checkpoint is None:
        assert isinstance(run.text, LanguageModelConfig)
        run = run.replace(text=run.text.replace(bridge=run.text.bridge.replace(pretrained="")))
    task, start = Answering(), "pretrained" if checkpoint else "random"
    plans, run = plan_passes(run, train, task)
    engine = build_engine(run, task, partial(layer_builders, run, task, language_model=language_model,
                                             weight_of=checkpoint.weight if checkpoint else None))
    *_, seconds = train_passes(engine, run, train, task, plans, start=start)
    return VisionLanguageModel(dict(engine.layers.items()), recompute=False), seconds


def say_answers(run: Run, model: VisionLanguageModel, asked: Sequence[Asked], pictures: Sequence[int | None], *, index: Index,
                end_ids: Sequence[int], processes: Processes) -> list[list[int]]:
    """Return the ids that the model says to each question.

    pictures: the one in front of each; None, for all of them or none, asks the language model alone.   end_ids: tokens that end an answer.
    """
    from rich.progress import track

    assert isinstance(model.head, FrozenLm)
    said: list[list[int]] = []
    batches = list(batches_of(processes.share(list(zip(asked, pictures, strict=True)))))
    for chosen in track(batches, description="answers", transient=True, disable=processes.rank > 0):
        shown = [picture for _, picture in chosen if picture is not None]
        prefixes = model.head.no_pictures(len(chosen))
        if shown:
            distinct, places = np.unique(shown, return_inverse=True)
            pixels = torch.from_numpy(read_pixels(run, index, distinct.tolist())).to(prefixes.device)
            prefixes = encode_images(model, pixels).rows[torch.from_numpy(places).to(prefixes.device)]
        found = model.head.generate(prefixes, [question.prompt_ids for question, _ in chosen], end_ids=end_ids, max_new=MAX_ANSWER_TOKENS,
                                    min_new=1, beams=BEAMS, length_penalty=LENGTH_PENALTY)
        said += [ids for ids, _ in found]
    return processes.gather(said)


def line_breaks(tokenizer: AnyTokenizer) -> list[int]:
    """Return the tokens of nothing but line breaks: behind an answer a language model breaks the line and goes on with the next question."""
    return [token for token, piece in enumerate(tokenizer.pieces(range(tokenizer.vocab_size))) if set(piece) == {"\n"}]


def score_answers(said: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Return the shares of right answers, overall and by kind of question."""
    right, count = torch.zeros(2), torch.zeros(2)
    for one, answer in zip(said, answers, strict=True):
        part = 0 if answer in YES_NO else 1
        right[part] += normal(one) == normal(answer)
        count[part] += 1
    return shares(right, count)


def normal(answer: str) -> str:
    """Return the answer's lower-cased words without articles, small numbers as digits."""
    return " ".join(DIGITS.get(word, word) for word in words(answer).split() if word not in ARTICLES)


def _ids_of(texts: Iterable[str], tokenizer: AnyTokenizer) -> dict[str, list[int]]:
    """Return BOS, the ids and EOS of each text."""
    distinct = sorted(texts)
    return dict(zip(distinct, tokenizer.encode_all(distinct), strict=True))


def _check_room(run: Run, language_model: FrozenLm, lengths: Sequence[int]) -> None:
    """Raise DataError when a picture and the longest question with its answer do not fit into the language model's positions."""
    assert isinstance(run.text, LanguageModelConfig)
    sizes = tower_sizes(run.vision)
    *_, prefix = tokens_along(run.text.bridge, image_tokens=sizes["image_tokens"], prefix_tokens=sizes["prefix_tokens"])
    positions = language_model.lm.config.max_position_embeddings
    if prefix + max(lengths) > positions:
        raise DataError(f"{run.data.path}: a question with its answer has {max(lengths)} tokens, and behind {prefix} tokens of a picture the "
                        f"language model has room for {positions - prefix}; leave such questions out of the dataset")
