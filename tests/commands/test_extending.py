"""The network of docs/your-network.md is trained on two processes, killed, resumed and exported by the commands."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_dist import Recipe
from cifar_dist.run.checkpoint import load_checkpoint
from tests.commands.test_train import assert_same_run
from tests.conftest import ROOT
from tests.launching.test_launch import BIN, begin, family, finish, wait_for

pytestmark = pytest.mark.full
SECTION = (ROOT / "docs" / "your-network.md").read_text().split("\n### ")[0]
(NETWORK,) = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
_FIRST, RESUME = re.findall(r"```sh\n(.*?)```", SECTION, re.DOTALL)
TRAIN, TRAIN_ON_PHOTOS = [f"python launch.py {each}" for each in _FIRST.split("python launch.py ")[1:]]
(EXPORT,) = re.findall(r"`(python launch\.py export [^`]+)`", SECTION)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder like a clone, with the network."""
    for name in ("launch.py", "accelerate_configs", "cifar_dist"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "mynet.py").write_text(NETWORK)
    return tmp_path


def start(command: str, folder: Path) -> subprocess.Popen:
    environ = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return begin(*shlex.split(command.replace("\\\n", " ")), cwd=folder, **environ)


def run(command: str, folder: Path) -> None:
    ((code, out, err),) = finish(start(command, folder))
    assert code == 0, out + err


def test_a_network_of_your_own_is_trained_killed_resumed_and_exported(folder):
    mynet, whole = folder / "runs" / "mynet", folder / "runs" / "whole"
    run(TRAIN, folder)
    mynet.rename(whole)

    last = mynet / "checkpoints" / "last.pt"
    process = start(TRAIN, folder)
    wait_for(last.exists, process)
    for each in [*family(process), process]:
        each.kill()
    finish(process)
    steps = load_checkpoint(last)["step"], load_checkpoint(whole / "checkpoints" / "last.pt")["step"]
    assert steps[0] < steps[1], "it was not killed in mid-run"
    run(RESUME, folder)
    assert_same_run(whole, mynet, epochs=Recipe.load("first").epochs)

    run(EXPORT, folder)
    names: dict = {}
    exec(NETWORK, names)
    names["net"](num_classes=10).load_state_dict(torch.load(folder / "mynet.pth", weights_only=True), strict=True)


def test_it_trains_on_images_of_your_own(folder):
    for number, name in enumerate(["猫", "狗", "汽车"]):
        (folder / "photos" / name).mkdir(parents=True)
        for index in range(20):
            Image.fromarray(np.full((40, 50, 3), 80 * number + index, np.uint8)).save(
                folder / "photos" / name / f"{index}.png"
            )
    run(TRAIN_ON_PHOTOS, folder)
    summary = json.loads((folder / "runs" / "photos" / "summary.json").read_text())
    assert summary["status"] == "completed" and set(summary["test"]["per_class_accuracy"]) == {"猫", "狗", "汽车"}
