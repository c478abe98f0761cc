"""The validation split: stratified, and fixed by the seed."""

import torch
from torch import Tensor

from cifar_dist.data.sampler import derive_seed


def stratified_split(labels: Tensor, validation_size: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Split sample indices into training and validation parts; each class gives its share of the validation part.

    `labels` is (N,) int64. Returns two ascending (n,) int64 tensors, the second of exactly `validation_size`. Shares
    are rounded by largest remainder, and each class keeps a training sample. Raises ValueError where that cannot be.
    """
    num_samples, counts = len(labels), torch.bincount(labels)
    most = num_samples - int((counts > 0).sum())
    if not 0 <= validation_size <= most:
        raise ValueError(f"validation_size must be in [0, {most}], not {validation_size}")
    exact = counts * validation_size  # in units of 1/num_samples
    shares = exact // num_samples
    by_remainder = torch.argsort(exact - shares * num_samples, descending=True, stable=True)
    while missing := validation_size - int(shares.sum()):  # once, unless a small class has nothing more to give
        can_give = by_remainder[(shares + 1 < counts)[by_remainder]]
        shares[can_give[:missing]] += 1

    generator = torch.Generator().manual_seed(derive_seed("validation split", seed))
    held_out = torch.zeros(num_samples, dtype=torch.bool)
    for label, share in enumerate(shares.tolist()):
        members = torch.nonzero(labels == label).squeeze(1)
        held_out[members[torch.randperm(len(members), generator=generator)[:share]]] = True
    return torch.nonzero(~held_out).squeeze(1), torch.nonzero(held_out).squeeze(1)
