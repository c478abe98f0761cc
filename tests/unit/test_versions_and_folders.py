"""What a run finds around it: other versions, a folder that is gone, git, pipes, no folder for temporary files."""

import os
import tempfile
from pathlib import Path

import pytest
import yaml

from cifar_dist.cli import main
from cifar_dist.config.provenance import git_commit, package_versions
from tests.commands.test_train import error_of, small_world, train
from tests.conftest import ROOT

__all__ = ["small_world"]  # a fixture


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
