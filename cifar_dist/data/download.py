"""Download one file over HTTP with resume, mirrors and an md5 check.

The bytes go to `NAME.part`, which a later attempt, mirror or process continues. The file gets its name when its md5 is
right.
"""

import hashlib
import re
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError

from cifar_dist.config.errors import UserError
from cifar_dist.config.files import writing

Progress = Callable[[int, int | None], None]
"""Called with what is done so far and the total (None if unknown): bytes of a download, or decoded images."""

_TIMEOUT_SECONDS = 10.0
_PAUSE_SECONDS = 1.0
_CHUNK_BYTES = 1 << 18
_MAX_IDLE_ATTEMPTS = 2  # consecutive attempts without a new byte


class DownloadError(Exception):
    """No address served the file; the text has the reason of each."""


def reason_of(error: Exception) -> str:
    """Return the short reason of an OSError or URLError, without numbers and file names."""
    if isinstance(error, URLError) and isinstance(error.reason, Exception):
        return reason_of(error.reason)
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def md5_of(path: Path) -> str:
    """Return the md5 of a file as hexadecimal digits. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()


def writing_data(path: Path) -> AbstractContextManager[None]:
    """Return a context that turns the OSErrors of a full or read-only disk into a UserError that names `path`."""
    return writing(path.absolute(), "free space or change the permissions, or name another folder with --data-dir DIR")


def download(urls: Sequence[str], target: Path, md5: str, *, progress: Progress | None = None) -> None:
    """Download `target`, whose folder exists, from the first of `urls` that serves content with this md5.

    Raises DownloadError if none does; UserError if the file cannot be written or an address is not HTTP.
    """
    for url in urls:
        if not url.lower().startswith(("http://", "https://")):
            raise UserError(f"cannot download from {url}: only http:// and https:// addresses are supported")
    failures = []
    for url in urls:
        try:
            _download_from(url, target, md5, progress)
            return
        except DownloadError as error:
            failures.append(f"{url.split('/')[2]}: {error}")
    raise DownloadError("; ".join(failures) or "there is no address to ask")


def _download_from(url: str, target: Path, md5: str, progress: Progress | None) -> None:
    """Complete `NAME.part` from one address, over several connections as long as they bring new bytes."""
    part = target.with_name(target.name + ".part")
    before = furthest = _size(part)
    was_resumed, idle = before > 0, 0
    while True:
        try:
            _receive(url, part, progress)
        except HTTPError as error:
            error.close()
            if error.code != 416 or not _size(part):  # 416: nothing follows `part`
                raise DownloadError(f"HTTP status {error.code}") from error
        except (OSError, HTTPException, ValueError) as error:  # ValueError: an impossible host name
            size = _size(part)
            furthest, idle = max(size, furthest), 0 if size > furthest else idle + 1
            # A URLError is a failed connection (refused, unknown host): a retry seldom helps.
            if idle == _MAX_IDLE_ATTEMPTS or (isinstance(error, (URLError, ValueError)) and furthest == before):
                raise DownloadError(reason_of(error)) from error
            time.sleep(_PAUSE_SECONDS * idle)
            continue
        with writing_data(part):
            if md5_of(part) == md5:
                part.replace(target)
                return
            part.unlink()
        if not was_resumed:
            raise DownloadError("wrong content (its md5 differs)")
        was_resumed = False  # the wrong bytes may be another mirror's: get the whole file from this one


def _receive(url: str, part: Path, progress: Progress | None) -> None:
    """Append to `part` what one connection sends. Raises OSError or HTTPException if it ends too early."""
    done = _size(part)
    headers = {"User-Agent": "cifar-dist"} | ({"Range": f"bytes={done}-"} if done else {})
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_SECONDS) as response:
        if response.status == 206:
            sent = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            if sent is None or int(sent[1]) != done:
                raise DownloadError("sent another range than requested")
        else:  # the server does not support Range and sends the whole file
            done = 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else None
        with writing_data(part):
            file = part.open("ab" if done else "wb", buffering=0)
        with file:
            while chunk := response.read1(_CHUNK_BYTES):
                with writing_data(part):
                    file.write(chunk)
                done += len(chunk)
                if progress:
                    progress(done, total)
    if total is not None and done < total:
        raise ConnectionError(f"broke off after {done} of {total} bytes")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
