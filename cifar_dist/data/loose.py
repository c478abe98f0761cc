"""Image files that belong to no dataset: found where they were named, and decoded as those of class folders are."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from cifar_dist.config.errors import UserError
from cifar_dist.data.folder import OTHER_SUFFIXES, files_below
from cifar_dist.data.image_cache import ImageFile, Pixels, decode_by

UNREADABLE = "cannot be read: empty, damaged, too large or no image"


def find_images(paths: Sequence[Path]) -> tuple[list[ImageFile], dict[str, str]]:
    """List the files that were named, and those below folders, each once; and why others are none.

    In a folder only files with an image's suffix count. Raises UserError where there is no file at all.
    """
    found: dict[Path, ImageFile] = {}
    refused: dict[str, str] = {}
    for path in paths:
        members = [ImageFile(str(path), str(path), -1, -1)]
        if path.is_dir():
            members = sorted(files_below(str(path), f"{path}/"), key=lambda file: file.name)
            if not members:
                refused[str(path)] = "holds no images"
        for file in members:
            if file.name.lower().endswith(OTHER_SUFFIXES):
                refused[file.name] = "HEIC and AVIF images cannot be read: convert it to PNG or JPEG"
            elif not os.path.isfile(file.path):  # noqa: PTH113 - a name may hold bytes that no Path can show
                refused[file.name] = "is no file" if Path(file.path).exists() else "does not exist"
            else:
                found.setdefault(Path(file.path).resolve(), file)
    if not found and not refused:
        raise UserError("no images were named")
    return list(found.values()), refused


def decode_images(files: Sequence[ImageFile], size: int) -> tuple[Pixels, list[bool]]:
    """Decode files as (N, 3, size, size), and say which of them could be read."""
    images: Pixels = np.zeros((len(files), 3, size, size), dtype=np.uint8)
    sizes = decode_by(ThreadPoolExecutor(os.cpu_count()), files, images, None)
    return images, [each is not None for each in sizes]
