"""The CPUs that this process may use, how busy other programs keep them, and the threads that it computes with."""

import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from cifar_dist.config.accelerate_config import has_outer_launcher
from cifar_dist.config.world import World

_OWN_GROUPS, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_SHORTEST_SAMPLE_SECONDS = 0.3
_BUSY = ("user", "nice", "system", "irq", "softirq", "steal")


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


class CpuTimes(NamedTuple):
    """Counters in seconds. Their differences are a sample of the load."""

    wall: float
    busy: float
    """Sum over the CPUs that this process may use."""
    own: float
    """Of this process, and of its children that have ended."""

    def others_since(self, begun: "CpuTimes") -> float:
        """Return the mean number of CPUs that other programs kept busy."""
        return max(0.0, (self.busy - begun.busy - (self.own - begun.own)) / (self.wall - begun.wall))


_sample_begun: CpuTimes | None = None


def begin_load_sample() -> None:
    """Begin the sample of the load that `choose_num_threads` ends: before torch is imported, which takes seconds."""
    global _sample_begun
    _sample_begun = _read_cpu_times()


def _read_cpu_times() -> CpuTimes | None:
    """Return the counters of this moment; None where the system does not provide them."""
    affinity = getattr(os, "sched_getaffinity", None)
    try:
        each = psutil.cpu_times(percpu=True)
        usable = [each[number] for number in affinity(0)] if affinity else each
    except (OSError, psutil.Error, IndexError):
        return None
    busy = sum(getattr(times, name, 0.0) for times in usable for name in _BUSY)
    return CpuTimes(time.monotonic(), busy, sum(os.times()[:4]))


def _busy_cpus() -> float:
    """Return the mean number of CPUs that other programs keep busy since `begin_load_sample`, or for 0.3 s.

    0 if it is unknown, and under a CPU quota, which leaves the CPUs of the machine to others in any case.
    """
    begun, now = _sample_begun, _read_cpu_times()
    if now is None or cpu_quota() < math.inf:
        return 0.0
    if begun is None or now.wall - begun.wall < _SHORTEST_SAMPLE_SECONDS:  # torch was imported before
        time.sleep(_SHORTEST_SAMPLE_SECONDS)
        begun, now = now, _read_cpu_times()
    return now.others_since(begun) if now is not None else 0.0


def free_threads(most: int, cpus: int, busy: float) -> tuple[int, str]:
    """Return the threads, at most `most`, for which CPUs are free, at least 1, and the reason if these are fewer.

    `busy` of the `cpus` are used by others. A thread without a CPU makes all others wait for it (docs/benchmarks.md).
    """
    taken = min(cpus, round(busy))
    threads = max(1, min(most, cpus - taken))
    return threads, f"{taken} of {cpus} CPUs {'is' if taken == 1 else 'are'} busy" if threads < most else ""


def choose_num_threads(environ: Mapping[str, str], world: World, *, torch_threads: int) -> tuple[int, str]:
    """Return the threads of this process, and a reason: `OMP_NUM_THREADS`, else a Slurm task's cores, else a share.

    A single process without an outer launcher has torch's own number, as far as CPUs are free.
    """
    text, outer, cores = environ.get("OMP_NUM_THREADS", ""), has_outer_launcher(environ), usable_cores()
    forced = outer and text == "1"  # set by `accelerate launch` and torchrun; it would leave the other cores idle
    if text.isdecimal() and int(text) > 0 and not forced:
        return int(text), ""
    own = environ.get("SLURM_CPUS_PER_TASK", "")
    if own.isdecimal() and "SLURM_STEP_ID" in environ and not outer:
        return max(1, min(cores, int(own))), ""
    if outer or world.local_size > 1:
        return max(1, cores // world.local_size), ""
    most = min(torch_threads, usable_cpus())
    return free_threads(most, usable_cpus(), _busy_cpus() if world.size == 1 and most > 1 else 0.0)
