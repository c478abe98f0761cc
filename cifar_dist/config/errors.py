"""The one exception that a user is meant to see, and the exit codes of the launcher."""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_KEYBOARD_INTERRUPT = 130


class UserError(Exception):
    """Something only the user can mend. Raised anywhere, caught in `cli` alone, shown as one line.

    The text says what is wrong and what to do about it; it has no trailing newline and no traceback.
    """

    def __str__(self) -> str:
        """Give the message as one line, whatever was put into it (file contents, other exceptions)."""
        return " ".join(super().__str__().split())
