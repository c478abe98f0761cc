"""`tune --lr-range`: train some steps at an exponentially rising learning rate, and suggest one (arXiv 1506.01186)."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cifar_dist.config.accelerate_config import AccelerateConfig
from cifar_dist.config.errors import EXIT_DONE, UserError
from cifar_dist.config.files import writing
from cifar_dist.config.options import TuneOptions
from cifar_dist.config.plan import fit_to_dataset, make_plan
from cifar_dist.config.recipe import Recipe, describe_recipe, recipe_to_mapping, resolve_recipe
from cifar_dist.config.world import World
from cifar_dist.data.dataset import load_dataset
from cifar_dist.display.figures import draw_lr_range
from cifar_dist.display.progress import Display, loading_progress
from cifar_dist.display.terminal import make_console, print_header, print_lines
from cifar_dist.run.resolve import resolve
from cifar_dist.run.weights import pretrained_weights
from cifar_dist.runtime.distributed import connect, start
from cifar_dist.training.setup import build_trainer
from cifar_dist.training.trainer import DivergedError, Trainer

# As fastai's lr_find: range, number of steps, and the loss (relative to the lowest) at which it stops.
_LOWEST, _HIGHEST, _STEPS, _STOP = 1e-7, 10.0, 100, 4.0
_WINDOW = 9

EQUAL_STEPS = {
    "schedule": {"name": "constant", "warmup_fraction": 0.0, "step_epochs": None, "gamma": None},
    "image_size_schedule": None,
    "freeze_epochs": 0,
    "ema_decay": 0.0,
}
"""Fields of the recipe with which steps differ in their learning rate only."""


def run(options: TuneOptions, world: World, config: AccelerateConfig) -> int:
    """Train, print the suggestion and draw lr_range.png. Return the exit code."""
    console, spec = make_console(quiet=world.rank > 0), resolve(options.as_training())
    with connect(world, config) as ranks:
        with loading_progress(console, spec.dataset) as progress:
            load = lambda: load_dataset(spec.dataset, spec.data_dir, spec.recipe, progress=progress)  # noqa: E731
            dataset = ranks.main_process_first(load)
        runtime = start(ranks, config, **spec.compute_settings(world.size))
        recipe = fit_to_dataset(resolve_recipe(recipe_to_mapping(spec.recipe), EQUAL_STEPS), dataset.sizes)
        plan = make_plan(recipe, world_size=world.size, sizes=dataset.sizes, device_type=runtime.device.type)
        name = describe_recipe(spec.recipe_name, recipe)
        what = f"{name} on {spec.dataset}, seed {recipe.seed}, {recipe.optimizer.name}"
        words = f"{_LOWEST:g} to {_HIGHEST:g} in {_STEPS} steps"
        print_header(console, {"recipe": what, "device": runtime.compute.line, **plan.lines, "learning rate": words})
        pretrained = ranks.broadcast_from_main(lambda: pretrained_weights(recipe, Display(console).on_note))
        trainer = build_trainer(recipe, plan, dataset, runtime, Display(console), pretrained=pretrained)
        rates, losses = range_test(trainer)
        if not ranks.is_main:
            return EXIT_DONE
    suggested = suggest(rates, losses)
    path = (options.study or Path()) / "lr_range.png"
    with writing(path, "name another folder with --study"):
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_lr_range(rates, losses, smooth(losses), suggested, path, title=what)
    lines = ["the loss falls by less than its noise: there is no rate to suggest"]
    if suggested is not None:
        lines = [
            f"the loss falls most steeply at learning rate {suggested:.2g} and is lowest at"
            f" {rates[smooth(losses).argmin()]:.2g}; the recipe has {spec.recipe.optimizer.learning_rate:g}",
            f"begin with --set optimizer.learning_rate={suggested:.2g}, and try higher rates",
        ]
    print_lines(console, [*lines, f"written: {path}"], title="learning rate range")
    return EXIT_DONE


def range_test(trainer: Trainer) -> tuple[list[float], list[float]]:
    """Train 100 steps; stop at a loss above 4 times the lowest smoothed one. Return the rates and the losses.

    A group with a learning rate of its own (`sgd_learning_rate`, `head_learning_rate`) keeps its share of the rate.
    """
    rates, losses = np.geomspace(_LOWEST, _HIGHEST, _STEPS).tolist(), list[float]()
    base = trainer.recipe
    trainer.step.recipe = _at_rate(base, rates[0])
    with contextlib.suppress(DivergedError):
        for loss in _step_losses(trainer):
            if not math.isfinite(loss):
                break
            losses.append(loss)
            if len(losses) == _STEPS or loss > _STOP * smooth(losses).min():
                break
            trainer.step.recipe = _at_rate(base, rates[len(losses)])
    if not losses:
        raise UserError("the loss of the first step is not finite: look at the network and its images")
    return rates[: len(losses)], losses


def _step_losses(trainer: Trainer) -> Iterator[float]:
    """Train without end. Yield the mean loss of each step over all ranks."""
    total, images = 0.0, 0.0
    for epoch in count(1):
        for _ in trainer.steps(epoch):
            sums = trainer.runtime.ranks.all_gather(trainer.state.sums.read()[:3])
            new_total, _, new_images = (sum(column) for column in zip(*sums, strict=True))
            yield (new_total - total) / (new_images - images)
            total, images = new_total, new_images


def smooth(losses: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of each loss and of 4 on each side, as far as there are any.

    fastai and Lightning average the past with 0.98: that is 49 steps old on average, which are 4 decades here.
    """

    def window_sums(values: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
        return np.convolve(values, np.ones(_WINDOW))[_WINDOW // 2 :][: len(values)]

    return window_sums(losses) / window_sums([1.0] * len(losses))


def suggest(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """Return the rate, below that of the lowest loss, at which the smoothed loss falls most steeply.

    Return None if the loss falls by less than its noise, the standard deviation of the steps.
    """
    smoothed = smooth(losses)
    before = slice(0, int(smoothed.argmin()) + 1)
    noise = np.std(losses[before] - smoothed[before])
    if len(losses[before]) < 2 * _WINDOW or smoothed[before].mean() - smoothed.min() < noise:
        return None
    return rates[int(smooth(np.gradient(smoothed))[before].argmin())]


def _at_rate(recipe: Recipe, rate: float) -> Recipe:
    return replace(recipe, optimizer=replace(recipe.optimizer, learning_rate=rate))
