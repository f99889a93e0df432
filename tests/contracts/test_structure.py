"""The house rules that growth would break first: layers, doors, cycles, sizes, a quick --help, recipes that round-trip."""

import ast
import json
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest

import flm_scale
from flm_scale.config import Run
from flm_scale.engine.deepspeed_config import KNOWN_KEYS, RUN_OWNED, merge_deepspeed
from flm_scale.errors import ConfigError
from flm_scale.recipes import RECIPES

PACKAGE = Path(flm_scale.__file__).parent
REPOSITORY = PACKAGE.parent

# A file may import files of the lines below its own, and files of its own folder.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"cli_data"},
    {"train", "plan", "score"},
    {"evals"},
    {"guard", "run_dir", "opening"},
    {"engine", "checkpoint", "observe"},
    {"parallel"},
    {"data", "model"},
    {"objectives"},
    {"masks"},
    {"batch"},
    {"recipes"},
    {"config"},
    {"config_lm", "config_vision"},
    {"section"},
    {"errors"},
    {"export", "export_lm"},
]
DOORS = {
    "deepspeed": "engine/deepspeed.py", "megatron": "parallel/tensor.py", "ray": "data/actors.py", "webdataset": "data/shards.py",
    "open_clip": "model/vision.py", "timm": "model/convnet.py", "sentencepiece": "data/tokens.py", "transformers": "model/frozen_lm.py",
    "aiohttp": "data/prepare/fetch.py", "fsspec": "data/storage.py", "simplejpeg": "data/images.py", "py3langid": "data/prepare/filters.py",
    "torchvision": "data/augment.py", "av": "data/clips.py",
}
# open_clip builds towers of timm's blocks, which its door looks at.
SECOND_DOORS = {"timm": "model/vision.py"}
# Go beside exported weights and run without the rest of the package, so they can use no other file's door.
ALONE = {"export.py", "export_lm.py"}
# Doors that need their library for every line: nobody imports them but inside a function.
LAZY = {"engine/deepspeed.py", "parallel/tensor.py", "data/prepare/fetch.py"} | ALONE
LONG_FILES = {"export.py": "transformers copies and runs one file, so config, model and picture processor are all in it"}
LONG_FUNCTIONS: dict[str, str] = {}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@cache
def imports_of(path: Path, *, at_head: bool = False) -> tuple[str, ...]:
    tree, found = ast.parse(path.read_text()), list[str]()
    for node in tree.body if at_head else ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return tuple(found)


def rank(module: str) -> int:
    top = module.split(".")[1] if "." in module else "__main__"
    return next(i for i, layer in enumerate(LAYERS) if top in layer)


def test_imports_point_downward() -> None:
    for path in sources():
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if own == "__init__":
            continue
        for module in imports_of(path):
            if module.startswith("flm_scale."):
                there = module.split(".")[1]
                assert own == there or rank(f"x.{own}") < rank(module), f"{path.relative_to(PACKAGE)} imports {module}"


def test_there_is_no_import_cycle() -> None:
    names = {f"flm_scale.{'.'.join(path.relative_to(PACKAGE).with_suffix('').parts)}".removesuffix(".__init__"): path for path in sources()}
    graph = {name: {module for module in imports_of(path) if module in names and module != name} for name, path in names.items()}
    while graph:
        leaves = {name for name, needs in graph.items() if not needs & graph.keys()}
        assert leaves, f"import cycle among {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in leaves}


@pytest.mark.parametrize("library", DOORS)
def test_a_heavy_dependency_has_one_door_and_is_imported_inside_functions(library: str) -> None:
    users = {path.relative_to(PACKAGE).as_posix() for path in sources() if library in {m.split(".")[0] for m in imports_of(path)}}
    assert users <= {DOORS[library], SECOND_DOORS.get(library)} | ALONE
    for path in sources():
        at_head = set(imports_of(path, at_head=True))
        assert path.relative_to(PACKAGE).as_posix() in LAZY or library not in {module.split(".")[0] for module in at_head}
        assert not at_head & {f"flm_scale.{door.removesuffix('.py').replace('/', '.')}" for door in LAZY}


def test_the_files_that_are_exported_need_nothing_else_of_the_package() -> None:
    found = {module.split(".")[0] for name in ALONE for module in imports_of(PACKAGE / name)}
    assert found <= {"collections", "functools", "hashlib", "itertools", "typing", "numpy", "torch", "PIL", "transformers", "open_clip", "export"}


def test_folders_say_in_a_paragraph_what_lives_there_and_hold_no_code() -> None:
    for init in PACKAGE.rglob("*/__init__.py"):
        tree = ast.parse(init.read_text())
        assert ast.get_docstring(tree), init
        assert len(tree.body) == 1, init


def test_help_answers_in_under_a_second_without_a_heavy_library() -> None:
    code = ("import sys; from flm_scale.cli import main; main(['--help']); "
            "print(sorted({'torch', 'numpy', 'deepspeed', 'ray', 'matplotlib'} & set(sys.modules)))")
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        seconds.append(time.perf_counter() - started)
    assert out.splitlines()[-1] == "[]"
    assert min(seconds) < 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_survives_its_json_and_says_what_it_is(recipe: str) -> None:
    run = RECIPES[recipe]()
    assert Run.model_validate_json(run.model_dump_json()) == run
    assert run.name == recipe
    assert RECIPES[recipe].__doc__


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [path.stem for path in sorted((REPOSITORY / "ds_configs").glob("*.json"))])
def test_every_template_merges_with_every_recipe(recipe: str, precision: str, name: str) -> None:
    """In both precisions, except that DeepSpeed has no float32 gradient sums at ZeRO 0: there bf16 is refused."""
    template = json.loads((REPOSITORY / "ds_configs" / f"{name}.json").read_text())
    stage = template["zero_optimization"]["stage"]
    run = RECIPES[recipe]()
    run = run.replace(precision=precision, parallel=run.parallel.replace(zero=stage))
    if (stage, precision) == (0, "bf16"):
        with pytest.raises(ConfigError, match="needs float32 gradient sums"):
            merge_deepspeed(template, run, data_parallel_size=1)
        return
    merged = merge_deepspeed(template, run, data_parallel_size=1)
    assert merged["gradient_accumulation_steps"] == run.batch.micro_batches
    assert merged["gradient_clipping"] == (run.optim.clip_norm if stage else 0)
    assert merged["zero_optimization"]["stage"] == stage
    assert merged["bf16"]["enabled"] == (precision == "bf16")
    assert merged.get("data_types") == ({"grad_accum_dtype": "fp32"} if precision == "bf16" else None)
    assert merged.get("communication_data_type") == ("fp32" if precision == "bf16" else None)


@pytest.mark.parametrize("key", RUN_OWNED)
def test_a_template_that_sets_what_the_run_owns_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"'{key}' belongs to the Run"):
        merge_deepspeed({"zero_optimization": {"stage": 1}, key: 1}, RECIPES["demo"](), data_parallel_size=1)


@pytest.mark.parametrize(("offload", "kind", "message"), [
    ({"device": "nvme"}, "adamw", "for device cpu and ratio 1 alone"), ({"device": "cpu", "ratio": 0.5}, "adamw", "for device cpu and ratio 1 alone"),
    ({"device": "cpu"}, "sgd", "optim.kind sgd has no form")])
def test_offloading_that_could_not_be_trained_or_resumed_is_refused(offload: dict, kind: str, message: str) -> None:
    run = RECIPES["demo"]()
    run = run.replace(optim=run.optim.replace(kind=kind), parallel=run.parallel.replace(zero=3))
    with pytest.raises(ConfigError, match=message):
        merge_deepspeed({"zero_optimization": {"stage": 3, "offload_optimizer": offload}}, run, data_parallel_size=1)


def test_all_conflicts_of_a_template_are_listed_at_once() -> None:
    template = {"zero_optimization": {"stage": 2}, "optimizer": {}, "zero_optimisation": {}}
    with pytest.raises(ConfigError, match=r"'optimizer' belongs.*unknown key 'zero_optimisation'; did you mean 'zero_optimization'.*stage \(2\)"):
        merge_deepspeed(template, RECIPES["demo"](), data_parallel_size=1)
    assert not KNOWN_KEYS & set(RUN_OWNED)


def test_every_config_field_is_read_somewhere() -> None:
    """A knob that turns nothing is a lie."""
    used = {node.attr for path in sources() if path.name not in {"config.py", "config_lm.py", "config_vision.py", "recipes.py"}
            for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    from flm_scale import config, config_lm, config_vision
    from flm_scale.section import Section

    sections = [section for section in (vars(config) | vars(config_lm) | vars(config_vision)).values()
                if isinstance(section, type) and issubclass(section, Section)]
    unread = {f"{section.__name__}.{field}" for section in sections for field in section.model_fields if field not in used}
    assert not unread, unread


def test_files_and_functions_stay_small() -> None:
    """Advice, not law: what exceeds it stands in LONG_FILES or LONG_FUNCTIONS with a sentence of reason."""
    for path in sources():
        name = path.relative_to(PACKAGE).as_posix()
        assert len(path.read_text().splitlines()) <= 400 or name in LONG_FILES, name
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= 60 or f"{name}:{node.name}" in LONG_FUNCTIONS, f"{name}:{node.name}"
