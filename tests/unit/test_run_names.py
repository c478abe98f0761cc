"""Runs whose directory nobody named take different names, however close together they start."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

from cifar_dist.config.errors import UserError
from cifar_dist.run.lock import RunLock
from cifar_dist.run.run_files import names_in_turn
from tests.commands.test_train import small_world, train

__all__ = ["small_world"]  # a fixture


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
        return lock.claim(names_in_turn(tmp_path / "runs" / "mine"))

    with ThreadPoolExecutor(5) as pool:
        folders = set(pool.map(start, locks))
    assert {folder.name for folder in folders} == {"mine", "mine-2", "mine-3", "mine-4", "mine-5"}
    (tmp_path / "runs" / "mine-2" / "config.yaml").touch()
    for lock in locks:
        lock.release()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mine-2"], "no run came to be in the others"
