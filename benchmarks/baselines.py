"""Measures the training loop beside what others do, in turns, in one process.

    python benchmarks/baselines.py [--recipe original] [--precision no] [--seconds 10] [--set FIELD=VALUE ...]

The others have the same model, batch size and images:

- the original script's loop: PIL transforms for each image in two loader workers, float32, the loss read in every step;
- a common peer: tensor transforms in two loader workers, everything prepared by Accelerate.

Prints the images per second of each (medians of the rounds), and our loop over each of the others with its spread.
"""

import argparse
import itertools
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parent.parent))

from cifar_dist.commands.bench import NUM_CLASSES, alternate
from cifar_dist.config.accelerate_config import load_accelerate_config
from cifar_dist.config.options import BenchOptions
from cifar_dist.config.plan import make_plan
from cifar_dist.config.recipe import parse_assignments
from cifar_dist.config.world import World
from cifar_dist.display.terminal import format_table
from cifar_dist.model.networks import build_network
from cifar_dist.run.checks import recipe_for_speed
from cifar_dist.run.results import Observer
from cifar_dist.runtime.distributed import Runtime, connect, start
from cifar_dist.training.measure import endless_steps, random_dataset, seconds_of
from cifar_dist.training.setup import build_trainer

NUM_WORKERS = 2
PREFETCHED = 2 * NUM_WORKERS
"""Batches that the workers prepare ahead, torch's default."""


@dataclass(eq=False)
class TransformedImages(Dataset[tuple[Tensor, int]]):
    """Images that a loader worker transforms one by one."""

    images: Any
    """N of what `transform` takes, by their places."""
    labels: Sequence[int]
    transform: Callable[[Any], Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def end_quietly(worker: int) -> None:
    """Exit on SIGTERM without an error, which torch would raise in the parent for a killed worker."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def make_loader(samples: TransformedImages, batch_size: int, device: torch.device) -> DataLoader[tuple[Tensor, int]]:
    """Return the script's loader."""
    return DataLoader(
        samples,
        batch_size=batch_size,
        shuffle=True,
        num_workers=NUM_WORKERS,
        worker_init_fn=end_quietly,
        pin_memory=device.type == "cuda",
        drop_last=True,  # so that every step is as long as any other
    )


class ScriptLoop:
    """The script's training step, one per call; in float32 and contiguous, on one process."""

    def __init__(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int, device: torch.device
    ) -> None:
        """Prepare `images` (N, 3, H, W) uint8 and `labels` (N,) as torchvision's CIFAR10 has them."""
        transform = transforms.Compose(
            [
                Image.fromarray,
                transforms.RandomCrop(images.shape[-1], padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.RandomRotation(10),
                transforms.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.2),
                transforms.ToTensor(),
                transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
            ]
        )
        pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.device = device
        self.model = model.to(device).train()
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        self.loader = make_loader(TransformedImages(pixels, labels.tolist(), transform), batch_size, device)
        self.epoch_loss = 0.0
        self._batches = (batch for _ in itertools.count() for batch in self.loader)  # again and again

    def __call__(self) -> None:
        """Run one step."""
        data = next(self._batches)
        inputs, labels = data[0].to(self.device), data[1].to(self.device)
        self.optimizer.zero_grad()
        loss = self.criterion(self.model(inputs), labels)
        loss.backward()
        self.optimizer.step()
        self.epoch_loss += loss.item()


class PeerLoop:
    """The training step of a common program on Accelerate, one per call; Accelerate chooses device and precision."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int) -> None:
        """Prepare `images` (N, 3, H, W) uint8 and `labels` (N,); the transforms are the script's, on tensors."""
        transform = v2.Compose(
            [
                v2.RandomCrop(images.shape[-1], padding=4),
                v2.RandomHorizontalFlip(),
                v2.RandomRotation(10),
                v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.2),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
            ]
        )
        self.accelerator = Accelerator()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        samples = TransformedImages(images, labels.tolist(), transform)
        loader = make_loader(samples, batch_size, self.accelerator.device)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model.train(), optimizer, loader)
        self._batches = (batch for _ in itertools.count() for batch in self.loader)  # again and again

    def __call__(self) -> None:
        """Run one step."""
        data = next(self._batches)
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(data[0]), data[1])
        self.accelerator.backward(loss)
        self.optimizer.step()


def fair_seconds_of(step: Callable[[], object], count: int, runtime: Runtime) -> float:
    """Time `count` steps; of a loop with workers, after the batches that they prepared in another loop's time."""
    if not isinstance(step, ScriptLoop | PeerLoop):
        return seconds_of(step, count, runtime)
    seconds_of(step, PREFETCHED, runtime)
    taken = seconds_of(step, count, runtime)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:  # until the workers no longer work in the next loop's time
        before = seconds_worked()
        time.sleep(0.1)
        if seconds_worked() - before <= 0.01:  # a clock tick
            break
    return taken


def seconds_worked() -> float:
    """Return the processor time of this process's children."""
    total = 0.0
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            times = child.cpu_times()
            total += times.user + times.system
    return total


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="original")
    parser.add_argument("--config")
    parser.add_argument("--precision")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--set", nargs="*", default=[], help="fields of the recipe, as for launch.py")
    typed = parser.parse_args()
    recipe = recipe_for_speed(BenchOptions(recipe=typed.recipe, assignments=parse_assignments(typed.set)))
    config, batch = load_accelerate_config(typed.config), recipe.global_batch_size
    with connect(World(), config) as ranks:
        runtime = start(ranks, config, requested_precision=typed.precision, doing="measuring")
        dataset = random_dataset(recipe.image_size, batch)
        images, labels = dataset.train.images, dataset.train.labels
        plan = make_plan(recipe, world_size=1, sizes=dataset.sizes, device_type=runtime.device.type)
        models = [build_network(recipe, NUM_CLASSES) for _ in range(2)]
        loops: dict[str, Callable[[], object]] = {
            "our loop": endless_steps(build_trainer(recipe, plan, dataset, runtime, Observer())),
            "original script": ScriptLoop(models[0], images, labels, batch_size=batch, device=runtime.device),
            "common peer": PeerLoop(models[1], images, labels, batch_size=batch),
        }
        rounds = alternate(list(loops.values()), batch, typed.seconds, runtime, timer=fair_seconds_of)
        print(f"{typed.recipe}, stem {recipe.stem}, batch {batch}, {runtime.compute.line}, {len(rounds)} rounds")
    rows = [["", "images/s", "our loop is", "in rounds"]]
    ours, *others = zip(*rounds, strict=True)
    rows.append(["our loop", f"{statistics.median(ours):,.0f}", "", ""])
    for name, rates in zip(list(loops)[1:], others, strict=True):
        ratios = [own / other for own, other in zip(ours, rates, strict=True)]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        rows.append([name, f"{statistics.median(rates):,.0f}", f"{statistics.median(ratios):.3f} x as fast", spread])
    print(*format_table(rows), sep="\n")


if __name__ == "__main__":
    main()
