"""A run survives a kill between steps, damaged files and a full disk."""

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from cifar_dist.cli import main
from cifar_dist.display import figures
from cifar_dist.run.checkpoint import load_checkpoint, save_checkpoint
from cifar_dist.run.directory import RunDirectory
from cifar_dist.run.resolve import seconds_allowed
from cifar_dist.training.trainer import Trainer
from tests.commands.test_train import (
    EVERYTHING,
    FIGURES,
    assert_same_run,
    error_of,
    files_of,
    small_world,
    small_world_in,
    train,
    whole,
)
from tests.unit.test_checkpoint import Payload
from tests.unit.test_faults import Disk

__all__ = ["small_world", "whole"]  # fixtures


class Killed(BaseException):
    """Stands for SIGKILL: the package must not handle it."""


def step_saved_last(run: str) -> int:
    return load_checkpoint(Path(run) / "checkpoints" / "last.pt")["step"]


@pytest.mark.parametrize(
    ("options", "saved_at"), [(("--checkpoint-every-steps", "2"), 6), (("--checkpoint-every-minutes", "0.00001"), 7)]
)
def test_a_killed_run_resumes_from_its_last_checkpoint_with_the_same_bits(monkeypatch, whole, options, saved_at):
    """There are three steps in an epoch: step 7 is the first of the third."""
    monkeypatch.setattr("cifar_dist.config.plan._IMAGES_A_SECOND", {"cpu": 32})  # the ranks agree after each step
    original = Trainer._end_step

    def killed(trainer, epoch):
        if trainer.state.step == 7:
            raise Killed
        original(trainer, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_end_step", killed)
        with pytest.raises(Killed):
            train("--epochs", "3", "--run-dir", "parts", *options, *EVERYTHING)
    assert step_saved_last("parts") == saved_at
    assert main(["--resume", "parts", *options]) == 0
    assert_same_run(whole, "parts")


def test_saving_within_an_epoch_changes_nothing(whole):
    train("--epochs", "3", "--run-dir", "parts", "--checkpoint-every-steps", "1", *EVERYTHING)
    assert_same_run(whole, "parts")


def test_how_long_a_run_may_take():
    job = {"SLURM_JOB_END_TIME": "1000", "SLURM_STEP_ID": "0"}
    assert (seconds_allowed(None, {}, 0), seconds_allowed(2, {}, 0)) == (None, 120)
    assert [seconds_allowed(None, job, now) for now in (400, 990)] == [540, 0]
    assert seconds_allowed(1, job, 400) == 60
    assert seconds_allowed(None, {"SLURM_JOB_END_TIME": "1000"}, 400) is None, "a shell in an allocation"


def spoil(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "hostile":
        torch.save(torch.load(path, weights_only=True) | {"model": Payload(Path("ran"))}, path)
    else:
        path.write_bytes(data[: len(data) // 2])


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory) -> Path:
    """The first two epochs of `whole`, with a previous checkpoint. Read only."""
    folder = tmp_path_factory.mktemp("two")
    with small_world_in(folder):
        train("--epochs", "2", "--run-dir", "two", "--checkpoint-every-steps", "1", *EVERYTHING)
    return folder / "two"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", "is damaged: it ends too early"),
        ("hostile", "is refused: it is more than tensors and plain values"),
        ("missing", "is missing"),
    ],
)
def test_a_damaged_last_checkpoint_is_replaced_by_the_previous(capsys, whole, two_epochs, how, message):
    """tests/unit/test_checkpoint.py has every kind of damage."""
    shutil.copytree(two_epochs, "parts")
    last, kept = Path("parts/checkpoints/last.pt"), Path("parts/checkpoints/damaged.pt")
    spoil(last, how)
    kept.write_bytes(b"of an earlier damage")
    damaged = (last if last.exists() else kept).read_bytes()
    assert main(["--resume", "parts", "--epochs", "3"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "resuming from previous.pt" in shown
    assert f"parts/checkpoints/last.pt {message}" in shown
    assert not Path("ran").exists()
    assert_same_run(whole, "parts")
    assert kept.read_bytes() == damaged
    load_checkpoint(Path("parts/checkpoints/previous.pt"))


def test_without_a_good_checkpoint_nothing_is_changed(capsys, two_epochs):
    shutil.copytree(two_epochs, "x")
    for name in ("last.pt", "previous.pt"):
        spoil(Path("x/checkpoints") / name, "cut")
    before = files_of("x")
    assert main(["--resume", "x", "--epochs", "3"]) == 2
    assert "last.pt is damaged" in (line := error_of(capsys)) and "previous.pt is damaged" in line
    assert files_of("x") == before


@pytest.mark.parametrize("call", ["creat", "fsync", "replace"])
def test_a_disk_that_fails_before_training_is_one_line_and_code_2(capsys, monkeypatch, call):
    with monkeypatch.context() as patch:
        disk = Disk(patch, errno.EROFS, fails=lambda _, name: name == call)
        train("--epochs", "1", "--run-dir", "x", code=2)
    assert disk.calls
    line = f"cannot write x: {os.strerror(errno.EROFS)}; free space or mend the rights there"
    assert error_of(capsys) in (line, f"{line}, or name another --run-dir"), "for the folder, or for a file in it"
    assert not Path("x/metrics.jsonl").exists()
    train("--epochs", "1", "--run-dir", "x", "--resume")


@pytest.mark.parametrize("call", ["write", "close", "replace"])
def test_a_disk_that_fails_during_training_is_one_line_and_code_1(capsys, monkeypatch, call):
    disks = []
    with monkeypatch.context() as patch:

        def save_and_break(path, content, **named):
            save_checkpoint(path, content, **named)
            if not disks:
                disks.append(Disk(patch, errno.ENOSPC, fails=lambda _, name: name == call))

        patch.setattr("cifar_dist.run.prepare.save_checkpoint", save_and_break)
        train("--epochs", "1", "--run-dir", "x", "--checkpoint-every-steps", "1", code=1)
    assert disks[0].calls
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "No space left on device; the last good checkpoint stays: x/checkpoints/last.pt; resume with: python" in line
    assert not list(Path("x").rglob("*.tmp"))
    assert step_saved_last("x") >= 1
    assert main(["--resume", "x"]) == 0


def test_a_run_directory_that_vanishes_is_one_line_and_code_1(capsys, monkeypatch):
    append = RunDirectory.append_record

    def append_and_lose(self, record):
        append(self, record)
        shutil.rmtree("x")

    monkeypatch.setattr(RunDirectory, "append_record", append_and_lose)
    train("--epochs", "2", "--run-dir", "x", code=1)
    assert capsys.readouterr().err == "the run directory x is gone, and nothing can be saved\n"
    assert not Path("x").exists()


def test_figures_that_cannot_be_drawn_are_a_note(capsys, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("latex was not able to\nprocess this")

    monkeypatch.setattr(figures, "draw_curves", fail)
    train("--epochs", "1", "--run-dir", "x")
    shown = capsys.readouterr()
    reason = "RuntimeError: latex was not able to process this"
    assert f"the figures could not be drawn: {reason}; draw them with: python launch.py report x\n" in shown.out
    assert not shown.err
    summary = RunDirectory(Path("x")).read_summary()
    assert summary.status == "completed" and summary.test is not None


def test_a_signal_while_figures_are_drawn_does_not_end_a_trained_run(capsys, monkeypatch):
    drawn = figures.draw_curves

    def signalled(*arguments, **named):
        os.kill(os.getpid(), signal.SIGTERM)
        return drawn(*arguments, **named)

    monkeypatch.setattr(figures, "draw_curves", signalled)
    train("--epochs", "1", "--run-dir", "x")
    assert not capsys.readouterr().err
    summary = RunDirectory(Path("x")).read_summary()
    assert summary.status == "completed" and summary.test is not None


def test_a_second_ctrl_c_while_figures_are_drawn_loses_no_result(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(figures, "draw_curves", interrupted)
    train("--epochs", "1", "--run-dir", "x", code=130)
    summary = RunDirectory(Path("x")).read_summary()
    assert summary.status == "completed" and summary.test is not None


def test_a_run_that_is_killed_while_figures_are_drawn_is_done(monkeypatch):
    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(figures, "draw_evaluation", killed)
        with pytest.raises(Killed):
            train("--epochs", "1", "--run-dir", "x")
    assert RunDirectory(Path("x")).read_summary().status == "completed"
    assert main(["--resume", "x"]) == 0
    assert main(["report", "x"]) == 0
    assert sorted(path.name for path in Path("x/figures").iterdir()) == FIGURES


@pytest.mark.parametrize("flag", ["--checkpoint-every-steps", "--checkpoint-every-minutes", "--max-minutes"])
def test_an_interval_must_be_above_zero(capsys, flag):
    train(flag, "0", code=2)
    assert f"{flag} must be " in error_of(capsys)
