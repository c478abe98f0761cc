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
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from cifar_dist.config.errors import UserError
from cifar_dist.data.archives import CIFAR10, CIFAR100, Archive, ArchiveFile
from cifar_dist.data.dataset import Dataset, LabelledImages
from cifar_dist.data.download import TIMEOUT_S, DownloadError, Progress, download, exclusive, md5_of, reason_of, writing

_COPY_BYTES = 1 << 20


def load_cifar10(
    data_dir: Path, *, progress: Progress | None = None, environ: Mapping[str, str] = os.environ
) -> Dataset:
    """Load CIFAR-10 from `data_dir/cifar-10-batches-py`; `load_archive` says what happens when it is not there."""
    return load_archive(CIFAR10, data_dir, progress=progress, environ=environ)


def load_cifar100(
    data_dir: Path, *, progress: Progress | None = None, environ: Mapping[str, str] = os.environ
) -> Dataset:
    """Load CIFAR-100 with its 100 fine classes from `data_dir/cifar-100-python`, in the same way."""
    return load_archive(CIFAR100, data_dir, progress=progress, environ=environ)


def load_archive(
    archive: Archive,
    data_dir: Path,
    *,
    progress: Progress | None = None,
    environ: Mapping[str, str] = os.environ,
    timeout: float = TIMEOUT_S,
) -> Dataset:
    """Load the files of `archive` below `data_dir`, the folder that torchvision calls `root`.

    Missing files are unpacked from the tarball in `data_dir`, which is downloaded first if it is not there. A file
    that is there is never changed: a wrong one, even of those without images, is named in the error. `progress` is
    told the bytes downloaded so far and in all, `timeout` is in seconds. Raises UserError for everything that keeps
    the data from being had.
    """
    folder = data_dir / archive.folder
    if _missing(folder, archive):
        _provide(archive, data_dir, progress, environ, timeout)
    _refuse_wrong({folder / file.name: file.md5 for file in archive.others})  # the rest is checked as it is read
    return Dataset(
        name=archive.name,
        class_names=archive.class_names,
        train=_read_files(archive, folder, archive.train),
        test=_read_files(archive, folder, archive.test),
    )


def where_found(archive: Archive, data_dir: Path) -> str:
    """Say where the files of an archive are, or what would have to be done for them; their md5 is not looked at."""
    folder, tarball = data_dir / archive.folder, data_dir / archive.tarball
    if not (missing := _missing(folder, archive)):
        return f"found: {folder}"
    if tarball.exists():
        return f"found: {tarball}, to be unpacked"
    some = "missing" if len(missing) == len(archive.train + archive.test) else f"{', '.join(missing)} missing"
    return f"{some} in {folder}: would be downloaded"


def _missing(folder: Path, archive: Archive) -> list[str]:
    """Name the files without which nothing can be read. A broken link is there, so it is not written over."""
    return [file.name for file in archive.train + archive.test if not os.path.lexists(folder / file.name)]


def _read_files(archive: Archive, folder: Path, files: tuple[ArchiveFile, ...]) -> LabelledImages:
    # Each file is copied into its place and dropped, so that the pixels are not in memory twice.
    images = torch.empty((sum(file.images for file in files), 3, 32, 32), dtype=torch.uint8)
    labels = torch.empty(len(images), dtype=torch.int64)
    start = 0
    for file in files:
        there = slice(start, start + file.images)
        _read_file(archive, folder / file.name, file.md5, images[there], labels[there])
        start = there.stop
    return LabelledImages(images=images, labels=labels)


def _read_file(archive: Archive, path: Path, md5: str, images: Tensor, labels: Tensor) -> None:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path.absolute()}: {reason_of(error)}") from error
    # The bytes that are hashed are those that are unpickled, whatever happens to the file in between.
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise _wrong(path)
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), path).load()
        np.copyto(images.numpy(), batch[b"data"].reshape(images.shape), casting="no")
        labels.copy_(torch.tensor(batch[archive.label_key]).reshape(labels.shape))
    except UserError:
        raise
    except Exception as error:  # a pickle with other content raises nearly anything
        raise UserError(f"{path.absolute()} does not hold {len(labels)} images of {archive.name} ({error})") from error


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


def _wrong(*paths: Path) -> UserError:
    names = ", ".join(str(path.absolute()) for path in paths)
    return UserError(
        f"wrong md5, so damaged or not official: {names} (left alone; move it away to have it fetched anew)"
    )


def _refuse_wrong(md5s: Mapping[Path, str]) -> None:
    try:
        wrong = [path for path, md5 in md5s.items() if os.path.lexists(path) and md5_of(path) != md5]
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {reason_of(error)}") from error
    if wrong:
        raise _wrong(*wrong)


def _provide(
    archive: Archive, data_dir: Path, progress: Progress | None, environ: Mapping[str, str], timeout: float
) -> None:
    """Complete the folder of the archive from the tarball, and download that first if it is not there."""
    folder, tarball = data_dir / archive.folder, data_dir / archive.tarball
    _refuse_wrong({folder / file.name: file.md5 for file in archive.files})
    with exclusive(data_dir, archive.tarball + ".lock"):
        if not (missing := _missing(folder, archive)):
            return  # another process has provided them meanwhile
        _refuse_wrong({tarball: archive.tarball_md5})
        if not tarball.exists():
            listed = environ.get(archive.urls_variable)
            urls = archive.urls if listed is None else [url for url in re.split(r"[\s,]+", listed) if url]
            try:
                download(urls, tarball, archive.tarball_md5, progress=progress, timeout=timeout)
            except DownloadError as error:
                raise UserError(
                    f"missing in {folder.absolute()}: {', '.join(missing)}; the download failed ({error}); put"
                    f" {archive.tarball} or the folder {archive.folder} into {data_dir.absolute()}, name another place"
                    f" with --data-dir DIR, set {archive.urls_variable} to addresses of the tarball, or use"
                    " --dataset shapes, which needs no files"
                ) from error
        _extract(archive, tarball, folder)


def _extract(archive: Archive, tarball: Path, folder: Path) -> None:
    """Unpack the files of the archive that are not in `folder`, by their exact names and nothing else."""
    files = {f"{archive.folder}/{file.name}": file for file in archive.files}
    try:
        with writing(folder), tarfile.open(tarball, "r:gz") as tar:
            folder.mkdir(exist_ok=True)
            for member in tar:
                file, source = files.get(member.name), tar.extractfile(member) if member.isreg() else None
                if file and source and not os.path.lexists(folder / file.name):
                    _write_checked(source, folder / file.name, file.md5)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"cannot unpack {tarball.absolute()}: {error}") from error
    if missing := _missing(folder, archive):
        raise UserError(f"{tarball.absolute()} lacks {', '.join(missing)}")


def _write_checked(source: IO[bytes], target: Path, md5: str) -> None:
    """Give the file its real name only when it is whole, so that a killed process leaves no half file under it."""
    temporary, digest = target.with_name(target.name + ".part"), hashlib.md5(usedforsecurity=False)
    try:
        with temporary.open("wb") as file:
            while chunk := source.read(_COPY_BYTES):
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != md5:
            raise UserError(f"{target.name} in the tarball has a wrong md5, and was not unpacked")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
