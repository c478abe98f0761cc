"""Datasets by name, or by folder."""

from pathlib import Path

from cifar_dist.config.plan import KNOWN_SIZES, DatasetSizes
from cifar_dist.config.recipe import Recipe
from cifar_dist.data.archives import ARCHIVES
from cifar_dist.data.cifar import load_archive
from cifar_dist.data.dataset import Dataset
from cifar_dist.data.download import Progress
from cifar_dist.data.folder import folder_sizes, load_folder
from cifar_dist.data.shapes import load_shapes


def load_dataset(
    name: str, data_dir: Path, recipe: Recipe, *, for_training: bool = True, progress: Progress | None = None
) -> Dataset:
    """Load a dataset into memory, downloading it where it is missing and can be had.

    A folder of images is read at the recipe's `image_size`, and needs training images only `for_training`. `progress`
    is told a download's (bytes so far, total or None), or (files decoded, total). Raises UserError.
    """
    if name == "shapes":
        return load_shapes()
    if name in ARCHIVES:
        return load_archive(ARCHIVES[name], data_dir, progress=progress)
    return load_folder(Path(name), image_size=recipe.image_size, for_training=for_training, progress=progress)


def known_sizes(name: str) -> DatasetSizes:
    """Return a dataset's sizes without loading it; a folder is listed. Raises UserError."""
    return KNOWN_SIZES[name] if name in KNOWN_SIZES else folder_sizes(Path(name))
