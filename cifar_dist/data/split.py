"""The validation split: stratified, and fixed by the seed."""

import torch
from torch import Tensor

from cifar_dist.data.order import derive_seed


def stratified_split(labels: Tensor, validation_size: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Split sample indices into training and validation parts; each class gives its share of the validation part.

    `labels` is (N,) int64. Gives two ascending (n,) int64 tensors, the second of exactly `validation_size`. Shares
    are rounded by largest remainder. Raises ValueError where `validation_size` is not in [0, N].
    """
    num_samples = len(labels)
    if not 0 <= validation_size <= num_samples:
        raise ValueError(f"validation_size must be in [0, {num_samples}], not {validation_size}")
    exact = torch.bincount(labels) * validation_size  # in units of 1/num_samples
    shares = exact // num_samples
    missing = validation_size - int(shares.sum())
    remainders = exact - shares * num_samples
    shares[torch.argsort(remainders, descending=True, stable=True)[:missing]] += 1

    generator = torch.Generator().manual_seed(derive_seed("validation split", seed))
    held_out = torch.zeros(num_samples, dtype=torch.bool)
    for label, share in enumerate(shares.tolist()):
        members = torch.nonzero(labels == label).squeeze(1)
        held_out[members[torch.randperm(len(members), generator=generator)[:share]]] = True
    return torch.nonzero(~held_out).squeeze(1), torch.nonzero(held_out).squeeze(1)
