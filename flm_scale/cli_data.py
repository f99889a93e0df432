"""The verbs of `flm data`; cli.py parses and calls them. Work is imported inside the verb, as there.

Those in SPEC_VERBS take every value of a Spec as an option. They are made anew for each command line, because the values that options override,
and that --help shows, come from the file given as --spec.
"""

import os
import sys
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from pydantic import ValidationError

from flm_scale.data.prepare.fleet import FleetOptions
from flm_scale.data.prepare.spec import ScoreConfig, Spec
from flm_scale.errors import ConfigError, DataError

if TYPE_CHECKING:
    from flm_scale.score import ShardScorer

Folder = Annotated[Path, tyro.conf.Positional]
# Several behind one --input, or each behind its own: plain lists would keep the last --input alone.
Inputs = Annotated[tyro.conf.UseAppendAction[list[tuple[Path, ...]]], tyro.conf.arg(name="input")]
Values = Annotated[Spec, tyro.conf.arg(name="")]
Workers = Annotated[FleetOptions, tyro.conf.arg(name="")]
BY_THIS_MACHINE = FleetOptions()


def data_demo(folder: Folder, *, large: bool = False, clips: bool = False, overwrite: bool = False, workers: int = 0) -> None:
    """Prepare real demo data: easy-vqa's pictures, captions and questions, and a tokenizer.

    Args:
        folder: where to build; a complete dataset is left alone.
        large: the emoji and clip-art set instead (14,000 pairs; a few minutes, about 250 MB of packages).
        clips: easy-vqa's shapes in motion instead, as clips of eight frames, for simvlg_video_demo.
        overwrite: replace what is in the folder.
        workers: processes that prepare it, a CPU each; 0 takes every CPU.
    """
    from flm_scale.data.demo import build_demo

    if large and clips:
        raise ConfigError("--large and --clips exclude each other; give one of them")
    build_demo(folder, large=large, clips=clips, overwrite=overwrite, workers=workers)


def data_verify(folder: Annotated[str, tyro.conf.Positional], *, fast: tyro.conf.FlagCreatePairsOff[bool] = False,
                full: tyro.conf.FlagCreatePairsOff[bool] = False) -> None:
    """Compare every byte of a dataset with what it states, every tar with its index, and the token ids with their captions' index.

    Args:
        folder: the dataset; or its URL.
        fast: sizes and the heads of files alone.
        full: every byte, as without a flag.
    """
    from flm_scale.data.shards import open_unchecked
    from flm_scale.data.verify import verify

    if fast and full:
        raise ConfigError("--fast and --full exclude each other; give one of them")
    dataset = open_unchecked(folder)
    if problems := verify(dataset, fast=fast):
        raise DataError(f"{folder}: {'; '.join(problems)}; restore what is named, or if it was prepared: flm data repair {folder}")
    print(f"{folder}: every file {'has the size' if fast else 'is as'} the dataset states ({dataset.root[:12]})")


def plan_verb(words: Sequence[str]) -> Callable[..., None]:
    """Say what a preparation would make: shards, and about how large and how long, from a sample of the rows."""
    default = _spec_of(words)

    def plan_data(values: Values = default, *, inputs: Inputs, spec: Path | None = None, rows: int = 200,  # noqa: ARG001
                  options: Workers = BY_THIS_MACHINE) -> None:
        """Say what a preparation would make.

        Args:
            values: what becomes of the rows.
            inputs: tables, shards, folders or annotation files; val=PATH makes it the split val.
            spec: file of values (JSON); options win over it.
            rows: that are prepared in earnest, and thrown away, to measure size and time.
            options: who would do the work.
        """
        from flm_scale.data.prepare.estimate import print_plan

        if values.input.adopt:
            raise ConfigError("flm data plan: input.adopt writes no picture, so there is little to estimate; leave it out, or: flm data import")
        _check_weights(values.score)
        print_plan([*chain.from_iterable(inputs)], values, rows=rows, options=options, scorer=_scorer)

    return plan_data


def prepare_verb(words: Sequence[str]) -> Callable[..., None]:
    """Make a dataset of shards from tables, tars, folders or annotation files, with a fleet of workers; goes on where it was stopped."""
    default = _spec_of(words)

    def prepare_data(values: Values = default, *, inputs: Inputs, output: Path, spec: Path | None = None,  # noqa: ARG001
                     options: Workers = BY_THIS_MACHINE) -> None:
        """Make a dataset of shards.

        Args:
            values: what becomes of the rows.
            inputs: tables, shards, folders or annotation files, in the order of the dataset; val=PATH makes it the split val.
            output: folder of the dataset, on a file system that all workers share.
            spec: file of values (JSON, such as spec in OUTPUT/ledger/preparation.json); options win over it.
            options: who does the work.
        """
        from flm_scale.data.prepare.driver import prepare

        _check_weights(values.score)
        _exit(prepare([*chain.from_iterable(inputs)], output, values, options, scorer=_scorer))

    return prepare_data


def import_verb(words: Sequence[str]) -> Callable[..., None]:
    """Make a dataset of img2dataset's or webdataset's tars as they are, linked and not copied; goes on where it was stopped."""
    spec = _spec_of(words)
    default = spec.replace(input=spec.input.replace(kind="shards", adopt=True))

    def import_data(paths: Annotated[list[Path], tyro.conf.Positional], *, values: Values = default, output: Path,
                    spec: Path | None = None, options: Workers = BY_THIS_MACHINE) -> None:  # noqa: ARG001
        """Make a dataset of tars as they are.

        Each tar is a shard, linked (hard, or symbolic where the file system refuses). The index holds the samples that stay, under their own keys.
        Pictures keep their bytes and are not decoded: how they would be scaled and encoded (--image.size, ...) may not be said.

        Args:
            paths: tars, or folders of them, in the order of the dataset; val=PATH makes it the split val.
            values: which samples stay.
            output: folder of the dataset, on a file system that all workers share.
            spec: file of values (JSON); options win over it.
            options: who does the work.
        """
        from flm_scale.data.prepare.driver import prepare

        if not paths:
            raise ConfigError("flm data import: no tar is named; name tars, or folders of them")
        _check_weights(values.score)
        _exit(prepare(paths, output, values, options, scorer=_scorer))

    return import_data


def data_status(folder: Folder, *, form: Annotated[Literal["text", "json", "prometheus"], tyro.conf.arg(name="format")] = "text",
                watch: bool = False) -> None:
    """Tell how a preparation goes: shards, speed, what is lost to what, who is slow, time left.

    Args:
        folder: of the dataset.
        form: text for people, json for a line of everything, prometheus for its text format.
        watch: again every few seconds, until the preparation ends.
    """
    from flm_scale.data.prepare.status import show_status

    show_status(folder, form=form, watch=watch)


def data_retry(folder: Folder, *, failed: bool = False, reason: str = "", options: Workers = BY_THIS_MACHINE) -> None:
    """Fetch failed rows again, and leave what was kept as it is.

    Args:
        folder: of the dataset.
        failed: every row that could not be fetched.
        reason: only those lost to this, such as dns or timeout.
        options: who does the work.
    """
    from flm_scale.data.prepare.retry import retry

    if not failed:
        raise ConfigError(f"flm data retry {folder}: say --failed, and --reason if only some rows are meant")
    _exit(retry(folder, reason=reason, options=options, scorer=_scorer))


def data_repair(folder: Folder, *, options: Workers = BY_THIS_MACHINE) -> None:
    """Make the shards again that are damaged or missing, from the inputs that the dataset was made of.

    Args:
        folder: of the dataset.
        options: who does the work.
    """
    from flm_scale.data.prepare.retry import repair

    _exit(repair(folder, options=options, scorer=_scorer))


def data_filter(folder: Folder, *, out: Path, where: list[str] = [], keys: Path | None = None, captions_at_least: int = 0) -> None:  # noqa: B006
    """Make a dataset of some of another's samples, by scores, sizes or keys, without copying a picture.

    A sample must meet every condition that is given.
    Tars are linked (hard, or symbolic where the file system refuses), so the subset takes little room and the other dataset may be removed.

    Args:
        folder: the dataset, which stays as it is.
        out: folder of the new one.
        where: comparisons of a number of the index, each in quotes: "clip_score >= 0.28" "width >= 200" "phash != 0".
        keys: file of the keys to keep: text, a key a line; or DataComp's .npy of uids, where keys are uids.
        captions_at_least: captions that a sample must have.
    """
    from flm_scale.data.shards import open_dataset
    from flm_scale.data.subset import filter_dataset

    filter_dataset(open_dataset(folder), out, where=where, keys=keys, captions_at_least=captions_at_least)


def data_reshard(folder: Folder, *, out: Path, samples_per_shard: int, seed: int | None = None) -> None:
    """Write a dataset's samples into shards of another size, all shuffled where --seed is given; no picture is encoded again.

    Killed, the same command goes on where it was. Of a filtered dataset it writes the kept samples alone.

    Args:
        folder: the dataset, which stays as it is.
        out: folder of the new one.
        samples_per_shard: of the new one; 10,000 is usual.
        seed: of the shuffle; without it samples keep their order. Every sample is then read from another place: quick on flash, slow on disks.
    """
    from flm_scale.data.reshard import reshard
    from flm_scale.data.shards import open_dataset

    reshard(open_dataset(folder), out, samples_per_shard=samples_per_shard, seed=seed)


def data_score(folder: Folder, *, out: Path, model: str, pretrained: str, batch: int = 64, device: Literal["auto", "cpu", "cuda"] = "auto",
               workers: int = os.cpu_count() or 1) -> None:
    """Score how well pictures and captions go together, by an open_clip model, for: flm data filter --where "clip_score >= 0.28".

    The new dataset has the other's tars, linked, and a column clip_score in its index: the cosine of a picture and the caption that fits it best.
    Killed, the same command goes on where it was.

    Args:
        folder: the dataset, which stays as it is.
        out: folder of the new one.
        model: open_clip's name, such as ViT-B-32; OpenAI's weights in a file want the name with -quickgelu.
        pretrained: a tag of the model, which is fetched, or a file of weights.
        batch: pictures, and captions, that go through the model together.
        device: a GPU where there is one, by default.
        workers: threads that decode pictures.
    """
    from flm_scale.data.shards import open_dataset
    from flm_scale.score import score

    score(open_dataset(folder), out, model=model, pretrained=pretrained, batch=batch, device=device, workers=workers)


VERBS: dict[tuple[str, ...], Callable[..., None]] = {
    ("data", "demo"): data_demo, ("data", "status"): data_status, ("data", "retry"): data_retry, ("data", "repair"): data_repair,
    ("data", "verify"): data_verify, ("data", "filter"): data_filter, ("data", "reshard"): data_reshard, ("data", "score"): data_score,
}
SPEC_VERBS: dict[tuple[str, ...], Callable[[Sequence[str]], Callable[..., None]]] = {
    ("data", "plan"): plan_verb, ("data", "prepare"): prepare_verb, ("data", "import"): import_verb,
}


def _spec_of(words: Sequence[str]) -> Spec:
    """Return the values of the file behind --spec, or else the usual ones. Raises ConfigError when it does not hold a Spec."""
    named = [word.removeprefix("--spec=") for word in words if word.startswith("--spec=")]
    named += [after for word, after in pairwise(words) if word == "--spec"]
    if not named:
        return Spec()
    try:
        return Spec.model_validate_json(Path(named[-1]).read_bytes())
    except OSError as error:
        raise ConfigError(f"--spec {named[-1]} cannot be read ({error.strerror}); correct the path") from error
    except ValidationError as error:
        raise ConfigError(f"--spec {named[-1]}: {error.errors()[0]['msg']}; correct the file") from error


def _check_weights(config: ScoreConfig) -> None:
    """Load the model that is to score, if one is: what is wrong with it is said before anything is fetched, and before the folder remembers it."""
    if config.pretrained:
        from flm_scale.score import load_scorer

        load_scorer(config, "cpu")


def _scorer(config: ScoreConfig, device: Literal["cpu", "cuda"]) -> "ShardScorer":
    """Return what the preparation's workers score with."""
    from flm_scale.score import ShardScorer

    return ShardScorer(config, device)


def _exit(is_whole: bool) -> None:
    if not is_whole:
        sys.exit(1)
