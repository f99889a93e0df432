"""Finds rank, world size and rendezvous from whichever launcher started this process: torchrun, deepspeed, srun, or none."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from flm_scale.config import ParallelConfig
from flm_scale.errors import ConfigError


class Ranks(NamedTuple):
    """This process among all processes."""

    rank: int
    size: int
    local_rank: int


def find_ranks(environ: Mapping[str, str]) -> tuple[Ranks, dict[str, str]]:
    """Return this process's ranks, and the variables that torch.distributed wants and the launcher did not set.

    torchrun and deepspeed set all of them. srun sets its own (one task a device): the first host of the step becomes the meeting point, and
    the port follows from the job's number, so that two jobs on a host do not meet. Without a launcher the process is alone.
    Raises ConfigError when a launcher's variables are incomplete.
    """
    if "RANK" in environ:
        missing = [name for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environ]
        if missing:
            raise ConfigError(f"RANK is set but {', '.join(missing)} is not; start with torchrun, deepspeed or srun, or unset RANK")
        return Ranks(int(environ["RANK"]), int(environ["WORLD_SIZE"]), int(environ["LOCAL_RANK"])), {}
    # Only inside srun: a batch script sees SLURM_NTASKS too, but is one process.
    if "SLURM_STEP_NUM_TASKS" in environ and "SLURM_PROCID" in environ:
        ranks = Ranks(int(environ["SLURM_PROCID"]), int(environ["SLURM_STEP_NUM_TASKS"]), int(environ["SLURM_LOCALID"]))
        job = int(environ.get("SLURM_JOB_ID", "0"))
        meeting = {"MASTER_ADDR": first_host(environ["SLURM_STEP_NODELIST"]), "MASTER_PORT": str(20000 + job % 20000)}
        wanted = {"RANK": str(ranks.rank), "WORLD_SIZE": str(ranks.size), "LOCAL_RANK": str(ranks.local_rank)} | meeting
        return ranks, {name: value for name, value in wanted.items() if name not in environ}
    return Ranks(0, 1, 0), {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def first_host(node_list: str) -> str:
    """Return the first name of a Slurm node list: `gpu[003-007,9],login` gives gpu003."""
    head, bracket, rest = node_list.partition("[")
    if not bracket or "," in head:
        return node_list.split(",", 1)[0]
    number = re.split(r"[-,\]]", rest, maxsplit=1)[0]
    return head + number


def no_meeting(error: Exception, environ: Mapping[str, str]) -> ConfigError:
    """Return what to say when torch could not bring the processes together: a port in use, a host that is not found, ranks that never came."""
    reason = "the port is in use" if "EADDRINUSE" in str(error) else str(error).splitlines()[0]
    return ConfigError(f"the {environ['WORLD_SIZE']} processes cannot meet at {environ['MASTER_ADDR']}:{environ['MASTER_PORT']}: {reason}; set "
                       "MASTER_PORT to a free port, and MASTER_ADDR to a host that all of them reach")


class Layout(NamedTuple):
    """How many ways the work is cut. Ranks count tensor pieces first, then data, then stages, as DeepSpeed and megatron-core do."""

    tensor: int
    pipe: int
    data: int

    @property
    def size(self) -> int:
        """Processes."""
        return self.tensor * self.pipe * self.data

    def data_index(self, rank: int) -> int:
        """Return which data-parallel replica a rank belongs to."""
        return rank // self.tensor % self.data

    def stage(self, rank: int) -> int:
        """Return the pipeline stage of a rank."""
        return rank // (self.tensor * self.data)

    def rank(self, *, stage: int, data_index: int, tensor_index: int) -> int:
        """Return the rank at a place."""
        return (stage * self.data + data_index) * self.tensor + tensor_index

    def replica(self, data_index: int) -> list[int]:
        """Return the ranks that hold one whole model between them, stage after stage. The first of them reads for all."""
        return [self.rank(stage=stage, data_index=data_index, tensor_index=tensor_index) for stage in range(self.pipe)
                for tensor_index in range(self.tensor)]

    def reader(self, rank: int) -> int:
        """Return the rank that reads the batches of a rank's replica."""
        return self.replica(self.data_index(rank))[0]


def find_layout(parallel: ParallelConfig, *, world_size: int) -> Layout:
    """Return the layout over so many processes. Raises ConfigError when they cannot be cut that way."""
    data, left_over = divmod(world_size, parallel.tensor * parallel.pipe)
    if left_over or not data:
        raise ConfigError(f"{world_size} process(es) cannot be cut into parallel.tensor ({parallel.tensor}) x parallel.pipe ({parallel.pipe}); "
                          f"start a multiple of {parallel.tensor * parallel.pipe}, or change one of them")
    return Layout(parallel.tensor, parallel.pipe, data)
