"""Times what comes before and between the steps: start-up, the decoding of a folder, and the boundary of two epochs.

    python benchmarks/startup.py [--rounds 7] [--images 60000] [--recipe original]

- Start-up: from the command `launch.py --dataset shapes` to the end of its first step, against a process that imports
  torch, torchvision and accelerate and does nothing else, in turns.
- Decoding: a class folder of PNG files of 32 x 32 pixels (drawn here).
- Boundary: from the last step of an epoch of 50,000 images to the first forward pass of the next, without validation,
  in a run whose steps do everything but the model's work. The first batch's augmentation is in it.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from PIL import Image

from cifar_dist.cli import main as cifar_dist
from cifar_dist.data import dataset
from cifar_dist.data.dataset import Dataset, LabelledImages
from cifar_dist.data.loader import Batch
from cifar_dist.training.step import TrainingStep
from cifar_dist.training.trainer import Trainer

ROOT = Path(__file__).parent.parent
FIRST_STEP = """
import os, sys
import cifar_dist.cli
from cifar_dist.training import trainer as engine
end = engine.Trainer._end_step
def first_step(trainer, epoch):
    end(trainer, epoch)
    os._exit(0)
engine.Trainer._end_step = first_step
cifar_dist.cli.main(sys.argv[1:])
"""
LOAD = """
import sys, time
from pathlib import Path
from cifar_dist.data.folder import load_folder
begun = time.perf_counter()
load_folder(Path(sys.argv[1]), image_size=32)
print(time.perf_counter() - begun)
"""


def spread(values: list[float], unit: float = 1, digits: int = 2) -> str:
    """Give median, smallest and largest in words."""
    low, middle, high = (unit * each for each in (min(values), statistics.median(values), max(values)))
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f}, n = {len(values)})"


def seconds(command: list[str]) -> float:
    """Time a process."""
    begun = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begun


def start_up(rounds: int, recipe: str) -> None:
    """Print how long it takes to the first step."""
    imports, commands = [], []
    for number in range(rounds + 1):  # the first fills the system's caches
        alone = seconds([sys.executable, "-c", "import torch, torchvision, accelerate"])
        with tempfile.TemporaryDirectory() as folder:
            options = ["--dataset", "shapes", "--recipe", recipe, "--run-dir", f"{folder}/run", "--quiet"]
            whole = seconds([sys.executable, "-c", FIRST_STEP, *options])
        if number:
            imports.append(alone)
            commands.append(whole)
    over = [whole - 1.3 * alone for whole, alone in zip(commands, imports, strict=True)]
    print(f"import torch, torchvision, accelerate: {spread(imports)} s")
    print(f"launch.py --dataset shapes --recipe {recipe}, to the end of the first step: {spread(commands)} s")
    print(f"that is 1.3 x the imports and {spread(over)} s", flush=True)


def decoding(count: int) -> None:
    """Print how long a folder takes."""
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(count):
            part = folder / "images" / ("train" if number % 6 else "test") / f"class{number % 10}"
            part.mkdir(parents=True, exist_ok=True)
            # Smooth, as photographs are: noise would not be compressed.
            small = generator.integers(256, size=(8, 8, 3), dtype=np.uint8)
            Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC).save(part / f"{number}.png")
        command = [sys.executable, "-c", LOAD, str(folder / "images")]
        taken = [float(subprocess.check_output(command, cwd=ROOT)) for _ in range(5)]
    print(f"{count:,} PNG files: {spread(taken)} s", flush=True)


def boundary(recipe: str, epochs: int = 6) -> None:
    """Print what lies between two epochs."""
    ends, begins, end = [], [], Trainer._end_step

    def train_on(step: TrainingStep, batch: Batch) -> None:
        """Note when a batch arrives; compute nothing."""
        begins.append((step.state.epoch + 1, time.perf_counter()))
        step.state.sums.add(torch.ones(()), torch.zeros(len(batch.labels), 10), batch.labels)

    def timed_step(trainer: Trainer) -> None:
        """Note when a step is done."""
        end(trainer)
        ends.append((trainer.state.epoch + 1, time.perf_counter()))

    def random_images(*_: Any, **__: Any) -> Dataset:
        """Stand in for CIFAR-10."""
        images = torch.randint(256, (50_000, 3, 32, 32), dtype=torch.uint8)
        part = LabelledImages(images=images, labels=torch.arange(50_000) % 10)
        few = LabelledImages(images=images[:100], labels=part.labels[:100])
        return Dataset(name="random", class_names=tuple("0123456789"), train=part, test=few)

    TrainingStep.train_on, Trainer._end_step, dataset.load_archive = train_on, timed_step, random_images
    with tempfile.TemporaryDirectory() as folder:
        typed = ["--recipe", recipe, "--epochs", str(epochs), "--run-dir", f"{folder}/run"]
        cifar_dist([*typed, "--set", "validation_size=0", "early_stopping.enabled=false"])
    last, first = dict(ends), {}
    for epoch, moment in begins:
        first.setdefault(epoch, moment)
    gaps = [first[epoch + 1] - last[epoch] for epoch in range(1, epochs)]
    print(f"boundary of two epochs of 50,000 images, {recipe}: {spread(gaps, unit=1000, digits=0)} ms")


def main() -> None:
    """Print all three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="original")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=60_000)
    typed = parser.parse_args()
    start_up(typed.rounds, typed.recipe)
    decoding(typed.images)
    boundary(typed.recipe)


if __name__ == "__main__":
    main()
