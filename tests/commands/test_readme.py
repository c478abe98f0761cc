"""Every command of the README is run; those that take more than a minute are run with --dry-run."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet18

from tests.conftest import ROOT, make_dataset
from tests.worlds.harness import Program

pytestmark = pytest.mark.full
README, EXTENDING = (ROOT / "README.md").read_text(), (ROOT / "docs" / "extending.md").read_text()
COMMANDS = [
    line.split("  # ")[0]
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]

# What a command needs to be run here: other arguments for those that would take long, or that need files.
SMALL = ["--set", "image_size=16"]
ADDED = {
    "python launch.py --config accelerate_configs/multi_cpu.yaml --recipe first": ["--dry-run"],
    "python launch.py --recipe original --epochs 20": ["--dry-run"],
    "python launch.py --recipe first --set model=mynet.py:net": ["image_size=16"],
    "python launch.py --recipe quick --budget 10m": ["--dry-run", "--measure", *SMALL, "image_size_schedule=null"],
    "python launch.py --recipe quick --set train_size=0.1 --dry-run --measure": [*SMALL, "image_size_schedule=null"],
    "python launch.py --recipe first --seeds 2": ["--epochs", "1", "--run-dir", "seeds", *SMALL],
    "python launch.py tune --recipe first --trials 20": ["--epochs", "1", "--trials", "2", *SMALL],
    "python launch.py --num-processes 2": ["--dry-run"],
    "accelerate launch launch.py --config accelerate_configs/mps.yaml --recipe first": SMALL,
    "accelerate launch launch.py --config accelerate_configs/multi_gpu.yaml": ["--dry-run"],
    "accelerate launch --config_file accelerate_configs/multi_gpu.yaml launch.py": ["--dry-run"],
    "torchrun --standalone --nproc-per-node 2 launch.py": ["--dry-run"],
    "python launch.py eval --ckpt resnet18_cifar10_data_augument.pth --json result.json": ["--dataset", "shapes"],
    "python launch.py bench --recipe original --seconds 10": [
        *SMALL, "stem=small", "global_batch_size=16", "--seconds", "0.5",
    ],
}  # fmt: skip
TEST_COMMAND = "python3 -m venv .venv && . .venv/bin/activate && pip install -e '.[test]' && pytest"
FIRST = "python launch.py --recipe first"
INSTALL = "python3 -m venv .venv && . .venv/bin/activate && pip install -e . && "


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A folder like a clone, in which runs may be left."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("launch.py", "accelerate_configs", "cifar_dist", "docs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "mynet.py").write_text(re.search(r"```python\n(.*?)```", EXTENDING, re.DOTALL)[1])
    torch.save(resnet18(num_classes=10).state_dict(), folder / "resnet18_cifar10_data_augument.pth")
    return folder


def few_images() -> None:
    """96 images instead of all shapes."""
    from cifar_dist.commands import train

    train.load_dataset = lambda *_, **__: make_dataset()


def run(clone: Path, command: str) -> tuple[int | None, str, str]:
    """Run a command line: in a new interpreter where it is not this one's launch.py in one process."""
    words = shlex.split(command) + ADDED.get(command, [])
    if words[:2] == ["python", "launch.py"]:
        return Program(words[2:], clone).finish()
    if "mps.yaml" in command:  # tests/launching has `accelerate launch`
        return Program(words[words.index("launch.py") + 1 :], clone, prepare=few_images).finish()
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    words = ["bash", "-c", command] if command.startswith("eval ") else words
    ended = subprocess.run(words, cwd=clone, env=environ, capture_output=True, text=True, timeout=600, check=False)
    return ended.returncode, ended.stdout, ended.stderr


def test_the_readme_begins_with_the_two_commands():
    assert COMMANDS[0] == INSTALL + FIRST
    assert COMMANDS[1] == TEST_COMMAND, "what .ci/run calls"


# Those for Slurm are submitted in tests/slurm.
@pytest.mark.parametrize("command", [each for each in COMMANDS if each != TEST_COMMAND and "sbatch" not in each])
def test_a_command_of_the_readme(clone, command):
    """In the order of the README, in one folder: later commands use what earlier ones left."""
    command = command.removeprefix(INSTALL)  # installing is what .ci/run does
    code, out, err = run(clone, command)
    assert code == 0, out + err
    if command == FIRST:
        summary = json.loads((clone / "runs" / "first-shapes-seed0" / "summary.json").read_text())
        assert summary["test"]["top1"] >= 0.96, "the README promises 97 %"
    if command.startswith("python launch.py predict"):
        assert re.search(r"star\.png\s+star", out), out
    if "multi_cpu" in command:
        assert "64 per device x 2 processes" in out
    if "mps.yaml" in command and not torch.backends.mps.is_available() and not torch.cuda.is_available():
        assert "no MPS or CUDA device here: the CPU computes" in out
