"""The CPUs that a process may use: affinity, and the quotas of its control groups."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from cifar_dist.config import cpus
from cifar_dist.config.accelerate_config import AccelerateConfig
from cifar_dist.config.world import World
from cifar_dist.data import folder
from cifar_dist.runtime import device, threads
from tests.conftest import ROOT

V2, V1 = "0::/jobs/mine\n", "4:cpu,cpuacct:/docker/3f\n3:cpuset:/\n1:name=systemd:/docker/3f\n"


def limit_v1(quota: int) -> dict[str, str]:
    return {"cpu.cfs_quota_us": f"{quota}\n", "cpu.cfs_period_us": "100000\n"}


QUOTAS = {
    "v2": (V2, {"jobs/mine/cpu.max": "200000 100000\n"}, 2),
    "v2, of the group above": (V2, {"jobs/mine/cpu.max": "max 100000\n", "jobs/cpu.max": "150000 100000\n"}, 1.5),
    "v2, in a container": ("0::/../../jobs\n", {"cpu.max": "50000 100000\n"}, 0.5),
    "v2, none": (V2, {"jobs/mine/cpu.max": "max 100000\n"}, float("inf")),
    "v1": (V1, {f"cpu/docker/3f/{name}": text for name, text in limit_v1(400_000).items()}, 4),
    "v1, in a container": (V1, {f"cpu/{name}": text for name, text in limit_v1(300_000).items()}, 3),
    "v1, none": (V1, {f"cpu/{name}": text for name, text in limit_v1(-1).items()}, float("inf")),
    "no groups": (None, {}, float("inf")),
}


@pytest.fixture
def groups(tmp_path, monkeypatch):
    def make(own: str | None, files: dict[str, str]) -> None:
        for name, text in files.items():
            (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "groups" / name).write_text(text)
        if own is not None:
            (tmp_path / "own").write_text(own)

    monkeypatch.setattr(cpus, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(cpus, "_GROUPS", tmp_path / "groups")
    return make


@pytest.mark.parametrize(("own", "files", "quota"), QUOTAS.values(), ids=QUOTAS.keys())
def test_the_quota(groups, own, files, quota):
    groups(own, files)
    assert cpus.cpu_quota() == quota


@pytest.mark.parametrize(("quota", "count"), [(50_000, 1), (150_000, 1), (250_000, 2), (900_000, 4)])
def test_threads_and_workers_keep_to_it(groups, monkeypatch, quota, count):
    groups(V2, {"jobs/mine/cpu.max": f"{quota} 100000\n"})
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 8)
    monkeypatch.setattr(device.torch, "get_num_threads", lambda: 4)
    compute = device.choose_compute(AccelerateConfig(use_cpu=True), os.environ, World())
    assert (threads.usable_cores(), compute.num_threads) == (count, count)
    pools: list[int] = []
    monkeypatch.setattr(folder, "ThreadPoolExecutor", lambda workers: pools.append(workers) or ThreadPoolExecutor(1))
    folder.decode_images([], 8)
    assert pools == [count]


@pytest.mark.parametrize("script", ["train.sh", "array.sh", "eval.sh"])
def test_a_job_asks_for_nothing_that_a_node_may_lack(script):
    lines = (ROOT / "slurm" / script).read_text().splitlines()
    asked = {line.split()[1].partition("=")[0] for line in lines if line.startswith("#SBATCH")}
    assert asked <= {"--job-name", "--output", "--open-mode", "--time", "--array", "--requeue", "--signal"}
