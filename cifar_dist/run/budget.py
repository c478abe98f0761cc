"""`--budget` and `--measure`: the time that a run takes here, and the most epochs that fit into a time."""

import time
from bisect import bisect_right
from contextlib import suppress
from dataclasses import replace

from cifar_dist.config.errors import UserError
from cifar_dist.config.options import TrainOptions, parse_duration
from cifar_dist.config.plan import KNOWN_SIDE, KNOWN_SIZES, DatasetSizes, fit_to_dataset, make_plan
from cifar_dist.config.recipe import Recipe
from cifar_dist.run.resolve import RunSpec
from cifar_dist.runtime.distributed import Runtime
from cifar_dist.training.measure import Pace, measure_pace

_MOST_EPOCHS = 1_000_000
_CHEAPEST = "quick"
"""The recipe to name where the budget is too small for another."""


def measure_run(
    options: TrainOptions, spec: RunSpec, sizes: DatasetSizes, runtime: Runtime, begun: float
) -> tuple[RunSpec, Pace]:
    """Measure the pace of a run. Return the run, with `--budget` with the most epochs that fit, and the pace.

    The budget counts from `begun`, rank 0's `time.monotonic()`; a resumed run keeps its epochs. A collective. Raises
    UserError on all ranks if not even one epoch fits.
    """
    pace = _measure(spec.recipe, spec, sizes, runtime)
    if options.budget is None or spec.stored is not None:
        return spec, pace
    budget_seconds = parse_duration(options.budget)
    end = begun + budget_seconds
    if epochs := _most_epochs(pace, spec.recipe, sizes, runtime, end):
        return replace(spec, recipe=replace(spec.recipe, epochs=epochs)), pace
    advice = "allow more time, or train on a part of the images with train_size"
    if spec.recipe_name != _CHEAPEST:
        with suppress(UserError):  # it may not fit this world or dataset
            cheapest = Recipe.load(_CHEAPEST)
            others = _most_epochs(_measure(cheapest, spec, sizes, runtime), cheapest, sizes, runtime, end)
            advice = f"--recipe {_CHEAPEST} fits, with {others} epochs" if others else advice
    seconds = _seconds(pace, spec.recipe, sizes, runtime, 1)
    with runtime.ranks.together():
        raise UserError(
            f"--budget {options.budget} is too small for {spec.recipe_name}, of which one epoch takes"
            f" {seconds:,.0f} s here: {advice}"
        )


def _measure(recipe: Recipe, spec: RunSpec, sizes: DatasetSizes, runtime: Runtime) -> Pace:
    image_size = KNOWN_SIDE if spec.dataset in KNOWN_SIZES else spec.recipe.image_size
    return measure_pace(recipe, runtime, image_size=image_size, num_classes=sizes.num_classes)


def _most_epochs(pace: Pace, recipe: Recipe, sizes: DatasetSizes, runtime: Runtime, end: float) -> int:
    """Return the most epochs that end before `end` on rank 0's clock; 0 if one ends later. Equal on all ranks."""
    left = runtime.ranks.broadcast_from_main(lambda: end - time.monotonic())
    epochs = range(1, _MOST_EPOCHS + 1)
    return bisect_right(epochs, left, key=lambda count: _seconds(pace, recipe, sizes, runtime, count))


def _seconds(pace: Pace, recipe: Recipe, sizes: DatasetSizes, runtime: Runtime, epochs: int) -> float:
    planned = replace(fit_to_dataset(recipe, sizes), epochs=epochs)
    plan = make_plan(planned, world_size=runtime.world.size, sizes=sizes, device_type=runtime.device.type)
    return pace.seconds(plan)
