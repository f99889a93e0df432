"""The spec: what decides bytes is in its hash, what does not is not, and a difference is told by name."""

from collections.abc import Callable
from pathlib import Path

import pytest

from flm_scale.data.prepare.spec import PRESETS, Columns, FilterConfig, InputConfig, Preset, ScoreConfig, Spec, difference
from flm_scale.errors import ConfigError


def test_a_spec_survives_its_json() -> None:
    spec = Spec(input=InputConfig(kind="coco", images=Path("pictures")), filter=FilterConfig(where=("similarity>=0.3",), forbidden=Path("hashes")),
                tokenizer=Path("tokenizer.model"))
    assert Spec.model_validate_json(spec.model_dump_json()) == spec


def test_every_value_that_decides_bytes_changes_the_hash_and_is_told_by_its_name() -> None:
    spec = Spec()
    for changed, line in ((spec.replace(image=spec.image.replace(size=224)), "image.size was 256, is 224"),
                          (spec.replace(samples_per_shard=100), "samples_per_shard was 10000, is 100"),
                          (spec.replace(fetch=spec.fetch.replace(require_hash=True)), "fetch.require_hash was false, is true"),
                          (spec.replace(filter=spec.filter.replace(where=("a<1",))), 'filter.where was [], is ["a<1"]'),
                          (spec.replace(input=spec.input.replace(kind="coco", images=Path("x"))), "input.images was false, is true")):
        assert changed.hash != spec.hash
        assert line in difference(spec.decisive(), changed.decisive())
    assert not difference(spec.decisive(), Spec().decisive())


def test_workers_and_places_on_a_disk_are_not_in_the_hash_but_the_content_of_files_is(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for file in (one, other):
        file.write_text("0" * 64)
    spec = Spec(filter=FilterConfig(forbidden=one))
    assert spec.replace(fetch=spec.fetch.replace(concurrency=3)).hash == spec.hash
    assert spec.replace(filter=FilterConfig(forbidden=other)).hash == spec.hash
    assert str(tmp_path) not in str(spec.decisive())
    before = spec.hash
    one.write_text("1" * 64)
    assert spec.hash != before
    one.unlink()
    with pytest.raises(ConfigError, match=r"filter\.forbidden \(.*one\) cannot be read \(No such file"):
        _ = spec.hash


def test_scores_decide_by_the_content_of_their_weights_and_nothing_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tmp_path / "one.pt", tmp_path / "other.pt"
    for file in (one, other):
        file.write_bytes(b"weights")
    spec = Spec(score=ScoreConfig(pretrained=str(one)))
    assert spec.hash == Spec(score=ScoreConfig(pretrained=str(other))).hash != Spec().hash
    assert Spec(score=ScoreConfig(model="ViT-L-14", batch=3)).hash == Spec().hash
    monkeypatch.chdir(tmp_path)
    assert Spec(score=ScoreConfig(pretrained="one.pt")).anchored().score.pretrained == str(one)
    assert Spec(score=ScoreConfig(pretrained="openai")).anchored().decisive()["score"]["pretrained"] == "openai"
    before = spec.decisive()
    one.write_bytes(b"other weights")
    assert [line.partition(" was ")[0] for line in difference(before, spec.decisive())] == ["score.pretrained"]
    assert difference(before, spec.replace(score=spec.score.replace(minimum=0.25)).decisive())[0] == "score.minimum was null, is 0.25"


@pytest.mark.parametrize(("build", "problem"), [
    (lambda: ScoreConfig(minimum=0.3), r"score\.minimum \(0\.3\) needs scores, .*; set score\.pretrained"),
    (lambda: ScoreConfig(pretrained="openai", minimum=28), r"ScoreConfig\.minimum \(28\): .* less than or equal to 1"),
    (lambda: Spec(score=ScoreConfig(pretrained="openai"), input=InputConfig(keep=("clip_score",))), "is the column that score.pretrained makes"),
    (lambda: Spec(score=ScoreConfig(pretrained="openai"), filter=FilterConfig(where=("clip_score>=0.3",))), "leave one of them out")])
def test_scores_that_nobody_makes_or_two_do_are_refused(build: Callable[[], object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        build()


@pytest.mark.parametrize("where", ["similarity", ">=3", "similarity>=high", "similarity>=0.3,0.4", "a b>=1"])
def test_a_condition_that_says_nothing_is_refused_when_the_spec_is_made(where: str) -> None:
    with pytest.raises(ConfigError, match=r"filter\.where"):
        Spec(filter=FilterConfig(where=(where,)))


def test_columns_of_conditions_go_along_once() -> None:
    spec = Spec(input=InputConfig(keep=("LICENSE", "similarity")), filter=FilterConfig(where=("similarity>=0.3", "similarity < 0.9", "NSFW!=NSFW")))
    assert spec.kept_columns == ("LICENSE", "similarity", "NSFW")
    assert [condition.numeric for condition in spec.conditions] == [True, True, False]


def test_a_preset_names_the_columns_and_single_ones_are_overridden() -> None:
    assert InputConfig(preset="datacomp").columns == Columns("url", ("text",), sha256="sha256")
    assert InputConfig(preset="laion", captions=("ALT",), md5="md5").columns == Columns("URL", ("ALT",), md5="md5")


@pytest.mark.parametrize("preset", PRESETS)
def test_only_the_withdrawn_dataset_is_warned_of(preset: Preset) -> None:
    assert ("withdrawn" in InputConfig(preset=preset).warning) == (preset == "laion")


def test_a_folder_of_pictures_elsewhere_goes_with_lists_alone() -> None:
    with pytest.raises(ConfigError, match=r"input\.images \(x\) does not go with input\.kind shards"):
        InputConfig(kind="shards", images=Path("x"))


def test_what_a_folder_remembers_holds_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers and repairs stand in other folders than the first command did."""
    (tmp_path / "bad").write_text("")
    monkeypatch.chdir(tmp_path)
    spec = Spec(input=InputConfig(images=Path("pictures")), filter=FilterConfig(forbidden=Path("bad")))
    anchored = spec.anchored()
    assert (anchored.input.images, anchored.filter.forbidden) == (tmp_path / "pictures", tmp_path / "bad")
    assert anchored.hash == spec.hash


def test_a_shard_holds_no_more_than_its_reader_takes() -> None:
    with pytest.raises(ConfigError, match="less than or equal to 300000"):
        Spec(samples_per_shard=333_334)
