"""Where a run came from: program, versions and the commit of the checkout, so that it can be run again."""

import os
import platform
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

from cifar_dist import __version__

PROGRAM = "CIFAR_DIST_PROGRAM"
"""The environment variable with the program's name as it was typed, for all ranks."""


def program_name(path: str) -> str:
    """Return the words that start this program, from the path that Python was given (`sys.argv[0]`)."""
    name = Path(path).stem
    if name == "launch":
        return f"python {shlex.quote(path)}"
    return {"cifar-dist": "cifar-dist", "__main__": "python -m cifar_dist"}.get(name, "python launch.py")


def command_line(*words: object) -> str:
    """Return a command of this program as it can be typed here."""
    return f"{os.environ.get(PROGRAM, 'cifar-dist')} {shlex.join(map(str, words))}"


def package_versions() -> dict[str, str]:
    """Return the versions of Python, this package, and those that decide what is computed."""
    from importlib.metadata import PackageNotFoundError, version  # which takes 10 ms, and --help needs none of it

    versions = {"python": platform.python_version(), "cifar_dist": __version__}
    for name in ("torch", "torchvision", "accelerate", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # one that was built and not installed
            versions[name] = "unknown"
    return versions


def version_note(before: Mapping[str, str]) -> str | None:
    """Return a note with the versions that differ from a run's; None if none does."""
    now = package_versions()
    changed = [f"{name} {old} -> {now[name]}" for name, old in before.items() if name in now and old != now[name]]
    return f"other versions than before: {', '.join(changed)}: not the same bits" if changed else None


def git_commit() -> str | None:
    """Return the checkout's commit, with `-dirty` where tracked files differ from it; None outside a checkout."""
    here = Path(__file__)
    # A checkout of another user is trusted: its code is what runs here.
    git = ["git", "-C", str(here.parent), "-c", "safe.directory=*"]
    describe = [*git, "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        # The package may only lie in a checkout of something else.
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True, timeout=10)
        described = subprocess.run(describe, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None
