"""Fixtures that several tests share, and the two tiers."""

import contextlib
import ctypes
import gc
import os
from pathlib import Path

from tests.environment import ROOT as ROOT  # first: it clears the environment before torch is imported

# isort: split
import pytest
import torch
from PIL import Image

from cifar_dist.config.accelerate_config import AccelerateConfig
from cifar_dist.config.cpus import usable_cpus
from cifar_dist.config.recipe import Recipe, parse_assignments, read_recipe, resolve_recipe
from cifar_dist.config.world import World
from cifar_dist.data.dataset import Dataset, LabelledImages
from cifar_dist.runtime.distributed import connect, start


@pytest.fixture(scope="session")
def official_data() -> Path:
    """The folder that holds the official CIFAR-10 files."""
    folder = os.environ.get("CIFAR_DIST_TEST_DATA")
    if not folder or not (Path(folder) / "cifar-10-batches-py").is_dir():
        pytest.skip("needs the official CIFAR-10 files: set CIFAR_DIST_TEST_DATA to the folder that holds them")
    return Path(folder)


def make_recipe(*assignments: str, base: str = "original") -> Recipe:
    return resolve_recipe(read_recipe(base), parse_assignments(assignments))


def make_dataset(num_train: int = 96, num_test: int = 40, num_classes: int = 10) -> Dataset:
    """Images whose class is their brightness: learnable in a few steps."""
    generator = torch.Generator().manual_seed(7)

    def part(count: int) -> LabelledImages:
        labels = torch.arange(count) % num_classes
        noise = torch.randint(0, 20, (count, 3, 32, 32), generator=generator)
        images = (labels.view(-1, 1, 1, 1) * (230 // num_classes) + noise).to(torch.uint8)
        order = torch.randperm(count, generator=generator)
        return LabelledImages(images=images[order].contiguous(), labels=labels[order])

    names = tuple(f"class{i}" for i in range(num_classes))
    return Dataset(name="brightness", class_names=names, train=part(num_train), test=part(num_test))


def make_images(folder: Path) -> Path:
    """A folder of 26 training and 7 test images of two classes."""
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 13), ("test", 4)):
        for name in ("dark", "light"):
            (folder / part / name).mkdir(parents=True)
            for number in range(count - (part == "test" and name == "light")):
                pixels = torch.randint(0, 60, (16, 16, 3), generator=generator) + 190 * (name == "light")
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / part / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module", autouse=True)
def _return_memory():
    """Return freed memory to the system after each file: glibc keeps it."""
    yield
    gc.collect()
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture
def runtime():
    """A world of one on the CPU in float32, on one thread: two would wait for each other where cores are shared."""
    config = AccelerateConfig(use_cpu=True)
    with connect(World(), config) as ranks:
        yield start(ranks, config, requested_precision="no", num_threads=1)


FULL_TIER = {"launching", "slurm", "gpu"}
"""Folders whose tests all start processes of their own, or need a device."""


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the full tier, too: processes, worlds, Slurm, browser")


def pytest_xdist_auto_num_workers() -> int:
    """Return the number of workers of `-n auto`: one for each core that this process may use, 4 at most."""
    return min(4, usable_cpus())


def pytest_collection_modifyitems(config, items):
    """Leave out the full tier without --all. Put long files first, so that workers end together."""
    for item in items:
        if item.path.parent.name in FULL_TIER:
            item.add_marker("full")
    if not config.option.all:
        left_out = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    order = {"launching": 0, "worlds": 1, "slurm": 2, "commands": 3}
    items.sort(key=lambda item: order.get(item.path.parent.name, 4))


def pytest_unconfigure(config):
    """Print, as the last line of the fast tier, how to run the rest."""
    if not (hasattr(config, "workerinput") or config.option.all or config.option.collectonly):
        config.get_terminal_writer().line("This was the fast tier. Everything: pytest --all")
