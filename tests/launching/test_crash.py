"""SIGKILL at any moment loses nothing: the short form of benchmarks/crash_test.py."""

import random
import time

from torchvision.models._api import BUILTIN_MODELS

from cifar_dist.run.checkpoint import load_checkpoint
from tests.commands.test_train import assert_same_run
from tests.conftest import ROOT, make_images
from tests.worlds.harness import Program, ThinResNet18

COMMAND = [
    "--config", str(ROOT / "accelerate_configs" / "cpu.yaml"), "--recipe", "original", "--dataset", "images",
    "--precision", "no", "--set", "global_batch_size=8", "stem=small", "image_size=16", "early_stopping.enabled=false",
    "ema_decay=0.9", "optimizer.nesterov=true", "augmentation.mixup=0.5", "--epochs", "5", "--resume", "--run-dir",
]  # fmt: skip


def thin_models() -> None:
    BUILTIN_MODELS["resnet18"] = ThinResNet18


def wait_for(condition, program: Program) -> None:
    while not condition():
        assert program.process.is_alive(), program.finish()
        time.sleep(0.005)


def test_a_run_that_is_killed_ends_with_the_same_bits(tmp_path):
    make_images(tmp_path / "images")
    checkpoints = tmp_path / "parts" / "checkpoints"
    last = checkpoints / "last.pt"

    def start() -> Program:
        return Program([*COMMAND, "parts", "--checkpoint-every-steps", "1"], tmp_path, prepare=thin_models)

    def kill(program: Program) -> int:
        """Kill a run; its checkpoint is good. Return its step."""
        program.kill()
        program.finish()
        return load_checkpoint(last)["step"]

    program = start()
    wait_for(lambda: last.exists() and any(checkpoints.glob(".*.tmp")), program)
    step = kill(program)
    moment = random.uniform(0, 0.3)
    print(f"killed {moment:.3f} s after a step")  # shown where the test fails
    program = start()
    wait_for(lambda: load_checkpoint(last)["step"] > step, program)
    time.sleep(moment)
    kill(program)
    whole, parts = Program([*COMMAND, "whole"], tmp_path, prepare=thin_models), start()
    for code, _, err in (whole.finish(), parts.finish()):
        assert code == 0, err
    assert_same_run(str(tmp_path / "whole"), str(tmp_path / "parts"), epochs=5)
    assert not [path for path in (tmp_path / "parts").rglob("*") if path.name.endswith(".tmp")]
