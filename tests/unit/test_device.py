"""Device, precision, threads and compiler as pure functions of facts; the CPUs that a process may use."""

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from cifar_dist import cli
from cifar_dist.config import cpus
from cifar_dist.config.accelerate_config import AccelerateConfig, load_accelerate_config
from cifar_dist.config.cpus import choose_num_threads
from cifar_dist.config.errors import UserError
from cifar_dist.config.world import World
from cifar_dist.data import folder
from cifar_dist.runtime import device
from cifar_dist.runtime.device import SHARE_GPU, DeviceFacts, choose_compute, probe, resolve_precision
from cifar_dist.runtime.distributed import _set_environment, connect, start

CPU = DeviceFacts(type="cpu")
CPU_BF16 = DeviceFacts(type="cpu", cpu_has_fast_bf16=True)
MPS = DeviceFacts(type="mps", macos_version=15)
OLD_MPS = DeviceFacts(type="mps", macos_version=13)
AMPERE = DeviceFacts(type="cuda", cuda_capability=(8, 0))
VOLTA = DeviceFacts(type="cuda", cuda_capability=(7, 0))
PASCAL = DeviceFacts(type="cuda", cuda_capability=(6, 1))
ON_CPU = AccelerateConfig(use_cpu=True)


@pytest.mark.parametrize(("facts", "is_compiled"), [(CPU, True), (MPS, False)])
def test_a_model_is_compiled_or_a_note_gives_the_reason(monkeypatch, facts, is_compiled):
    monkeypatch.setattr(device, "probe", lambda **_: facts)
    compute = choose_compute(AccelerateConfig(path="x.yaml", dynamo_backend="INDUCTOR"), {}, World())
    assert compute.compiler == ("INDUCTOR" if is_compiled else None)
    assert ("compiled by" in compute.line) == compute.short.endswith(" · compiled") == is_compiled
    *_, note = compute.notes
    assert ("first step compiles" in note) == is_compiled != ("slower on MPS" in note), "a wait is announced"


def test_a_note_tells_which_number_of_processes_counts():
    four, world = AccelerateConfig(path="four.yaml", num_processes=4), World(size=2, local_size=2, launcher="torchrun")
    assert choose_compute(four, {}, world).notes[0].startswith("WORLD_SIZE says 2 processes")


@pytest.mark.parametrize(
    ("precision", "world", "micro_batches", "replays"),
    [
        ("bf16", World(), 1, True), ("no", World(), 1, True), ("fp16", World(), 1, False),
        ("no", World(size=2), 1, False), ("no", World(), 2, False),
    ],
)  # fmt: skip
def test_steps_are_replayed_where_they_can_be(monkeypatch, precision, world, micro_batches, replays):
    monkeypatch.setattr(device, "probe", lambda **_: AMPERE)
    for config in (AccelerateConfig(), AccelerateConfig(path="x.yaml", dynamo_backend="CUDAGRAPHS")):
        compute = choose_compute(config, {}, world, requested_precision=precision, micro_batches=micro_batches)
        is_noted = config.path is not None and not replays  # nobody else asked for it
        assert [note.startswith("CUDAGRAPHS needs CUDA, one process") for note in compute.notes] == [True] * is_noted
        assert (compute.replays, compute.compiler) == (replays, None)
        assert compute.line.endswith(", steps replayed as CUDA graphs") == compute.replays
        assert compute.short.endswith(" · replayed") == compute.replays


@pytest.mark.parametrize(
    ("backend", "doing", "facts", "expected"),
    [
        (None, "training", AMPERE, "CUDAGRAPHS"), (None, "measuring", AMPERE, "CUDAGRAPHS"),
        (None, "evaluating", AMPERE, None), ("CUDAGRAPHS", "training", AMPERE, "CUDAGRAPHS"),
        ("CUDAGRAPHS", "predicting", AMPERE, None), ("NO", "training", AMPERE, None),
        ("INDUCTOR", "training", AMPERE, "INDUCTOR"), (None, "training", CPU, None), (None, "training", MPS, None),
    ],
)  # fmt: skip
def test_steps_are_replayed_unless_a_config_compiles_or_says_no(monkeypatch, backend, doing, facts, expected):
    monkeypatch.setattr(device, "probe", lambda **_: facts)
    config = AccelerateConfig(path="x.yaml", dynamo_backend=backend)
    for environ in ({}, {"ACCELERATE_DYNAMO_BACKEND": "no"}):  # the latter is what accelerate launch sets
        compute = choose_compute(config, environ, World(), doing=doing)
        assert compute.backend == expected
        assert not any("not replayed" in note for note in compute.notes)
    outer = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}  # of an outer launcher that compiles
    assert choose_compute(load_accelerate_config(None, outer), outer, World(), doing=doing).backend == (
        None if facts is MPS else "INDUCTOR"
    )


@pytest.mark.parametrize(
    ("requested", "facts", "precision"),
    [
        ("auto", CPU, "no"), ("auto", CPU_BF16, "bf16"), ("no", CPU_BF16, "no"), ("bf16", CPU, "bf16"),
        ("fp16", CPU, "no"), ("fp16", CPU_BF16, "bf16"),
        ("auto", MPS, "no"), ("bf16", MPS, "bf16"), ("fp16", MPS, "fp16"), ("bf16", OLD_MPS, "no"),
        ("fp16", OLD_MPS, "fp16"), ("auto", AMPERE, "bf16"), ("fp16", AMPERE, "fp16"), ("no", AMPERE, "no"),
        ("auto", VOLTA, "fp16"), ("bf16", VOLTA, "fp16"), ("auto", PASCAL, "no"), ("bf16", PASCAL, "no"),
    ],
)  # fmt: skip
def test_a_requested_precision_becomes_what_the_device_supports(requested, facts, precision):
    chosen, reason = resolve_precision(requested, facts)
    assert chosen == precision
    assert (f"{requested} is not served" in reason) == (requested not in ("auto", precision))
    assert (reason == "") == (requested == chosen), "what was requested needs no reason"


@pytest.mark.parametrize(
    ("environ", "processes", "threads"),
    [
        ({}, 1, 6), ({}, 16, 1), ({}, 3, 2),
        ({"OMP_NUM_THREADS": "3"}, 1, 3), ({"OMP_NUM_THREADS": "1"}, 1, 1), ({"OMP_NUM_THREADS": "many"}, 1, 6),
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, 1, 8),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 2, 4),
        ({"OMP_NUM_THREADS": "2", "TORCHELASTIC_RUN_ID": "x"}, 2, 2),
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "bf16", "CIFAR_DIST_LAUNCHED": "1"}, 2, 1),
        ({"SLURM_CPUS_PER_TASK": "3", "SLURM_STEP_ID": "0"}, 2, 3),
        ({"SLURM_CPUS_PER_TASK": "99", "SLURM_STEP_ID": "0"}, 1, 8),
        ({"SLURM_CPUS_PER_TASK": "3"}, 2, 4),  # of the job, and this is no task of it
    ],
)  # fmt: skip
def test_threads_are_the_users_or_a_share_of_the_cores(monkeypatch, environ, processes, threads):
    monkeypatch.setattr(cpus, "usable_cores", lambda: 8)
    monkeypatch.setattr(cpus, "usable_cpus", lambda: 16)
    monkeypatch.setattr(cpus, "_busy_cpus", lambda: 14.6 if threads == 6 else pytest.fail("nobody needs the load"))
    world = World(size=processes, local_size=processes)
    assert choose_num_threads(environ, world, torch_threads=6) == (
        (1, "15 of 16 CPUs are busy") if threads == 6 else (threads, "")
    )
    monkeypatch.setattr(cpus, "_busy_cpus", lambda: 0.4)
    assert choose_num_threads(environ, world, torch_threads=6) == (threads, "")
    other_machine = World(size=2)
    monkeypatch.setattr(cpus, "_busy_cpus", lambda: pytest.fail("several processes, as many threads as ever"))
    assert choose_num_threads({}, other_machine, torch_threads=6) == (6, "")


@pytest.mark.parametrize(
    ("most", "count", "busy", "threads", "reason"),
    [
        (2, 2, 0.4, 2, ""), (2, 2, 0.6, 1, "1 of 2 CPUs is busy"), (2, 2, 1.9, 1, "2 of 2 CPUs are busy"),
        (2, 2, 7.3, 1, "2 of 2 CPUs are busy"), (8, 8, 2.7, 5, "3 of 8 CPUs are busy"), (1, 1, 1.0, 1, ""),
        (4, 8, 4.4, 4, ""), (4, 8, 4.6, 3, "5 of 8 CPUs are busy"),  # two threads of the processor a core
    ],
)  # fmt: skip
def test_there_are_as_many_threads_as_free_cpus(most, count, busy, threads, reason):
    assert cpus.free_threads(most, count, busy) == (threads, reason)


@pytest.fixture
def machine(monkeypatch):
    """A machine of four CPUs of which this process may use the last two. `spend` moves its faked counters."""
    clock, counters, own = [100.0], [[50.0, 900.0] for _ in range(4)], [20.0]
    slept: list[float] = []

    def spend(seconds: float, *, by_us: float, by_others: float) -> None:
        """Pass time in which programs use this many of our CPUs, and others all of the first two."""
        clock[0] += seconds
        own[0] += by_us * seconds
        for number, (share, _) in enumerate(counters):
            used = 1.0 if number < 2 else (by_us + by_others) / 2
            counters[number] = [share + used * seconds, counters[number][1] + (1 - used) * seconds]

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        spend(seconds, by_us=0, by_others=1)

    def read(percpu: bool) -> list[SimpleNamespace]:
        return [SimpleNamespace(user=busy / 2, steal=busy / 2, idle=idle, guest=busy) for busy, idle in counters]

    monkeypatch.setattr(cpus, "_sample_begun", None)
    monkeypatch.setattr(cpus, "cpu_quota", lambda: float("inf"))
    monkeypatch.setattr(cpus.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(cpus.time, "sleep", sleep)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3}, raising=False)
    monkeypatch.setattr(os, "times", lambda: (own[0] / 2, 0.0, own[0] / 4, own[0] / 4, 7.0))
    monkeypatch.setattr("psutil.cpu_times", read)
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    return SimpleNamespace(spend=spend, slept=slept)


@pytest.mark.parametrize(("by_others", "threads"), [(0.0, 2), (0.4, 2), (0.7, 1), (1.2, 1)])
def test_threads_leave_out_the_cpus_of_others_since_the_start(machine, by_others, threads):
    cli._prepare_for_torch()
    machine.spend(3, by_us=0.8, by_others=by_others)
    compute = choose_compute(ON_CPU, {}, World())
    assert machine.slept == [], "the sample is free"
    assert compute.num_threads == threads
    assert ("1 thread (1 of 2 CPUs is busy)" in compute.line) == (threads == 1)
    assert compute.short.endswith(f"{threads} thread{'s' if threads > 1 else ''}")


@pytest.mark.parametrize("is_begun", [False, True])
def test_a_short_sample_is_taken_anew(machine, is_begun):
    if is_begun:
        cpus.begin_load_sample()
        machine.spend(0.2, by_us=1, by_others=0)
    assert choose_num_threads({}, World(), torch_threads=2) == (1, "1 of 2 CPUs is busy")
    assert machine.slept == [0.3]


def test_an_unknown_load_changes_nothing(machine, monkeypatch):
    cpus.begin_load_sample()
    machine.spend(3, by_us=0, by_others=2)
    assert choose_num_threads({}, World(), torch_threads=2)[0] == 1
    assert choose_compute(ON_CPU, {}, World(), num_threads=2).num_threads == 2, "a resumed run's"
    monkeypatch.setattr(cpus, "cpu_quota", lambda: 2.0)
    assert choose_num_threads({}, World(), torch_threads=2) == (2, "")
    monkeypatch.setattr(cpus, "cpu_quota", lambda: float("inf"))
    for failure in ("psutil.cpu_times", lambda percpu: []), ("psutil.cpu_times", Mock(side_effect=OSError)):
        monkeypatch.setattr(*failure)
        cpus.begin_load_sample()
        assert choose_num_threads({}, World(), torch_threads=2) == (2, "")


V1 = "4:cpu,cpuacct:/docker/3f\n3:cpuset:/\n1:name=systemd:/docker/3f\n"
QUOTAS = {
    "own": ("0::/jobs/mine\n", {"jobs/mine/cpu.max": "200000 100000\n"}, 2),
    "of the group above": (
        "0::/jobs/mine\n", {"jobs/mine/cpu.max": "max 100000\n", "jobs/cpu.max": "150000 100000\n"}, 1.5
    ),
    "in a container": ("0::/../../jobs\n", {"cpu.max": "50000 100000\n"}, 0.5),
    "none": ("0::/jobs/mine\n", {"jobs/mine/cpu.max": "max 100000\n"}, float("inf")),
    "v1": (V1, {"cpu/docker/3f/cpu.cfs_quota_us": "400000\n", "cpu/docker/3f/cpu.cfs_period_us": "100000\n"}, 4),
    "v1, none": (V1, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, float("inf")),
    "no groups": (None, {}, float("inf")),
}  # fmt: skip


@pytest.fixture
def control_groups(tmp_path, monkeypatch):
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
def test_the_cpu_quota(control_groups, own, files, quota):
    control_groups(own, files)
    assert cpus.cpu_quota() == quota


@pytest.mark.parametrize(("quota", "count"), [(50_000, 1), (150_000, 1), (250_000, 2), (900_000, 4)])
def test_threads_and_workers_respect_the_quota(control_groups, monkeypatch, quota, count):
    control_groups("0::/jobs/mine\n", {"jobs/mine/cpu.max": f"{quota} 100000\n"})
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    compute = choose_compute(ON_CPU, os.environ, World())
    assert (cpus.usable_cores(), compute.num_threads) == (count, count)
    pools: list[int] = []
    monkeypatch.setattr(folder, "ThreadPoolExecutor", lambda workers: pools.append(workers) or ThreadPoolExecutor(1))
    folder.decode_images([], 8)
    assert pools == [count]


@pytest.mark.parametrize(
    ("has", "is_intel", "is_fast"),
    [
        ((), False, False), (("avx512_bf16",), False, True), (("avx512_bf16",), True, False),
        (("amx_bf16", "avx512_bf16"), True, True), (("bf16",), False, True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("asks", ["get_capabilities", "older torch"])
def test_bf16_is_fast_where_the_processor_gains_by_it(has, is_intel, is_fast, asks, monkeypatch):
    if asks == "older torch":  # 2.11 cannot tell of ARM's
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: "amx_bf16" in has)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: "avx512_bf16" in has)
        is_fast = is_fast and has != ("bf16",)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True} | dict.fromkeys(has, True))
    monkeypatch.setattr(device, "_is_intel", lambda: is_intel)
    assert probe(use_cpu=True).cpu_has_fast_bf16 == is_fast


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(device, "_cpu_has_fast_bf16", lambda: False)
    with connect(World(), AccelerateConfig()) as ranks:
        runtime = start(ranks, AccelerateConfig(), requested_precision="fp16")
        assert (runtime.device.type, runtime.precision) == ("cpu", "no")
        assert runtime.compute.line.startswith("cpu (no MPS or CUDA device here), float32")
        (note,) = runtime.compute.notes
        assert note.startswith("fp16 is not served by this cpu") and note.endswith("using float32")


def test_two_runs_with_other_precisions_and_threads_follow_each_other_in_one_process():
    before = torch.get_num_threads()
    for precision, num_threads in (("no", 1), ("bf16", 2), ("no", 1)):
        with connect(World(), ON_CPU) as ranks:
            runtime = start(ranks, ON_CPU, requested_precision=precision, num_threads=num_threads)
            assert runtime.accelerator.mixed_precision == precision
            assert runtime.num_threads == torch.get_num_threads() == num_threads
            assert runtime.compute.notes == ()
        assert torch.get_num_threads() == before


def test_gpus_are_described(monkeypatch):
    gpu = SimpleNamespace(name="NVIDIA X", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: gpu)
    lines = device.describe_devices()
    assert lines["GPU 1"] == "NVIDIA X, compute capability 9.0, 80 GiB" and "CUDA" not in lines


@pytest.mark.parametrize(
    ("world", "visible", "refused"),
    [
        (World(size=2, local_size=2, launcher="torchrun"), 2, False),
        (World(size=2, local_size=2, launcher="torchrun"), 1, True),
        (World(size=2, local_size=1, launcher="torchrun"), 1, False),  # two machines
        (World(size=2, local_size=2, launcher="slurm"), 1, False),  # --gpus-per-task=1
        (World(size=4, local_size=4, launcher="slurm"), 2, True),
        (World(), 1, False),
    ],
)
def test_too_few_gpus_are_refused(monkeypatch, world, visible, refused):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    with pytest.raises(UserError, match="start as many as there are GPUs") if refused else nullcontext():
        device.check_world(world, "cuda", {})
    device.check_world(world, "cuda", {SHARE_GPU: "1"})
    with pytest.raises(UserError, match="cannot share a Mac's MPS device") if world.size > 1 else nullcontext():
        device.check_world(world, "mps", {})


@pytest.mark.parametrize(("visible", "number"), [(4, "3"), (1, "0")])
def test_the_gpu_of_a_slurm_task(monkeypatch, visible, number):
    """With --gpus-per-task=1 a task sees one, whatever its number on the machine is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr("cifar_dist.config.cpus.usable_cores", lambda: 16)
    monkeypatch.setattr(os, "environ", {"SLURM_STEP_ID": "0", "SLURM_CPUS_PER_TASK": "8"})
    world = World(rank=7, size=8, local_rank=3, local_size=4, launcher="slurm", main_address="gpu07", main_port=12_071)
    _set_environment(world, cpu=False)
    told = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    assert told == {"RANK": "7", "WORLD_SIZE": "8", "LOCAL_RANK": number, "LOCAL_WORLD_SIZE": "4"}
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("gpu07", "12071")
    # What is chosen afterwards reads them there: a 1 would be taken for the user's.
    assert os.environ["OMP_NUM_THREADS"] == "8"
    assert choose_num_threads(os.environ, world, torch_threads=3) == (8, "")


def test_ranks_that_would_each_be_alone_are_refused(monkeypatch):
    """As Accelerate does it where there is no GPU and no CPU was requested."""
    monkeypatch.setattr("cifar_dist.runtime.distributed.PartialState", lambda **_: SimpleNamespace(num_processes=1))
    monkeypatch.setattr("cifar_dist.runtime.distributed.rendezvous", lambda *_: None)
    world = World(rank=1, size=2, local_rank=1, local_size=2, launcher="torchrun")
    with pytest.raises(UserError, match="each would train alone"), connect(world, ON_CPU):
        pass


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library has no mallopt")
def test_the_memory_of_freed_tensors_is_kept_on_a_cpu():
    """After a few large tensors, the next ones need no new page; a world begins in a process of its own."""
    program = """
import resource, torch
from cifar_dist.config.accelerate_config import AccelerateConfig
from cifar_dist.config.world import World
from cifar_dist.runtime.distributed import connect, start

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 25)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

config = AccelerateConfig(use_cpu=True)
with connect(World(), config) as ranks:
    start(ranks, config)
    print(*[new_pages() for _ in range(16)])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    first, *later = map(int, done.stdout.split())  # 128 MiB: 32,768 pages, or 64 huge ones
    # A freed block is too small for the next tensor where a small object took its edge: three or four blocks suffice.
    assert first > 50 and max(later[-8:]) < first / 10
