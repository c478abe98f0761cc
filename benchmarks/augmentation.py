"""Times the whole augmentation of a recipe, as the training loop calls it: several batches at once.

python benchmarks/augmentation.py [--recipe original] [--set augmentation.policy=trivial] [--images 512] [--threads 2]
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from cifar_dist.config.recipe import parse_assignments, read_recipe, resolve_recipe
from cifar_dist.data.augmentation import Augmentation


def main() -> None:
    """Print images a second."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="original")
    parser.add_argument("--set", nargs="+", default=[])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=60)
    typed = parser.parse_args()
    torch.set_num_threads(typed.threads)
    recipe = resolve_recipe(read_recipe(typed.recipe), parse_assignments(typed.set))
    augmentation = Augmentation(recipe.augmentation, seed=0)
    images = torch.randint(256, (50_000, 3, 32, 32), dtype=torch.uint8)
    table, order, rates = augmentation.draw_table(1, len(images)), torch.randperm(len(images)), []
    for number in range(typed.rounds + 5):
        samples = order[torch.arange(number * typed.images, (number + 1) * typed.images) % len(order)]
        begun = time.perf_counter()
        augmentation.apply(images.index_select(0, samples), table[samples])
        rates.append(typed.images / (time.perf_counter() - begun))
    rates = sorted(rates[5:])
    quarter, what = len(rates) // 4, " ".join([typed.recipe, *typed.set])
    print(
        f"{what}, {typed.images} at once, {typed.threads} threads: {statistics.median(rates):,.0f} images/s"
        f" (quartiles {rates[quarter]:,.0f} to {rates[-1 - quarter]:,.0f}, n = {len(rates)})"
    )


if __name__ == "__main__":
    main()
