"""Lock a run directory, so that only one process trains in it."""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from cifar_dist.config.errors import UserError

_RESTART_TIMEOUT_SECONDS = 120
"""How long a restarted job waits: the file server frees a lost node's lock after its lease (NFSv4: 90 s)."""


def is_locked(folder: Path) -> bool:
    """Return whether a process trains in a run directory; True if that cannot be tried."""
    file = folder / ".lock"
    try:
        with FileLock(file, timeout=0) if file.exists() else contextlib.nullcontext():
            return False
    except (Timeout, OSError):
        return True


class RunLock:
    """The lock of one run directory: `flock` on its file `.lock`, which the system frees when this process ends.

    If the file system lacks `flock`, filelock uses a lock file that names its owner.
    """

    def __init__(self, *, is_restart: bool = False) -> None:
        self._timeout_seconds = _RESTART_TIMEOUT_SECONDS if is_restart else 0
        self._lock: FileLock | None = None
        self._created: list[Path] = []

    def acquire(self, folder: Path) -> None:
        """Lock a run directory, and create it if it is missing.

        Raises UserError if another process has locked it, OSError if the disk refuses.
        """
        missing = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._created = missing
        self._lock_file(folder, self._timeout_seconds)

    def acquire_first_free(self, folders: Iterable[Path]) -> Path:
        """Create the first of these folders that does not exist, lock it, and return it."""
        for folder in folders:
            missing = [each for each in folder.parents if not each.exists()]
            folder.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                self._created = [folder, *missing]
                self._lock_file(folder, 0)
                return folder
        raise ValueError("every name is in use")

    def release(self) -> None:
        """Release the lock. Remove its file, and the folders that it created, if no run was written there."""
        lock, created, self._lock, self._created = self._lock, self._created, None, []
        with contextlib.suppress(OSError):
            if lock is not None:
                file = Path(lock.lock_file)
                if [each.name for each in file.parent.iterdir()] == [file.name]:
                    file.unlink()
            for folder in created:
                folder.rmdir()
        if lock is not None:
            lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _lock_file(self, folder: Path, timeout_seconds: float) -> None:
        lock = FileLock(folder / ".lock", timeout=timeout_seconds)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(
                f"{folder} is in use by another process: wait until it has ended, or name another --run-dir"
            ) from None
        self._lock = lock
