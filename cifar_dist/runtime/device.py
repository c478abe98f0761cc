"""Which device, how precise, how many threads: decided by pure functions from facts that are probed once."""

import os
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from cifar_dist.config.accelerate_config import (
    AccelerateConfig,
    cpu_requested,
    process_count_note,
    requested_compiler,
    requested_precision,
)
from cifar_dist.config.cpus import usable_cpus
from cifar_dist.config.errors import UserError
from cifar_dist.config.world import World
from cifar_dist.runtime.precision import FULL_NAMES, DeviceFacts, DeviceType, Precision, resolve_precision
from cifar_dist.runtime.threads import choose_num_threads, usable_cores

SHARE_GPU = "CIFAR_DIST_SHARE_GPU"
"""Set to 1, this environment variable lets several ranks share a GPU, over gloo: how DDP is tested with one GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeSettings:
    """What a process would compute with: known before anything is started."""

    device_type: DeviceType
    precision: Precision
    precision_reason: str
    num_threads: int
    compiler: str | None
    """torch.compile's backend; None: the model is not compiled."""
    replays: bool
    """Whether whole training steps are recorded as CUDA graphs and replayed; never with a compiler."""
    notes: tuple[str, ...]
    """Lines that a person should read: what was asked for and cannot be had."""

    @property
    def line(self) -> str:
        """Device, precision and threads in words."""
        how = f", compiled by {self.compiler.lower()}" if self.compiler else ""
        how = ", steps replayed as CUDA graphs" if self.replays else how
        reason = f" ({self.precision_reason})" if self.precision_reason else ""
        return f"{self.device_type}, {FULL_NAMES[self.precision]}{reason}, {self._threads}{how}"

    @property
    def short(self) -> str:
        """The same without reasons."""
        how = " · replayed" if self.replays else " · compiled" if self.compiler else ""
        return f"{self.device_type} · {FULL_NAMES[self.precision]} · {self._threads}{how}"

    @property
    def backend(self) -> str | None:
        """The compiler, or CUDAGRAPHS where steps are replayed: what `bench` calls the compiler."""
        return "CUDAGRAPHS" if self.replays else self.compiler

    @property
    def _threads(self) -> str:
        return f"{self.num_threads} thread{'s' if self.num_threads > 1 else ''}"


def choose_compute(
    config: AccelerateConfig,
    environ: Mapping[str, str],
    world: World,
    *,
    typed_precision: str | None = None,
    num_threads: int | None = None,
    doing: str = "training",
    micro_batches: int = 1,
) -> ComputeSettings:
    """Choose device, precision and threads; the notes say of the number of processes, too, which one counts.

    `num_threads` is that of a run which goes on, `doing` a word for notes; a step has so many `micro_batches`.
    """
    asked_cpu = cpu_requested(config, environ)
    facts, other_count = probe(use_cpu=asked_cpu), process_count_note(world, config)
    notes = [*config.notes, *([] if other_count is None else [other_count])]
    if facts.type == "cpu" and not asked_cpu:
        notes.append("no MPS or CUDA device here: the CPU computes")
    wish = requested_precision(typed_precision, config, environ)
    precision, reason = resolve_precision(wish, facts)
    if wish not in ("auto", precision):
        notes.append(f"{reason}: using {FULL_NAMES[precision]}")
    if wish == "auto" and precision != "no" and environ.get("ACCELERATE_MIXED_PRECISION") == "no":
        notes.append(
            f"accelerate launch has mixed_precision no, its default: using {FULL_NAMES[precision]};"
            " --precision no for float32"
        )
    wished = requested_compiler(config, environ)
    compiler = None if wished == "CUDAGRAPHS" else wished
    if compiler and (obstacle := _cannot_compile(facts.type, compiler)):
        compiler = None
        notes.append(f"{obstacle}: not compiled")
    elif compiler and doing == "training":
        notes.append("the first step compiles the model, which takes half a minute or more")
    has_steps = doing in ("training", "measuring")
    obstacle = _cannot_replay(facts.type, precision, world, micro_batches)
    if wished == "CUDAGRAPHS" and obstacle and has_steps:
        notes.append(f"{obstacle}: steps are not replayed")
    return ComputeSettings(
        device_type=facts.type,
        precision=precision,
        precision_reason=reason,
        num_threads=num_threads
        or choose_num_threads(
            environ,
            cores=usable_cores(),
            local_processes=world.local_size,
            default=min(torch.get_num_threads(), usable_cpus()),
        ),
        compiler=compiler,
        replays=has_steps and obstacle is None and wished in (None, "CUDAGRAPHS") and config.dynamo_backend != "NO",
        notes=tuple(notes),
    )


def _cannot_compile(device_type: str, compiler: str) -> str | None:
    """Say why a model cannot be compiled here."""
    if device_type == "mps":
        return "compiled training is slower on MPS (pytorch#192551)"
    names = [os.environ.get("CXX", "g++"), "g++", "clang++", "cl"]
    if compiler == "INDUCTOR" and not any(map(shutil.which, names)):
        return "INDUCTOR needs a C++ compiler (g++), and there is none"
    return None


def _cannot_replay(device_type: str, precision: str, world: World, micro_batches: int) -> str | None:
    """Say why steps cannot be replayed as CUDA graphs here."""
    if device_type != "cuda":
        return "CUDAGRAPHS needs a CUDA device"
    if world.size > 1:
        return f"CUDAGRAPHS replays the steps of one process, and there are {world.size}"
    if micro_batches > 1:
        return f"CUDAGRAPHS replays steps of one micro-batch, and they have {micro_batches}"
    return "CUDAGRAPHS cannot replay fp16's scaler, which asks the device" if precision == "fp16" else None


def probe(*, use_cpu: bool) -> DeviceFacts:
    """Look at this machine: the best accelerator there is, or the CPU where that is asked for."""
    if not use_cpu and torch.cuda.is_available():
        return DeviceFacts(type="cuda", cuda_capability=torch.cuda.get_device_capability())
    if not use_cpu and torch.backends.mps.is_available():
        macos = int(platform.mac_ver()[0].split(".")[0] or 0)
        return DeviceFacts(type="mps", macos_version=macos)
    return DeviceFacts(type="cpu", cpu_has_fast_bf16=_cpu_has_fast_bf16())


def _cpu_has_fast_bf16() -> bool:
    """Ask torch (`get_capabilities` from 2.12 on) for AMX, ARM's BF16, or AVX512-BF16 on a processor not of Intel's.

    On an Intel Xeon with AVX512-BF16 and without AMX bf16 has 0.67 to 0.8 of float32's speed (docs/benchmarks.md).
    """
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities:
        matrix, vector = capabilities.get("amx_bf16") or capabilities.get("bf16"), capabilities.get("avx512_bf16")
    else:
        matrix, vector = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
    return bool(matrix or (vector and not _is_intel()))


def _is_intel() -> bool:
    facts = Path("/proc/cpuinfo")
    return "GenuineIntel" in (facts.read_text() if facts.exists() else platform.processor())


def check_world(world: World, device_type: str, environ: Mapping[str, str]) -> None:
    """Raise UserError where these processes cannot work together on these devices."""
    if world.size == 1:
        return
    if device_type == "mps":
        raise UserError(f"{world.size} processes cannot share a Mac's MPS device: start one, or set use_cpu: true")
    if device_type == "cuda" and not environ.get(SHARE_GPU):
        visible = torch.cuda.device_count()
        own_by_slurm = world.launcher == "slurm" and visible == 1  # --gpus-per-task=1: each sees its own
        if visible < world.local_size and not own_by_slurm:
            raise UserError(
                f"{world.local_size} processes on a machine with {visible} GPU: start as many as there are GPUs,"
                " or set use_cpu: true"
            )


def describe_devices() -> dict[str, str]:
    """Say in words what there is to compute on: names and values."""
    lines = {"CPU": "has fast bf16 arithmetic" if _cpu_has_fast_bf16() else "has no fast bf16 arithmetic"}
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    lines |= {
        f"GPU {number}": f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
        for number, gpu in enumerate(gpus)
    }
    if not gpus:
        lines["CUDA"] = "no GPU is visible" + ("" if torch.version.cuda else "; this torch is built without CUDA")
    if torch.backends.mps.is_available():
        lines["MPS"] = f"available, macOS {platform.mac_ver()[0]}"
    elif sys.platform == "darwin":
        lines["MPS"] = "not available" + ("" if torch.backends.mps.is_built() else ": this torch is built without it")
    return lines


def memory_format(device_type: str) -> torch.memory_format:
    """Give channels_last for CPU and CUDA, where it is faster, and contiguous for MPS.

    On MPS the backward of BatchNorm in channels_last is wrong or crashes (pytorch#175189).
    """
    return torch.contiguous_format if device_type == "mps" else torch.channels_last


def peak_process_memory_mib() -> int | None:
    """Give the largest memory this process has had; None on Windows, where Python does not say."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2**20 if sys.platform == "darwin" else 2**10)
