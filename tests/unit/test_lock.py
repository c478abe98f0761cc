"""Two live runs never share a run directory, and a dead one does not keep the next one out."""

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from cifar_dist.config.errors import UserError
from cifar_dist.config.world import SlurmJob
from cifar_dist.run.directory import RunDirectory
from cifar_dist.run.lock import LockLostError, RunLock
from cifar_dist.run.results import EpochRecord
from cifar_dist.training import lock as module

HOLD = """
import sys, time
from pathlib import Path
from cifar_dist.run.lock import RunLock
RunLock().take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture(params=["locks", "no locks"])
def system(request, monkeypatch):
    """A disk with the system's locks, and one (or Windows) that has none."""
    if request.param == "no locks":
        monkeypatch.setattr(module, "fcntl", None)


@pytest.fixture
def other_process(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def owned_by(folder: Path, *, host: str = "elsewhere", pid: int = 1, seconds_ago: float = 0, **other: object) -> None:
    owner = {"host": host, "boot": "another", "pid": pid, "started": 0.0, "job": None, "restarts": 0}
    owner |= {"token": "theirs"} | other
    path = folder / ".lock"
    path.write_text(json.dumps(owner))
    os.utime(path, (path.stat().st_atime - seconds_ago, path.stat().st_mtime - seconds_ago))


@pytest.mark.usefixtures("system")
def test_a_live_run_keeps_others_out_and_a_dead_one_does_not(tmp_path, other_process):
    with pytest.raises(UserError, match=rf"is in use by process {other_process.pid} on .*name another --run-dir"):
        RunLock().take(tmp_path)
    other_process.send_signal(signal.SIGKILL)
    other_process.wait()
    assert (tmp_path / ".lock").exists()
    with RunLock() as lock:
        lock.take(tmp_path)
        lock.take(tmp_path)  # it has it
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("system")
def test_in_one_process_too(tmp_path):
    with RunLock() as first, RunLock() as second:
        first.take(tmp_path)
        with pytest.raises(UserError, match="is in use"):
            second.take(tmp_path)
        first.check()
    with RunLock() as third:
        third.take(tmp_path)


def test_a_number_of_a_process_is_used_again(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "fcntl", None)
    owned_by(tmp_path, host=module.platform.node(), pid=os.getpid())  # started in 1970
    with RunLock() as lock:
        lock.take(tmp_path)
    started = module._start_time(os.getpid())
    owned_by(tmp_path, host=module.platform.node(), pid=os.getpid(), boot=module._boot_id(), started=started)
    with RunLock() as lock, pytest.raises(UserError, match="is in use"):
        lock.take(tmp_path)


@pytest.mark.usefixtures("system")
def test_an_owner_on_another_host_is_believed_for_ten_minutes(tmp_path):
    owned_by(tmp_path, seconds_ago=590)
    with RunLock() as lock, pytest.raises(UserError, match=r"process 1 on elsewhere \(last sign of life 59\d s ago\)"):
        lock.take(tmp_path)
    owned_by(tmp_path, seconds_ago=610)
    with RunLock() as lock:
        lock.take(tmp_path)
        lock.check()


@pytest.mark.parametrize(
    ("job", "taken"),
    [
        (SlurmJob(id="7", restarts=1), True),
        (SlurmJob(id="7", restarts=0), False),  # another step of the same job, which may live
        (SlurmJob(id="8", restarts=1), False),
        (None, False),
    ],
)
def test_a_restart_of_the_same_slurm_job_need_not_wait(tmp_path, job, taken):
    owned_by(tmp_path, job="7")
    with RunLock(job) as lock, nullcontext() if taken else pytest.raises(UserError, match="is in use"):
        lock.take(tmp_path)


def test_a_lock_that_a_gone_host_still_has_is_left_to_it(tmp_path):
    """As over a network: the system says that it is locked, for the machine that had it has not been missed yet."""
    with RunLock() as gone:
        gone.take(tmp_path)
        owned_by(tmp_path, seconds_ago=900)
        with RunLock() as lock:
            lock.take(tmp_path)
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
            with pytest.raises(LockLostError):
                gone.check()
    assert not (tmp_path / ".lock").exists()


def test_a_lock_that_is_given_back_while_another_takes_it(tmp_path, monkeypatch):
    """The file is opened, then removed by its owner, then locked: that is no lock any more."""
    path, original, removed = tmp_path / ".lock", module._lock, []

    def lock_late(file):
        if not removed:
            path.unlink()
            removed.append(file)
        return original(file)

    monkeypatch.setattr(module, "_lock", lock_late)
    with RunLock() as lock:
        lock.take(tmp_path)
        assert path.exists()
        with pytest.raises(UserError, match="is in use"):
            RunLock().take(tmp_path)
    assert removed


def test_a_run_that_slept_too_long_writes_nothing(tmp_path):
    numbers = dict.fromkeys(("epoch", "step", "world_size"), 1) | dict.fromkeys(("val_loss", "val_acc"))
    rates = dict.fromkeys(("lr", "train_loss", "train_acc", "images_per_second", "epoch_seconds"), 0.5)
    record = EpochRecord(**numbers, **rates)
    with RunLock() as lock:
        run = RunDirectory(tmp_path, lock)
        run.create()
        run.append_record(record)
        owned_by(tmp_path, pid=5)
        for write in (
            lambda: run.append_record(record),
            lambda: run.write_config({}),
            lambda: run.write_checkpoint(run.last, {}),
        ):
            with pytest.raises(LockLostError, match="process 5 on elsewhere has taken this run over"):
                write()
    assert run.read_records() == [record]
    assert not run.last.exists()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == 5, "their lock was removed"


def test_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_TOUCHED_EVERY_S", 0.01)
    with RunLock() as lock:
        lock.take(tmp_path)
        os.utime(tmp_path / ".lock", (0, 0))
        assert any(lock._released.wait(0.01) or (tmp_path / ".lock").stat().st_mtime for _ in range(3000))


def test_a_run_that_came_to_be_meanwhile_is_not_overwritten(tmp_path):
    with RunLock() as lock:
        run = RunDirectory(tmp_path, lock)
        run.config.write_text("theirs")
        with pytest.raises(UserError, match="holds a run by now"):
            run.create(is_new=True)
    assert run.config.read_text() == "theirs"
