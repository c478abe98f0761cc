"""Image files that belong to no dataset: found where they were named, and decoded as those of class folders are."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cifar_dist.config.errors import UserError, printable
from cifar_dist.data.decoding import ImageFile, Pixels, decode_by, name_some, pool_for
from cifar_dist.data.folder import describe_skipped, files_below

UNREADABLE = "cannot be read: empty, damaged, too large, or no image for this Pillow"


def find_images(paths: Sequence[Path]) -> tuple[list[ImageFile], dict[str, str], str]:
    """List the files that were named, and those below folders, each path once; why others are none; what was skipped.

    In a folder only files with an image's suffix count. Raises UserError where nothing is left to be read.
    """
    found: dict[str, ImageFile] = {}
    refused, skipped = dict[str, str](), Counter[str]()
    for path in paths:
        # A name may be any bytes, and is to be printed.
        shown = printable(os.fsencode(path).decode(errors="backslashreplace"))
        members = [ImageFile(str(path), shown, -1, -1, -1)]
        if os.path.isdir(path):  # noqa: PTH112 - a Path would raise where nobody may look
            below = files_below(str(path), f"{shown}/", skipped, refused)
            members = sorted(below, key=lambda file: file.name)
            if not members:
                refused.setdefault(shown, "holds no images")
        for file in members:
            if not os.path.isfile(file.path):  # noqa: PTH113 - a name may hold bytes that no Path can show
                refused[file.name] = _why_no_file(file.path)
            else:
                found.setdefault(file.path, file)
    if not found:
        raise UserError(f"no image is left: {name_some([f'{name} {reason}' for name, reason in refused.items()])}")
    return list(found.values()), refused, describe_skipped(skipped)


def _why_no_file(path: str) -> str:
    try:
        os.stat(path)  # noqa: PTH116 - a name may hold bytes that no Path can show
    except (FileNotFoundError, NotADirectoryError):
        return "does not exist"
    except (OSError, ValueError) as error:
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"
    return "is no file"


def decode_images(files: Sequence[ImageFile], size: int) -> tuple[Pixels, list[bool]]:
    """Decode files as (N, 3, size, size), and say which of them could be read."""
    images: Pixels = np.zeros((len(files), 3, size, size), dtype=np.uint8)
    sizes = decode_by(pool_for(len(files)), files, images, None)
    return images, [each is not None for each in sizes]
