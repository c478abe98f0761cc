"""Checks the floor that `bench` measures against: its bare step beside twenty lines without the package.

    python benchmarks/floor.py [--stem cifar] [--batch 512] [--precision bf16] [--rounds 30]

Both do the same steps in turns, with one model each; the ratio of their times is given with its spread.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torchvision.models import resnet18


def twenty_lines(stem: str, batch: int, precision: str) -> Callable[[], None]:
    """Give the training step as one would write it in a notebook, tuned: channels_last, autocast, a fused optimiser."""
    model = resnet18(num_classes=10)
    if stem == "cifar":
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    model = model.to(memory_format=torch.channels_last).train()
    decayed = [each for each in model.parameters() if each.ndim > 1]
    others = [each for each in model.parameters() if each.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 5e-4}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, fused=True)
    images = torch.rand(batch, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.arange(batch) % 10

    def step() -> None:
        """Do one step."""
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def bare_step(stem: str, batch: int, precision: str) -> Callable[[], None]:
    """Give the step that `bench` calls the floor."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from cifar_dist.commands import bench
    from cifar_dist.config.recipe import parse_assignments, read_recipe, resolve_recipe
    from cifar_dist.model.networks import build_network, use_dense_products
    from cifar_dist.model.optimizer import build_optimizer

    assignments = parse_assignments(["optimizer.decay_norm_and_bias=false"])
    recipe = resolve_recipe(read_recipe("original"), assignments, {"stem": stem})
    model = build_network(recipe, 10).to(memory_format=torch.channels_last)
    use_dense_products(model)
    images = torch.rand(batch, 3, 32, 32).to(memory_format=torch.channels_last)
    return bench.bare_step(model, build_optimizer(model, recipe.optimizer), images, torch.arange(batch) % 10, precision)


def main() -> None:
    """Print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stem", choices=("cifar", "imagenet"), default="imagenet")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--rounds", type=int, default=30)
    typed = parser.parse_args()
    steps = [make(typed.stem, typed.batch, typed.precision) for make in (twenty_lines, bare_step)]
    seconds: list[list[float]] = [[], []]
    for number in range(2 * (typed.rounds + 3)):
        which = (number + number // 2) % 2  # each is as often the first of the two
        begun = time.perf_counter()
        steps[which]()
        seconds[which].append(time.perf_counter() - begun)
    notebook, ours = (times[3:] for times in seconds)
    ratios = sorted(a / b for a, b in zip(notebook, ours, strict=True))
    quarter = len(ratios) // 4
    print(
        f"stem {typed.stem}, batch {typed.batch}, precision {typed.precision}, {torch.get_num_threads()} threads:"
        f" bare step {typed.batch / statistics.median(ours):,.0f} images/s,"
        f" over twenty lines {statistics.median(ratios):.3f}"
        f" (quartiles {ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f}, n = {len(ratios)})"
    )


if __name__ == "__main__":
    main()
