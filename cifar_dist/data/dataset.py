"""What a dataset is to the rest of the package: uint8 images, labels and the names of the classes."""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cifar_dist.config.plan import DatasetSizes


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a small tensor from the CPU to a device, on CUDA without waiting for what it is doing.

    That takes pinned memory. MPS has none, and its non-blocking copies can corrupt (pytorch#139550).
    """
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LabelledImages:
    """Images that live in memory as one tensor, so that a batch is an index and not a worker process."""

    images: Tensor
    """(N, 3, H, W) uint8, contiguous."""
    labels: Tensor
    """(N,) int64, in [0, number of classes)."""

    def __post_init__(self) -> None:
        if not self.images.is_contiguous():
            raise ValueError("images must be contiguous")
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[1] != 3:
            raise ValueError(f"images must be (N, 3, H, W) uint8, not {tuple(self.images.shape)} {self.images.dtype}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"labels must be ({len(self.images)},) int64, not {tuple(self.labels.shape)}")

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "LabelledImages":
        """Move both tensors to `device` (no copy when they are there already)."""
        return LabelledImages(images=self.images.to(device), labels=self.labels.to(device))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Dataset:
    """A training set and a test set with the same classes."""

    name: str
    class_names: tuple[str, ...]
    train: LabelledImages
    test: LabelledImages
    validation: LabelledImages | None = None
    """Where the dataset brings its own; otherwise a recipe may hold out part of `train`."""
    whole: LabelledImages | None = None
    """The images of `train` and `test` together, of a folder that does not separate them itself."""
    origin: str | None = None
    """What a person is told of the files behind the images, where that is news."""

    @property
    def num_classes(self) -> int:
        """How many classes there are, with or without images of each."""
        return len(self.class_names)

    @property
    def sizes(self) -> DatasetSizes:
        """How many images there are."""
        own = 0 if self.validation is None else len(self.validation)
        return DatasetSizes(
            num_train=len(self.train), num_test=len(self.test), num_validation=own, num_classes=self.num_classes
        )

    def with_classes(self, class_names: tuple[str, ...]) -> "Dataset":
        """Give the same images with labels that count in `class_names`, which has all of this dataset's classes.

        Raises ValueError that names a class it has not.
        """
        if class_names == self.class_names:
            return self
        missing = [name for name in self.class_names if name not in class_names]
        if missing:
            raise ValueError(f"there is no class '{missing[0]}'")
        places = torch.tensor([class_names.index(name) for name in self.class_names])

        parts = {name: getattr(self, name) for name in ("train", "test", "validation", "whole")}
        relabelled: dict[str, Any] = {
            name: LabelledImages(images=part.images, labels=places[part.labels])
            for name, part in parts.items()
            if part is not None
        }
        return replace(self, class_names=class_names, **relabelled)

    def fingerprint(self) -> str:
        """Hash names, images and labels, so that a run can tell whether it goes on with the data it began with."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update("\n".join(self.class_names).encode())
        for part in (self.train, self.test, *(() if self.validation is None else (self.validation,))):
            for tensor in (part.images, part.labels):
                digest.update(str(tuple(tensor.shape)).encode())
                digest.update(tensor.cpu().numpy().data)
        return digest.hexdigest()
