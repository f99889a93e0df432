"""Copies that drift apart are found when they are saved; and checkpoints cut ahead of time are what the layout saves, and read, itself.

One launch a number of processes.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from flm_scale.parallel.mesh import Layout
from tests.distributed.drift_worker import LAYOUTS, STEP, folder_name
from tests.distributed.launch import run_worker

pytestmark = pytest.mark.slow

CUTS = [(size, cut) for size, cuts in LAYOUTS.items() for cut in cuts]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("drift")
    for size in LAYOUTS:
        run_worker("drift_worker", out, processes=size, timeout=600)
    return out


def found_by(outcomes: Path, size: int, cut: tuple[int, int, int, str]) -> list[dict[str, Any]]:
    """What each rank found."""
    return [json.loads((outcomes / f"{folder_name(size, cut)}-rank{rank}.json").read_text()) for rank in range(size)]


@pytest.mark.parametrize(("cut", "drift", "name"), [
    ((2, 1, 1, "fp32"), "norm weight", "weight of head.norm.weight"), ((2, 1, 1, "fp32"), "norm exp_avg_sq", "exp_avg_sq of head.norm.weight"),
    ((2, 1, 1, "fp32"), "bias", "weight of vision_0.block.mlp.c_proj.bias"), ((2, 1, 3, "fp32"), "norm weight", "weight of head.norm.weight"),
    ((1, 2, 1, "fp32"), "table", "weight of text_entry.tokens.weight"), ((1, 2, 1, "bf16"), "table", "weight of text_entry.tokens.weight"),
    ((1, 1, 0, "fp32"), "replica", "exp_avg of head.norm.weight")], ids=str)
def test_one_bit_of_one_copy_is_found_and_named_once(outcomes: Path, cut: tuple[int, int, int, str], drift: str, name: str) -> None:
    said = [found["said"][drift] for found in found_by(outcomes, 2, cut)]
    assert said[0].startswith(f"flm: what several processes must hold alike has drifted apart: {name}; ")
    assert said[0].count("\n") == 1
    assert said[1] == ""


@pytest.mark.parametrize(("size", "cut"), CUTS, ids=str)
def test_what_is_not_held_alike_may_differ(outcomes: Path, size: int, cut: tuple[int, int, int, str]) -> None:
    """After real steps, on every layout; and a shard is its process's own."""
    for found in found_by(outcomes, size, cut):
        assert found["said"]["nothing"] == ""
        assert found["said"].get("shard", "") == ""


@pytest.mark.parametrize(("size", "cut"), CUTS, ids=str)
def test_a_checkpoint_cut_ahead_of_time_is_byte_for_byte_what_the_layout_saves_itself(outcomes: Path, size: int,
                                                                                      cut: tuple[int, int, int, str]) -> None:
    """By way of one for a single process."""
    name = folder_name(size, cut)
    saved, again = (outcomes / folder / "checkpoints" / f"step-{STEP:06d}" for folder in (name, f"{name}-again"))
    sizes = 0
    for path in again.glob("*.safetensors"):
        assert path.read_bytes() == (saved / path.name).read_bytes()
        sizes += path.stat().st_size
    # At ZeRO 0 the second replica's file has a head and nothing more.
    assert sizes == pytest.approx(sum(path.stat().st_size for path in saved.glob("*.safetensors")), rel=0.01)


@pytest.mark.parametrize(("size", "cut"), CUTS, ids=str)
def test_a_process_reads_its_own_file_and_for_what_its_group_holds_alike_the_first_ones(outcomes: Path, size: int,
                                                                                        cut: tuple[int, int, int, str]) -> None:
    """Building the model it also reads what other replicas keep of its own stage. The last stage's copy of the tied table is with the first."""
    tensor, pipe, zero, _ = cut
    layout = Layout(tensor, pipe, size // (tensor * pipe))
    for rank, found in enumerate(found_by(outcomes, size, cut)):
        stage, place, replica = layout.stage(rank), rank % tensor, layout.data_index(rank)
        writers = {(stage, place), (stage, 0)} | ({(0, place)} if stage == pipe - 1 else set())
        for way, replicas in (("resumed from", [replica] if zero else [0]), ("built from", range(layout.data) if zero else [0])):
            ranks = {layout.rank(stage=stage, data_index=index, tensor_index=place) for stage, place in writers for index in replicas}
            assert found[way] == [f"rank-{number:05d}.safetensors" for number in sorted(ranks)]
