"""Every command of the README is run; those that take more than a minute are run with --dry-run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet18

from tests.conftest import ROOT

pytestmark = pytest.mark.full
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("  # ")[0]
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]

# What a command needs to be run here: other arguments for those that would take long, or that need files.
SMALL = ["--set", "image_size=16"]
ADDED = {
    "python launch.py --dataset shapes --recipe original --epochs 3": SMALL,
    "python launch.py --config accelerate_configs/multi_cpu.yaml --dataset shapes --recipe original --epochs 1": SMALL,
    "python launch.py --recipe original --epochs 20": ["--dry-run"],
    "python launch.py --num-processes 2": ["--dry-run"],
    "accelerate launch launch.py --config accelerate_configs/mps.yaml --dataset shapes --epochs 1": [
        *SMALL,
        "stem=imagenet",
    ],
    "accelerate launch launch.py --config accelerate_configs/multi_gpu.yaml": ["--dry-run"],
    "accelerate launch --config_file accelerate_configs/multi_gpu.yaml launch.py": ["--dry-run"],
    "torchrun --standalone --nproc-per-node 2 launch.py": ["--dry-run"],
    "python launch.py eval --ckpt resnet18_cifar10_data_augument.pth --json result.json": ["--dataset", "shapes"],
    "python launch.py bench --recipe original --seconds 10": [*SMALL, "global_batch_size=16", "--seconds", "1"],
}
TEST_COMMAND = "python3 -m venv .venv && . .venv/bin/activate && pip install -e '.[test]' && pytest"
INSTALL = "python3 -m venv .venv && . .venv/bin/activate && pip install -e . && "


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A folder like a clone, in which runs may be left."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("launch.py", "accelerate_configs", "cifar_dist", "docs"):
        (folder / name).symlink_to(ROOT / name)
    torch.save(resnet18(num_classes=10).state_dict(), folder / "resnet18_cifar10_data_augument.pth")
    return folder


def run(clone: Path, words: list[str]) -> subprocess.CompletedProcess:
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(words, cwd=clone, env=environ, capture_output=True, text=True, timeout=600, check=False)


def test_the_readme_begins_with_the_two_commands():
    assert COMMANDS[0].startswith(INSTALL + "python launch.py --dataset shapes")
    assert COMMANDS[1] == TEST_COMMAND, "what .ci/run calls"


# Those for Slurm are submitted in tests/slurm.
@pytest.mark.parametrize("command", [each for each in COMMANDS if each != TEST_COMMAND and "sbatch" not in each])
def test_a_command_of_the_readme(clone, command):
    """In the order of the README, in one folder: later commands use what earlier ones left."""
    command = command.removeprefix(INSTALL)  # installing is what .ci/run does
    words = shlex.split(command) + ADDED.get(command, [])
    result = run(clone, ["bash", "-c", command] if command.startswith("eval ") else words)
    assert result.returncode == 0, result.stdout + result.stderr
    if command == COMMANDS[0].removeprefix(INSTALL):
        accuracy = float(re.search(r"test accuracy ([\d.]+) %", result.stdout)[1])
        assert 20 < accuracy < 100, "the first try learns nothing"
    if "multi_cpu" in command:
        assert "64 per device x 2 processes" in result.stdout
    if "mps.yaml" in command and not torch.backends.mps.is_available() and not torch.cuda.is_available():
        assert "no MPS or CUDA device here: training on cpu" in result.stdout


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"\]\((?!https:)([^)#]+)\)|`((?:docs|accelerate_configs)/[\w./-]*)`", README)))
)
def test_a_path_of_the_readme_exists(path):
    assert (ROOT / (path[0] or path[1])).exists()


def test_without_files_and_network_it_ends_in_one_line(tmp_path):
    environ = {**os.environ, "CIFAR_DIST_CIFAR10_URLS": "http://127.0.0.1:9/cifar-10-python.tar.gz"}
    result = subprocess.run(
        [sys.executable, str(ROOT / "launch.py")],
        cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    for choice in ("--data-dir", "CIFAR_DIST_CIFAR10_URLS", "--dataset shapes", "cifar-10-python.tar.gz"):
        assert choice in result.stderr, choice
    assert list(tmp_path.iterdir()) == []
