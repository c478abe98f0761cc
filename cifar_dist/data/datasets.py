"""Datasets by name."""

from collections.abc import Callable
from pathlib import Path

from cifar_dist.config.errors import UserError
from cifar_dist.config.parsing import nearest
from cifar_dist.config.plan import KNOWN_SIZES
from cifar_dist.data.cifar import load_cifar10
from cifar_dist.data.dataset import Dataset
from cifar_dist.data.shapes import load_shapes


def check_dataset_name(name: str) -> None:
    """Raise UserError where there is no dataset of this name."""
    if name not in KNOWN_SIZES:
        known = ", ".join(KNOWN_SIZES)
        raise UserError(f"unknown dataset '{name}'{nearest(name, KNOWN_SIZES)} (datasets: {known})")


def load_dataset(name: str, data_dir: Path, *, progress: Callable[[int, int | None], None] | None = None) -> Dataset:
    """Load a dataset into memory, downloading it where it is missing and can be had.

    `progress` hears of a download's (bytes so far, total or None). Raises UserError.
    """
    check_dataset_name(name)
    return load_shapes() if name == "shapes" else load_cifar10(data_dir, progress=progress)
