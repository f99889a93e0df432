"""`flm checkpoint diff`: nothing that two checkpoints hold otherwise goes unsaid, and nothing else counts."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from flm_scale.checkpoint.store import begin, commit, write_rank
from flm_scale.cli import main
from flm_scale.model.parts import Piece
from tests.synthetic import tiny_run

WEIGHTS = {f"layer_{i}.weight": torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i in range(12)}


def write(run_dir: Path, weights: dict[str, Tensor], *, step: int = 4, seed: int = 0, cursor: int = 7, ranks: int = 1) -> Path:
    """Commit weights and a moment of each, over ranks that hold every value once, and return the folder."""
    partial = begin(run_dir, step=step)
    for rank in range(ranks):
        pieces = []
        for name, weight in weights.items():
            share = -(-weight.numel() // ranks)
            run = slice(share * rank, share * (rank + 1))
            pieces += [Piece(name, kind, tuple(weight.shape), None, run.start, scale * weight.flatten()[run])
                       for kind, scale in (("weight", 1.0), ("exp_avg", 0.5))]
        write_rank(partial, rank=rank, pieces=pieces, state={})
    state = {"layout": f"{ranks} ranks", "loader": {"cursor": cursor}, "versions": {"torch": str(ranks)}}
    return commit(partial, num_ranks=ranks, run_json=tiny_run(seed=seed).model_dump_json(), state=state, timeout_seconds=1)


def diff(one: Path, other: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """Return exit code and lines."""
    try:
        code = main(["checkpoint", "diff", str(one), str(other)])
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().out.splitlines()[1:]


def test_what_another_layout_wrote_is_the_same_and_the_layout_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run directory stands for its latest checkpoint."""
    write(tmp_path / "one", {name: weight + 1 for name, weight in WEIGHTS.items()}, step=3)
    write(tmp_path / "one", WEIGHTS)
    folder = write(tmp_path / "other", WEIGHTS, ranks=3)
    assert diff(tmp_path / "one", folder, capsys) == (0, [
        "written  layout: 1 ranks and 3 ranks", "written  versions.torch: 1 and 3",
        "weight      12 tensors: 12 equal to the bit, 0 differ", "exp_avg     12 tensors: 12 equal to the bit, 0 differ"])


@pytest.mark.parametrize(("changes", "line"), [({"seed": 1}, "run      seed: 0 and 1"), ({"step": 5}, "state    step: 4 and 5"),
                                               ({"cursor": 8}, "state    loader.cursor: 7 and 8")])
def test_run_values_step_and_place_in_the_data_count(tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict, line: str) -> None:
    write(tmp_path / "one", WEIGHTS)
    code, lines = diff(tmp_path / "one", write(tmp_path / "other", WEIGHTS, **changes), capsys)
    assert (code, lines[0]) == (1, line)


def test_weights_that_differ_are_told_largest_first_and_ten_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = {name: weight.clone() for name, weight in WEIGHTS.items()}
    for place, weight in enumerate(changed.values()):
        weight[1, 2] += 0.5 * place
    relative = 5.5 / WEIGHTS["layer_11.weight"].norm()
    write(tmp_path / "one", WEIGHTS)
    code, lines = diff(tmp_path / "one", write(tmp_path / "other", changed), capsys)
    assert code == 1
    assert lines[0] == "weight      12 tensors: 1 equal to the bit, 11 differ, the largest by 5.5 in layer_11.weight"
    assert lines[1] == f"           5.5 at most, {relative:8.2g} of its norm   layer_11.weight"
    assert [line.split()[-1] for line in lines[1:11]] == [f"layer_{i}.weight" for i in range(11, 1, -1)]
    assert lines[11].startswith("exp_avg     12 tensors: 1 equal to the bit, 11 differ, the largest by 2.75")


def test_equal_is_equal_to_the_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Zero and minus zero are not, a value that is no number is itself; and where one is not a number, that comes first."""
    zero, minus, nan = torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]), torch.tensor([torch.nan, 1.0])
    write(tmp_path / "one", {"a": zero, "b": nan, "c": zero, "d": zero})
    code, lines = diff(tmp_path / "one", write(tmp_path / "other", {"a": zero + 1, "b": nan, "c": nan, "d": minus}), capsys)
    assert code == 1
    assert lines[0] == "weight      4 tensors: 1 equal to the bit, 3 differ, the largest by nan in c"
    assert [line.split()[0] for line in lines[2:4]] == ["1", "0"]


def test_what_one_lacks_or_has_in_another_shape_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "one", {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2, 3)})
    code, lines = diff(tmp_path / "one", write(tmp_path / "other", {"a": torch.ones(2), "c": torch.ones(3, 2), "d": torch.ones(2)}), capsys)
    assert code == 1
    assert lines[0] == ("weight      4 tensors: 1 equal to the bit, 0 differ; 1 only in the first: b; 1 only in the second: d; "
                        "1 of other shapes: c")


def test_what_cannot_be_read_is_not_called_different(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "one", WEIGHTS)
    assert diff(folder, tmp_path / "nowhere", capsys)[0] == 2
    (folder / "run.json").write_text("{}")
    assert diff(folder, folder, capsys)[0] == 2
