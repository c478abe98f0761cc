"""The owner of a run directory is identified by boot and start time, not by the clock or the host name."""

import json
from pathlib import Path

import psutil
import pytest

from cifar_dist.config.errors import UserError
from cifar_dist.run.lock import RunLock
from cifar_dist.training import lock as module


def change_owner(folder: Path, **fields: str) -> None:
    path = folder / ".lock"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_step_of_the_clock_does_not_end_an_owner(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "fcntl", None)
    created = psutil.Process.create_time
    with RunLock() as owner:
        owner.take(tmp_path)
        monkeypatch.setattr(psutil.Process, "create_time", lambda process: created(process) + 3600)
        with pytest.raises(UserError, match="is in use"):
            RunLock().take(tmp_path)


@pytest.mark.parametrize(
    ("system_locks", "held", "owner", "taken"),
    [
        (True, False, {"host": "replaced-container"}, True),
        (True, True, {"host": "container-beside"}, False),
        (True, False, {"host": "elsewhere", "boot": "of-another-machine"}, False),
        (False, True, {"host": "container-beside"}, False),  # its process is not in this process table
        (False, True, {"boot": "before"}, True),  # the machine was restarted
    ],
)
def test_who_is_taken_for_alive(tmp_path, monkeypatch, system_locks, held, owner, taken):
    if not system_locks:
        monkeypatch.setattr(module, "fcntl", None)
    first = RunLock()
    first.take(tmp_path)
    change_owner(tmp_path, **owner)
    if not held and first._file is not None:
        first._file.close()  # as the system does with a process that ends
    with RunLock() as lock:
        if taken:
            lock.take(tmp_path)
        else:
            with pytest.raises(UserError, match="is in use"):
                lock.take(tmp_path)
    first.release()
