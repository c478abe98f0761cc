"""Standard streams whose write errors end no training. Without torch and Rich: `--help` imports this."""

import contextlib
import io
import os
import sys
from typing import Any, TextIO

from cifar_dist.config.errors import UserError


class _SteadyFile(io.FileIO):
    """A file that drops what cannot be written, and keeps the first error."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write bytes. Return how many were written or dropped."""
        try:
            return os.write(self.fileno(), data)
        except OSError as error:  # a full log disk, a closed terminal, a reader that has ended
            self.error = self.error or error
            return len(data)


def make_output_steady() -> None:
    """Replace stdout and stderr by streams that raise neither for the disk nor for a character."""
    for name in ("stdout", "stderr"):
        stream: TextIO = getattr(sys, name)
        buffer = getattr(stream, "buffer", None)
        with contextlib.suppress(AttributeError):  # there is no stream, or a notebook's or a test's
            stream.reconfigure(errors="replace")  # type: ignore[attr-defined]
        if type(getattr(buffer, "raw", buffer)) is io.FileIO:
            stream.flush()
            writer = io.BufferedWriter(_SteadyFile(stream.fileno(), "wb", closefd=False))
            steady = io.TextIOWrapper(writer, encoding=stream.encoding, errors="replace", line_buffering=True)
            setattr(sys, name, steady)


def check_output_written() -> None:
    """Raise UserError, or BrokenPipeError, if stdout could not be written."""
    if sys.stdout is not None:
        sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    error = raw.error if isinstance(raw, _SteadyFile) else None
    if isinstance(error, BrokenPipeError):
        raise error
    if error is not None:
        raise UserError(f"cannot write the standard output: {error.strerror}; redirect it to another place")
