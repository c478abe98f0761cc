"""How many CPUs this process may use."""

import math
import os
from contextlib import suppress
from pathlib import Path

_OWN_GROUPS, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def usable_cpus() -> int:
    """Return the number of logical CPUs that affinity and the quotas of control groups allow, at least 1."""
    affinity = getattr(os, "sched_getaffinity", None)
    allowed = len(affinity(0)) if affinity else (os.cpu_count() or 1)
    return max(1, int(min(allowed, cpu_quota())))


def cpu_quota() -> float:
    """Return how many CPUs' time the control groups allow (cgroup v1 and v2), as of a container; infinity: no limit."""
    quota = math.inf
    for line in _OWN_GROUPS.read_text().splitlines() if _OWN_GROUPS.exists() else ():
        _, controllers, path = line.split(":", 2)  # "0::/user.slice" of v2, "4:cpu,cpuacct:/docker/3f" of v1
        if controllers and "cpu" not in controllers.split(","):
            continue
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
        own = _GROUPS / ("cpu" if controllers else "") / path.lstrip("/")
        for group in (own, *own.parents):  # a container sees its group at the top, and may know its path outside
            with suppress(OSError, ValueError):  # there is no such file, or "max 100000" in it
                limit, period = map(int, " ".join((group / name).read_text() for name in names).split())
                quota = min(quota, limit / period if limit > 0 else math.inf)
    return quota
