"""How precise a device computes: a pure function of what was asked for and of facts about the device."""

from dataclasses import dataclass
from typing import Literal

DeviceType = Literal["cpu", "mps", "cuda"]
Precision = Literal["no", "fp16", "bf16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceFacts:
    """What decides how precise a device can be."""

    type: DeviceType
    cpu_has_fast_bf16: bool = False
    """Whether the processor computes faster in bfloat16 than in float32."""
    cuda_capability: tuple[int, int] = (0, 0)
    macos_version: int = 0
    """Major version; 0 elsewhere."""


FULL_NAMES = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}


def resolve_precision(wish: str, facts: DeviceFacts) -> tuple[Precision, str]:
    """Turn `auto`, `no`, `fp16` or `bf16` into what the device can serve; give it, and why, where it was not asked for.

    fp16 needs a gradient scaler, which a CPU does not use. bf16 is asked of compute capability 8, since
    `is_bf16_supported()` counts emulation; on MPS it needs macOS 14 and was half as fast as float32 on an M1 Pro, so
    that `auto` does not choose it there.
    """
    if wish == "no" or wish in _able(facts):
        return wish, ""  # type: ignore[return-value]
    best, reason = _automatic(facts)
    return best, reason if wish == "auto" else f"{wish} is not served by this {facts.type}: {reason}"


def _able(facts: DeviceFacts) -> set[str]:
    """Give the reduced precisions that a device can serve, quickly or not."""
    if facts.type == "cpu":
        return {"bf16"}
    if facts.type == "mps":
        return {"fp16"} | ({"bf16"} if facts.macos_version >= 14 else set())
    return {"fp16"} | ({"bf16"} if facts.cuda_capability >= (8, 0) else set())


def _automatic(facts: DeviceFacts) -> tuple[Precision, str]:
    if facts.type == "cpu":
        return ("bf16", "this processor has fast bf16") if facts.cpu_has_fast_bf16 else ("no", "no fast bf16 here")
    if facts.type == "mps":
        return "no", "the fastest that is safe on MPS"
    capability = ".".join(map(str, facts.cuda_capability))
    if facts.cuda_capability >= (8, 0):
        return "bf16", f"compute capability {capability}"
    if facts.cuda_capability >= (7, 0):
        return "fp16", f"compute capability {capability} has fp16 tensor cores and no bf16"
    return "no", f"compute capability {capability} has no tensor cores"
