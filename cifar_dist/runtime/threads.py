"""How many threads a process computes with."""

from collections.abc import Mapping

import psutil

from cifar_dist.config.accelerate_config import has_outer_launcher
from cifar_dist.config.cpus import usable_cpus


def choose_num_threads(environ: Mapping[str, str], *, cores: int, local_processes: int, default: int) -> int:
    """Give the threads of this process.

    `OMP_NUM_THREADS` is the user's word, except that a 1 under `accelerate launch` or torchrun was forced by them and
    would leave the other cores idle: then the cores are shared among the processes here. A Slurm task has
    the cores that Slurm gave it. Otherwise one process keeps `default`, torch's own.
    """
    text = environ.get("OMP_NUM_THREADS", "")
    outer = has_outer_launcher(environ)
    forced = outer and text == "1"
    if text.isdecimal() and int(text) > 0 and not forced:
        return int(text)
    own = environ.get("SLURM_CPUS_PER_TASK", "")
    if own.isdecimal() and "SLURM_STEP_ID" in environ and not outer:
        return max(1, min(cores, int(own)))
    if outer or local_processes > 1:
        return max(1, cores // local_processes)
    return default


def usable_cores() -> int:
    """Return the number of cores that this process may use, at most as many as there are physical ones."""
    return min(usable_cpus(), psutil.cpu_count(logical=False) or usable_cpus())
