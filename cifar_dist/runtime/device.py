"""Device, precision and threads: pure functions of what was requested and of facts that are probed once."""

import ctypes
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from cifar_dist.config.accelerate_config import (
    AccelerateConfig,
    cpu_requested,
    precision_requested,
    process_count_note,
)
from cifar_dist.config.cpus import choose_num_threads
from cifar_dist.config.errors import UserError
from cifar_dist.config.options import FULL_NAMES
from cifar_dist.config.world import World

DeviceType = Literal["cpu", "mps", "cuda"]
Precision = Literal["no", "fp16", "bf16"]

SHARE_GPU = "CIFAR_DIST_SHARE_GPU"
"""Set to 1, this environment variable lets several ranks share a GPU, over gloo, to test DDP with one GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceFacts:
    """The properties of a device that decide its precision."""

    type: DeviceType
    cpu_has_fast_bf16: bool = False
    """Whether the processor is faster in bfloat16 than in float32."""
    cuda_capability: tuple[int, int] = (0, 0)
    macos_version: int = 0
    """Major version; 0 elsewhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeSettings:
    """Device, precision, threads and compiler of a process."""

    device_type: DeviceType
    device_reason: str
    """Why it is the CPU, if that was not requested; empty otherwise."""
    precision: Precision
    precision_reason: str
    num_threads: int
    threads_reason: str
    """Why there are fewer threads than usual; empty otherwise."""
    compiler: str | None
    """torch.compile's backend; None: the model is not compiled."""
    replays: bool
    """Whether whole training steps are replayed as CUDA graphs; never with a compiler."""
    notes: tuple[str, ...]
    """Lines for the user: what was requested and is not available."""

    @property
    def line(self) -> str:
        """Device, precision and threads with their reasons."""
        how = f", compiled by {self.compiler.lower()}" if self.compiler else ""
        how = ", steps replayed as CUDA graphs" if self.replays else how
        reasons = (self.device_reason, self.precision_reason, self.threads_reason)
        device, precision, threads = (f" ({reason})" if reason else "" for reason in reasons)
        return f"{self.device_type}{device}, {FULL_NAMES[self.precision]}{precision}, {self._threads}{threads}{how}"

    @property
    def short(self) -> str:
        """The same without reasons."""
        how = " · replayed" if self.replays else " · compiled" if self.compiler else ""
        return f"{self.device_type} · {FULL_NAMES[self.precision]} · {self._threads}{how}"

    @property
    def backend(self) -> str | None:
        """The compiler, or CUDAGRAPHS if steps are replayed."""
        return "CUDAGRAPHS" if self.replays else self.compiler

    @property
    def _threads(self) -> str:
        return f"{self.num_threads} thread{'s' if self.num_threads > 1 else ''}"


def choose_compute(
    config: AccelerateConfig,
    environ: Mapping[str, str],
    world: World,
    *,
    requested_precision: str | None = None,
    num_threads: int | None = None,
    doing: str = "training",
    micro_batches: int = 1,
) -> ComputeSettings:
    """Choose device, precision, threads and compiler, with notes on what was requested and is not available.

    `num_threads` is a resumed run's, `doing` a word for the notes, `micro_batches` their number in a step.
    """
    use_cpu = cpu_requested(config, environ)
    facts, notes = probe(use_cpu=use_cpu), [*config.notes, *filter(None, [process_count_note(world, config)])]

    requested = precision_requested(requested_precision, config, environ)
    precision, reason = resolve_precision(requested, facts)
    if requested not in ("auto", precision):
        notes.append(f"{reason}: using {FULL_NAMES[precision]}")
    if requested == "auto" and precision != "no" and environ.get("ACCELERATE_MIXED_PRECISION") == "no":
        notes.append(
            f"accelerate launch has mixed_precision no, its default: using {FULL_NAMES[precision]};"
            " --precision no for float32"
        )
    backend = config.compiler
    compiler = None if backend == "CUDAGRAPHS" else backend
    if compiler and facts.type == "mps":
        compiler = None
        notes.append("compiled training is slower on MPS (pytorch#192551): not compiled")
    elif compiler and doing == "training":
        notes.append("the first step compiles the model, which takes half a minute or more")
    has_steps = doing in ("training", "measuring")
    can_replay = facts.type == "cuda" and world.size == 1 and micro_batches == 1 and precision != "fp16"
    if backend == "CUDAGRAPHS" and has_steps and not can_replay:
        notes.append("CUDAGRAPHS needs CUDA, one process, one micro-batch and no fp16: steps are not replayed")
    threads_reason = ""
    if num_threads is None:
        num_threads, threads_reason = choose_num_threads(environ, world, torch_threads=torch.get_num_threads())
    return ComputeSettings(
        device_type=facts.type,
        device_reason="no MPS or CUDA device here" if facts.type == "cpu" and not use_cpu else "",
        precision=precision,
        precision_reason=reason,
        num_threads=num_threads,
        threads_reason=threads_reason,
        compiler=compiler,
        replays=has_steps and can_replay and backend in (None, "CUDAGRAPHS") and config.dynamo_backend != "NO",
        notes=tuple(notes),
    )


def resolve_precision(requested: str, facts: DeviceFacts) -> tuple[Precision, str]:
    """Return the precision for `auto`, `no`, `fp16` or `bf16`, and the reason if it is not the requested one."""
    best: Precision = "no"
    capability = "compute capability {}.{}".format(*facts.cuda_capability)
    unsupported = "bf16"
    if facts.type == "cpu":
        unsupported, reason = "fp16", "no fast bf16 here"  # the CPU has no gradient scaler
        if facts.cpu_has_fast_bf16:
            best, reason = "bf16", "this processor has fast bf16"
    elif facts.type == "mps":  # bf16 was half as fast as float32 on an M1 Pro
        unsupported, reason = "" if facts.macos_version >= 14 else "bf16", "the fastest that is safe on MPS"
    elif facts.cuda_capability >= (8, 0):  # `is_bf16_supported()` also counts emulation
        unsupported, best, reason = "", "bf16", capability
    elif facts.cuda_capability >= (7, 0):
        best, reason = "fp16", f"{capability} has fp16 tensor cores and no bf16"
    else:
        reason = f"{capability} has no tensor cores"
    if requested not in ("auto", unsupported):
        return requested, ""  # type: ignore[return-value]
    return best, reason if requested == "auto" else f"{requested} is not served by this {facts.type}: {reason}"


def probe(*, use_cpu: bool) -> DeviceFacts:
    """Return the facts of the best accelerator, or of the CPU if requested."""
    if not use_cpu and torch.cuda.is_available():
        return DeviceFacts(type="cuda", cuda_capability=torch.cuda.get_device_capability())
    if not use_cpu and torch.backends.mps.is_available():
        return DeviceFacts(type="mps", macos_version=int(platform.mac_ver()[0].split(".")[0] or 0))
    return DeviceFacts(type="cpu", cpu_has_fast_bf16=_cpu_has_fast_bf16())


def _cpu_has_fast_bf16() -> bool:
    """Return True for AMX, ARM's BF16, and AVX512-BF16 except on Intel.

    An Intel Xeon with AVX512-BF16 and without AMX has 0.67 to 0.8 of float32's speed (docs/benchmarks.md).
    """
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # from torch 2.12 on
    if capabilities:
        matrix, vector = capabilities.get("amx_bf16") or capabilities.get("bf16"), capabilities.get("avx512_bf16")
    else:
        matrix, vector = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
    return bool(matrix or (vector and not _is_intel()))


def _is_intel() -> bool:
    facts = Path("/proc/cpuinfo")
    return "GenuineIntel" in (facts.read_text() if facts.exists() else platform.processor())


def check_world(world: World, device_type: str, environ: Mapping[str, str]) -> None:
    """Raise UserError if these processes cannot work together on their devices."""
    if world.size > 1 and device_type == "mps":
        raise UserError(f"{world.size} processes cannot share a Mac's MPS device: start one, or set use_cpu: true")
    if world.size > 1 and device_type == "cuda" and not environ.get(SHARE_GPU):
        visible = torch.cuda.device_count()
        own_by_slurm = world.launcher == "slurm" and visible == 1  # --gpus-per-task=1: each task sees its own
        if visible < world.local_size and not own_by_slurm:
            raise UserError(
                f"{world.local_size} processes on a machine with {visible} GPU: start as many as there are GPUs,"
                " or set use_cpu: true"
            )


def describe_devices() -> dict[str, str]:
    """Return names and descriptions of the devices, for `doctor`."""
    lines = {"CPU": "has fast bf16 arithmetic" if _cpu_has_fast_bf16() else "has no fast bf16 arithmetic"}
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    for number, gpu in enumerate(gpus):
        capability, memory = f"compute capability {gpu.major}.{gpu.minor}", f"{gpu.total_memory / 2**30:.0f} GiB"
        lines[f"GPU {number}"] = f"{gpu.name}, {capability}, {memory}"
    if not gpus:
        lines["CUDA"] = "no GPU is visible" + ("" if torch.version.cuda else "; this torch is built without CUDA")
    if sys.platform == "darwin":
        lines["MPS"] = f"{'' if torch.backends.mps.is_available() else 'not '}available, macOS {platform.mac_ver()[0]}"
    return lines


def memory_format(device_type: str) -> torch.memory_format:
    """Return channels_last for CPU and CUDA, which is faster there.

    On MPS the backward of BatchNorm in channels_last is wrong or crashes (pytorch#175189).
    """
    return torch.contiguous_format if device_type == "mps" else torch.channels_last


def keep_freed_memory() -> None:
    """Keep the memory of freed tensors in this process, for the next ones, where the C library is glibc.

    By default, glibc returns it, and each step gets large tensors in new pages, which the kernel clears one by one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # man 3 mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large tensor
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: no trimming


def peak_process_memory_mib() -> int | None:
    """Return the peak resident memory of this process; None on Windows, which lacks `resource`."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2**20 if sys.platform == "darwin" else 2**10)
