"""The exception that a user is meant to see, and the exit codes of the launcher."""

import re

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 75
"""Interrupted and saved (EX_TEMPFAIL: try again)."""
EXIT_KEYBOARD_INTERRUPT = 130


def printable(text: str) -> str:
    """Return `text` with control characters, which a terminal would obey, escaped as in Python source."""
    return re.sub(r"[\0-\x1f\x7f-\x9f]", lambda match: match[0].encode("unicode_escape").decode(), text)


class UserError(Exception):
    """A mistake that the user can correct. Its text is one line: what is wrong, and what to do about it.

    Raised anywhere. The command line catches it in `cli` alone, prints it and exits with 2.
    """

    def __str__(self) -> str:
        """Return the message as one line, whatever it contains (file contents, other exceptions)."""
        return printable(" ".join(super().__str__().split()))


class SharedError(UserError):
    """A mistake that all ranks know: each ends with it, and rank 0 prints it."""


class PeerFailedError(Exception):
    """Another rank failed, and prints why."""
