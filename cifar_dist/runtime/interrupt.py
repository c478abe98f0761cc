"""How a run is told to stop: a signal sets a flag, and the ranks look at their flags together at the end of a step.

Nothing is saved inside a signal handler: it may run in the middle of a write (Lightning#21406).
"""

import math
import signal
import threading
import time
from types import FrameType
from typing import Any, Self

# SIGUSR2 is what Slurm is told to send before the time limit; some clusters send only SIGTERM; SIGHUP comes when a
# terminal is closed: all are treated alike.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


class Interrupt:
    """The context in which signals are noted instead of ending the process; a second Ctrl-C ends it at once."""

    def __init__(self, *, seconds: float | None = None) -> None:
        """Ask to stop after so many seconds, also without a signal."""
        self.requested: str | None = None
        """The name of the first signal that came; None: none did."""
        self._deadline = math.inf if seconds is None else time.monotonic() + seconds
        self._before: dict[int, Any] = {}
        self._interrupts = 0

    @property
    def wanted(self) -> bool:
        """Whether this process was told to stop, or its time is over."""
        return self.requested is not None or time.monotonic() >= self._deadline

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for name in _NAMES:
                number = getattr(signal, name, None)  # Windows lacks some
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._note:  # else they are ignored by now
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


class UntilTraining(Interrupt):
    """The context of what comes before training: a signal ends it, and Ctrl-C is Python's own."""

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = self.requested or signal.Signals(number).name
        raise StoppedBeforeTraining(signal.Signals(number).name)
