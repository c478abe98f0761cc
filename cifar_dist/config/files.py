"""Files that are written whole or not at all, and what a command was asked to write."""

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from cifar_dist.config.errors import UserError

STANDARD_OUTPUT = Path("-")
"""What `--json` may name instead of a file."""


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file under a temporary name in the same folder, fsync it, and put it in place in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextmanager
def writing(path: Path, advice: str = "name another place") -> Iterator[None]:
    """Turn what the disk refuses into a UserError that names `path` and what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; {advice}") from None


def write_output(path: Path, content: bytes) -> None:
    """Write a file that was asked for, atomically. Raises UserError where that cannot be."""
    with writing(path):
        write_atomically(path, lambda file: file.write(content))


def write_json(path: Path | None, content: Mapping[str, Any]) -> None:
    """Write what `--json` asks for, where it was typed. Raises UserError where that cannot be."""
    text = json.dumps(content, allow_nan=False) + "\n"
    if path == STANDARD_OUTPUT:
        sys.stdout.write(text)
    elif path is not None:
        write_output(path, text.encode())


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; Windows has no such call on a folder and needs none."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # a file system that knows no such thing
            raise
    finally:
        os.close(descriptor)
