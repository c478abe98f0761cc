"""Files that are written whole or not at all."""

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
    """Write a file under a temporary name in the same folder, fsync it, and rename it."""
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
    try:  # make the rename durable, where folders can be opened
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # of file systems that know no such thing
            raise
    finally:
        os.close(folder)


@contextmanager
def writing(path: Path, advice: str = "name another place") -> Iterator[None]:
    """Raise an OSError of the context as UserError that names `path` and what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; {advice}") from None


def write_output(path: Path, content: bytes) -> None:
    """Write a file atomically, through a link, or write to a device or a pipe. Raises UserError."""
    with writing(path):
        if path.exists() and not path.is_file():  # /dev/null must stay what it is
            path.write_bytes(content)
        else:
            write_atomically(path.resolve(), lambda file: file.write(content))


def write_json(path: Path | None, content: Mapping[str, Any]) -> None:
    """Write what `--json` asks for, if it was typed. Raises UserError."""
    is_terminal = path == STANDARD_OUTPUT  # which may have another encoding than UTF-8
    text = json.dumps(content, allow_nan=False, ensure_ascii=is_terminal) + "\n"
    if path == STANDARD_OUTPUT:
        sys.stdout.write(text)
    elif path is not None:
        write_output(path, text.encode(errors="backslashreplace"))  # JSON's escapes for a path that is no text
