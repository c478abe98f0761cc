"""Which samples make which batch: a pure function of (seed, epoch), the same at every world size."""

import hashlib
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One of `count` strided parts of a batch: positions index, index + count, and so on."""

    index: int = 0
    count: int = 1


def derive_seed(*parts: int | str) -> int:
    """Hash the parts into a seed of 63 bits, so that neighbouring seeds and epochs share no stream."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MicroBatch:
    """A shard's part of what is forwarded at once."""

    positions: Tensor
    """(n,) int64: which samples of the training set; n may be 0."""
    images_together: int
    """Images of the micro-batch over all shards: what BatchNorm sees."""
    images_in_step: int
    """Images of the step over all shards and micro-batches: what the loss is divided by."""
    ends_step: bool
    """Whether the optimizer steps after this one."""


@dataclass(frozen=True, slots=True)
class GlobalBatchSampler:
    """Cuts an epoch's order into global batches, the same at every world size; it neither pads nor drops."""

    num_samples: int
    global_batch_size: int
    _: KW_ONLY
    seed: int
    shard: Shard = Shard()
    num_used: int | None = None
    """RunPlan.images_per_epoch, which leaves out the order's tail; None uses all samples."""
    accumulation_steps: int = 1

    def order(self, epoch: int) -> Tensor:
        """Return an epoch's order of all samples, (num_used,) int64."""
        generator = torch.Generator().manual_seed(derive_seed("order", self.seed, epoch))
        return torch.randperm(self.num_samples, generator=generator)[: self.num_used]

    def micro_batches(self, epoch: int) -> Iterator[MicroBatch]:
        """Iterate over this shard's parts of an epoch.

        Micro-batch a of A holds positions [aB/A, (a+1)B/A) of a global batch of B. A short last batch has fewer, so
        that each has the two samples that BatchNorm needs. A shard's part may be empty.
        """
        for batch in torch.split(self.order(epoch), self.global_batch_size):
            parts = max(1, min(self.accumulation_steps, len(batch) // 2))
            for number in range(parts):
                part = batch[number * len(batch) // parts : (number + 1) * len(batch) // parts]
                yield MicroBatch(
                    positions=part[self.shard.index :: self.shard.count],
                    images_together=len(part),
                    images_in_step=len(batch),
                    ends_step=number == parts - 1,
                )
