"""Dropout before the head whose masks are functions of (seed, epoch, sample), equal on every device and world size."""

import torch
from torch import Tensor, nn


class HeadDropout:
    """Drops features of the last layer's input while the model trains; the model's state dict stays as it was.

    A feature's fate is a hash of (key, sample, feature), not a draw of the device: whether it falls does not depend on
    who computes it, or with whom.
    """

    def __init__(self, model: nn.Module, probability: float) -> None:
        self.probability = probability
        self._samples: Tensor | None = None
        self._key = 0
        head: nn.Module = model.fc  # type: ignore[assignment]
        head.register_forward_pre_hook(self._drop)

    def set_samples(self, samples: Tensor, key: int) -> None:
        """Say which samples (B,) int64 the next batch holds; `key` stands for seed and epoch."""
        self._samples, self._key = samples, key

    def _drop(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not module.training or self._samples is None:
            return None
        features = inputs[0]
        kept = uniform_hash(self._samples, features.shape[1], self._key) >= self.probability
        return (features * (kept.to(features.dtype) / (1 - self.probability)),)


def uniform_hash(samples: Tensor, count: int, key: int) -> Tensor:
    """Give `count` numbers in [0, 1) for each sample (B,) int64: (B, count) float32.

    32-bit integer mixing in int64, which every device does exactly: MurmurHash3's finaliser, twice.
    """
    feature = torch.arange(count, device=samples.device)
    mixed = _mix(samples + (key & 0xFFFFFFFF)).unsqueeze(1) + feature * 0x9E3779B1
    return (_mix((mixed + (key >> 32)) & 0xFFFFFFFF) >> 8).to(torch.float32) / 2**24


def _mix(value: Tensor) -> Tensor:
    value = value & 0xFFFFFFFF
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return value ^ (value >> 16)
