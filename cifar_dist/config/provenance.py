"""Where a run came from: versions and the commit of the checkout, so that it can be run again."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cifar_dist import __version__


def package_versions() -> dict[str, str]:
    """Give the versions of Python, this package, and those that decide what is computed."""
    versions = {"python": platform.python_version(), "cifar_dist": __version__}
    for name in ("torch", "torchvision", "accelerate", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "unknown"
    return versions


def git_commit() -> str | None:
    """Give the checkout's commit, with `-dirty` where tracked files differ from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
