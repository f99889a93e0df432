"""The processes of an evaluation: replicas share items without gap or overlap, whatever their number."""

from itertools import product

import pytest
import torch

from flm_scale.config import ParallelConfig
from flm_scale.model.assemble import alone
from flm_scale.model.parts import PlainParts
from flm_scale.parallel.mesh import Layout
from flm_scale.parallel.processes import Processes, start_processes


@pytest.mark.parametrize(("data", "count"), list(product([1, 2, 3, 4], [0, 1, 3, 23])))
def test_replicas_share_all_items_and_the_processes_of_one_replica_have_the_same(data: int, count: int) -> None:
    layout = Layout(tensor=2, pipe=2, data=data)
    items = list(range(count))
    shares = [Processes(rank, layout, torch.device("cpu"), PlainParts(), alone).share(items) for rank in range(layout.size)]
    joined = [item for index in range(data) for item in shares[layout.rank(stage=0, data_index=index, tensor_index=0)]]
    assert joined == items
    for rank, share in enumerate(shares):
        assert share == shares[layout.rank(stage=0, data_index=layout.data_index(rank), tensor_index=0)]
        assert len(share) in {count // data, count // data + 1}


def test_one_process_has_everything_and_makes_no_group() -> None:
    processes = start_processes(ParallelConfig())
    assert not torch.distributed.is_initialized()
    assert processes.share([1, 2, 3]) == processes.gather([1, 2, 3]) == [1, 2, 3]
    rows = torch.ones(2, 3)
    assert torch.equal(processes.relay(rows, lambda x: 2 * x), 2 * rows)
