"""The official CIFAR files for Python, read.

The files are pickles, which can run code when they are read. They are read only after their md5 was found right, and
even then by an unpickler that knows nothing but the three names a NumPy array is made of.
"""

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cifar_dist.config.errors import UserError
from cifar_dist.data.archives import Archive, ArchiveFile
from cifar_dist.data.dataset import Dataset, LabelledImages
from cifar_dist.data.download import Progress, reason_of
from cifar_dist.data.official_files import provide, refuse_wrong, wrong


def load_archive(archive: Archive, data_dir: Path, *, progress: Progress | None = None) -> Dataset:
    """Load the files of `archive` below `data_dir`, the folder that torchvision calls `root`.

    What is missing is unpacked or downloaded first, as `provide` says. A file that is there is never changed. Raises
    UserError that names the wrong ones, even of those without images, or says why the missing cannot be had.
    """
    folder = provide(archive, data_dir, progress=progress)
    refuse_wrong({folder / file.name: file.md5 for file in archive.others})  # the rest is checked as it is read
    return Dataset(
        name=archive.name,
        class_names=archive.class_names,
        train=_read_files(archive, folder, archive.train),
        test=_read_files(archive, folder, archive.test),
    )


def _read_files(archive: Archive, folder: Path, files: tuple[ArchiveFile, ...]) -> LabelledImages:
    # Each file is copied into its place and dropped, so that the pixels are not in memory twice.
    counts = [file.images for file in files]
    images = torch.empty((sum(counts), 3, 32, 32), dtype=torch.uint8)
    labels = torch.empty(sum(counts), dtype=torch.int64)
    places = zip(files, torch.split(images, counts), torch.split(labels, counts), strict=True)
    for file, its_images, its_labels in places:
        _read_file(archive, folder / file.name, file.md5, its_images, its_labels)
    return LabelledImages(images=images, labels=labels)


def _read_file(archive: Archive, path: Path, md5: str, images: Tensor, labels: Tensor) -> None:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path.absolute()}: {reason_of(error)}") from error
    # The bytes that are hashed are those that are unpickled, whatever happens to the file in between.
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise wrong(path)
    batch = _ArrayUnpickler(io.BytesIO(content), path).load()
    np.copyto(images.numpy(), batch[b"data"].reshape(images.shape), casting="no")
    labels.copy_(torch.tensor(batch[archive.label_key]).reshape(labels.shape))


class _ArrayUnpickler(pickle.Unpickler):
    """Reads the pickles of Python 2 that hold arrays, and refuses every other object."""

    def __init__(self, file: io.BytesIO, path: Path) -> None:
        # "bytes" and not "latin1", because b"data" and its like are the keys in the file.
        super().__init__(file, encoding="bytes")
        self._path = path

    def find_class(self, module: str, name: str, /) -> Any:
        """Give one of the three names an array is made of. Raises UserError for any other."""
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            # NumPy 2 moved the function and deprecates the old place; every array says where it is.
            return np.empty(0).__reduce__()[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        path, wanted = self._path.absolute(), f"{module}.{name}"
        raise UserError(f"{path} would run code ({wanted}) when it is read, and was refused: do not use this file")
