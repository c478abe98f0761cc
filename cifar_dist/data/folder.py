"""Images in class folders, listed, split and read into memory.

Two layouts are understood, as README.md shows them: parts that hold class folders, and class folders alone. As
for torchvision's ImageFolder, what lies deeper in a class folder counts, too, if some images lie in it directly.
"""

import math
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import psutil

from cifar_dist.config.errors import UserError, printable
from cifar_dist.config.plan import DatasetSizes
from cifar_dist.data.decoding import ImageFile, Progress, image_suffixes, name_some
from cifar_dist.data.download import reason_of
from cifar_dist.data.image_cache import read_images

if TYPE_CHECKING:
    from cifar_dist.data.dataset import Dataset

# torch is imported by `load_folder` alone: a folder that is no dataset is refused without it.
_PARTS = ("train", "test", "val")
_PART_LIKE = frozenset((*_PARTS, "training", "testing", "valid", "validation"))
_TEST_SHARE = 5  # one in so many

Classes = dict[str, list[ImageFile]]
"""The files of each class, both in the order of their names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Listing:
    """The files of a folder."""

    parts: dict[str, Classes]
    """"train", "test" and, if it is there besides, "val"."""
    is_flat: bool
    """Whether the test images were chosen here."""
    skipped: str
    """Which files of class folders are not read, in words; empty for none."""


def load_folder(
    path: Path, *, image_size: int, for_training: bool = True, progress: Progress | None = None
) -> "Dataset":
    """Load the images below `path` as (N, 3, image_size, image_size) uint8, in the order of (class, relative path).

    Where the folder has no test set, each image's name decides whether it is a test image, whatever the seed of a run.
    `for_training=False` allows a folder without training images. `progress` is told the files decoded so far and in
    all. Raises UserError where the folder is no dataset.
    """
    import torch

    from cifar_dist.data.dataset import Dataset, LabelledImages

    listing = list_folder(path, for_training=for_training)
    parts = listing.parts
    files = [file for classes in parts.values() for members in classes.values() for file in members]
    check_memory(len(files), image_size)
    # One array for all parts: they are views of it, and no pixel is in memory twice.
    images = torch.empty((len(files), 3, image_size, image_size), dtype=torch.uint8)
    (smallest, largest), from_cache = read_images(files, images.numpy(), folder=path, progress=progress)

    names = tuple(sorted({name for classes in parts.values() for name in classes}))
    loaded, start = {}, 0
    for part, classes in parts.items():
        counts = torch.tensor([len(classes.get(name, ())) for name in names])
        labels = torch.repeat_interleave(torch.arange(len(names)), counts)
        loaded[part] = LabelledImages(images=images[start : start + len(labels)], labels=labels)
        start += len(labels)
    sizes = " to ".join(f"{width}x{height}" for width, height in dict.fromkeys((smallest, largest)))
    together = torch.cat([part.labels for part in loaded.values()])
    skipped = f"; {listing.skipped}" if listing.skipped else ""
    return Dataset(
        name=printable(path.name if path.name not in ("", "..") else path.resolve().name),
        class_names=names,
        train=loaded["train"],
        test=loaded["test"],
        validation=loaded.get("val"),
        whole=LabelledImages(images=images, labels=together) if listing.is_flat else None,
        origin=f"{len(files):,} files of {sizes} pixels, resized and cropped to {image_size}x{image_size},"
        f" {images.nbytes / 2**20:,.1f} MiB in memory{' (read from the cache)' if from_cache else ''}{skipped}",
    )


def folder_sizes(path: Path) -> DatasetSizes:
    """Count a folder's images without reading one. Raises UserError as `load_folder` does."""
    parts = list_folder(path, for_training=True).parts
    train, test, own = (sum(map(len, parts.get(part, {}).values())) for part in _PARTS)
    return DatasetSizes(num_train=train, num_test=test, num_validation=own, num_classes=len(parts["train"]))


def list_folder(path: Path, *, for_training: bool) -> _Listing:
    """List a folder's files. Raises UserError where they are no dataset."""
    # A class may well be called train, but then it holds images and no folders.
    folders, skipped = _subfolders(path).items(), Counter[str]()
    names = {name for name, entry in folders if name.lower() in _PART_LIKE and _subfolders(entry.path)}
    parts: dict[str, Classes]
    if names == {"train"} or not names <= set(_PARTS) or (for_training and names and "train" not in names):
        raise UserError(
            f"{path.absolute()} holds {', '.join(sorted(names))} with folders in them: expected are train/CLASS and"
            " test/CLASS or val/CLASS (or both), by these names, or else CLASS folders alone"
        )
    if names:
        parts = {part: _list_classes(path / part, f"{part}/", skipped) for part in _PARTS if part in names}
        if "test" not in parts:
            parts["test"] = parts.pop("val")
        parts = {"train": {}} | parts
    else:
        parts = _split(_list_classes(path, "", skipped))
    if for_training:
        _check_training(path, parts)
    for part, classes in parts.items():
        if part != "train" and not any(classes.values()):
            raise UserError(f"{path.absolute()} has no images for {part}")
    return _Listing(parts=parts, is_flat=not names, skipped=describe_skipped(skipped))


def describe_skipped(skipped: Mapping[str, int]) -> str:
    """Return the numbers of skipped files by suffix in words; an empty text where there are none."""
    by_suffix = [f"{count:,} {suffix or 'without a suffix'}" for suffix, count in sorted(skipped.items())]
    return f"{sum(skipped.values()):,} other files skipped ({name_some(by_suffix)})" if skipped else ""


def _split(classes: Classes) -> dict[str, Classes]:
    """Choose a fifth of each class as test images, each by its name: new images move few others."""
    parts: dict[str, Classes] = {"train": {}, "test": {}}
    for name, members in classes.items():
        count = max(round(len(members) / _TEST_SHARE), min(1, len(members) - 1), 0)
        by_lot = sorted(members, key=lambda file: blake2b(f"folder split/{file.name}".encode(), digest_size=8).digest())
        chosen = {file.path for file in by_lot[:count]}
        parts["train"][name] = [file for file in members if file.path not in chosen]
        parts["test"][name] = [file for file in members if file.path in chosen]
    return parts


def _check_training(path: Path, parts: Mapping[str, Classes]) -> None:
    where, train = path.absolute(), parts["train"]
    files = [PurePosixPath(file.name) for members in train.values() for file in members]
    class_folders = {*train, *(f"train/{name}" for name in train)}
    if files and not any(str(file.parent) in class_folders for file in files):
        likely = Counter(file.parent.parent for file in files).most_common(1)[0][0]
        likely = likely.parent if likely.name.lower() in _PART_LIKE else likely
        raise UserError(
            f"no class folder of {where} holds an image itself, only folders do: name the folder whose folders are the"
            f" classes ({where / likely}, by the looks of it), or move the images up"
        )
    if len(train) < 2:
        raise UserError(f"{where} holds {len(train)} class folders for training: a dataset needs two or more")
    if empty := [name for name, members in train.items() if not members]:
        raise UserError(f"there are no training images in {where} of {name_some(empty)}: add some, or remove the class")
    for part, classes in parts.items():
        if unknown := [name for name in classes if name not in train]:
            raise UserError(f"{where} has classes for {part} that train/ lacks: {name_some(unknown)}")


def check_memory(num_files: int, image_size: int) -> None:
    """Raise UserError if there is no room for the images."""
    needed, available = num_files * 3 * image_size**2, psutil.virtual_memory().available
    if needed > available:
        raise UserError(
            f"{num_files:,} images of {image_size} x {image_size} take {needed / 2**20:,.0f} MiB, and"
            f" {available / 2**20:,.0f} MiB of memory are available: choose a smaller image_size"
            f" (at most {math.isqrt(available // (3 * num_files))}), or use fewer images"
        )


def _list_classes(folder: Path, prefix: str, skipped: Counter[str]) -> Classes:
    return {
        name: sorted(files_below(entry.path, f"{prefix}{name}/", skipped), key=lambda file: file.name)
        for name, entry in sorted(_subfolders(folder).items())
    }


def _subfolders(folder: Path | str) -> dict[str, os.DirEntry[str]]:
    found: dict[str, os.DirEntry[str]] = {}
    for entry in filter(_is_folder, _entries(folder)):
        other = found.setdefault(_portable(entry.name), entry)
        if other is not entry:
            raise UserError(f"{Path(folder).absolute()} has two folders that are both called {_portable(entry.name)}")
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or to where nobody may look
        return False


def files_below(
    folder: str,
    prefix: str,
    skipped: Counter[str],
    unreadable: dict[str, str] | None = None,
    above: tuple[Path, ...] = (),
) -> Iterator[ImageFile]:
    """Yield all image files at any depth; `prefix` is what their names begin with, `above` the folders come through.

    Other files are counted in `skipped`, by suffix. Folders that cannot be listed are put into `unreadable`, with the
    reason; without it they are a UserError.
    """
    here = Path(folder).resolve()
    if here in above:  # a link to where we come from
        return
    try:
        entries = _entries(folder)
    except UserError as error:
        if unreadable is None:
            raise
        unreadable[prefix.rstrip("/")] = f"is left out: {error}"
        return
    for entry in entries:
        name = prefix + _portable(entry.name)
        if _is_folder(entry):
            yield from files_below(entry.path, f"{name}/", skipped, unreadable, (*above, here))
        elif (suffix := PurePosixPath(name).suffix.lower()) not in image_suffixes():
            skipped[suffix] += 1
        else:
            try:
                status = entry.stat()
            except OSError:  # a broken link, to be named with the other files that cannot be read
                yield ImageFile(entry.path, name, -1, -1, -1)
            else:
                if stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
                    yield ImageFile(entry.path, name, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _entries(folder: Path | str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"cannot read the folder {Path(folder).absolute()}: {reason_of(error)}") from error


def _portable(name: str) -> str:
    """Return a name as valid, composed Unicode of one line: macOS may decompose it, and Linux allows any bytes."""
    if name.isascii() and name.isprintable():  # nearly always, and a folder may have very many
        return name
    return printable(unicodedata.normalize("NFC", os.fsencode(name).decode(errors="backslashreplace")))
