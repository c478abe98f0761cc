"""The CPUs that this process may use, and the threads that it computes with."""

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from cifar_dist.config.accelerate_config import has_outer_launcher

_OWN_GROUPS, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def usable_cpus() -> int:
    """Return the number of logical CPUs that affinity and control group quotas allow, at least 1."""
    affinity = getattr(os, "sched_getaffinity", None)
    allowed = len(affinity(0)) if affinity else (os.cpu_count() or 1)
    return max(1, int(min(allowed, cpu_quota())))


def usable_cores() -> int:
    """Return `usable_cpus`, but at most the number of physical cores."""
    return min(usable_cpus(), psutil.cpu_count(logical=False) or usable_cpus())


def cpu_quota() -> float:
    """Return the CPUs' time that control groups (v1 and v2) allow, for example in a container; infinity: no limit."""
    quota = math.inf
    for line in _OWN_GROUPS.read_text().splitlines() if _OWN_GROUPS.exists() else ():
        _, controllers, path = line.split(":", 2)  # v2: "0::/user.slice"; v1: "4:cpu,cpuacct:/docker/3f"
        if controllers and "cpu" not in controllers.split(","):
            continue
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
        own = _GROUPS / ("cpu" if controllers else "") / path.lstrip("/")
        for group in (own, *own.parents):  # a container's group is at the top, and its path may be that outside
            with suppress(OSError, ValueError):  # there is no such file, or "max 100000" in it
                limit, period = map(int, " ".join((group / name).read_text() for name in names).split())
                quota = min(quota, limit / period if limit > 0 else math.inf)
    return quota


def choose_num_threads(environ: Mapping[str, str], *, local_processes: int, torch_threads: int) -> int:
    """Return the threads of this process: `OMP_NUM_THREADS`, else a Slurm task's cores, else a share of the cores.

    A single process without an outer launcher keeps torch's own number, as far as the CPUs allow.
    """
    text, outer, cores = environ.get("OMP_NUM_THREADS", ""), has_outer_launcher(environ), usable_cores()
    forced = outer and text == "1"  # set by `accelerate launch` and torchrun; it would leave the other cores idle
    if text.isdecimal() and int(text) > 0 and not forced:
        return int(text)
    own = environ.get("SLURM_CPUS_PER_TASK", "")
    if own.isdecimal() and "SLURM_STEP_ID" in environ and not outer:
        return max(1, min(cores, int(own)))
    if outer or local_processes > 1:
        return max(1, cores // local_processes)
    return min(torch_threads, usable_cpus())
