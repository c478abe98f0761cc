"""Precision, threads and memory format as pure functions of facts."""

import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from cifar_dist.config.accelerate_config import AccelerateConfig
from cifar_dist.config.errors import UserError
from cifar_dist.config.world import World
from cifar_dist.runtime.device import (
    SHARE_GPU,
    DeviceFacts,
    check_world,
    choose_compute,
    describe_devices,
    memory_format,
    probe,
    resolve_precision,
)
from cifar_dist.runtime.distributed import _tell_accelerate, connect, start
from cifar_dist.runtime.threads import choose_num_threads

CPU = DeviceFacts(type="cpu")
CPU_BF16 = DeviceFacts(type="cpu", cpu_has_fast_bf16=True)
MPS = DeviceFacts(type="mps", macos_version=15)
OLD_MPS = DeviceFacts(type="mps", macos_version=13)
AMPERE = DeviceFacts(type="cuda", cuda_capability=(8, 0))
VOLTA = DeviceFacts(type="cuda", cuda_capability=(7, 0))
PASCAL = DeviceFacts(type="cuda", cuda_capability=(6, 1))


@pytest.mark.parametrize(
    ("device", "backend", "found", "reason"),
    [
        ("cpu", "INDUCTOR", True, None),
        ("cpu", "INDUCTOR", False, "INDUCTOR needs a C++ compiler"),
        ("cpu", "EAGER", False, None),
        ("mps", "INDUCTOR", True, "compiled training is slower on MPS"),
    ],
)
def test_what_cannot_be_compiled_is_not_and_is_said(monkeypatch, device, backend, found, reason):
    monkeypatch.setattr("cifar_dist.runtime.device.probe", lambda **_: {"cpu": CPU, "mps": MPS}[device])
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/c++" if found else None)
    compute = choose_compute(AccelerateConfig(path="x.yaml", dynamo_backend=backend), {}, World())
    assert compute.compiler == (backend if reason is None else None)
    assert ("compiled by" in compute.line) == (reason is None)
    threads = f"{compute.num_threads} thread{'s' if compute.num_threads > 1 else ''}"
    assert compute.short == f"{device} · float32 · {threads}" + ("" if reason else " · compiled")
    assert any((reason or "?") in note and note.endswith(": not compiled") for note in compute.notes) == bool(reason)
    assert any("first step compiles" in note for note in compute.notes) == (reason is None), "a wait is announced"


def test_which_number_of_processes_counts_is_said():
    four, world = AccelerateConfig(path="four.yaml", num_processes=4), World(size=2, local_size=2, launcher="torchrun")
    assert choose_compute(four, {}, world).notes[0].startswith("WORLD_SIZE says that there are 2 processes")


@pytest.mark.parametrize(
    ("precision", "world", "micro_batches", "obstacle"),
    [
        ("bf16", World(), 1, None),
        ("no", World(), 1, None),
        ("fp16", World(), 1, "CUDAGRAPHS cannot replay fp16's scaler, which asks the device"),
        ("no", World(size=2), 1, "CUDAGRAPHS replays the steps of one process, and there are 2"),
        ("no", World(), 2, "CUDAGRAPHS replays steps of one micro-batch, and they have 2"),
    ],
)
def test_steps_are_replayed_where_they_can_be(monkeypatch, precision, world, micro_batches, obstacle):
    monkeypatch.setattr("cifar_dist.runtime.device.probe", lambda **_: AMPERE)
    for config in (AccelerateConfig(), AccelerateConfig(path="x.yaml", dynamo_backend="CUDAGRAPHS")):
        compute = choose_compute(config, {}, world, typed_precision=precision, micro_batches=micro_batches)
        said = config.path is not None and obstacle is not None  # nobody else asked for it
        assert compute.notes == ((f"{obstacle}: steps are not replayed",) if said else ())
        assert compute.replays == (obstacle is None)
        assert compute.compiler is None
        assert compute.line.endswith(", steps replayed as CUDA graphs") == compute.replays
        assert compute.short.endswith(" · replayed") == compute.replays


@pytest.mark.parametrize(
    ("backend", "doing", "device", "backends"),
    [
        (None, "training", AMPERE, "CUDAGRAPHS"), (None, "measuring", AMPERE, "CUDAGRAPHS"),
        (None, "evaluating", AMPERE, None), ("CUDAGRAPHS", "training", AMPERE, "CUDAGRAPHS"),
        ("CUDAGRAPHS", "predicting", AMPERE, None), ("NO", "training", AMPERE, None),
        ("INDUCTOR", "training", AMPERE, "INDUCTOR"), (None, "training", CPU, None),
        ("INDUCTOR", "training", CPU, "INDUCTOR"), (None, "training", MPS, None),
    ],
)  # fmt: skip
def test_steps_are_replayed_by_default_but_where_a_config_compiles_or_says_no(
    monkeypatch, backend, doing, device, backends
):
    monkeypatch.setattr("cifar_dist.runtime.device.probe", lambda **_: device)
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/c++")
    config = AccelerateConfig(path="x.yaml", dynamo_backend=backend)
    for environ in ({}, {"ACCELERATE_DYNAMO_BACKEND": "no"}):  # the latter is what accelerate launch sets
        compute = choose_compute(config, environ, World(), doing=doing)
        assert compute.backend == backends
        assert not any("not replayed" in note for note in compute.notes)
    outer = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}  # of an outer launcher that compiles
    assert choose_compute(AccelerateConfig(), outer, World(), doing=doing).backend == (
        None if device is MPS else "INDUCTOR"
    )


ON_CPU = AccelerateConfig(use_cpu=True)


@pytest.mark.parametrize(
    ("wish", "facts", "precision", "differs"),
    [
        ("auto", CPU, "no", False), ("auto", CPU_BF16, "bf16", False), ("no", CPU_BF16, "no", False),
        ("bf16", CPU, "bf16", False), ("fp16", CPU, "no", True), ("fp16", CPU_BF16, "bf16", True),
        ("auto", MPS, "no", False), ("bf16", MPS, "bf16", False), ("fp16", MPS, "fp16", False),
        ("bf16", OLD_MPS, "no", True), ("fp16", OLD_MPS, "fp16", False),
        ("auto", AMPERE, "bf16", False), ("bf16", AMPERE, "bf16", False), ("fp16", AMPERE, "fp16", False),
        ("no", AMPERE, "no", False),
        ("auto", VOLTA, "fp16", False), ("bf16", VOLTA, "fp16", True), ("auto", PASCAL, "no", False),
        ("bf16", PASCAL, "no", True),
    ],
)  # fmt: skip
def test_a_wish_becomes_what_the_device_can_serve(wish, facts, precision, differs):
    chosen, reason = resolve_precision(wish, facts)
    assert chosen == precision
    assert (f"{wish} is not served" in reason) == differs
    assert (reason == "") == (wish == chosen), "what was asked for needs no reason"


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
def test_threads_are_the_users_or_a_share_of_the_cores(environ, processes, threads):
    assert choose_num_threads(environ, cores=8, local_processes=processes, default=6) == threads


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
    monkeypatch.setattr("cifar_dist.runtime.device._is_intel", lambda: is_intel)
    assert probe(use_cpu=True).cpu_has_fast_bf16 == is_fast


def test_memory_formats():
    formats = {kind: memory_format(kind) for kind in ("mps", "cpu", "cuda")}
    last = torch.channels_last
    assert formats == {"mps": torch.contiguous_format, "cpu": last, "cuda": last}


def test_an_accelerator_that_is_missing_is_named_and_a_wish_that_fails_is_explained(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr("cifar_dist.runtime.device._cpu_has_fast_bf16", lambda: False)
    with connect(World(), AccelerateConfig()) as ranks:
        runtime = start(ranks, AccelerateConfig(), typed_precision="fp16")
        assert runtime.device.type == "cpu"
        assert runtime.precision == "no"
        first, second = runtime.compute.notes
        assert first == "no MPS or CUDA device here: the CPU computes"
        assert second.startswith("fp16 is not served by this cpu")
        assert second.endswith("using float32")


def test_two_runs_with_other_precisions_and_threads_follow_each_other_in_one_process():
    before = torch.get_num_threads()
    for precision, num_threads in (("no", 1), ("bf16", 2), ("no", 1)):
        with connect(World(), ON_CPU) as ranks:
            runtime = start(ranks, ON_CPU, typed_precision=precision, num_threads=num_threads)
            assert runtime.accelerator.mixed_precision == precision
            assert runtime.num_threads == torch.get_num_threads() == num_threads
            assert runtime.compute.notes == ()
        assert torch.get_num_threads() == before


def test_devices_are_described_in_words(monkeypatch):
    monkeypatch.setattr("cifar_dist.runtime.device._cpu_has_fast_bf16", lambda: True)
    gpu = SimpleNamespace(name="NVIDIA X", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: gpu)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    lines = describe_devices()
    assert lines["CPU"] == "has fast bf16 arithmetic"
    assert lines["GPU 1"] == "NVIDIA X, compute capability 9.0, 80 GiB"
    assert "CUDA" not in lines
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert describe_devices()["CUDA"].startswith("no GPU is visible")


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
        check_world(world, "cuda", {})
    check_world(world, "cuda", {SHARE_GPU: "1"})


@pytest.mark.parametrize(("visible", "device"), [(4, "3"), (1, "0")])
def test_which_gpu_a_task_takes(monkeypatch, visible, device):
    """With --gpus-per-task=1 a task sees one, whatever its number on the machine is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    world = World(rank=7, size=8, local_rank=3, local_size=4, launcher="slurm", main_address="gpu07", main_port=12_071)
    _tell_accelerate(world, cpu=False)
    told = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    assert told == {"RANK": "7", "WORLD_SIZE": "8", "LOCAL_RANK": device, "LOCAL_WORLD_SIZE": "4"}
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("gpu07", "12071")


def test_accelerate_is_told_the_threads_that_slurm_gave(monkeypatch):
    """What is chosen afterwards reads them there: a 1 would be taken for the user's word."""
    monkeypatch.setattr("cifar_dist.runtime.distributed.usable_cores", lambda: 16)
    monkeypatch.setattr(os, "environ", {"SLURM_STEP_ID": "0", "SLURM_CPUS_PER_TASK": "8"})
    _tell_accelerate(World(rank=1, size=2, local_rank=1, local_size=2, launcher="slurm"), cpu=True)
    assert os.environ["OMP_NUM_THREADS"] == "8"
    assert choose_num_threads(os.environ, cores=16, local_processes=2, default=3) == 8


def test_ranks_that_would_each_be_alone_are_refused(monkeypatch):
    """As Accelerate does it where there is no GPU and nobody said so."""
    monkeypatch.setattr("cifar_dist.runtime.distributed.PartialState", lambda **_: SimpleNamespace(num_processes=1))
    monkeypatch.setattr("cifar_dist.runtime.distributed.rendezvous", lambda *_: None)
    world = World(rank=1, size=2, local_rank=1, local_size=2, launcher="torchrun")
    with pytest.raises(UserError, match="each would train alone"), connect(world, ON_CPU):
        pass
