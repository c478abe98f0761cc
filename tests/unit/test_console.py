"""The console, and what a person is told of the program: in pipes, under FORCE_COLOR, without the packages."""

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from cifar_dist.cli import main
from cifar_dist.config import provenance
from cifar_dist.config.provenance import command_line, program_name
from cifar_dist.display.terminal import can_draw, make_console
from tests.conftest import ROOT


@pytest.mark.parametrize("words", ["--completion", "eval --help"])
def test_a_closed_output_is_a_quiet_exit(words):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "launch.py", *words.split()]
    result = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=60, check=False
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")


def test_a_pipe_gets_text_as_it_is_and_no_moving_view(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not can_draw(make_console())
    monkeypatch.delenv("FORCE_COLOR")
    make_console().print("a/:cat:.png 100", markup=False)
    assert capsys.readouterr().out == "a/:cat:.png 100\n"


def test_missing_packages_are_one_line():
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", "launch.py", "--dataset", "shapes"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environ, timeout=60, check=False)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "has no package yaml" in result.stderr and "pip install" in result.stderr


def test_a_missing_torch_is_one_line(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name))
    assert main(["--dataset", "shapes", "--dry-run"]) == 2
    shown = capsys.readouterr().err
    assert "has no package torch: activate the virtual environment" in shown and shown.count("\n") == 1


@pytest.mark.parametrize("name", ["cifar_dist.gone", "wandb.part_of_it"])
def test_a_module_that_is_missing_deep_inside_keeps_its_traceback(monkeypatch, name):
    def broken():
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    monkeypatch.setattr("cifar_dist.cli.main", broken)
    with pytest.raises(ModuleNotFoundError, match=name):
        runpy.run_path(str(ROOT / "launch.py"), run_name="__main__")


def test_a_copy_in_somebodys_checkout_has_no_commit_of_theirs(tmp_path):
    """As in a virtual environment that lies in a repository and is ignored there."""
    copy = tmp_path / "venv" / "provenance.py"
    copy.parent.mkdir()
    copy.write_bytes(Path(provenance.__file__).read_bytes())
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    git_commit = runpy.run_path(str(copy))["git_commit"]
    assert git_commit() is None
    subprocess.run([*git, "add", "venv"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "ours"], check=True)
    assert len(git_commit()) == 40


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("launch.py", "python launch.py"),
        ("/a b/launch.py", "python '/a b/launch.py'"),
        ("/x/bin/cifar-dist", "cifar-dist"),
        ("/x/cifar_dist/__main__.py", "python -m cifar_dist"),
    ],
)
def test_a_command_line_names_the_program_as_it_was_typed(monkeypatch, path, name):
    monkeypatch.setenv("CIFAR_DIST_PROGRAM", program_name(path))
    assert command_line("report", "my runs/x") == f"{name} report 'my runs/x'"
