"""What a run opens before anything trains: its tokenizer, the objective that goes with it, and the hashes of all that it reads."""

from collections.abc import Sequence

from flm_scale.config import CaptioningConfig, Run, TextConfig
from flm_scale.config_lm import LanguageModelConfig
from flm_scale.data.loader import Loader, open_mixture
from flm_scale.data.shards import Dataset
from flm_scale.data.tokens import AnyTokenizer, LmTokenizer, Tokenizer
from flm_scale.errors import ConfigError
from flm_scale.model.assemble import tower_sizes
from flm_scale.model.bridge import tokens_along
from flm_scale.model.frozen_lm import FrozenLm, content_hash, find_folder
from flm_scale.model.pretrained import PretrainedBridge, PretrainedEncoder, PretrainedText
from flm_scale.objectives.objective import Objective, build_objective


def open_data(run: Run) -> tuple[list[Dataset], AnyTokenizer]:
    """Open the datasets that the run trains on, the first one first, and what cuts their captions.

    Raises DataError as `open_mixture`, ConfigError for pictures where the run wants clips.
    """
    language_tokens = _language_tokens(run)
    datasets = open_mixture(run.data, language_tokens)
    for dataset in datasets:
        if run.vision.frames > 1 and not dataset.index("train").holds_clips:
            raise ConfigError(f"vision.frames ({run.vision.frames}): dataset {dataset.folder} holds pictures; name one of clips (flm data prepare "
                              "--input.clips), or set vision.frames 1")
    return datasets, language_tokens or Tokenizer(datasets[0].tokenizer_file)


def _language_tokens(run: Run) -> LmTokenizer | None:
    """Return the tokenizer of the run's frozen language model; None for a run without one.

    Raises DataError when it is another than the run states.
    """
    return LmTokenizer(find_folder(run.text), fingerprint=run.data.tokenizer_hash) if isinstance(run.text, LanguageModelConfig) else None


def open_tokenizer(run: Run, dataset: Dataset) -> AnyTokenizer:
    """Return what cuts the run's captions; dataset: the first one."""
    return _language_tokens(run) or Tokenizer(dataset.tokenizer_file)


def objective_of(run: Run, tokenizer: AnyTokenizer) -> Objective:
    """Return the objective, with its prompt in tokens. Raises ConfigError when prompt and caption do not fit into a micro-batch."""
    if isinstance(tokenizer, Tokenizer):
        return build_objective(run.objective, mask_id=tokenizer.mask_id)
    prompt = run.objective.prompt if isinstance(run.objective, CaptioningConfig) else ""
    objective = build_objective(run.objective, mask_id=-1, prompt=tokenizer.encode_all([prompt])[0][1:-1])
    if (longest := run.text.max_length + objective.num_added) > run.batch.text_tokens:
        raise ConfigError(f"batch.text_tokens ({run.batch.text_tokens}) must hold the prompt and one caption of text.max_length ({longest} tokens); "
                          "raise the first, or lower the second")
    return objective


def open_pretrained(run: Run, tokenizer: AnyTokenizer) -> PretrainedEncoder | None:
    """Open the BERT or RoBERTa that the run's text side, or its bridge, starts from; None when it names none."""
    if isinstance(run.text, TextConfig):
        return PretrainedText(run.text, tokenizer.pieces(range(tokenizer.vocab_size))) if run.text.pretrained else None
    sizes, bridge = tower_sizes(run.vision), run.text.bridge
    first, *_ = tokens_along(bridge, image_tokens=sizes["image_tokens"], prefix_tokens=sizes["prefix_tokens"])
    return PretrainedBridge(bridge, num_tokens=first) if bridge.pretrained else None


def pin(run: Run, datasets: Sequence[Dataset], tokenizer: AnyTokenizer, language_model: FrozenLm | None = None) -> Run:
    """Return the run with the hashes of datasets, tokenizer and frozen language model filled in.

    Raises ConfigError when the vocabulary is too small.
    """
    if isinstance(run.text, TextConfig) and run.text.vocab_size < tokenizer.vocab_size:
        raise ConfigError(f"text.vocab_size ({run.text.vocab_size}) must be at least the tokenizer's {tokenizer.vocab_size}; "
                          f"add --text.vocab-size {tokenizer.vocab_size}")
    if language_model:
        run = run.replace(text=run.text.replace(weights_hash=content_hash(language_model)))
    first, *also = (dataset.root for dataset in datasets)
    return run.replace(data=run.data.replace(manifest_hash=first, also_hashes=tuple(also), tokenizer_hash=tokenizer.fingerprint))


def step_keys(run: Run, *, step: int) -> list[str]:
    """Return the samples that a step, counted from 1, sees, whatever the layout: a line a micro-batch."""
    run = run.replace(data=run.data.replace(manifest_hash="", also_hashes=(), tokenizer_hash="", workers=0))  # no picture is read
    datasets, tokenizer = open_data(run)
    loader = Loader(run, datasets, tokenizer, objective_of(run, tokenizer))
    return [f"micro-batch {number}: {' '.join(keys)}" for number, keys in enumerate(loader.keys_of_step(step), start=1)]
