"""Which part of the package may import which."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cifar_dist"

# room -> the rooms of ours that it may import
MAY_IMPORT = {
    "config": {"config"},
    "display": {"display", "config", "run"},
    "data": {"data", "config"},
    "model": {"model", "config"},
    "runtime": {"runtime", "config"},
    "training": {"training", "data", "model", "runtime", "config"},
    "run": {"run", "training", "data", "model", "runtime", "config"},
    "commands": {"data", "model", "runtime", "training", "run", "display", "config"},
    "cli": {"config", "run", "runtime", "__init__"},
    "api": {"commands", "run", "display", "config"},
    "__init__": {"api", "config"},
    "__main__": {"cli"},
}
NO_TORCH = {"config", "display", "cli", "__init__", "__main__"}
HEAVY = {"torch", "torchvision", "accelerate"}
NO_TORCH_FILES = {
    "commands/examples.py",
    "commands/seeds.py",
    "run/results.py",
    "run/resolve.py",
    "run/directory.py",
    "run/lock.py",
    "run/study.py",
    "run/checks.py",
    "runtime/launch.py",
    "runtime/signals.py",
    "runtime/output.py",
    "data/download.py",
}
# (room or file, what it may not import), besides the rooms
KNOWS_ACCELERATE = {"runtime/distributed.py"}


def imports(tree: ast.AST, name: str) -> list[str]:
    """Absolute names of all modules that are imported anywhere in a file, functions included."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative imports hide the room"
            found.append(node.module or "")
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def room_of(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def violations(path: str, source: str) -> list[str]:
    """What a file (path relative to the package) imports and may not."""
    room, wrong, tree = room_of(path), [], ast.parse(source)
    # What cli imports inside of a function it imports when that is asked for: any room, but never torch itself.
    at_import = ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef)], [])
    lazily = set(imports(tree, path)) - set(imports(at_import, path)) if room == "cli" else set()
    for name in imports(tree, path):
        top, *rest = name.split(".")
        if top == "cifar_dist":
            target = rest[0] if rest else "__init__"
            known = target in MAY_IMPORT and not (room == "training" and name.startswith("cifar_dist.run.results"))
            allowed = target in MAY_IMPORT[room] or (room == "config" and target == "__init__") or name in lazily
            if known and not allowed:
                wrong.append(f"{path}: imports {name}")
        if top in HEAVY and (room in NO_TORCH or path in NO_TORCH_FILES):
            wrong.append(f"{path}: imports {top}")
        if top == "accelerate" and path not in KNOWS_ACCELERATE:
            wrong.append(f"{path}: imports accelerate")
        if top == "rich" and room in {"training", "data", "model", "runtime", "config"}:
            wrong.append(f"{path}: talks to the console")
    return wrong


FILES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


def test_imports_follow_the_table():
    assert [line for path in FILES for line in violations(path, (PACKAGE / path).read_text())] == []


def test_every_folder_and_module_is_a_known_room():
    assert {room_of(path) for path in FILES} <= set(MAY_IMPORT)
    banned = {"utils.py", "common.py", "helpers.py", "core.py"}
    assert not banned & {Path(path).name for path in FILES}
    assert set(FILES) >= NO_TORCH_FILES | KNOWS_ACCELERATE


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("config/plan.py", "import torch"),
        ("display/terminal.py", "from cifar_dist.training.trainer import Trainer"),
        ("data/sampler.py", "from cifar_dist.model import networks"),
        ("runtime/launch.py", "import torch.distributed"),
        ("runtime/device.py", "from accelerate import Accelerator"),
        ("training/trainer.py", "from rich.console import Console"),
        ("commands/train.py", "from cifar_dist.commands.evaluate import run"),
        ("commands/train.py", "def f():\n    from accelerate import Accelerator"),
        ("cli.py", "from cifar_dist.commands.train import run"),
        ("cli.py", "def f():\n    import torch"),
    ],
)
def test_a_forbidden_import_is_caught(path, source):
    assert violations(path, source)


def test_the_entry_file_is_a_stub():
    source = (ROOT / "launch.py").read_text()
    assert set(imports(ast.parse(source), "launch.py")) == {"sys", "cifar_dist.cli", "cifar_dist.cli.main"}
    assert len(source.splitlines()) < 18


PROBE = """
import sys
from cifar_dist.cli import main
from cifar_dist.config.options import COMMANDS

def require_absent(*names):
    if found := set(names) & set(sys.modules):
        sys.exit(f"imported {found}")

for command in ([], *([name] for name in COMMANDS)):
    try:
        main([*command, "--help"])
    except SystemExit:
        require_absent("torch", "torchvision", "accelerate", "numpy", "matplotlib", "rich", "optuna")
for command in ("recipes", "config"):
    assert main([command]) == 0
require_absent("torch", "torchvision", "accelerate")
from cifar_dist.data import cifar
from cifar_dist.display import progress
from cifar_dist.runtime import launch, signals
require_absent("torch", "torchvision", "accelerate", "matplotlib")
from cifar_dist.commands import report, seeds, tune
from cifar_dist.display import report
require_absent("torch", "torchvision", "accelerate")
"""


def test_every_help_the_launcher_and_report_load_without_torch():
    """Unlike the table, this finds what is imported through other packages."""
    result = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("--help") >= 10
    assert all(len(line) <= 120 for line in result.stdout.splitlines())
