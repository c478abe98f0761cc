"""The console, and what a person is told of the program: in pipes, under FORCE_COLOR, without the packages."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from cifar_dist.config import provenance
from cifar_dist.config.provenance import command_line, program_name
from cifar_dist.display.console import can_draw, make_console
from tests.conftest import ROOT


def with_nobody_who_reads(*words: str, stream: str = "stdout") -> subprocess.CompletedProcess:
    """Run Python with a standard output (or error) that is closed at its other end, and buffered as a user's is."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            [sys.executable, *words],
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writer},
            text=True,
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
            timeout=60,
            check=False,
        )
    finally:
        os.close(writer)


def test_a_program_goes_on_where_nobody_reads_its_lines():
    code = """
import sys
from cifar_dist.display.console import make_console
console = make_console()
for _ in range(100):
    console.print("a line of a training")
print("it went on", file=sys.stderr)
"""
    result = with_nobody_who_reads("-c", code)
    assert (result.returncode, result.stderr) == (0, "it went on\n")


def test_a_result_is_written_where_nobody_reads_what_stands_beside_it():
    code = """
import sys
from cifar_dist.display.console import make_console
console = make_console(stderr=True)
for _ in range(3):
    console.print("a note")
print("the result")
"""
    result = with_nobody_who_reads("-c", code, stream="stderr")
    assert (result.returncode, result.stdout) == (0, "the result\n")


@pytest.mark.parametrize("words", ["--completion", "--help", "eval --help", "--version"])
def test_what_nobody_reads_to_its_end_is_no_accident(words):
    result = with_nobody_who_reads("launch.py", *words.split())
    assert (result.returncode, result.stderr) == (1, "")


def test_a_pipe_gets_no_moving_view_where_colours_are_forced(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not can_draw(make_console())


def test_text_is_shown_as_it_is(capsys):
    make_console().print("a/:cat:.png 100", markup=False)
    assert capsys.readouterr().out == "a/:cat:.png 100\n"


def test_a_python_without_the_packages_is_told_so_in_one_line():
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", "launch.py", "--dataset", "shapes"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environ, timeout=60, check=False)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "has no package yaml" in result.stderr and "pip install" in result.stderr


def test_a_part_of_the_program_that_is_missing_is_not_taken_for_a_package(monkeypatch):
    def broken():
        raise ModuleNotFoundError("No module named 'cifar_dist.gone'", name="cifar_dist.gone")

    monkeypatch.setattr("cifar_dist.cli.main", broken)
    with pytest.raises(ModuleNotFoundError, match="gone"):
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
        ("/x/bin/pytest", "python launch.py"),
        ("/x/pytest/__main__.py", "python launch.py"),
    ],
)
def test_a_command_is_told_as_this_one_was_typed(monkeypatch, path, name):
    monkeypatch.setenv("CIFAR_DIST_PROGRAM", program_name(path))
    assert command_line("report", "my runs/x") == f"{name} report 'my runs/x'"
