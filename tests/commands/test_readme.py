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

from tests.conftest import ROOT, make_dataset, make_images
from tests.worlds.harness import Program

pytestmark = pytest.mark.full
README, NETWORK = (ROOT / "README.md").read_text(), (ROOT / "docs" / "your-network.md").read_text()
COMMANDS = [
    line.split("  # ")[0]
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]

# Other arguments for commands that would take long.
ADDED = {
    "python launch.py --recipe fast --set validation_size=0": ["--dry-run"],
    "python launch.py --set validation_size=0": ["--dry-run"],
    "python launch.py --dataset photos --recipe quick --epochs 30 --set image_size=64 global_batch_size=32": [
        "--epochs", "1", "--set", "image_size=16", "global_batch_size=8",
    ],
    "python launch.py --recipe first --set model=mynet.py:net": ["--epochs", "1", "--set", "image_size=16"],
    "python launch.py --recipe first --num-processes 2": ["--dry-run"],
    "accelerate launch launch.py --config accelerate_configs/mps.yaml --recipe first": ["--set", "image_size=16"],
}  # fmt: skip
INSTALL = "python3 -m venv .venv && . .venv/bin/activate && pip install -e . && "
TEST_COMMAND = "python3 -m venv .venv && . .venv/bin/activate && pip install -e '.[test]' && pytest"


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A folder like a clone, with images and a network, in which runs may be left."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("launch.py", "accelerate_configs", "cifar_dist", "docs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "mynet.py").write_text(re.search(r"```python\n(.*?)```", NETWORK, re.DOTALL)[1])
    make_images(folder / "photos")
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
    ended = subprocess.run(words, cwd=clone, env=environ, capture_output=True, text=True, timeout=600, check=False)
    return ended.returncode, ended.stdout, ended.stderr


def test_the_readme_begins_with_the_first_recipe_and_ends_with_the_tests():
    assert COMMANDS[0] == INSTALL + "python launch.py --recipe first"
    assert COMMANDS[-1] == TEST_COMMAND, "what .ci/run calls"
    assert ADDED.keys() <= set(COMMANDS), "of a command that is no longer there"


# Those for Slurm are submitted in tests/slurm.
@pytest.mark.parametrize("command", [each for each in COMMANDS if each != TEST_COMMAND and "sbatch" not in each])
def test_a_command_of_the_readme(clone, command):
    """In the order of the README, in one folder: later commands use what earlier ones left."""
    command = command.removeprefix(INSTALL)  # installing is what .ci/run does
    code, out, err = run(clone, command)
    assert code == 0, out + err
    if command == COMMANDS[0].removeprefix(INSTALL):
        summary = json.loads((clone / "runs" / "first-shapes-seed0" / "summary.json").read_text())
        assert summary["test"]["top1"] >= 0.97, "the README promises 99 %"
    if "--num-processes" in command:
        assert "per device x 2 processes" in out
    if "mps.yaml" in command and not torch.backends.mps.is_available() and not torch.cuda.is_available():
        assert "cpu (no MPS or CUDA device here), " in out
    if "star.png" in command:
        assert re.search(r"star\.png\s+star", out), out
