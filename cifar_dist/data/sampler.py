"""Order and global batches: a pure function of (seed, epoch), the same at every world size."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler


def derive_seed(*parts: int | str) -> int:
    """Hash the parts into a seed of 63 bits, so that neighbouring seeds and epochs share no stream."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MicroBatch:
    """A rank's part of a micro-batch."""

    positions: Tensor
    """(n,) int64: which samples of the training set; n may be 0."""
    images_together: int
    """Images of the micro-batch over all ranks: BatchNorm's statistics are over them."""
    images_in_step: int
    """Images of the step over all ranks and micro-batches: what the loss is divided by."""
    ends_step: bool
    """Whether the optimizer steps after this one."""


class GlobalBatchSampler(DistributedSampler[int]):
    """A DistributedSampler that neither pads nor drops: global batches are the same at every world size.

    `set_epoch` chooses the order. Seed and epoch are hashed; torch adds them, so that neighbouring seeds share orders.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        num_replicas: int = 1,
        num_used: int | None = None,
        accumulation_steps: int = 1,
    ) -> None:
        """`num_used` (`RunPlan.images_per_epoch`) leaves out the order's tail; None uses all samples."""
        super().__init__(range(num_samples), num_replicas=num_replicas, rank=rank, seed=seed)  # type: ignore[arg-type]
        self.global_batch_size, self.accumulation_steps = global_batch_size, accumulation_steps
        self.num_used = num_used

    def order(self) -> Tensor:
        """Return the epoch's samples in order, (num_used,) int64."""
        generator = torch.Generator().manual_seed(derive_seed("order", self.seed, self.epoch))
        num_samples = len(self.dataset)  # type: ignore[arg-type]
        return torch.randperm(num_samples, generator=generator)[: self.num_used]

    def micro_batches(self) -> Iterator[MicroBatch]:
        """Iterate over this rank's parts of the epoch.

        Micro-batch a of A holds positions [aB/A, (a+1)B/A) of a global batch of B. A short last batch has fewer, so
        that each has the two samples that BatchNorm needs. A rank's part may be empty.
        """
        for batch in torch.split(self.order(), self.global_batch_size):
            parts = max(1, min(self.accumulation_steps, len(batch) // 2))
            for number in range(parts):
                part = batch[number * len(batch) // parts : (number + 1) * len(batch) // parts]
                yield MicroBatch(
                    positions=part[self.rank :: self.num_replicas],
                    images_together=len(part),
                    images_in_step=len(batch),
                    ends_step=number == parts - 1,
                )

    def __iter__(self) -> Iterator[int]:
        for micro_batch in self.micro_batches():
            yield from micro_batch.positions.tolist()

    def __len__(self) -> int:
        return sum(len(micro_batch.positions) for micro_batch in self.micro_batches())
