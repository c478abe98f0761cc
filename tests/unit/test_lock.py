"""Two live runs never share a run directory, and a dead one does not keep the next one out."""

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from cifar_dist.config.errors import UserError
from cifar_dist.run.directory import numbered_names
from cifar_dist.run.lock import RunLock
from tests.commands.test_train import small_world, train

__all__ = ["small_world"]  # a fixture

HOLD = """
import sys, time
from pathlib import Path
from cifar_dist.run.lock import RunLock
lock = RunLock()
lock.acquire(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_a_live_run_keeps_others_out_and_a_dead_one_does_not(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=r"is in use by another process: .*name another --run-dir"):
            RunLock().acquire(tmp_path)
        with ThreadPoolExecutor(1) as pool, RunLock(is_restart=True) as restarted:  # waits for the job before it
            waiting = pool.submit(restarted.acquire, tmp_path)
            process.send_signal(signal.SIGKILL)
            waiting.result(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert list(tmp_path.iterdir()) == [], "no run came to be here"


def test_a_lock_leaves_what_was_there(tmp_path):
    (tmp_path / "config.yaml").touch()
    with RunLock() as lock:
        lock.acquire(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", ".lock"}
    with pytest.raises(OSError, match="Not a directory"), RunLock() as lock:
        lock.acquire(tmp_path / "config.yaml" / "run")


def test_a_lock_that_cannot_be_made_leaves_no_folder(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cifar_dist.run.lock.FileLock.acquire", full)
    with pytest.raises(OSError, match="No space"), RunLock() as lock:
        lock.acquire(tmp_path / "runs" / "mine")
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_that_is_found_later_leaves_no_folder(monkeypatch, capsys):
    def find_mistake(*_, **__):
        assert Path("runs/original-shapes-seed0").is_dir()
        raise UserError("found: later")

    monkeypatch.setattr("cifar_dist.commands.train.load_dataset", find_mistake)
    train(code=2)
    assert capsys.readouterr().err == "error: found: later\n"
    assert not Path("runs").exists()


def test_runs_that_start_together_take_different_names(tmp_path):
    """The test fails where a name that is free a moment before is taken without being claimed."""
    locks, together = [RunLock() for _ in range(5)], Barrier(5)

    def start(lock):
        together.wait()
        return lock.acquire_first_free(numbered_names(tmp_path / "runs" / "mine"))

    with ThreadPoolExecutor(5) as pool:
        folders = set(pool.map(start, locks))
    assert {folder.name for folder in folders} == {"mine", "mine-2", "mine-3", "mine-4", "mine-5"}
    (tmp_path / "runs" / "mine-2" / "config.yaml").touch()
    for lock in locks:
        lock.release()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mine-2"], "no run came to be in the others"
