"""`--budget` and `--measure`: the time that a run takes here, and the most epochs that fit into a time."""

import time
from bisect import bisect_right
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from cifar_dist.config.errors import UserError
from cifar_dist.config.options import TrainOptions, parse_duration
from cifar_dist.config.plan import KNOWN_SIDE, KNOWN_SIZES, DatasetSizes, fit_to_dataset, make_plan
from cifar_dist.config.recipe import Recipe
from cifar_dist.run.resolve import RunSpec
from cifar_dist.runtime.distributed import Runtime
from cifar_dist.training.measure import Pace, measure_pace

_MEASURING_SECONDS = 3.0  # at each image size; with a budget 2 % of it
_MOST_EPOCHS = 1_000_000
_POWERS = [12 ** (step / 40 - 1) for step in range(40)]
"""Of the ends of image sizes, where a budget asks for smaller images: from 1/12 to nearly 1."""
_CHEAPEST = "quick"
"""The recipe to name where the budget is too small for another."""


def measure_run(
    options: TrainOptions, spec: RunSpec, sizes: DatasetSizes, runtime: Runtime, begun: float
) -> tuple[RunSpec, Pace]:
    """Measure the pace of a run. Return the run, with `--budget` with the epochs that fit, and the pace.

    The image sizes change earlier or later, so that these epochs take the whole budget. It counts from `begun`, rank
    0's `time.monotonic()`; a resumed run keeps its plan. A collective. Raises UserError on all ranks if not even one
    epoch fits.
    """
    budget_seconds = None if options.budget is None or spec.stored is not None else parse_duration(options.budget)
    measuring_seconds = _MEASURING_SECONDS if budget_seconds is None else min(10.0, max(0.5, 0.02 * budget_seconds))
    side = KNOWN_SIDE if spec.dataset in KNOWN_SIZES else spec.recipe.image_size

    def measure(recipe: Recipe) -> tuple[Pace, float, int]:
        """Return the pace, the seconds that are left then, and the most epochs that fit into them."""
        classes = sizes.num_classes
        pace = measure_pace(recipe, runtime, image_size=side, num_classes=classes, seconds=measuring_seconds)
        left = runtime.ranks.broadcast_from_main(lambda: begun + (budget_seconds or 0) - time.monotonic())
        epochs = bisect_right(range(1, _MOST_EPOCHS + 1), left, key=lambda n: _seconds(pace, recipe, sizes, runtime, n))
        return pace, left, epochs

    pace, left, epochs = measure(spec.recipe)
    if budget_seconds is None:
        return spec, pace
    recipe = _fill(spec.recipe, epochs, left, lambda each: _seconds(pace, each, sizes, runtime, each.epochs))
    if recipe.epochs:
        return replace(spec, recipe=recipe), pace
    advice = "allow more time, or train on a part of the images with train_size"
    if spec.recipe_name != _CHEAPEST:
        with suppress(UserError):  # it may not fit this world or dataset
            *_, others = measure(Recipe.load(_CHEAPEST))
            advice = f"--recipe {_CHEAPEST} fits, with {others} epochs" if others else advice
    with runtime.ranks.together():
        raise UserError(
            f"--budget {options.budget} is too small for {spec.recipe_name}: an epoch takes"
            f" {_seconds(pace, spec.recipe, sizes, runtime, 1):,.0f} s here, and {max(left, 0):,.0f} s are left after"
            f" measuring: {advice}"
        )


def _fill(recipe: Recipe, epochs: int, left: float, seconds_of: Callable[[Recipe], float]) -> Recipe:
    """Return the recipe with the epochs and the image sizes that take nearly `left` seconds, but no more.

    The ends of its image sizes, fractions of the steps, are raised to one power: below 1 for one epoch more and smaller
    images, above 1 for larger ones. 0 epochs if not even one fits.
    """
    fitting = replace(recipe, epochs=epochs)
    schedule = recipe.image_size_schedule
    if schedule is None or len(schedule) < 2:
        return fitting

    def stretched(num_epochs: int, power: float) -> Recipe:
        ends = tuple((side, end**power) for side, end in schedule)
        return replace(recipe, epochs=num_epochs, image_size_schedule=ends)

    for num_epochs, powers in ((epochs + 1, _POWERS), (epochs, [1 / power for power in reversed(_POWERS)])):
        fits = [stretched(num_epochs, power) for power in powers]
        if count := bisect_right(fits, left, key=seconds_of):
            return fits[count - 1]
    return fitting


def _seconds(pace: Pace, recipe: Recipe, sizes: DatasetSizes, runtime: Runtime, epochs: int) -> float:
    planned = replace(fit_to_dataset(recipe, sizes), epochs=epochs)
    plan = make_plan(planned, world_size=runtime.world.size, sizes=sizes, device_type=runtime.device.type)
    return pace.seconds(plan)
