"""Keeps two live runs out of one run directory: a file that says whose it is, locked by the system where it can be."""

import contextlib
import json
import os
import platform
import tempfile
import threading
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import psutil

from cifar_dist.config.errors import UserError
from cifar_dist.config.world import SlurmJob

fcntl: Any = None
with contextlib.suppress(ImportError):  # Windows has none
    import fcntl

_TOUCHED_EVERY_S = 60
_FORGOTTEN_AFTER_S = 600
"""An owner on another host that gave no sign of life for so long is taken for dead."""


class LockLostError(OSError):
    """Another process has taken the run directory over, and nothing may be written into it any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Owner:
    host: str
    boot: str
    """The id of this start of the kernel, which the machine's containers share; the host where a system has none."""
    pid: int
    started: float
    """When the process was started: a number of a process is used again."""
    job: str | None
    restarts: int
    token: str

    @classmethod
    def read(cls, path: Path) -> "_Owner | None":
        """Read who owns a lock; None where that is not said."""
        try:
            return cls(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def runs_here(self, boot: str) -> bool:
        """Return whether the owner's process is alive, if it was started on this host."""
        try:
            is_zombie = psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
            return not is_zombie and self.boot == boot and _start_time(self.pid) == self.started
        except (psutil.Error, OSError):
            return False


class RunLock:
    """The right to write into a run directory, held until the context ends or this process dies.

    On one machine the system's own lock tells whether the owner lives (where there is none, the process table does).
    An owner on another machine is believed for ten minutes after its last sign of life, which it gives each minute, but
    not against a restart of the Slurm job that it belonged to.
    """

    def __init__(self, job: SlurmJob | None = None) -> None:
        """Hold nothing yet; `job` is the Slurm job that this process belongs to."""
        self._me = _Owner(
            host=platform.node(),
            boot=_boot_id(),
            pid=os.getpid(),
            started=_start_time(os.getpid()),
            job=None if job is None else job.id,
            restarts=0 if job is None else job.restarts,
            token=uuid.uuid4().hex,
        )
        self._path: Path | None = None
        self._file: BinaryIO | None = None
        self._claimed: Path | None = None
        self._released = threading.Event()

    def claim(self, folders: Iterable[Path]) -> Path:
        """Make the first of these folders that is free, and take its lock. It goes with the lock if it stays empty."""
        for folder in folders:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                self._claimed = folder
                self.take(folder)
                return folder
        raise AssertionError("names do not come to an end")

    def take(self, folder: Path) -> None:
        """Take a run directory's lock. Raises UserError where a live run has it, OSError where none can be made."""
        if self._path is not None:
            return
        path = folder / ".lock"
        while self._path is None:
            file = path.open("a+b")
            try:
                if self._take(file, path):
                    self._path = path
            finally:
                if self._path is None or fcntl is None:  # Windows cannot remove what is open
                    file.close()
                else:
                    self._file = file
        threading.Thread(target=self._give_signs_of_life, daemon=True, name="run-lock").start()

    def check(self) -> None:
        """Raise LockLostError where another has the lock now: this process may have slept for long."""
        if self._path is None:
            return
        owner = _Owner.read(self._path)
        if owner is not None and owner.token != self._me.token:
            what = f"process {owner.pid} on {owner.host} has taken this run over"
            raise LockLostError(None, what, str(self._path.parent))

    def release(self) -> None:
        """Give the lock back."""
        self._released.set()
        if self._path is not None:
            with contextlib.suppress(OSError):
                self.check()
                self._path.unlink()
        if self._file is not None:
            self._file.close()
        if self._claimed is not None:
            with contextlib.suppress(OSError):  # it holds a run
                os.removedirs(self._claimed)
        self._path = self._file = self._claimed = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _take(self, file: BinaryIO, path: Path) -> bool:
        """Take the lock that is this file, unless it is one no more. Raises UserError where a live run has it."""
        locked = _lock(file)
        if not _is_same_file(file, path):
            return False  # removed by its owner between the two steps
        owner = _Owner.read(path)
        age = _now_at(path.parent) - os.fstat(file.fileno()).st_mtime
        if self._is_alive(owner, locked, age):
            raise _in_use(path.parent, owner, age)
        if locked is False:  # the lock of a host that is gone, or is to be taken for gone, stays with its file
            path.unlink(missing_ok=True)
            return False
        file.truncate(0)
        file.write(json.dumps(asdict(self._me)).encode())
        file.flush()
        if _Owner.read(path) != self._me:  # without the system's lock two may have come this far
            raise _in_use(path.parent, None, 0)
        return True

    def _is_alive(self, owner: _Owner | None, locked: bool | None, age: float) -> bool:
        """Tell whether the owner of a lock lives; `locked` is whether the system gave it to us, None if it has none."""
        if owner is None:  # a file just made, whose maker has it
            return locked is False
        if locked is not None and (owner.host == self._me.host or owner.boot == self._me.boot):
            return not locked
        if owner.host == self._me.host:
            return owner.runs_here(self._me.boot)
        if owner.job is not None and owner.job == self._me.job and owner.restarts < self._me.restarts:
            return False
        return age < _FORGOTTEN_AFTER_S

    def _give_signs_of_life(self) -> None:
        while not self._released.wait(_TOUCHED_EVERY_S):
            with contextlib.suppress(OSError, AttributeError):
                self.check()
                os.utime(self._path)  # type: ignore[arg-type]


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return platform.node()


def _start_time(pid: int) -> float:
    """Return when a process was started, whatever becomes of the clock. Raises OSError or psutil.Error."""
    if platform.system() == "Linux":  # psutil adds the time of the boot, which the kernel computes from the clock
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])  # in clock ticks since boot
    return psutil.Process(pid).create_time()


def _lock(file: BinaryIO) -> bool | None:
    """Ask the system for a lock that ends with this process; None where the system or the disk has none."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_same_file(file: BinaryIO, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _now_at(folder: Path) -> float:
    """Give the time by the clock of the disk that the folder is on, in seconds since 1970."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


def _in_use(folder: Path, owner: _Owner | None, age: float) -> UserError:
    who = "another process" if owner is None else f"process {owner.pid} on {owner.host}"
    seen = f"last sign of life {max(age, 0):.0f} s ago"
    return UserError(f"{folder} is in use by {who} ({seen}): wait until it has ended, or name another --run-dir")
