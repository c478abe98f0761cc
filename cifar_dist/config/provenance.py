"""Where a run came from: program, versions and the commit of the checkout, so that it can be run again."""

import os
import platform
import shlex
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cifar_dist import __version__

PROGRAM = "CIFAR_DIST_PROGRAM"
"""The environment variable that tells all processes of a run how it was typed."""


def program_name(path: str) -> str:
    """Give what a person types to start this program, from the path that Python was given (`sys.argv[0]`)."""
    folder, name = Path(path).parent.name, Path(path).stem
    if name == "launch":
        return f"python {shlex.quote(path)}"
    if (folder, name) == ("cifar_dist", "__main__"):
        return "python -m cifar_dist"
    return "cifar-dist" if name == "cifar-dist" else "python launch.py"


def command_line(*words: object) -> str:
    """Give a command of this program as it can be typed here."""
    return f"{os.environ.get(PROGRAM, 'cifar-dist')} {shlex.join(map(str, words))}"


def package_versions() -> dict[str, str]:
    """Give the versions of Python, this package, and those that decide what is computed."""
    versions = {"python": platform.python_version(), "cifar_dist": __version__}
    for name in ("torch", "torchvision", "accelerate", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # one that was built and not installed
            versions[name] = "unknown"
    return versions


def version_note(before: Mapping[str, str]) -> str | None:
    """Return which versions are others than those that a run had `before`; None if none is."""
    now = package_versions()
    changed = [f"{name} {old} -> {now[name]}" for name, old in before.items() if name in now and old != now[name]]
    return f"other versions than before: {', '.join(changed)}: not the same bits" if changed else None


def git_commit() -> str | None:
    """Give the checkout's commit, with `-dirty` where tracked files differ from it; None outside a checkout."""
    here = Path(__file__)
    try:
        _git(here.parent, "ls-files", "--error-unmatch", here.name)  # else it only lies in somebody's checkout
        return _git(here.parent, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*") or None
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    # A checkout of another user is trusted: its code is what runs here.
    command = ["git", "-C", str(folder), "-c", "safe.directory=*", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
