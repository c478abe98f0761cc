"""The console that all commands write to."""

import contextlib
import os
import sys
from typing import IO

from rich.console import Console

from cifar_dist.config.errors import UserError


class SteadyConsole(Console):
    """A Rich console for programs that must not end because nobody reads on.

    Text is shown as it is (`:100:` in a file's name is no emoji), and under `FORCE_COLOR` a pipe gets colours and no
    view that moves the cursor.
    """

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError:  # a full disk, or a terminal that was closed
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Go on in silence: nobody reads on, and a training is worth more than its lines."""
        self.quiet = True
        discard_output(self.file)


def make_console(*, quiet: bool = False, stderr: bool = False) -> Console:
    """Give a console on the standard output, or on stderr."""
    console = SteadyConsole(quiet=quiet, stderr=stderr, emoji=False, highlight=False)
    with contextlib.suppress(ValueError, AttributeError):  # a stream that is closed, or none
        console.is_interactive = console.is_interactive and (console.is_jupyter or console.file.isatty())
    return console


def can_draw(console: Console) -> bool:
    """Whether this is a terminal that can move its cursor."""
    return console.is_interactive and console.is_terminal and not console.is_dumb_terminal


def check_drawing() -> None:
    """Import matplotlib, which most commands do not need. Raises UserError if that fails.

    Figures are drawn by Agg alone, so an MPLBACKEND that matplotlib does not know here (a notebook's) does no harm.
    """
    if "matplotlib" in sys.modules:
        return
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"matplotlib cannot be used: {reason}") from None
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:  # for the figures of whoever calls us from Python
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend


def print_error(text: str) -> None:
    """Print a line on stderr."""
    print(text, file=sys.stderr, flush=True)


def discard_output(stream: IO[str]) -> None:
    """Send what is still to be written to a stream nowhere."""
    with contextlib.suppress(OSError, ValueError):  # it is no file, or closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
