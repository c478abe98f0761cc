"""The package as pip installs it: built from a source distribution, and run from an empty folder without a checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.full
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")


def run(*command: object, cwd: Path, **environ: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != "CIFAR_DIST_PROGRAM"} | environ
    ended = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build as `python -m build` does, a wheel from a source distribution, but with the installed setuptools."""
    folder = tmp_path_factory.mktemp("build")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("cifar_dist", "accelerate_configs"):
        shutil.copytree(ROOT / name, folder / "checkout" / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "checkout")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", code, cwd=folder / "checkout")
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder / "source", filter="data")
    source = next((folder / "source").iterdir())
    run(*PIP, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder, source, cwd=folder)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_what_the_package_reads(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "cifar_dist"
    needed = {*package.rglob("*.py"), *package.glob("config/recipes/*.yaml"), *package.rglob("*.html")}
    assert {str(path.relative_to(ROOT)) for path in needed} | {"cifar_dist/py.typed"} <= names
    configs = {f"cifar_dist/config/accelerate_configs/{path.name}" for path in (ROOT / "accelerate_configs").iterdir()}
    assert configs <= names
    assert {name.split("/")[0] for name in names} == {"cifar_dist", "cifar_dist-0.1.0.dist-info"}


def test_an_installed_wheel_trains_in_an_empty_folder(wheel, tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    run(*PIP, "install", "--no-deps", "--no-index", "--target", site, wheel, cwd=work)

    def cifar_dist(*words: str) -> str:
        return run(sys.executable, site / "bin" / "cifar-dist", *words, cwd=work, PYTHONPATH=str(site))

    code = "import cifar_dist; print(cifar_dist.__file__)"
    assert Path(run(sys.executable, "-c", code, cwd=work, PYTHONPATH=str(site)).strip()).is_relative_to(site)
    assert "cifar-dist --recipe mine.yaml" in cifar_dist("recipes")
    (work / "cpu.yaml").write_text(cifar_dist("config", "cpu"))
    (work / "mine.yaml").write_text(cifar_dist("recipes", "quick"))
    small = ("--set", "image_size=8", "train_size=100", "validation_size=0", "global_batch_size=50")
    out = cifar_dist("--config", "cpu.yaml", "--recipe", "mine.yaml", "--dataset", "shapes", "--epochs", "1", *small)
    assert "on 1,000 images" in out
    cifar_dist("report", "runs/mine-shapes-seed0")
    assert "<html" in (work / "runs" / "mine-shapes-seed0" / "report.html").read_text()
