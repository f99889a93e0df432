"""Ranks from the variables of each launcher."""

import socket

import pytest
import torch.distributed as dist

from flm_scale.config import ParallelConfig
from flm_scale.errors import ConfigError
from flm_scale.parallel.mesh import Layout, Ranks, find_layout, find_ranks, first_host, no_meeting


def test_torchruns_variables_are_taken_as_they_are() -> None:
    environ = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert find_ranks(environ) == (Ranks(3, 8, 1), {})


def test_srun_gets_a_meeting_point_on_the_first_host_and_a_port_of_its_job() -> None:
    environ = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[003-004]", "SLURM_JOB_ID": "77"}
    ranks, missing = find_ranks(environ)
    assert ranks == (5, 8, 1)
    assert missing == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu003", "MASTER_PORT": "20077"}


def test_a_batch_script_outside_srun_is_one_process() -> None:
    assert find_ranks({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"})[0] == (0, 1, 0)


def test_a_half_set_launcher_is_refused() -> None:
    with pytest.raises(ConfigError, match="WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        find_ranks({"RANK": "1"})


@pytest.mark.parametrize(("nodes", "first"), [("n0", "n0"), ("n0,n1", "n0"), ("gpu[003-007,9],login", "gpu003"), ("a,b[1-2]", "a"), ("x[7]", "x7")])
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_ranks_count_tensor_pieces_first_then_replicas_then_stages() -> None:
    layout = Layout(tensor=2, pipe=3, data=4)
    places = [(stage, data_index, tensor_index) for stage in range(3) for data_index in range(4) for tensor_index in range(2)]
    for rank, (stage, data_index, tensor_index) in enumerate(places):
        assert layout.rank(stage=stage, data_index=data_index, tensor_index=tensor_index) == rank
        assert (layout.stage(rank), layout.data_index(rank)) == (stage, data_index)


def test_a_replica_is_its_stages_with_all_their_tensor_pieces_and_its_first_rank_reads() -> None:
    layout = Layout(tensor=2, pipe=3, data=4)
    assert layout.replica(1) == [2, 3, 10, 11, 18, 19]
    assert sorted(rank for data_index in range(4) for rank in layout.replica(data_index)) == list(range(24))
    assert [layout.reader(rank) for rank in (0, 2, 11, 18, 23)] == [0, 2, 2, 2, 6]


def test_processes_that_tensor_and_pipe_do_not_take_up_are_replicas() -> None:
    assert find_layout(ParallelConfig(engine="deepspeed", tensor=2, pipe=2), world_size=12) == Layout(2, 2, 3)
    with pytest.raises(ConfigError, match=r"6 process\(es\) cannot be cut .* start a multiple of 4"):
        find_layout(ParallelConfig(engine="deepspeed", tensor=2, pipe=2), world_size=6)


def test_a_port_in_use_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        environ = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(dist.DistError) as raised:
            dist.init_process_group("gloo")
    message = str(no_meeting(raised.value, environ))
    assert message.startswith(f"the 1 processes cannot meet at 127.0.0.1:{environ['MASTER_PORT']}: the port is in use; set MASTER_PORT")
    assert "\n" not in message
