"""SIGKILL at any moment loses nothing: the short form of benchmarks/crash_test.py."""

import random
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from cifar_dist.training.checkpoint import load_checkpoint
from tests.commands.test_train import assert_same_run
from tests.conftest import make_images
from tests.launching.test_launch import LAUNCH, QUICK, begin, family, finish, wait_for

pytestmark = pytest.mark.full
EVERYTHING = ("--precision", "no", "--set", "ema_decay=0.9", "optimizer.nesterov=true", "augmentation.mixup=0.5")


def kill_all(process, last: Path, step: int, moment: float) -> None:
    """Kill a run's processes a moment after it has gone on from a step; its checkpoint is good and nobody is left."""
    wait_for(lambda: load_checkpoint(last)["step"] > step, process)
    time.sleep(moment)
    everyone = [*family(process), psutil.Process(process.pid)]
    for one in everyone:
        one.kill()
    finish(process)
    load_checkpoint(last)
    _, alive = psutil.wait_procs(everyone, timeout=20)
    assert not alive


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_that_is_killed_ends_with_the_same_bits(tmp_path, size):
    make_images(tmp_path / "images")
    arguments = [sys.executable, LAUNCH, "--config", str(Path(LAUNCH).parent / "accelerate_configs" / "cpu.yaml")]
    arguments += ["--num-processes", str(size), *QUICK, "images", *EVERYTHING, "--epochs", "5", "--resume"]

    def start(run: str):
        often = ("--checkpoint-every-steps", "1") if run == "parts" else ()
        return begin(*arguments, "--run-dir", run, *often, cwd=tmp_path, OMP_NUM_THREADS="1")

    whole = start("whole")
    checkpoints, moment = tmp_path / "parts" / "checkpoints", random.uniform(0, 1)
    last = checkpoints / "last.pt"
    process = start("parts")  # rank 0 (or the only process) is killed in the writing of a checkpoint
    wait_for(lambda: last.exists() and any(checkpoints.glob(".*.tmp")), process)
    everyone = [psutil.Process(process.pid), *family(process)]
    (writer,) = [one for one in everyone if size == 1 or one.environ().get("RANK") == "0"]
    writer.kill()
    ((code, _, _),) = finish(process)
    assert code == (-signal.SIGKILL if size == 1 else 1)
    step = load_checkpoint(last)["step"]

    kill_all(start("parts"), last, step, moment)
    for code, _, err in finish(whole, start("parts")):
        assert code == 0, err
    print(f"killed {moment:.3f} s after a step")  # shown where the next line fails
    assert_same_run(str(tmp_path / "whole"), str(tmp_path / "parts"), epochs=5)
    assert not [path for path in (tmp_path / "parts").rglob("*") if path.name.endswith((".tmp", ".lock"))]
