"""Datasets in memory: uint8 images, labels and class names; loaded by name, and split."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifar_dist.config.plan import KNOWN_SIZES, DatasetSizes
from cifar_dist.config.recipe import Recipe
from cifar_dist.data.cifar import ARCHIVES, load_archive
from cifar_dist.data.download import Progress
from cifar_dist.data.folder import folder_sizes, load_folder
from cifar_dist.data.sampler import derive_seed
from cifar_dist.data.shapes import load_shapes


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LabelledImages:
    """Images in memory as one tensor, so that a batch is an index and not a worker process."""

    images: Tensor
    """(N, 3, H, W) uint8, contiguous."""
    labels: Tensor
    """(N,) int64, in [0, number of classes)."""

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.shape[1:2] != (3,) or not self.images.is_contiguous():
            raise ValueError(f"images must be (N, 3, H, W) uint8, contiguous, not {tuple(self.images.shape)}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"labels must be ({len(self.images)},) int64, not {tuple(self.labels.shape)}")

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "LabelledImages":
        """Move both tensors to `device` (no copy if they are there)."""
        return LabelledImages(images=self.images.to(device), labels=self.labels.to(device))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Dataset:
    """A training set and a test set with the same classes."""

    name: str
    class_names: tuple[str, ...]
    train: LabelledImages
    test: LabelledImages
    validation: LabelledImages | None = None
    """The dataset's own; without it a recipe may hold out part of `train`."""
    whole: LabelledImages | None = None
    """All images of a folder whose test set was drawn from them."""
    origin: str | None = None
    """Description of a folder's image files."""

    @property
    def num_classes(self) -> int:
        """The number of classes, with or without images."""
        return len(self.class_names)

    @property
    def sizes(self) -> DatasetSizes:
        """The numbers of images and classes."""
        own = 0 if self.validation is None else len(self.validation)
        return DatasetSizes(
            num_train=len(self.train), num_test=len(self.test), num_validation=own, num_classes=self.num_classes
        )

    def with_classes(self, class_names: tuple[str, ...]) -> "Dataset":
        """Return the same images with labels that are indices in `class_names`.

        Raises ValueError if one of this dataset's classes is not among them.
        """
        if class_names == self.class_names:
            return self
        if missing := [name for name in self.class_names if name not in class_names]:
            raise ValueError(
                f"'{missing[0]}' is none of {', '.join(class_names[:3])}{', ...' if len(class_names) > 3 else ''}"
            )
        places = torch.tensor([class_names.index(name) for name in self.class_names])
        parts: dict[str, Any] = {
            name: LabelledImages(images=part.images, labels=places[part.labels])
            for name in ("train", "test", "validation", "whole")
            if (part := getattr(self, name)) is not None
        }
        return replace(self, class_names=class_names, **parts)

    def fingerprint(self) -> str:
        """Hash names, images and labels, so that a run recognizes the data it was trained on."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update("\n".join(self.class_names).encode())
        for part in (self.train, self.test, *(() if self.validation is None else (self.validation,))):
            for tensor in (part.images, part.labels):
                digest.update(str(tuple(tensor.shape)).encode())
                digest.update(tensor.cpu().numpy().data)
        return digest.hexdigest()


def load_dataset(
    name: str, data_dir: Path, recipe: Recipe, *, for_training: bool = True, progress: Progress | None = None
) -> Dataset:
    """Load a dataset by name, downloaded if need be, or a folder of images at the recipe's `image_size`.

    `for_training=False` allows a folder without training images. Raises UserError.
    """
    if name == "shapes":
        return load_shapes()
    if name in ARCHIVES:
        return load_archive(ARCHIVES[name], data_dir, progress=progress)
    return load_folder(Path(name), image_size=recipe.image_size, for_training=for_training, progress=progress)


def known_sizes(name: str) -> DatasetSizes:
    """Return a dataset's sizes without loading it; a folder is listed. Raises UserError."""
    return KNOWN_SIZES[name] if name in KNOWN_SIZES else folder_sizes(Path(name))


def stratified_split(labels: Tensor, validation_size: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Split sample indices into training and validation parts, in proportion to the classes.

    `labels` is (N,) int64. Returns two ascending (n,) int64 tensors, the second of exactly `validation_size`. Shares
    are rounded by largest remainder, and each class keeps a training sample. Raises ValueError if that is impossible.
    """
    counts = torch.bincount(labels)
    most = len(labels) - int((counts > 0).sum())
    if not 0 <= validation_size <= most:
        raise ValueError(f"validation_size must be in [0, {most}], not {validation_size}")
    shares = _class_shares(counts, validation_size)
    generator = torch.Generator().manual_seed(derive_seed("validation split", seed))
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label, share in enumerate(shares.tolist()):
        members = torch.nonzero(labels == label).squeeze(1)
        held_out[members[torch.randperm(len(members), generator=generator)[:share]]] = True
    return torch.nonzero(~held_out).squeeze(1), torch.nonzero(held_out).squeeze(1)


def stratified_subset(data: LabelledImages, indices: Tensor, size: int) -> Tensor:
    """Choose `size` of the samples `indices` (n,), in proportion to the classes; at least one of each class.

    A hash of the pixels chooses within a class, so that neither the seed nor the order of the samples matters, and a
    smaller subset lies in a larger one, up to rounding. Returns (size,) int64, in the order of `indices`.
    """
    labels = data.labels[indices]
    counts, chosen = torch.bincount(labels), torch.zeros(len(indices), dtype=torch.bool)
    kept = counts - _class_shares(counts, len(indices) - size)
    pixels = data.images.numpy()
    for label, number in enumerate(kept.tolist()):
        members = torch.nonzero(labels == label).flatten().tolist()
        members.sort(key=lambda member: hashlib.blake2b(pixels[indices[member]].data, digest_size=16).digest())
        chosen[members[:number]] = True
    return indices[chosen]


def _class_shares(counts: Tensor, size: int) -> Tensor:
    """Divide `size` samples over the classes in proportion to `counts` (C,), by largest remainder.

    No share is a whole class. Returns (C,) int64.
    """
    num_samples = int(counts.sum())
    exact = counts * size  # in units of 1/num_samples
    shares = exact // num_samples
    by_remainder = torch.argsort(exact - shares * num_samples, descending=True, stable=True)
    while missing := size - int(shares.sum()):  # once, unless small classes are exhausted
        eligible = by_remainder[(shares + 1 < counts)[by_remainder]]
        shares[eligible[:missing]] += 1
    return shares
