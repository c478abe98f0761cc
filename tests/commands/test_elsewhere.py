"""One process trains where there is less than on Linux: what Windows and macOS lack is taken away."""

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from cifar_dist.cli import main
from cifar_dist.run.directory import RunDirectory
from tests.commands.test_train import EVERYTHING, assert_same_run, files_of, small_world, train, whole

__all__ = ["small_world", "whole"]  # fixtures


@pytest.fixture
def windows(monkeypatch):
    """No SIGUSR1 and its like, no links, or fsync of a folder; what is open is neither moved nor removed."""
    for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGQUIT"):
        monkeypatch.delattr(signal, name)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setitem(sys.modules, "resource", None)
    opened, linked, refused = os.open, [], []

    def open_file(path, *arguments, **named):
        if Path(path).is_dir():
            refused.append(path)
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **named)

    def link(source, *_):
        linked.append(source)
        raise OSError(1, "Incorrect function")

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "link", link)
    for name in ("replace", "unlink"):
        monkeypatch.setattr(Path, name, refusing_open_files(getattr(Path, name)))
    yield
    assert linked and refused, "nothing was taken away"


def refusing_open_files(original):
    def checked(path, *arguments, **named):
        busy = {file.path for file in psutil.Process().open_files()}
        for each in (path, *arguments):
            if str(Path(each).absolute()) in busy and not Path(each).name.startswith((".lock", ".filelock")):
                raise PermissionError(32, "The process cannot access the file because it is being used", str(each))
        return original(path, *arguments, **named)

    return checked


@pytest.mark.usefixtures("windows")
def test_one_process_trains_stops_and_resumes(whole):
    train("--epochs", "3", "--run-dir", "parts", "--max-minutes", "0.0001", *EVERYTHING, code=75)
    assert main(["--resume", "parts", "--checkpoint-every-steps", "2"]) == 0
    assert_same_run(whole, "parts")
    summary = RunDirectory(Path("parts")).read_summary()
    assert (summary.status, summary.peak_memory_mib) == ("completed", None)
    left = {path.name for path in files_of("parts")}
    assert "previous.pt" in left
    assert not [name for name in left if name.endswith(".tmp")]
