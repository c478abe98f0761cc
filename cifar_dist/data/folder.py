"""Images in class folders: listed without torch, split, and decoded in threads.

The layouts are those of torchvision's ImageFolder: `DIR/CLASS/*`, or `DIR/train/CLASS/*` beside `test/` or `val/`.
"""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from hashlib import blake2b
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image, ImageOps

from cifar_dist.config.cpus import usable_cpus
from cifar_dist.config.errors import UserError, printable
from cifar_dist.config.plan import DatasetSizes
from cifar_dist.data.download import Progress, reason_of

if TYPE_CHECKING:
    from cifar_dist.data.dataset import Dataset

UNREADABLE = "cannot be read: empty, damaged, too large, or no image for this Pillow"

_VALIDATION = ("val", "valid", "validation")
_PARTS = ("train", "test", *_VALIDATION)
_TEST_SHARE = 5  # one in so many images of a folder without parts
_MAX_WORKERS = 8
_CHUNK = 64  # images that a thread decodes before progress is reported
# Identified by content. Pillow's other formats are rare, and EPS starts Ghostscript. TGA has no signature: it is last.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP", "AVIF", "JPEG2000", "QOI", "TGA")

Pixels = NDArray[np.uint8]


class ImageFile(NamedTuple):
    """A file, and its name relative to the dataset's folder, with '/'."""

    name: str
    path: str


Classes = dict[str, list[ImageFile]]
"""The files of each class, both sorted by name."""


def load_folder(
    path: Path, *, image_size: int, for_training: bool = True, progress: Progress | None = None
) -> "Dataset":
    """Load the images below `path`, in the order of (class, relative path), resized to `image_size`.

    `for_training=False` allows a folder without training images. `progress` is called with the number of decoded files
    and of all. Raises UserError if the folder is no dataset.
    """
    import torch

    from cifar_dist.data.dataset import Dataset, LabelledImages

    parts, is_flat, skipped = list_folder(path, for_training=for_training)
    names = sorted({name for classes in parts.values() for name in classes})
    indices = {name: index for index, name in enumerate(names)}
    members = [(file, indices[name]) for classes in parts.values() for name in classes for file in classes[name]]
    files = [file for file, _ in members]
    check_memory(len(files), image_size)
    pixels, was_read = decode_images(files, image_size, progress)
    if unreadable := [file.name for file, ok in zip(files, was_read, strict=True) if not ok]:
        raise UserError(
            f"{len(unreadable):,} of {len(files):,} image files cannot be read (empty, damaged, too large, or no image"
            f" for this Pillow): {name_some(unreadable)}; replace or remove them"
        )
    whole = LabelledImages(images=torch.from_numpy(pixels), labels=torch.tensor([label for _, label in members]))
    sizes = [sum(map(len, classes.values())) for classes in parts.values()]
    views = zip(torch.split(whole.images, sizes), torch.split(whole.labels, sizes), strict=True)
    train, test, *own = (LabelledImages(images=images, labels=labels) for images, labels in views)
    summary = f"{len(files):,} image files, resized and cropped to {image_size}x{image_size} pixels"
    return Dataset(
        name=_shown(path.name if path.name not in ("", "..") else path.resolve().name),
        class_names=tuple(names),
        train=train,
        test=test,
        validation=own[0] if own else None,
        whole=whole if is_flat else None,
        origin="; ".join(filter(None, (summary, skipped))),
    )


def folder_sizes(path: Path) -> DatasetSizes:
    """Count a folder's images without reading one. Raises UserError as `load_folder` does."""
    parts, *_ = list_folder(path, for_training=True)
    train, test, own = (sum(map(len, parts.get(part, {}).values())) for part in ("train", "test", "val"))
    return DatasetSizes(num_train=train, num_test=test, num_validation=own, num_classes=len(parts["train"]))


def list_folder(path: Path, *, for_training: bool) -> tuple[dict[str, Classes], bool, str]:
    """List a folder's images. Raises UserError if it is no dataset.

    Returns the parts `train`, `test` and, if there is one besides, `val`; whether the folder has no parts, so that test
    images are drawn from all; and a description of the files that are no images, empty for none.
    """
    path, skipped = path.absolute(), Counter[str]()
    try:
        folders = _subfolders(path)
        # A class may be called train, but then it holds images and no folders.
        named = [name for name in _PARTS if name in folders and _subfolders(folders[name])]
        is_flat = not named or (for_training and "train" not in named)
        if is_flat:
            parts = _split(_list_classes(path, "", skipped))
        else:
            listed = {name: _list_classes(folders[name], f"{name}/", skipped) for name in named}
            # With both, test/ is the test set and val/ the validation set; else either is the test set.
            held_out = [listed[name] for name in ("test", *_VALIDATION) if name in listed]
            parts = {"train": listed.get("train", {}), **dict(zip(("test", "val"), held_out, strict=False))}
    except OSError as error:
        raise UserError(f"cannot read the folder {_shown(error.filename)}: {reason_of(error)}") from error
    if for_training:
        _check_training(path, parts, depth=1 if is_flat else 2)
    for part in ("test", *parts):
        if part != "train" and not any(parts.get(part, {}).values()):
            raise UserError(f"{path} has no images for {part}")
    return parts, is_flat, _describe(skipped)


def _split(classes: Classes) -> dict[str, Classes]:
    """Choose a fifth of each class as test images, by a hash of their names, so that new images move few others."""
    parts: dict[str, Classes] = {"train": {}, "test": {}}
    for name, files in classes.items():
        count = max(round(len(files) / _TEST_SHARE), min(1, len(files) - 1), 0)
        by_hash = sorted(files, key=lambda file: blake2b(f"folder split/{file.name}".encode(), digest_size=8).digest())
        parts["train"][name], parts["test"][name] = sorted(by_hash[count:]), sorted(by_hash[:count])
    return parts


def _check_training(path: Path, parts: Mapping[str, Classes], depth: int) -> None:
    train = parts["train"]
    files = [file for members in train.values() for file in members]
    if files and all(file.name.count("/") > depth for file in files):
        likely = Counter(PurePath(file.name).parents[1] for file in files).most_common(1)[0][0]
        likely = likely.parent if likely.name in _PARTS else likely
        raise UserError(
            f"no class folder of {path} holds an image itself, only folders do: name the folder whose folders are the"
            f" classes, perhaps {path / likely}, or move the images up"
        )
    if not any(train.values()):
        raise UserError(f"no folder in {path} holds an image: name the folder whose subfolders are the classes")
    if len(train) < 2:
        raise UserError(f"{path} holds 1 class folder for training: a dataset needs two or more")
    if empty := [name for name, members in train.items() if not members]:
        raise UserError(f"there are no training images in {path} of {name_some(empty)}: add some, or remove the class")
    if unknown := sorted({name for classes in parts.values() for name in classes if name not in train}):
        raise UserError(f"{path} has classes that train/ lacks: {name_some(unknown)}")


def check_memory(num_images: int, image_size: int) -> None:
    """Raise UserError if the decoded images do not fit into memory."""
    needed, available = num_images * 3 * image_size**2, psutil.virtual_memory().available
    if needed > available:
        raise UserError(
            f"{num_images:,} images of {image_size} x {image_size} take {needed / 2**20:,.0f} MiB, and"
            f" {available / 2**20:,.0f} MiB of memory are available: choose a smaller image_size or use fewer images"
        )


def find_images(paths: Sequence[Path]) -> tuple[list[ImageFile], dict[str, str], str]:
    """Find image files that belong to no dataset: as named, and below named folders, each path once.

    Returns them, the reason for each that cannot be read, and a description of what was skipped in folders. Raises
    UserError if no file is left.
    """
    found: dict[str, ImageFile] = {}
    refused, skipped = dict[str, str](), Counter[str]()

    def refuse(error: OSError) -> None:
        missing = isinstance(error, FileNotFoundError)
        refused[_shown(error.filename)] = "does not exist" if missing else f"cannot be read: {reason_of(error)}"

    for path in paths:
        name = _shown(path)
        is_file = os.path.isfile(path)  # noqa: PTH113 - a Path raises for a name that is too long
        files = [ImageFile(name, str(path))] if is_file else _files_below(path, f"{name}/", skipped, refuse)
        if not files:
            refused.setdefault(name, "holds no images")
        for file in files:
            found.setdefault(file.path, file)
    if not found:
        raise UserError(f"no image to predict: {name_some([f'{name} {reason}' for name, reason in refused.items()])}")
    return list(found.values()), refused, _describe(skipped)


def name_some(names: Sequence[str]) -> str:
    """Join the first ten names and the number of the others."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10:,} more" if len(names) > 10 else "")


def _describe(skipped: Mapping[str, int]) -> str:
    by_suffix = [f"{count:,} {suffix or 'without a suffix'}" for suffix, count in sorted(skipped.items())]
    return f"{sum(skipped.values()):,} other files skipped ({name_some(by_suffix)})" if skipped else ""


def _shown(name: str | Path) -> str:
    """Return a name, which may be any bytes, as printable Unicode."""
    return printable(os.fsencode(name).decode(errors="backslashreplace"))


def _subfolders(folder: Path) -> dict[str, Path]:
    return {
        _shown(entry.name): entry
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if not entry.name.startswith(".") and entry.is_dir()
    }


def _list_classes(folder: Path, prefix: str, skipped: Counter[str]) -> Classes:
    def fail(error: OSError) -> None:
        raise error

    folders = _subfolders(folder).items()
    return {name: _files_below(entry, f"{prefix}{name}/", skipped, fail) for name, entry in folders}


def _files_below(
    folder: Path, prefix: str, skipped: Counter[str], on_error: Callable[[OSError], None]
) -> list[ImageFile]:
    """Return the images at any depth, sorted by name; other files are counted in `skipped`, by suffix."""
    files, visited = list[ImageFile](), set[str]()
    for root, subfolders, names in os.walk(folder, onerror=on_error, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        if (real := os.path.realpath(root)) in visited:  # a link back
            subfolders.clear()
            continue
        visited.add(real)
        below = prefix + "".join(f"{part}/" for part in Path(root).relative_to(folder).parts)
        for name in names:
            suffix = PurePath(name).suffix.lower()
            if name.startswith("."):
                continue
            if suffix in _formats_and_suffixes()[1]:
                files.append(ImageFile(_shown(f"{below}{name}"), f"{root}/{name}"))
            else:
                skipped[suffix] += 1
    return sorted(files)


@cache
def _formats_and_suffixes() -> tuple[tuple[str, ...], frozenset[str]]:
    """Return the formats of `_FORMATS` that this build of Pillow knows, and their suffixes in lower case."""
    Image.init()
    formats = tuple(name for name in _FORMATS if name in Image.OPEN)
    known = Image.registered_extensions().items()
    return formats, frozenset(suffix for suffix, name in known if name in ("MPO", *formats))


def decode_images(files: Sequence[ImageFile], size: int, progress: Progress | None = None) -> tuple[Pixels, list[bool]]:
    """Decode files as (N, 3, size, size) uint8, in threads; return also which could be read."""
    images: Pixels = np.zeros((len(files), 3, size, size), dtype=np.uint8)
    was_read = [False] * len(files)

    def decode_chunk(start: int) -> None:
        for index in range(start, min(start + _CHUNK, len(files))):
            with suppress(Exception):  # Pillow raises nearly anything for a damaged file
                images[index] = decode(files[index].path, size).transpose(2, 0, 1)
                was_read[index] = True

    pool = ThreadPoolExecutor(min(_MAX_WORKERS, usable_cpus()))
    with warnings.catch_warnings():  # mostly about metadata; filters are global, so they are set here for all threads
        warnings.simplefilter("ignore")
        try:
            for number, _ in enumerate(pool.map(decode_chunk, range(0, len(files), _CHUNK)), start=1):
                if progress:
                    progress(min(number * _CHUNK, len(files)), len(files))
        finally:
            pool.shutdown(cancel_futures=True)  # so that Ctrl-C does not wait for the rest
    return images, was_read


def decode(path: str, size: int) -> Pixels:
    """Read the first frame of an image as (size, size, 3) RGB, turned as its EXIF block says.

    Another size is resized and cropped as by torchvision's Resize (bilinear, antialiased) and CenterCrop. Raises nearly
    anything if the file is no such image.
    """
    with Image.open(path, formats=_formats_and_suffixes()[0]) as image:
        image.load()
        with suppress(Exception):  # a broken EXIF block leaves the pixels good
            ImageOps.exif_transpose(image, in_place=True)
        rgb = _to_rgb(image)
    if rgb.size != (size, size):
        # Only what the crop keeps is resized: the whole of a strip of 1 x 10,000 would become 32 x 320,000.
        (width, height), shorter, longer = rgb.size, min(rgb.size), max(rgb.size)
        resized = size * longer // shorter
        offset = round((resized - size) / 2)
        start, end = (edge * longer / resized for edge in (offset, offset + size))
        box = (0, start, width, end) if height > width else (start, 0, end, height)
        rgb = rgb.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(rgb)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB; transparent parts become mid-grey, and 16 bits keep their upper eight."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    if image.mode.startswith("I"):  # Pillow would clip at 255
        return Image.fromarray((np.asarray(image).clip(0, 65_535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (128, 128, 128, 255))
        ground.alpha_composite(image.convert("RGBA"))
        return ground.convert("RGB")
    return image.convert("RGB")
