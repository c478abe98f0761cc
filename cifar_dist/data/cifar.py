"""The official CIFAR files for Python: found, completed from their tarball or the network, checked and read.

The files are pickles, which can run code when they are read. They are read only after their md5 was found right, and
even then by an unpickler that knows nothing but the three names a NumPy array is made of.
"""

import hashlib
import io
import os
import pickle
import re
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cifar_dist.config.errors import UserError
from cifar_dist.data.dataset import Dataset, LabelledImages
from cifar_dist.data.download import TIMEOUT_S, DownloadError, Progress, download, exclusive, md5_of, reason_of, writing

_PIXELS = (3, 32, 32)
_COPY_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class ArchiveFile:
    """One file of an archive."""

    name: str
    md5: str
    images: int = 0
    """How many images it holds; 0 for a file that is unpacked for other programs and not read here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Archive:
    """What there is to know about one archive of the CIFAR family before any of it is read."""

    name: str
    class_names: tuple[str, ...]
    folder: str
    """The folder in the tarball, and below the data folder, that the files lie in."""
    train: tuple[ArchiveFile, ...]
    """In the official order."""
    test: tuple[ArchiveFile, ...]
    others: tuple[ArchiveFile, ...]
    label_key: bytes
    tarball: str
    tarball_md5: str
    urls: tuple[str, ...]
    urls_variable: str
    """The environment variable that replaces `urls`."""


# https://www.cs.toronto.edu/~kriz/cifar.html gives the md5 of the tarball; those of the files are of its contents, and
# torchvision checks the same ones.
CIFAR10 = Archive(
    name="cifar10",
    class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    folder="cifar-10-batches-py",
    train=(
        ArchiveFile(name="data_batch_1", md5="c99cafc152244af753f735de768cd75f", images=10_000),
        ArchiveFile(name="data_batch_2", md5="d4bba439e000b95fd0a9bffe97cbabec", images=10_000),
        ArchiveFile(name="data_batch_3", md5="54ebc095f3ab1f0389bbae665268c751", images=10_000),
        ArchiveFile(name="data_batch_4", md5="634d18415352ddfa80567beed471001a", images=10_000),
        ArchiveFile(name="data_batch_5", md5="482c414d41f54cd18b22e5b47cb7c3cb", images=10_000),
    ),
    test=(ArchiveFile(name="test_batch", md5="40351d587109b95175f43aff81a1287e", images=10_000),),
    others=(ArchiveFile(name="batches.meta", md5="5ff9c542aee3614f3951f8cda6e48888"),),
    label_key=b"labels",
    tarball="cifar-10-python.tar.gz",
    tarball_md5="c58f30108f718f92721af3b95e74349a",
    urls=(
        # PaddlePaddle's mirror has the same bytes and is fast; the official server gives 66 to 85 kB/s
        # (https://github.com/pytorch/vision/issues/9536).
        "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    ),
    urls_variable="CIFAR_DIST_CIFAR10_URLS",
)


def load_cifar10(
    data_dir: Path, *, progress: Progress | None = None, environ: Mapping[str, str] = os.environ
) -> Dataset:
    """Load CIFAR-10 from `data_dir/cifar-10-batches-py`; `load_archive` says what happens when it is not there."""
    return load_archive(CIFAR10, data_dir, progress=progress, environ=environ)


def load_archive(
    archive: Archive,
    data_dir: Path,
    *,
    progress: Progress | None = None,
    environ: Mapping[str, str] = os.environ,
    timeout: float = TIMEOUT_S,
) -> Dataset:
    """Load the files of `archive` below `data_dir`, the folder that torchvision calls `root`.

    Missing files are unpacked from the tarball in `data_dir`, which is downloaded if it is not there either. A file
    that is there is never changed: a wrong one is named in the error. `progress` is told the bytes downloaded so far
    and in all, `timeout` is in seconds. Raises UserError for everything that keeps the data from being had.
    """
    folder = data_dir / archive.folder
    if _missing(folder, archive):
        _provide(archive, data_dir, progress, environ, timeout)
    return Dataset(
        name=archive.name,
        class_names=archive.class_names,
        train=_read_files(archive, folder, archive.train),
        test=_read_files(archive, folder, archive.test),
    )


def _missing(folder: Path, archive: Archive) -> list[str]:
    """Name the files without which nothing can be read. A broken link is there, so it is not written over."""
    return [file.name for file in archive.train + archive.test if not os.path.lexists(folder / file.name)]


def _read_files(archive: Archive, folder: Path, files: tuple[ArchiveFile, ...]) -> LabelledImages:
    # Each file is copied into its place and dropped, so that the pixels are never there twice.
    images = torch.empty((sum(file.images for file in files), *_PIXELS), dtype=torch.uint8)
    labels = torch.empty(len(images), dtype=torch.int64)
    start = 0
    for file in files:
        end = start + file.images
        pixels, classes = _read_file(archive, folder / file.name, file)
        images.numpy()[start:end] = pixels.reshape(-1, *_PIXELS)
        labels[start:end] = torch.tensor(classes)
        start = end
    return LabelledImages(images=images, labels=labels)


def _read_file(archive: Archive, path: Path, file: ArchiveFile) -> tuple[np.ndarray[Any, Any], list[int]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path.absolute()}: {reason_of(error)}") from error
    # The bytes that are hashed are those that are unpickled, whatever happens to the file in between.
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != file.md5:
        raise _wrong(path)
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), path).load()
        pixels, classes = batch[b"data"], batch[archive.label_key]
        if pixels.dtype != np.uint8 or pixels.shape != (file.images, np.prod(_PIXELS)) or len(classes) != file.images:
            raise ValueError(f"{len(classes)} labels, {pixels.dtype} pixels of shape {pixels.shape}")
        if not all(0 <= label < len(archive.class_names) for label in classes):
            raise ValueError("a label without a class")
    except UserError:
        raise
    except Exception as error:  # a broken pickle raises nearly anything
        raise UserError(f"{path.absolute()} is not a batch of {archive.name} ({error})") from error
    return pixels, classes


class _ArrayUnpickler(pickle.Unpickler):
    """Reads the pickles of Python 2 and NumPy 1 that hold arrays, and refuses every other object."""

    def __init__(self, file: io.BytesIO, path: Path) -> None:
        # "bytes" and not "latin1": an array can then use the bytes as they are, without a copy.
        super().__init__(file, encoding="bytes")
        self._path = path

    def find_class(self, module: str, name: str, /) -> Any:
        """Give one of the three names an array is made of. Raises UserError for any other."""
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            # The function's home moved in NumPy 2 and the old path warns; each array says where it is.
            return np.empty(0).__reduce__()[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        path, wanted = self._path.absolute(), f"{module}.{name}"
        raise UserError(f"{path} would run code ({wanted}) when it is read, and was refused: do not use this file")


def _wrong(path: Path) -> UserError:
    text = "is damaged or not the official file (its md5 is wrong) and was left alone"
    return UserError(f"{path.absolute()} {text}: move it away and start again, then it is fetched anew")


def _provide(
    archive: Archive, data_dir: Path, progress: Progress | None, environ: Mapping[str, str], timeout: float
) -> None:
    """Complete the folder of the archive from the tarball, and have the tarball downloaded if it is not there."""
    folder, tarball = data_dir / archive.folder, data_dir / archive.tarball
    for file in archive.train + archive.test + archive.others:
        _check(folder / file.name, file.md5)
    with exclusive(data_dir, archive.tarball + ".lock"):
        if not (missing := _missing(folder, archive)):
            return  # another process has provided it meanwhile
        if not os.path.lexists(tarball):
            listed = environ.get(archive.urls_variable)
            urls = archive.urls if listed is None else [url for url in re.split(r"[\s,]+", listed) if url]
            try:
                download(urls, tarball, archive.tarball_md5, progress=progress, timeout=timeout)
            except DownloadError as error:
                what = f"{', '.join(missing)} missing" if folder.is_dir() else f"no {archive.folder}"
                raise UserError(
                    f"{what} in {(folder if folder.is_dir() else data_dir).absolute()}, and no download ({error}): put"
                    f" {archive.tarball} or its folder {archive.folder} into {data_dir.absolute()}, name another place"
                    f" with --data-dir DIR, set {archive.urls_variable} to addresses of the tarball, or take"
                    f" --dataset shapes, which needs no files"
                ) from error
        else:
            _check(tarball, archive.tarball_md5)
        _extract(archive, tarball, folder)
