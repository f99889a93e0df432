"""What a Run refuses, and how it says so."""

import pytest

from flm_scale.cli import main
from flm_scale.config import BatchConfig, FlmConfig, MlmConfig, Run, TextConfig, micro_steps
from flm_scale.config_vision import SmallVisionConfig
from flm_scale.errors import ConfigError
from flm_scale.recipes import RECIPES
from flm_scale.section import of_kinds


@pytest.mark.parametrize(("make", "message"), [
    (lambda: TextConfig(width=130, heads=4), r"text.width \(130\) must be a multiple of text.heads \(4\)"),
    (lambda: TextConfig(bottom_layers=1, reconstructor_bottom_layers=2),
     r"reconstructor_bottom_layers \(2\) must not exceed text.bottom_layers \(1\)"),
    (lambda: TextConfig(max_length=2), r"TextConfig.max_length \(2\)"),
    (lambda: FlmConfig(corruption_rate=1.5), r"FlmConfig.corruption_rate \(1.5\).*less than or equal to 1"),
    (lambda: FlmConfig(corruption_rte=0.5), r"FlmConfig has no key 'corruption_rte'; did you mean 'corruption_rate'\?"),
    (lambda: SmallVisionConfig(image_size=60, patch_size=8), r"vision.image_size \(60\) must be a multiple of vision.patch_size \(8\)"),
    (lambda: Run(name="x", batch=BatchConfig(text_tokens=20)), r"batch.text_tokens \(20\) must hold one caption of text.max_length \(50\)"),
    (lambda: Run(name="x", steps=10), r"optim.warmup_steps \(100\) must be below steps \(10\)"),
    (lambda: Run(name="x", objective=MlmConfig(passes=20)), r"objective.passes \(20\) times text.max_length"),
    (lambda: micro_steps(BatchConfig(micro_batches=6), data_parallel_size=4), r"batch.micro_batches \(6\) must be a multiple.*\(4\); use 8"),
])
def test_an_impossible_value_is_refused_with_the_value_and_the_rule(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_replacing_a_value_checks_it() -> None:
    run = RECIPES["demo"]()
    with pytest.raises(ConfigError, match="heads"):
        run.replace(text=run.text.replace(width=130))


def test_a_wrong_key_in_json_is_named_with_the_nearest_one() -> None:
    text = RECIPES["demo"]().model_dump_json().replace('"lr"', '"lrr"')
    with pytest.raises(ConfigError, match="OptimConfig has no key 'lrr'; did you mean 'lr'"):
        Run.model_validate_json(text)


@pytest.mark.parametrize(("words", "message"), [
    ("train dmeo", "no recipe 'dmeo'; did you mean 'demo'?"),
    ("train demo --optim.lrr 3", "did you mean --optim.lr?"),
    ("train demo --steps many", "--steps: invalid literal"),
    ("train demo --text.heads 3", "text.width (128) must be a multiple of text.heads (3)"),
    ("train demo --data.path nowhere", "nowhere"),
    ("train demo --parallel.tensor 2", "1 process(es) cannot be cut into parallel.tensor (2) x parallel.pipe (1); start a multiple of 2"),
    ("train demo --parallel.pipe 2 --parallel.zero 2", "parallel.zero (2) does not go with parallel.pipe (2); use --parallel.zero 1"),
    ("train demo --parallel.tensor 3", "text.heads (4) must be a multiple of parallel.tensor (3)"),
    ("train debug --parallel.pipe 2", "need parallel.engine deepspeed"),
    ("report nowhere", "nowhere"),
    ("trian demo", "did you mean 'train'?"),
    ("data dmo x", "data demo"),
    ("eval nowhere --task vqa", "nowhere"),
    ("caption nowhere picture.png", "nowhere"),
])
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert not out
    assert message in err
    assert err.startswith("flm: ")
    assert err.count("\n") == 1


def test_options_choose_the_kind_of_a_section_and_a_value_of_that_name_is_left_alone() -> None:
    run = RECIPES["demo"]()
    other = of_kinds(run, ["--objective.kind", "mlm", "--vision.kind=open_clip", "--optim.kind", "sgd", "--steps", "3"])
    assert (other.objective, other.vision.kind, other.optim) == (MlmConfig(), "open_clip", run.optim)
    assert of_kinds(run, ["--objective.kind", "flm"]) == run
    with pytest.raises(ConfigError, match="mim"):
        of_kinds(run, ["--objective.kind", "mim"])
