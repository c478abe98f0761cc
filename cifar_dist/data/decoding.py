"""Image files turned into one uint8 array, in parallel."""

import os
import signal
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache, partial
from multiprocessing import get_context, parent_process
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from cifar_dist.config.cpus import usable_cpus
from cifar_dist.config.errors import UserError

Pixels = NDArray[np.uint8]
Size = tuple[int, int]  # width and height in pixels
Range = tuple[Size, Size]  # of the images with the smallest and the largest area
Progress = Callable[[int, int | None], None]  # is told the files decoded so far and in all

_CHUNK = 16  # images that a worker decodes before it reports: few, as they may be photographs
_MANY = 5_000  # images for which it pays to start processes
_MAX_WORKERS = 8
# Told by the content, whatever the suffix says: Pillow's other formats are rare, and one of them starts Ghostscript.
# TGA is the last, as nothing but its values tells that a file is one.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP", "AVIF", "JPEG2000", "QOI", "TGA")


class ImageFile(NamedTuple):
    """A file as it was listed."""

    path: str
    name: str  # relative to the folder of the dataset, with '/': the same on every system
    size: int  # bytes
    mtime_ns: int
    ctime_ns: int  # changes with a file's name too, on systems other than Windows


@cache
def image_formats() -> tuple[str, ...]:
    """Return the names of the formats that are read: those that this build of Pillow knows."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes of images, in lower case; with HEIC and AVIF, so that these are refused and never skipped."""
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in ("MPO", *image_formats())}
    return frozenset((known | {".heic", ".heif", ".avif"}) - {".pfm"})  # floating-point pixels


def name_some(names: Sequence[str]) -> str:
    """Join the first ten names, and say how many more there are."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10:,} more" if len(names) > 10 else "")


def decode_all(files: Sequence[ImageFile], images: Pixels, progress: Progress | None) -> Range:
    """Fill `images`, (N, 3, S, S), and give the range of the sizes. Raises UserError naming what cannot be read."""
    try:
        sizes = decode_by(pool_for(len(files)), files, images, progress)
    except BrokenExecutor:  # a worker was killed
        sizes = decode_by(ThreadPoolExecutor(1), files, images, progress)
    if unreadable := [file.name for file, size in zip(files, sizes, strict=True) if not size]:
        raise UserError(
            f"{len(unreadable):,} of {len(files):,} image files cannot be read (empty, damaged, too large,"
            f" or no image for this Pillow): {name_some(unreadable)}; replace or remove them"
        )
    by_area = sorted({size for size in sizes if size}, key=lambda size: (size[0] * size[1], size))
    return by_area[0], by_area[-1]


def decode_by(
    pool: Executor, files: Sequence[ImageFile], images: Pixels, progress: Progress | None
) -> list[Size | None]:
    """Fill `images` by the workers of a pool; give each image's own size, None for one that cannot be read."""
    sizes: list[Size | None] = []
    starts, side = range(0, len(files), _CHUNK), images.shape[-1]
    paths = ([file.path for file in files[start : start + _CHUNK]] for start in starts)
    with warnings.catch_warnings():  # here, for all threads at once: it is not theirs to change
        _choose_warnings()
        try:
            with _without_main():
                chunks = pool.map(partial(_decode_chunk, size=side), paths, chunksize=8)
            for start, (pixels, found) in zip(starts, chunks, strict=True):
                images[start : start + len(found)] = pixels
                sizes += found
                if progress:
                    progress(len(sizes), len(files))
        finally:
            pool.shutdown(cancel_futures=True)  # so that Ctrl-C does not wait for all the rest
    return sizes


def pool_for(num_files: int) -> Executor:
    """Give threads, or, where there are many images, processes: small ones wait for each other's interpreter lock."""
    workers = min(_MAX_WORKERS, usable_cpus())
    if num_files < _MANY or workers == 1:
        return ThreadPoolExecutor(workers)
    # Not forked: torch's threads may run already.
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_begin_worker)


@contextmanager
def _without_main() -> Iterator[None]:
    """Hide the program that is running from worker processes, which would run a script without a guard once more."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _choose_warnings() -> None:
    """Ignore them: most are about metadata, and one is of photographs above 89 million pixels, which are no bombs yet.

    Above twice as many Pillow refuses, before it takes the memory.
    """
    warnings.simplefilter("ignore")


def _begin_worker() -> None:
    """Let a worker process hear of Ctrl-C from its parent alone, and never outlive it."""
    _choose_warnings()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        """End with the parent."""
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _decode_chunk(paths: Sequence[str], size: int) -> tuple[Pixels, list[Size | None]]:
    """Read images as (N, 3, size, size), and their own sizes: None for one that cannot be read."""
    images: Pixels = np.zeros((len(paths), 3, size, size), dtype=np.uint8)
    sizes: list[Size | None] = [None] * len(paths)
    for index, path in enumerate(paths):
        with suppress(Exception):  # Pillow raises nearly anything for a damaged file
            pixels, sizes[index] = decode(path, size)
            images[index] = pixels.transpose(2, 0, 1)
    return images, sizes


def decode(path: str, size: int) -> tuple[Pixels, Size]:
    """Read the first frame of an image as (size, size, 3) RGB, and its own width and height.

    It is turned as its EXIF block says. What is transparent becomes mid-grey, on which dark and light figures both
    stay visible. 16 bits lose their lower eight. An image of another size has its shorter side brought to `size` and
    its middle cut out, by the rules of torchvision's `Resize` (bilinear, antialiased) and `CenterCrop`.
    Raises OSError, ValueError and nearly anything else where the file is no such image.
    """
    with Image.open(path, formats=image_formats()) as image:
        image.load()
        with suppress(Exception):  # a broken EXIF block leaves the pixels good
            ImageOps.exif_transpose(image, in_place=True)
        original, rgb = image.size, _to_rgb(image)
    if original != (size, size):
        # Only what the crop keeps is resized: the whole of a strip of 1 x 10,000 would become 32 x 320,000.
        longer = int(original[1] > original[0])
        resized = size * original[longer] // original[1 - longer]
        offset = round((resized - size) / 2)
        start, end = (edge * original[longer] / resized for edge in (offset, offset + size))
        box = (0, start, original[0], end) if longer else (start, 0, end, original[1])
        rgb = rgb.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(rgb), original


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("there is no one range for floating-point pixels")
    if image.mode.startswith("I"):  # 16 bits, or as many in 32: Pillow would cut them off at 255
        return Image.fromarray((np.asarray(image).clip(0, 65_535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (128, 128, 128, 255))
        ground.alpha_composite(image.convert("RGBA"))
        return ground.convert("RGB")
    return image.convert("RGB")
