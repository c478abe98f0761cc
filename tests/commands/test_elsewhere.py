"""Runs on other systems: no links or fsync of folders, other versions, a missing folder, pipes, no TMPDIR."""

import os
import signal
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import yaml

from cifar_dist.cli import main
from cifar_dist.config.provenance import git_commit, package_versions
from cifar_dist.run.directory import RunDirectory
from tests.commands.test_train import EVERYTHING, assert_same_run, error_of, files_of, small_world, train, whole
from tests.conftest import ROOT

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


def change_config(**values: object) -> None:
    path = Path("x/config.yaml")
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))


def test_a_run_that_goes_on(capsys):
    train("--epochs", "1", "--run-dir", "x")
    change_config(versions=package_versions() | {"torch": "2.0.0", "gone": "1"})
    for words in (["--dry-run"], []):
        capsys.readouterr()
        train("--resume", "x", "--epochs", "2", *words)
        note = f"other versions than before: torch 2.0.0 -> {package_versions()['torch']}: not the same bits"
        assert note in capsys.readouterr().out
    train("--resume", "x", "--epochs", "3", "--dry-run")
    assert "other versions" not in capsys.readouterr().out, "the run has these now"
    change_config(dataset={"name": "/gone/images", "data_dir": "d", "fingerprint": "f"})
    assert main(["--resume", "x", "--epochs", "3"]) == 2
    assert error_of(capsys) == "the dataset's folder /gone/images is not there: name its place with --dataset"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the checkout")
def test_the_commit_of_another_users_checkout_is_known(monkeypatch):
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert git_commit() is not None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with a name")
@pytest.mark.parametrize("option", ["--config", "--recipe"])
def test_a_pipe_is_refused(tmp_path, capsys, option):
    """As `--config <(...)` gives it: one process of several would get its content."""
    os.mkfifo(tmp_path / "63")
    train(option, str(tmp_path / "63"), code=2)
    assert error_of(capsys).endswith("/63 is a pipe, which can be read only once: name a file")


def test_no_folder_for_temporary_files_is_one_line(monkeypatch, capsys):
    def fail():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", fail)
    train(code=2)
    assert error_of(capsys) == "torch needs a folder for temporary files: set TMPDIR to one that can be written"
