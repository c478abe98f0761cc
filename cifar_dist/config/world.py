"""The world: the processes of a run and this one's place among them, read once from the environment."""

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
    """Rank and size, and who started the processes."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """Processes on this machine."""
    launcher: Literal["none", "torchrun", "slurm"] = "none"
    """`torchrun` is whatever sets `WORLD_SIZE`: torchrun, `accelerate launch`, or our own launcher."""
    main_address: str | None = None
    """Where rank 0 of Slurm tasks listens; None: see `MASTER_ADDR` and `MASTER_PORT`."""
    main_port: int | None = None

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> "World":
        """Read `WORLD_SIZE` and its companions, or a Slurm task's variables; anything else is a world of one.

        A `salloc` shell has `SLURM_*` too but is no task: without `SLURM_STEP_ID` it is a world of one.
        Raises UserError for variables that contradict each other.
        """
        if "WORLD_SIZE" in environ:
            size = read_number(environ, "WORLD_SIZE", 1)
            if size > 1 and (missing := [name for name in ("RANK", "LOCAL_WORLD_SIZE") if name not in environ]):
                raise UserError(f"WORLD_SIZE={size} is set without {missing[0]}: set RANK and LOCAL_WORLD_SIZE as well")
            world = cls(
                rank=read_number(environ, "RANK", 0),
                size=size,
                local_rank=read_number(environ, "LOCAL_RANK", 0),
                local_size=read_number(environ, "LOCAL_WORLD_SIZE", 1),
                launcher="torchrun",
            )
        else:
            _refuse_mpi(environ)
            if "SLURM_PROCID" not in environ or "SLURM_STEP_ID" not in environ or _slurm_tasks(environ) == 1:
                return cls()
            world = cls._slurm_task(environ)
        if world.rank >= world.size or world.local_rank >= world.local_size:
            place = f"rank {world.rank} of {world.size}, local rank {world.local_rank} of {world.local_size}"
            raise UserError(f"this process has {place}: correct RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE")
        return world

    def rendezvous_address(self, environ: Mapping[str, str]) -> tuple[str, int]:
        """Return host and port of rank 0. Raises UserError if the environment does not name them."""
        host = self.main_address or environ.get("MASTER_ADDR", "").strip()
        if not host:
            raise UserError(f"WORLD_SIZE={self.size} is set without MASTER_ADDR: set it to the address of rank 0")
        port = self.main_port or read_number(environ, "MASTER_PORT", DEFAULT_PORT)
        if not 0 < port < 2**16:
            raise UserError(f"MASTER_PORT must be from 1 to 65535, not {port}")
        return host, port

    @classmethod
    def _slurm_task(cls, environ: Mapping[str, str]) -> "World":
        nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", "127.0.0.1"))
        job, step = read_number(environ, "SLURM_JOB_ID", 0), read_number(environ, "SLURM_STEP_ID", 0)
        # "2(x3),1": tasks on each node of the step, in order of the nodes
        tasks = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", "1"))
        counts = [n for n, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", tasks) for _ in range(int(times or 1))] or [1]
        return cls(
            rank=read_number(environ, "SLURM_PROCID", 0),
            size=_slurm_tasks(environ),
            local_rank=read_number(environ, "SLURM_LOCALID", 0),
            local_size=int(counts[min(read_number(environ, "SLURM_NODEID", 0), len(counts) - 1)]),
            launcher="slurm",
            main_address=None if "MASTER_ADDR" in environ else first_host(nodes),
            # The steps of a job and the jobs of a node need different ports, and every task must compute the same one.
            # From 32,768 on the system assigns them to outgoing connections.
            main_port=None if "MASTER_PORT" in environ else 12_000 + (job * 31 + step) % 20_000,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmJob:
    """The Slurm job of a process, as one of its tasks or from a shell in it."""

    name: str
    """Job and step, by which the restarted job finds its run."""
    restarts: int
    """How often it was requeued."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> "SlurmJob | None":
        """Read Slurm's variables; None outside a job. Raises UserError."""
        if not (job := environ.get("SLURM_JOB_ID")):
            return None
        name = f"{job}.{environ.get('SLURM_STEP_ID') or 'batch'}"
        return cls(name=name, restarts=read_number(environ, "SLURM_RESTART_COUNT", 0))


def _slurm_tasks(environ: Mapping[str, str]) -> int:
    """Return the tasks of the step: an interactive shell is a step of one in an allocation of several."""
    return read_number(environ, "SLURM_STEP_NUM_TASKS", read_number(environ, "SLURM_NTASKS", 1))


def _refuse_mpi(environ: Mapping[str, str]) -> None:
    """Raise UserError if mpirun started this process with others: each would train as a world of one.

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


def read_number(environ: Mapping[str, str], name: str, default: int) -> int:
    """Read a variable that must be a whole number. Raises UserError."""
    text = environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"the environment variable {name} must be a number, not '{text}'")
    return int(text)
