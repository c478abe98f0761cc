"""Which samples make which batch: a pure function of (seed, epoch), the same for every world."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One part of `count` equal strides through a batch: positions index, index + count, and so on."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"index must be in [0, {self.count}), not {self.index}")


def derive_seed(*parts: int | str) -> int:
    """Hash the parts into a seed of 63 bits, so that neighbouring seeds and epochs share no stream."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class GlobalBatchSampler(DistributedSampler[int]):
    """A DistributedSampler that neither pads nor drops.

    It keeps torch's permutation, `set_epoch` and seed, but cuts the *whole* order of an epoch into global batches and
    hands a shard every count-th position of each. So the k-th global batch holds the same samples at every world size
    and for every number of samples. The last batch may be short, and a shard's part of it empty.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        *,
        seed: int,
        shard: Shard | None = None,
        num_used: int | None = None,
    ) -> None:
        """Cut `num_samples` samples into batches; `num_used` (RunPlan.images_per_epoch) leaves out the order's tail."""
        super().__init__(range(num_samples), num_replicas=1, rank=0, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.global_batch_size = global_batch_size
        self.shard = shard or Shard()
        self.num_used = num_samples if num_used is None else num_used

    def global_order(self) -> Tensor:
        """Give this epoch's order of all samples, (num_used,) int64."""
        return torch.tensor(list(super().__iter__()), dtype=torch.int64)[: self.num_used]

    def batches(self) -> list[Tensor]:
        """Give this shard's part of each global batch, (up to global_batch_size / count,) int64 each."""
        index, count = self.shard.index, self.shard.count
        return [batch[index::count] for batch in torch.split(self.global_order(), self.global_batch_size)]

    def __iter__(self) -> Iterator[int]:
        """Go through this shard's samples one by one, batch after batch."""
        for batch in self.batches():
            yield from batch.tolist()

    def __len__(self) -> int:
        return sum(len(batch) for batch in self.batches())
