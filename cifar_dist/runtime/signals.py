"""Signals that stop a run. A signal only sets a flag.

Every `agree_every_steps` steps the ranks exchange their flags. If one is set, all ranks save and stop.

Nothing is saved inside a signal handler: it may run in the middle of a write (Lightning#21406).
"""

import math
import signal
import threading
import time
from types import FrameType
from typing import Any, Self

# Slurm sends SIGUSR2 before the time limit (slurm/train.sh), some clusters SIGTERM; SIGHUP comes of a closed terminal.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


class Interrupt:
    """Context in which signals only set a flag; a second Ctrl-C raises KeyboardInterrupt."""

    def __init__(self, *, seconds: float | None = None) -> None:
        """Ask to stop after so many seconds, also without a signal."""
        self.requested: str | None = None
        """The name of the first signal."""
        self._deadline = math.inf if seconds is None else time.monotonic() + seconds
        self._before: dict[int, Any] = {}
        self._interrupts = 0

    @property
    def wanted(self) -> bool:
        """Whether a signal came, or the time is over."""
        return self.requested is not None or time.monotonic() >= self._deadline

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):  # Windows lacks some
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._note:  # else `ignore` was called
                signal.signal(number, handler)
        self._before.clear()

    def ignore(self) -> None:
        """Ignore the signals from now on: all is saved, and the process is about to end."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        self.requested = self.requested or signal.Signals(number).name


class StoppedBeforeTraining(BaseException):
    """A signal came before there was anything to save."""


class InterruptBeforeTraining(Interrupt):
    """Context in which a signal raises StoppedBeforeTraining, and Ctrl-C KeyboardInterrupt."""

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = self.requested or signal.Signals(number).name
        raise StoppedBeforeTraining
