"""The official CIFAR-10 and CIFAR-100 files: downloaded, checked and read without running pickled code.

torch is imported by `load_archive` alone, so that missing files are downloaded before it.
"""

import hashlib
import io
import os
import pickle
import re
import tarfile
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock

from cifar_dist.config.errors import UserError
from cifar_dist.data.download import DownloadError, Progress, download, md5_of, reason_of, writing_data

if TYPE_CHECKING:
    from cifar_dist.data.dataset import Dataset


@dataclass(frozen=True, kw_only=True, slots=True)
class Archive:
    """An official tarball, its files and their md5."""

    name: str
    class_names: tuple[str, ...]
    folder: str  # in the tarball, and below the data folder
    train: dict[str, str]  # md5 by file name, in the official order
    test: dict[str, str]
    label_key: bytes
    tarball: str
    tarball_md5: str


# PaddlePaddle's mirror has the same bytes; the official server sends 66 to 85 kB/s (pytorch/vision#9536).
HOSTS = ("https://dataset.bj.bcebos.com/cifar", "https://www.cs.toronto.edu/~kriz")

# The md5 of the tarballs are those on https://www.cs.toronto.edu/~kriz/cifar.html, those of the files torchvision's.
CIFAR10 = Archive(
    name="cifar10",
    class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    folder="cifar-10-batches-py",
    train={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    test={"test_batch": "40351d587109b95175f43aff81a1287e"},
    label_key=b"labels",
    tarball="cifar-10-python.tar.gz",
    tarball_md5="c58f30108f718f92721af3b95e74349a",
)

CIFAR100 = Archive(
    name="cifar100",
    class_names=tuple(
        """
        apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel
        can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur
        dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion
        lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree
        pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea
        seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table
        tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman
        worm
        """.split()
    ),
    folder="cifar-100-python",
    train={"train": "16019d7e3df5f24257cddd939b257f8d"},
    test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    label_key=b"fine_labels",
    tarball="cifar-100-python.tar.gz",
    tarball_md5="eb9058c3a382ffc7106e4002c42a8d85",
)

ARCHIVES = {archive.name: archive for archive in (CIFAR10, CIFAR100)}


def load_archive(archive: Archive, data_dir: Path, *, progress: Progress | None = None) -> "Dataset":
    """Load the files of `archive`, provided as `provide` does. Raises UserError that names a wrong file."""
    import torch

    from cifar_dist.data.dataset import Dataset, LabelledImages

    folder, parts = provide(archive, data_dir, progress=progress), []
    for md5s in (archive.train, archive.test):
        batches = [_read_file(folder / name, md5) for name, md5 in md5s.items()]
        images = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32)
        labels = torch.tensor([label for batch in batches for label in batch[archive.label_key]])
        parts.append(LabelledImages(images=torch.from_numpy(images), labels=labels))
    return Dataset(name=archive.name, class_names=archive.class_names, train=parts[0], test=parts[1])


def provide(archive: Archive, data_dir: Path, *, progress: Progress | None = None) -> Path:
    """Return the folder of the files; missing ones are unpacked from the tarball, downloaded if need be.

    `data_dir` is the folder that torchvision calls `root`, or the files' own folder. Existing files are never changed.
    `progress` is called with the downloaded and the total bytes. Raises UserError.
    """
    folder, tarball = _places(archive, data_dir)
    if not _missing(archive, folder):
        return folder
    lock = tarball.with_name(f".{tarball.name}.lock")
    created = [each for each in (tarball.parent, *tarball.parent.parents) if not each.exists()]
    with writing_data(tarball.parent):
        tarball.parent.mkdir(parents=True, exist_ok=True)
    try:
        with writing_data(tarball.parent), FileLock(lock):
            if missing := _missing(archive, folder):  # no other process has provided them meanwhile
                _provide_tarball(archive, tarball, progress, missing)
                _unpack(archive, tarball, folder)
    finally:  # a process that still waits for the lock looks for the files again
        with suppress(OSError):
            lock.unlink()
            for each in created:
                each.rmdir()
    return folder


def where_found(archive: Archive, data_dir: Path) -> str:
    """Describe where the files are, or what `provide` would do. Checks no md5."""
    folder, tarball = _places(archive, data_dir)
    if not (missing := _missing(archive, folder)):
        return f"found: {folder}"
    if tarball.exists():
        return f"found: {tarball}, to be unpacked"
    if not tarball.parent.exists():
        return f"the folder {tarball.parent} is not there yet: a training makes it, and downloads the files"
    names = f"{', '.join(missing)} " if folder.exists() else ""
    return f"{names}missing in {folder}: would be downloaded"


def _places(archive: Archive, data_dir: Path) -> tuple[Path, Path]:
    """Return the paths of folder and tarball, either of which may be named instead of `data_dir`."""
    root = data_dir.parent if data_dir.name in (archive.folder, archive.tarball) else data_dir
    return root / archive.folder, root / archive.tarball


def _missing(archive: Archive, folder: Path) -> list[str]:
    return [name for name in archive.train | archive.test if not os.path.lexists(folder / name)]


def _check_md5(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise UserError(
            f"wrong md5, so damaged or not official: {path.absolute()} (left alone; move it away to have it downloaded)"
        )


def _provide_tarball(archive: Archive, tarball: Path, progress: Progress | None, missing: list[str]) -> None:
    if tarball.exists():
        return _check_md5(tarball, md5_of(tarball), archive.tarball_md5)
    variable = f"CIFAR_DIST_{archive.name.upper()}_URLS"
    urls = os.environ.get(variable, " ".join(f"{host}/{archive.tarball}" for host in HOSTS))
    try:
        download(re.findall(r"[^\s,]+", urls), tarball, archive.tarball_md5, progress=progress)
    except DownloadError as error:
        data_dir = tarball.absolute().parent
        raise UserError(
            f"the download failed ({error}), and {data_dir / archive.folder} lacks {', '.join(missing)}; put"
            f" {archive.tarball} or the folder {archive.folder} into {data_dir}, name another place with --data-dir"
            f" DIR, set {variable} to addresses of the tarball, or use --dataset shapes, which needs no files"
        ) from error


def _unpack(archive: Archive, tarball: Path, folder: Path) -> None:
    """Unpack what `folder` lacks; each file is moved into place when it is whole."""
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary, tarfile.open(tarball, "r:gz") as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # new in Python 3.11.4
        tar.extractall(temporary)
        for file in Path(temporary, archive.folder).iterdir():
            if not os.path.lexists(folder / file.name):
                file.replace(folder / file.name)


def _read_file(path: Path, md5: str) -> dict[bytes, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path.absolute()}: {reason_of(error)}") from error
    # The bytes that are hashed are those that are unpickled, whatever happens to the file in between.
    _check_md5(path, hashlib.md5(content, usedforsecurity=False).hexdigest(), md5)
    return _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles NumPy arrays of Python 2 and refuses every other object."""

    def find_class(self, module: str, name: str, /) -> Any:
        """Return one of the three names an array is made of. Raises UserError for any other."""
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]  # NumPy 2 moved it, and warns of the old place
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise UserError(f"a dataset file would run code ({module}.{name}) and was refused: do not use it")
