"""The world: who runs beside us, read once from the environment."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cifar_dist.config.errors import UserError

DEFAULT_PORT = 29500
"""torch's default for `MASTER_PORT`."""
LAUNCHED = "CIFAR_DIST_LAUNCHED"
"""The environment variable that our launcher sets for its processes."""
LISTENING_SOCKET = "CIFAR_DIST_LISTENING_SOCKET"
"""The environment variable with the descriptor of the socket that rank 0 inherits, bound to `MASTER_PORT`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """The processes of this run, this one's place among them, and who started them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """Processes on this machine."""
    launcher: Literal["none", "torchrun", "slurm"] = "none"
    """`torchrun` is whatever sets `WORLD_SIZE`: torchrun, `accelerate launch`, or our own launcher."""
    main_address: str | None = None
    """Where rank 0 listens, for a Slurm task that was not told; None: `MASTER_ADDR` and `MASTER_PORT` say it."""
    main_port: int | None = None

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> "World":
        """Read `WORLD_SIZE` and its companions, or a Slurm task's variables; anything else is a world of one.

        A `salloc` shell has `SLURM_*` too but is no task: without `SLURM_STEP_ID` it is a world of one.
        Raises UserError where a variable is not a number, the rank is outside the world, or mpirun started us.
        """
        if "WORLD_SIZE" in environ:
            size, rank = _whole(environ, "WORLD_SIZE", 1), _whole(environ, "RANK", 0)
            local_rank = _whole(environ, "LOCAL_RANK", 0)
            for name, meaning in (
                ("RANK", "number of this process"),
                ("LOCAL_WORLD_SIZE", "processes of this machine"),
            ):
                if size > 1 and name not in environ:
                    raise UserError(f"WORLD_SIZE is set without {name}: set that to the {meaning}")
            local_size = _whole(environ, "LOCAL_WORLD_SIZE", 1)
            world = cls(rank=rank, size=size, local_rank=local_rank, local_size=local_size, launcher="torchrun")
        else:
            _refuse_mpi(environ)
            if "SLURM_PROCID" not in environ or "SLURM_STEP_ID" not in environ or _slurm_tasks(environ) == 1:
                return cls()
            world = cls._slurm_task(environ)
        if not world.rank < world.size:
            raise UserError(f"this process has rank {world.rank} in a world of {world.size}: mend RANK and WORLD_SIZE")
        if not world.local_rank < world.local_size:
            numbers = f"LOCAL_RANK={world.local_rank} of {world.local_size} processes on this machine"
            raise UserError(f"this process has {numbers}: mend LOCAL_RANK and LOCAL_WORLD_SIZE")
        return world

    def rendezvous_address(self, environ: Mapping[str, str]) -> tuple[str, int]:
        """Return host and port of rank 0. Raises UserError if the environment does not name them."""
        host = self.main_address or environ.get("MASTER_ADDR", "").strip()
        if not host:
            raise UserError(f"WORLD_SIZE={self.size} is set without MASTER_ADDR: set it to the address of rank 0")
        port = self.main_port or _whole(environ, "MASTER_PORT", DEFAULT_PORT)
        if not 0 < port < 2**16:
            raise UserError(f"MASTER_PORT must be from 1 to 65535, not {port}")
        return host, port

    @classmethod
    def _slurm_task(cls, environ: Mapping[str, str]) -> "World":
        nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", "127.0.0.1"))
        job, step = _whole(environ, "SLURM_JOB_ID", 0), _whole(environ, "SLURM_STEP_ID", 0)
        # "2(x3),1": tasks on each node of the step, in order of the nodes
        counts = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", "1"))
        return cls(
            rank=_whole(environ, "SLURM_PROCID", 0),
            size=_slurm_tasks(environ),
            local_rank=_whole(environ, "SLURM_LOCALID", 0),
            local_size=_entry(counts, _whole(environ, "SLURM_NODEID", 0)),
            launcher="slurm",
            main_address=None if "MASTER_ADDR" in environ else first_host(nodes),
            # The steps of a job and the jobs of a node want different ports, and every task must find the same one; not
            # one above 32,767, which the system gives to connections that go out.
            main_port=None if "MASTER_PORT" in environ else 12_000 + (job * 31 + step) % 20_000,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmJob:
    """The Slurm job that a process belongs to, as one of its tasks or from a shell in it."""

    id: str
    restarts: int
    """How often it was requeued."""
    step: str | None = None
    """The number of the step, which is the same after a requeue; None in a batch script or a shell."""

    @property
    def name(self) -> str:
        """What a run is marked with, so that the restarted job finds its own."""
        return f"{self.id}.{self.step or 'batch'}"

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> "SlurmJob | None":
        """Read Slurm's variables; None where there is no job. Raises UserError where a variable is not a number."""
        job = environ.get("SLURM_JOB_ID")
        if not job:
            return None
        return cls(id=job, restarts=_whole(environ, "SLURM_RESTART_COUNT", 0), step=environ.get("SLURM_STEP_ID"))


def _slurm_tasks(environ: Mapping[str, str]) -> int:
    """Give the tasks of the step: an interactive shell is a step of one in an allocation of several."""
    return _whole(environ, "SLURM_STEP_NUM_TASKS", _whole(environ, "SLURM_NTASKS", 1))


def _refuse_mpi(environ: Mapping[str, str]) -> None:
    """Raise UserError if mpirun started this process with others: each would train alone.

    `srun --mpi=pmi2` sets PMI_SIZE as well, to the number of tasks of its step.
    """
    tasks = _slurm_tasks(environ) if "SLURM_STEP_ID" in environ else 1
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        size = environ.get(name) or "1"
        if size != "1" and (name, size) != ("PMI_SIZE", str(tasks)):
            raise UserError(f"{name}={size}: start the processes with torchrun, Slurm or --num-processes, not mpirun")


def first_host(nodelist: str) -> str:
    """Return the first host of a Slurm node list such as `rack[0-1]gpu[003-005,9],cpu1`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)
    assert first is not None  # it matches anything
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def _entry(counts: str, index: int) -> int:
    """Give the index-th number of a list like `2(x3),1`, which stands for 2, 2, 2, 1."""
    numbers: list[int] = []
    for number, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", counts):
        numbers += [int(number)] * int(times or 1)
    return numbers[min(index, len(numbers) - 1)] if numbers else 1


def _whole(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"the environment variable {name} must be a number, not '{text}'")
    return int(text)
