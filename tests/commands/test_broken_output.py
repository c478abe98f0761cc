"""A console that cannot be written: a training ends as it would, and a command whose result it is says so."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cifar_dist.cli import main
from cifar_dist.run.directory import RunDirectory
from cifar_dist.runtime.output import make_output_steady
from tests.commands.test_train import finished, small_world, train
from tests.conftest import ROOT, make_images

__all__ = ["finished", "small_world"]  # fixtures

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
CANNOT = "error: cannot write the standard output: No space left on device; redirect it to another place\n"


@pytest.fixture
def full_disk():
    with Path("/dev/full").open("w") as file:
        yield file


def test_a_training_completes(full_disk, monkeypatch):
    monkeypatch.setattr(sys, "stdout", full_disk)
    monkeypatch.setattr(sys, "stderr", full_disk)
    train("--epochs", "1", "--run-dir", "x")
    assert RunDirectory(Path("x")).read_summary().status == "completed"
    train("--epochs", "1", "--run-dir", "x", code=2)


@pytest.mark.parametrize("words", ["--help", "--dry-run", "report {run}", "eval --ckpt {run} --json -"])
def test_a_result_that_cannot_be_written_is_one_line(finished, full_disk, monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "stdout", full_disk)
    assert main(words.format(run=finished.path).split()) == 2
    assert capsys.readouterr().err.endswith(CANNOT)


def test_what_can_be_written_is(monkeypatch, tmp_path):
    with (tmp_path / "log").open("w", encoding="ascii") as log:
        monkeypatch.setattr(sys, "stdout", log)
        make_output_steady()
        print("before", "█")
    assert (tmp_path / "log").read_text() == "before ?\n"


@pytest.mark.full
@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize(("ignored", "epochs", "code"), [(True, 5, 0), (False, 10_000, 75)])
def test_a_terminal_that_is_closed(tmp_path, num_processes, ignored, epochs, code):
    """With SIGHUP ignored, as under nohup, writing fails with EIO; without, the run is saved."""
    make_images(tmp_path / "data")
    options = "--dataset data --recipe original --set global_batch_size=4 image_size=16 --run-dir x --epochs"
    master, slave = os.openpty()

    def in_terminal():
        os.login_tty(slave)
        if ignored:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = subprocess.Popen(
        [sys.executable, ROOT / "launch.py", *options.split(), str(epochs), "--num-processes", str(num_processes)],
        cwd=tmp_path,
        preexec_fn=in_terminal,
    )
    os.close(slave)
    shown = b""
    while b"loss" not in shown:
        shown += os.read(master, 10_000)
    os.close(master)
    assert process.wait(timeout=100) == code
    status = RunDirectory(tmp_path / "x").read_summary().status
    assert status == ("completed" if ignored else "interrupted")
