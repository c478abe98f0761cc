"""Measures the bare training step with every precision, memory layout, compiler and optimizer kernel, in turns.

    python benchmarks/sweep.py [--recipe original] [--precision no] [--seconds 20] [--set FIELD=VALUE ...] [--json FILE]

One row for each combination, the fastest first; what the training loop would use is marked as chosen. A combination
that fails, such as a compiler that is missing, says why; one three times slower than the best so far has a first look
alone.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from cifar_dist.commands.bench import NUM_CLASSES, alternate, bare_step, captured
from cifar_dist.config.accelerate_config import load_accelerate_config
from cifar_dist.config.options import BenchOptions
from cifar_dist.config.recipe import Recipe, parse_assignments
from cifar_dist.config.world import World
from cifar_dist.display.terminal import format_table
from cifar_dist.model.networks import build_network, use_dense_products
from cifar_dist.model.optimizer import build_optimizer
from cifar_dist.run.checks import recipe_for_speed
from cifar_dist.runtime.distributed import Runtime, connect, start
from cifar_dist.training.measure import seconds_of

HOPELESS = 3.0
"""A choice so many times slower than the best so far is measured by a first look alone."""
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def choices(runtime: Runtime) -> Iterator[dict[str, Any]]:
    """Yield all that could be chosen on this device, and which of it the training loop has."""
    kind = runtime.device.type
    precisions = {"cpu": ("no", "bf16"), "mps": ("no", "fp16"), "cuda": ("no", "bf16", "fp16")}[kind]
    compilers = {"cpu": (None, "INDUCTOR"), "mps": (None,), "cuda": (None, "INDUCTOR", "CUDAGRAPHS")}[kind]
    # What was asked for is among the choices, whatever it is.
    precisions = tuple(dict.fromkeys((*precisions, runtime.precision)))
    compilers = tuple(dict.fromkeys((*compilers, runtime.compute.backend)))
    for precision, layout, compiler, fused in product(precisions, LAYOUTS, compilers, (True, False)):
        ours = (runtime.precision, runtime.memory_format, runtime.compute.backend, kind != "mps")
        yield {
            "precision": precision,
            "memory_format": layout,
            "compiler": compiler,
            "fused": fused,
            "is_chosen": (precision, LAYOUTS[layout], compiler, fused) == ours,
        }


def build_step(recipe: Recipe, device: torch.device, choice: dict[str, Any]) -> Callable[[], object]:
    """Build the bare step of a choice."""
    layout, batch = LAYOUTS[choice["memory_format"]], recipe.global_batch_size
    model = build_network(recipe, NUM_CLASSES)
    use_dense_products(model)
    model = model.to(device, memory_format=layout)
    optimizer = build_optimizer(model, recipe.optimizer, fused=choice["fused"])
    if choice["compiler"] not in (None, "CUDAGRAPHS"):
        model = torch.compile(model, backend=choice["compiler"].lower(), dynamic=False)
    images = torch.rand(batch, 3, recipe.image_size, recipe.image_size).to(device, memory_format=layout)
    labels = (torch.arange(batch) % NUM_CLASSES).to(device)
    step = bare_step(model, optimizer, images, labels, choice["precision"])
    return captured(step) if choice["compiler"] == "CUDAGRAPHS" else step


def sweep(recipe: Recipe, runtime: Runtime, seconds: float) -> dict[str, Any]:
    """Measure every choice. Raises SystemExit where none can be measured."""
    batch, rows = recipe.global_batch_size, list[dict[str, Any]]()
    steps: list[tuple[dict[str, Any], Callable[[], object]]] = []
    best, hopeless = float("inf"), set()
    for choice in choices(runtime):
        network = (choice["precision"], choice["memory_format"], choice["compiler"])
        if network in hopeless and not choice["is_chosen"]:  # whatever the optimizer's kernel
            continue
        row = {**choice, "images_per_second": None}
        rows.append(row)
        try:
            step = build_step(recipe, runtime.device, choice)
            seconds_of(step, 1, runtime)  # kernels are chosen, or compiled
            taken = min(seconds_of(step, 1, runtime) for _ in range(3))  # one alone may meet other work
        except Exception as error:  # a compiler that is missing or fails, in any of its many ways
            row["failed"] = (str(error).strip() or type(error).__name__).splitlines()[0]
            hopeless.add(network)
            continue
        best, row["images_per_second"] = min(best, taken), batch / taken
        if taken < HOPELESS * best or choice["is_chosen"]:
            steps.append((row, step))
        else:
            hopeless.add(network)
    if not steps:
        raise SystemExit(f"error: nothing can be measured here: {rows[0]['failed']}")
    rounds = alternate([step for _, step in steps], batch, seconds, runtime)
    for (row, _), rates in zip(steps, zip(*rounds, strict=True), strict=True):
        row |= {"images_per_second": statistics.median(rates), "min": min(rates), "max": max(rates)}
    rows.sort(key=lambda row: -(row["images_per_second"] or 0))
    chosen = next(row["images_per_second"] or 0 for row in rows if row["is_chosen"])
    over_fastest = chosen / (rows[0]["images_per_second"] or 1)
    return {"sweep": rows, "chosen_over_fastest": over_fastest, "rounds": len(rounds)}


def format_sweep(result: dict[str, Any]) -> list[str]:
    """Return a line for each choice; what was too slow or failed has no spread."""
    rows = [["precision", "layout", "compiler", "optimizer", "images/s", "in rounds", ""]]
    for row in result["sweep"]:
        rate = "-" if row["images_per_second"] is None else f"{row['images_per_second']:,.0f}"
        spread = f"{row['min']:,.0f} to {row['max']:,.0f}" if "min" in row else "first look"
        compiler = (row["compiler"] or "none").lower()
        kernel = "fused" if row["fused"] else "unfused"
        note = row.get("failed", "chosen" if row["is_chosen"] else "")
        rows.append([row["precision"], row["memory_format"], compiler, kernel, rate, spread, note])
    share = f"the choice of the training loop is {result['chosen_over_fastest']:.2f} of the fastest"
    return [*format_table(rows), "", f"medians of {result['rounds']} rounds; {share}"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="standard")
    parser.add_argument("--config")
    parser.add_argument("--precision")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--set", nargs="*", default=[], help="fields of the recipe, as for launch.py")
    parser.add_argument("--json", type=Path)
    typed = parser.parse_args()
    recipe = recipe_for_speed(BenchOptions(recipe=typed.recipe, assignments=parse_assignments(typed.set)))
    config = load_accelerate_config(typed.config)
    with connect(World(), config) as ranks:
        runtime = start(ranks, config, requested_precision=typed.precision, doing="measuring")
        batch = recipe.global_batch_size
        print(f"{typed.recipe}, stem {recipe.stem}, batch {batch}, {runtime.compute.line}", flush=True)
        result = sweep(recipe, runtime, typed.seconds)
    print(*format_sweep(result), sep="\n")
    if typed.json is not None:
        typed.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
