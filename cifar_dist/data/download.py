"""Fetch one file over HTTP so that a broken connection, a lying mirror or a full disk costs as little as possible.

Bytes go to `NAME.part` next to the target, and a later attempt, address or start of the program goes on from there.
The file gets its real name only when its md5 is right.
"""

import hashlib
import os
import re
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from http.client import HTTPException
from io import FileIO
from itertools import takewhile
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

from cifar_dist.config.errors import UserError
from cifar_dist.config.files import writing

fcntl: Any = None
with suppress(ImportError):  # Windows has none
    import fcntl

Progress = Callable[[int, int | None], None]
"""Is told the bytes so far and the bytes in all (None where the server does not say)."""

_TIMEOUT_S = 10.0  # for a connection, and for the next bytes of one
_PAUSE_S = 1.0  # before an address is asked again that has brought nothing
_CHUNK_BYTES = 1 << 18
_IDLE_ATTEMPTS = 2  # attempts in a row that bring nothing, then the address is given up
_LOCK_ATTEMPTS = 1000  # each lost one means that another process came and went meanwhile


class DownloadError(Exception):
    """The file could not be had; the text says why, shortly."""


def reason_of(error: Exception) -> str:
    """Give the short reason in an exception of the operating system or of urllib, without numbers and file names."""
    if isinstance(error, URLError) and isinstance(error.reason, Exception):
        return reason_of(error.reason)
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def md5_of(path: Path) -> str:
    """Give the md5 of a file as hexadecimal digits. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()


def writing_data(path: Path) -> AbstractContextManager[None]:
    """Give the context in which what the disk refuses (it is full, read-only) becomes a UserError that names `path`."""
    return writing(path.absolute(), "free space or mend the rights there, or name another folder with --data-dir DIR")


@contextmanager
def exclusive(folder: Path, lock_name: str) -> Iterator[None]:
    """Hold `folder`, made if need be, against other processes that do the same; wait while one of them holds it.

    On leaving, the lock file goes, and so do the folders made here that stayed empty. Raises UserError if the folder
    cannot be made or written. Where the platform has no `fcntl`, nobody waits.
    """
    made: list[Path] = []
    descriptor = None
    try:
        with writing_data(folder):
            descriptor = _take_lock(folder, folder / lock_name, made)
        yield
    finally:
        # The lock goes last: without it, the names could be those that another process has just made.
        if descriptor is not None:
            with suppress(OSError):
                (folder / lock_name).unlink()
        for path in made:
            with suppress(OSError):
                path.rmdir()
        if descriptor is not None:
            os.close(descriptor)


def _take_lock(folder: Path, lock: Path, made: list[Path]) -> int:
    """Open and lock `lock`; put the folders that had to be made into `made`, the deepest first."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_TEMPORARY", 0)  # Windows removes no open file but by itself
    for _ in range(_LOCK_ATTEMPTS):
        made[:0] = takewhile(lambda path: not path.exists(), (folder, *folder.parents))
        # The process waited for removes its lock file, perhaps the folder too: a lock on a removed file holds nobody.
        with suppress(FileNotFoundError):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except FileExistsError:  # a file of this name, or a folder that was removed since
                if folder.is_file():
                    raise
                continue
            descriptor, held = os.open(lock, flags, 0o666), False
            try:
                if fcntl is not None:
                    # Some network file systems know no locks: rather none than no data, the md5 guards the result.
                    with suppress(OSError):
                        fcntl.flock(descriptor, fcntl.LOCK_EX)
                held = os.path.samestat(os.fstat(descriptor), lock.stat())
            finally:
                if not held:
                    os.close(descriptor)
            if held:
                return descriptor
    raise OSError(f"could not keep {lock}")


def download(urls: Sequence[str], target: Path, md5: str, *, progress: Progress | None = None) -> None:
    """Fetch `target` (its folder exists) from the first of `urls` that gives content with this md5.

    Raises DownloadError if no address gave it; UserError if the disk refuses the bytes, or, before anything is asked
    for, if an address is neither http nor https.
    """
    for url in urls:
        if not url.lower().startswith(("http://", "https://")):
            raise UserError(f"cannot download from {url}: only http:// and https:// addresses are understood")
    failures = []
    for url in urls:
        try:
            _download_from(url, target, md5, progress or (lambda _done, _total: None))
            return
        except DownloadError as error:
            failures.append(f"{url.split('/')[2]}: {error}")
    raise DownloadError("; ".join(failures) or "there is no address to ask")


def _download_from(url: str, target: Path, md5: str, progress: Progress) -> None:
    part = target.with_name(target.name + ".part")
    inherited = _size(part) > 0
    while True:
        _complete(url, part, progress)
        with writing_data(part):
            if md5_of(part) == md5:
                part.replace(target)
                return
            part.unlink()
        if not inherited:
            raise DownloadError("wrong content (its md5 differs)")
        # The wrong bytes may be those that another address or an earlier run left: ask this one for all of it, once.
        inherited = False


def _complete(url: str, part: Path, progress: Progress) -> None:
    """Bring `part` to its end from one address, over as many connections as each bring it further."""
    before, furthest, idle = _size(part), _size(part), 0
    while True:
        try:
            _receive(url, part, progress)
            return
        except HTTPError as error:
            error.close()
            if error.code == 416 and _size(part):  # nothing comes after what is there; the md5 tells whether that is so
                return
            raise DownloadError(f"HTTP status {error.code}") from error
        except (OSError, HTTPException, ValueError) as error:  # ValueError: an impossible host name
            size = _size(part)
            furthest, idle = max(size, furthest), 0 if size > furthest else idle + 1
            # A URLError comes from connecting (refused, unknown, unreachable), where asking again seldom helps.
            if idle == _IDLE_ATTEMPTS or (isinstance(error, (URLError, ValueError)) and furthest == before):
                raise DownloadError(reason_of(error)) from error
            time.sleep(_PAUSE_S * idle)


def _receive(url: str, part: Path, progress: Progress) -> None:
    """Add to `part` what one connection gives. Raises OSError or HTTPException if that ends before the file does."""
    done = _size(part)
    headers = {"User-Agent": "cifar-dist"} | ({"Range": f"bytes={done}-"} if done else {})
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S) as response:
        length = response.headers.get("Content-Length", "")
        total = int(length) if length.isdecimal() else None
        if response.status == 206:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
            if match is None or int(match[1]) != done:
                raise DownloadError("gave another range than the one asked for")
            total = int(match[2]) if match[2] != "*" else None
        elif response.status == 200:  # the whole, whatever was asked for
            done = 0
        else:
            raise DownloadError(f"HTTP status {response.status}")
        # The file is opened with the first bytes in hand, so that an empty answer neither makes nor empties it.
        if chunk := response.read1(_CHUNK_BYTES):
            with writing_data(part):
                file = part.open("ab" if done else "wb", buffering=0)
            with file:
                while chunk:
                    with writing_data(part):
                        _write_all(file, chunk)
                    done += len(chunk)
                    progress(done, total)
                    chunk = response.read1(_CHUNK_BYTES)
    if not done or (total is not None and done < total):
        raise ConnectionError(f"broke off after {done} of {total or 'unknown'} bytes")


def _write_all(file: FileIO, data: bytes) -> None:
    """Write without a buffer, which would try a full disk again on closing."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
