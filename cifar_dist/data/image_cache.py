"""The decoded pixels of a folder, kept in a file of the user's cache folder: header, images by name, their checksum.

Nothing depends on that file: where it is missing, damaged or cannot be written, the images are decoded.
"""

import os
import struct
import sys
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import numpy as np

from cifar_dist.data.decoding import ImageFile, Pixels, Progress, Range, decode_all

_FORMAT = 3  # to be counted up when the layout of the file changes, or the way an image becomes pixels
_BLOCK_BYTES = 1 << 22
_HEADER = struct.Struct("<4I")  # width and height of the smallest and the largest original


def default_cache_dir(environ: Mapping[str, str] = os.environ, platform: str = sys.platform) -> Path | None:
    """Give $CIFAR_DIST_CACHE, else `cifar-dist` in the platform's folder for caches; None where there is no home."""
    if own := environ.get("CIFAR_DIST_CACHE"):
        return Path(own)
    try:
        if platform == "darwin":
            return Path.home() / "Library/Caches/cifar-dist"
        named = Path(environ.get("LOCALAPPDATA" if platform == "win32" else "XDG_CACHE_HOME", ""))
        # The XDG Base Directory Specification has relative paths ignored.
        return (named if named.is_absolute() else Path.home() / ".cache") / "cifar-dist"
    except RuntimeError:  # a container whose user has neither $HOME nor an account
        return None


def read_images(
    files: Sequence[ImageFile], images: Pixels, *, folder: Path, progress: Progress | None
) -> tuple[Range, bool]:
    """Fill `images`, (N, 3, S, S), with the N files in their order, each as `decode` gives it for S.

    `folder`, to which the files belong, has one cache file. Gives the range of the sizes in the files, and whether
    all came from the cache. Raises UserError naming the files that cannot be read.
    """
    if (cache_dir := default_cache_dir()) is None:
        return decode_all(files, images, progress), False
    listed = "".join(f"\0{file.name}\0{file.size}\0{file.mtime_ns}\0{file.ctime_ns}" for file in files)
    key = blake2b(f"{_FORMAT}\0{images.shape[-1]}{listed}".encode(), digest_size=16).digest()
    stem = blake2b(os.fsencode(folder.resolve()), digest_size=8).hexdigest()
    cache_file = cache_dir / f"{stem}-{key.hex()}.pixels"
    # Views, so that the pixels are never in memory twice.
    parts = np.array_split(images, min(len(files), images.nbytes // _BLOCK_BYTES + 1))
    blocks = [part.data for part in parts]
    if sizes := _load(cache_file, key, blocks):
        return sizes, True
    sizes = decode_all(files, images, progress)
    with suppress(OSError):  # no right to write, no space: it goes without
        _save(cache_file, key, blocks, sizes)
        for old in cache_dir.glob(f"{stem}-*"):  # whoever is writing one of these now only stays without it
            if old != cache_file:
                old.unlink(missing_ok=True)
    return sizes, False


def _load(cache_file: Path, key: bytes, blocks: list[memoryview]) -> Range | None:
    """Fill `blocks`; return None, whatever is in them then, if there is no such file or anything is wrong with it."""
    try:
        with cache_file.open("rb") as file:
            numbers = _HEADER.unpack(header := file.read(_HEADER.size))
            checksum = zlib.crc32(header, zlib.crc32(key))
            for block in blocks:
                file.readinto(block)  # of a file that is too short the checksum differs
                checksum = zlib.crc32(block, checksum)
            if file.read(5) != checksum.to_bytes(4):
                return None
    except (OSError, struct.error):  # the last: it is too short
        return None
    return (numbers[0], numbers[1]), (numbers[2], numbers[3])


def _save(cache_file: Path, key: bytes, blocks: list[memoryview], sizes: Range) -> None:
    """Write the file under another name first, so that its own name never stands for a part of it. Raises OSError."""
    cache_file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(".part", cache_file.stem, cache_file.parent)
    try:
        with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor is no path
            file.write(header := _HEADER.pack(*sizes[0], *sizes[1]))
            checksum = zlib.crc32(header, zlib.crc32(key))
            for block in blocks:
                file.write(block)
                checksum = zlib.crc32(block, checksum)
            file.write(checksum.to_bytes(4))
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(cache_file)
    finally:
        Path(temporary).unlink(missing_ok=True)
