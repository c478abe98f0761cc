"""What several tests share."""

import os
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the launcher does, before torch is imported: tests share cores
os.environ["TERM"] = "xterm-256color"  # what is drawn on a terminal is not to depend on whose tests these are

import pytest
import torch
from PIL import Image

from cifar_dist.config.accelerate_config import AccelerateConfig
from cifar_dist.config.loading import parse_assignments, read_recipe
from cifar_dist.config.recipe import Recipe, resolve_recipe
from cifar_dist.config.world import World
from cifar_dist.data.dataset import Dataset, LabelledImages
from cifar_dist.runtime.distributed import connect, start

ROOT = Path(__file__).parent.parent


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


@pytest.fixture
def runtime():
    """A world of one on the CPU in float32, on one thread: two would wait for each other where cores are shared."""
    config = AccelerateConfig(use_cpu=True)
    with connect(World(), config) as ranks:
        yield start(ranks, config, typed_precision="no", num_threads=1)


def pytest_collection_modifyitems(items):
    """Fast tests first: those of one module, then of several processes, then Slurm's, then of whole commands.

    The commands are many short files, so that two workers, which do a file as a whole, end at about the same time.
    """
    order = {"unit": 0, "worlds": 1, "launching": 2, "slurm": 3, "commands": 4, "gpu": 5}
    items.sort(key=lambda item: order.get(item.path.parent.name, 0))
