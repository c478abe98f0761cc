"""Dropout before the head, with masks that are functions of (seed, epoch, sample), equal on every device."""

import torch
from torch import Tensor, nn


class HeadDropout:
    """Drops inputs of the last layer in training; the model's state dict stays as it was.

    The mask is a hash of (key, sample, feature), not a draw of the device, so it does not depend on the batch.
    """

    def __init__(self, model: nn.Module, probability: float) -> None:
        self.probability = probability
        self._samples: Tensor | None = None
        head: nn.Module = model.fc  # type: ignore[assignment]
        # On the device, so that it may change between replays of a CUDA graph.
        self._key = torch.zeros(2, dtype=torch.int64, device=next(head.parameters()).device)
        head.register_forward_pre_hook(self._drop)

    def set_key(self, key: int) -> None:
        """Set the key of the next batches, 63 bits that stand for seed and epoch."""
        low, high = self._key
        low.fill_(key & 0xFFFFFFFF)
        high.fill_(key >> 32)

    def set_samples(self, samples: Tensor) -> None:
        """Set the samples (B,) int64 of the next batch."""
        self._samples = samples

    def _drop(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not module.training or self._samples is None:
            return None
        features = inputs[0]
        kept = uniform_hash(self._samples, features.shape[1], self._key) >= self.probability
        return (features * (kept.to(features.dtype) / (1 - self.probability)),)


def uniform_hash(samples: Tensor, count: int, key: Tensor) -> Tensor:
    """Return `count` numbers in [0, 1) for each sample (B,) int64, as (B, count) float32.

    `key` (2,) int64 holds the low and high 32 bits. MurmurHash3's finalizer, twice, in int64, which is exact on every
    device.
    """
    feature = torch.arange(count, device=samples.device)
    mixed = _mix(samples + key[0]).unsqueeze(1) + feature * 0x9E3779B1
    return (_mix((mixed + key[1]) & 0xFFFFFFFF) >> 8).to(torch.float32) / 2**24


def _mix(value: Tensor) -> Tensor:
    value = value & 0xFFFFFFFF
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return value ^ (value >> 16)
