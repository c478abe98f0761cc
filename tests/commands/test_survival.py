"""What a run survives: being killed between steps, running out of time, damaged files, a full disk."""

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from cifar_dist.cli import main
from cifar_dist.config.request import seconds_allowed
from cifar_dist.display import page
from cifar_dist.training.checkpoint import load_checkpoint
from cifar_dist.training.engine import Trainer
from cifar_dist.training.run_directory import RunDirectory
from tests.commands.test_train import VALIDATION, assert_same_run, error_of, small_world, train
from tests.unit.test_checkpoint import Payload
from tests.unit.test_faults import Disk

__all__ = ["small_world"]  # a fixture that every test here uses

EVERYTHING = (*VALIDATION, "ema_decay=0.9", "dropout=0.2", "optimizer.nesterov=true", "augmentation.mixup=0.5")


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours may answer it."""


def kill_after(monkeypatch, step: int) -> None:
    original = Trainer._end_step

    def killed(trainer):
        if trainer.state.step == step:
            raise Killed
        original(trainer)

    monkeypatch.setattr(Trainer, "_end_step", killed)


@pytest.mark.parametrize(
    ("options", "saved_at"), [(("--checkpoint-every-steps", "2"), 6), (("--checkpoint-every-minutes", "0.00001"), 7)]
)
def test_a_killed_run_goes_on_from_its_last_checkpoint_with_the_same_bits(monkeypatch, options, saved_at):
    """There are three steps in an epoch: step 7 is the first of the third."""
    monkeypatch.setattr("cifar_dist.config.plan._IMAGES_A_SECOND", {"cpu": 32})  # agreed after each step
    train("--epochs", "3", "--run-dir", "whole", *EVERYTHING)
    with monkeypatch.context() as patch:
        kill_after(patch, 7)
        with pytest.raises(Killed):
            train("--epochs", "3", "--run-dir", "parts", *options, *EVERYTHING)
    assert load_checkpoint(Path("parts/checkpoints/last.pt"))["step"] == saved_at
    assert main(["--resume", "parts", *options]) == 0
    assert_same_run("whole", "parts")


def test_saving_within_an_epoch_changes_nothing():
    train("--epochs", "3", "--run-dir", "whole", *EVERYTHING)
    train("--epochs", "3", "--run-dir", "parts", "--checkpoint-every-steps", "1", *EVERYTHING)
    assert_same_run("whole", "parts")


def test_a_run_whose_time_is_over_is_saved_and_goes_on(capsys):
    train("--epochs", "3", "--run-dir", "whole", *EVERYTHING)
    train("--epochs", "3", "--run-dir", "parts", "--max-minutes", "0.0001", *EVERYTHING, code=75)
    assert "and saved; go on with: python launch.py --resume parts" in capsys.readouterr().err
    assert RunDirectory(Path("parts")).read_summary().status == "interrupted"
    assert main(["--resume", "parts"]) == 0
    assert_same_run("whole", "parts")


def test_how_long_a_run_may_take():
    job = {"SLURM_JOB_END_TIME": "1000", "SLURM_STEP_ID": "0"}
    assert seconds_allowed(None, {}, 0) is None
    assert seconds_allowed(2, {}, 0) == 120
    assert seconds_allowed(None, job, 400) == 540
    assert seconds_allowed(1, job, 400) == 60
    assert seconds_allowed(None, job, 990) == 0
    assert seconds_allowed(None, {"SLURM_JOB_END_TIME": "1000"}, 400) is None, "a shell in an allocation"


WRONG = {
    "flipped": "is damaged: the checksum of", "empty": "is empty", "cut": "is damaged: it ends too early",
    "foreign": "is not a file that torch.save wrote", "newer": "has format 99, and this version reads 1",
    "hostile": "is refused: it is more than tensors and plain values", "missing": "is missing",
}  # fmt: skip


def spoil(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "flipped":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif how == "newer":
        torch.save(torch.load(path, weights_only=True) | {"format_version": 99}, path)
    elif how == "hostile":
        torch.save(torch.load(path, weights_only=True) | {"model": Payload(Path("ran"))}, path)
    else:
        path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "foreign": b"GIF89a"}[how])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Where runs are that several tests begin with."""
    return tmp_path_factory.mktemp("trained")


@pytest.mark.parametrize("how", ["flipped", "empty", "cut", "foreign", "newer", "hostile", "missing"])
def test_a_damaged_last_checkpoint_is_replaced_by_the_previous(capsys, trained, how):
    if not list(trained.iterdir()):
        train("--epochs", "3", "--run-dir", str(trained / "whole"), *EVERYTHING)
        train("--epochs", "2", "--run-dir", str(trained / "parts"), "--checkpoint-every-steps", "1", *EVERYTHING)
    for name in ("whole", "parts"):
        shutil.copytree(trained / name, name)
    last = Path("parts/checkpoints/last.pt")
    if how == "missing":
        last.unlink()
    else:
        spoil(last, how)
    damaged = last.read_bytes() if how != "missing" else None
    capsys.readouterr()
    assert main(["--resume", "parts", "--epochs", "3"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "going on from previous.pt" in shown
    assert f"parts/checkpoints/last.pt {WRONG[how]}" in shown
    assert not Path("ran").exists()
    assert_same_run("whole", "parts")
    kept = Path("parts/checkpoints/damaged-1.pt")
    assert kept.exists() == (how != "missing")
    assert damaged is None or kept.read_bytes() == damaged
    load_checkpoint(Path("parts/checkpoints/previous.pt"))


def test_where_no_checkpoint_is_good_nothing_is_changed(capsys):
    train("--epochs", "2", "--run-dir", "x", "--checkpoint-every-steps", "1")
    for name in ("last.pt", "previous.pt"):
        spoil(Path("x/checkpoints") / name, "cut")
    before = {path: path.read_bytes() for path in sorted(Path("x").rglob("*")) if path.is_file()}
    capsys.readouterr()
    assert main(["--resume", "x", "--epochs", "3"]) == 2
    assert "last.pt is damaged" in (line := error_of(capsys)) and "previous.pt is damaged" in line
    assert {path: path.read_bytes() for path in sorted(Path("x").rglob("*")) if path.is_file()} == before


@pytest.mark.parametrize(
    ("number", "call"),
    [(errno.ENOSPC, "fsync"), (errno.ENOSPC, "replace"), (errno.EROFS, "fsync"), (errno.ENOENT, "replace")],
)
def test_a_disk_that_fails_during_training_is_one_line_and_code_1(capsys, monkeypatch, number, call):
    def fail(*_, **__):
        if len(Path("x/metrics.jsonl").read_bytes().splitlines()) == 2:  # the second epoch is written down
            raise OSError(number, os.strerror(number))
        return original(*_, **__)

    target = os if call == "fsync" else Path
    original = getattr(target, call)
    argv = ("--epochs", "3", "--run-dir", "x", "--checkpoint-every-steps", "1")
    with monkeypatch.context() as patch:
        patch.setattr(
            target, call, lambda *a, **k: fail(*a, **k) if Path("x/metrics.jsonl").exists() else original(*a, **k)
        )
        train(*argv, code=1)
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert os.strerror(number) in message and "the last good checkpoint stays" in message
    assert not [path for path in Path("x").rglob("*") if path.name.endswith(".tmp")]
    assert load_checkpoint(Path("x/checkpoints/last.pt"))["step"] >= 3
    assert main(["--resume", "x"]) == 0


CALLS = pytest.mark.parametrize("call", ["creat", "write", "flush", "fsync", "close", "replace"])
ERRORS = pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS], ids=["ENOSPC", "EROFS"])


@CALLS
@ERRORS
def test_each_call_that_fails_before_training_is_one_line_and_code_2(capsys, monkeypatch, call, error):
    with monkeypatch.context() as patch:
        disk = Disk(patch, 0, error, stays=True, only=call)
        train("--epochs", "1", "--run-dir", "x", code=2)
    assert disk.calls
    advice = "free space or mend the rights there"
    line = f"cannot write x: {os.strerror(error)}; {advice}"
    assert error_of(capsys) in (line, f"{line}, or name another --run-dir"), "as the folder is made, or what is in it"
    assert not Path("x/metrics.jsonl").exists()
    train("--epochs", "1", "--run-dir", "x", "--resume")


@CALLS
@ERRORS
def test_each_call_that_fails_during_training_is_one_line_and_code_1(capsys, monkeypatch, call, error):
    save, disks = RunDirectory.write_checkpoint, []
    with monkeypatch.context() as patch:

        def save_and_break(self, path, content, **named):
            save(self, path, content, **named)
            if not disks:
                disks.append(Disk(patch, 0, error, stays=True, only=call))

        patch.setattr(RunDirectory, "write_checkpoint", save_and_break)
        train("--epochs", "1", "--run-dir", "x", "--checkpoint-every-steps", "1", code=1)
    assert disks[0].calls
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert f"{os.strerror(error)}; the last good checkpoint stays: x/checkpoints/last.pt; go on with: python" in line
    assert load_checkpoint(Path("x/checkpoints/last.pt"))["step"] >= 1


def test_a_run_directory_that_vanishes_is_one_line_and_code_1(capsys, monkeypatch):
    append = RunDirectory.append_record

    def append_and_lose(self, record):
        append(self, record)
        if record.epoch == 2:
            shutil.rmtree("x")

    monkeypatch.setattr(RunDirectory, "append_record", append_and_lose)
    train("--epochs", "3", "--run-dir", "x", code=1)
    assert capsys.readouterr().err == "the run directory x is gone, and nothing can be saved\n"
    assert not Path("x").exists()


def test_figures_that_cannot_be_written_are_one_line(capsys, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "x/figures/curves.png")

    monkeypatch.setattr("cifar_dist.display.page.draw_curves", fail)
    train("--epochs", "1", "--run-dir", "x", code=1)
    line = capsys.readouterr().err
    assert line.startswith(
        "cannot write x/figures/curves.png: No space left on device; the last good checkpoint stays: x/"
    )
    assert line.count("\n") == 1


def test_a_signal_while_figures_are_drawn_finds_nothing_to_save_and_waits_for_the_end(capsys, monkeypatch):
    def told(*arguments, **named):
        os.kill(os.getpid(), signal.SIGTERM)
        return drawn(*arguments, **named)

    drawn = page.draw_curves
    monkeypatch.setattr("cifar_dist.display.page.draw_curves", told)
    train("--epochs", "1", "--run-dir", "x")
    assert not capsys.readouterr().err
    summary = RunDirectory(Path("x")).read_summary()
    assert summary.status == "completed" and summary.test is not None


def test_a_run_that_is_killed_while_its_figures_are_drawn_draws_them_when_it_goes_on(monkeypatch):
    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("cifar_dist.display.page.draw_evaluation", killed)
        with pytest.raises(Killed):
            train("--epochs", "1", "--run-dir", "x")
    assert RunDirectory(Path("x")).read_summary().test is None
    assert main(["--resume", "x"]) == 0
    drawn = {"confusion.png", "curves.png", "mistakes.png", "per_class.png", "predictions.png"}
    assert {path.name for path in Path("x/figures").iterdir()} == drawn
    assert RunDirectory(Path("x")).read_summary().status == "completed"


def test_a_folder_that_cannot_be_written_is_found_before_training(capsys, monkeypatch):
    def fail(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "fsync", fail)
    train("--epochs", "1", "--run-dir", "x", code=2)
    assert error_of(capsys) == "cannot write x: Read-only file system; free space or mend the rights there"


@pytest.mark.parametrize("flag", ["--checkpoint-every-steps", "--checkpoint-every-minutes", "--max-minutes"])
def test_a_rhythm_must_be_above_zero(capsys, flag):
    train(flag, "0", code=2)
    assert f"{flag} must be above 0" in error_of(capsys)


def test_tensors_are_compared():
    """So that `assert_same_run` can fail."""
    train("--epochs", "3", "--run-dir", "a", *VALIDATION)
    train("--epochs", "3", "--run-dir", "b", *VALIDATION, "optimizer.learning_rate=0.011")
    assert not torch.equal(*(load_checkpoint(Path(f"{name}/checkpoints/last.pt"))["model"]["fc.bias"] for name in "ab"))
