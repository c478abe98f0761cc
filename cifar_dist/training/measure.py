"""Time the training loop on random images: how long a recipe will take here, and how many epochs fit into a time."""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from cifar_dist.config.plan import RunPlan, make_plan
from cifar_dist.config.recipe import Recipe
from cifar_dist.data.dataset import Dataset, LabelledImages
from cifar_dist.run.results import Observer
from cifar_dist.runtime.distributed import Runtime
from cifar_dist.training.evaluation import EvaluationSet, batch_size_for
from cifar_dist.training.setup import build_trainer
from cifar_dist.training.step import WARMUP_STEPS
from cifar_dist.training.trainer import Trainer

_RESERVE = 0.04
"""For checkpoints, which take at most 1 % of the time, the rest of an epoch's end, and what short steps do not show."""
_ENDS_SECONDS = 6.0  # Python's start, figures, exit
_ROUNDS = 3
_TINY_RATE = 1e-6  # measured weights stay as they are, whatever the images


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How fast a recipe trains and evaluates here; equal on all ranks."""

    step_seconds: Mapping[int, float]
    """Of a whole global batch, by the side of its images in pixels."""
    evaluation_seconds: float
    """Of one image."""

    def seconds(self, plan: RunPlan) -> float:
        """Return the time of the steps, the validation after each epoch, the test, and the figures."""
        starts = [0, *(end for _, end in plan.image_sizes)]
        sizes = zip(starts, plan.image_sizes, strict=False)
        steps = sum((end - start) * self.step_seconds[side] for start, (side, end) in sizes)
        filled = plan.images_per_epoch / (plan.steps_per_epoch * plan.global_batch_size)
        num_evaluated = plan.epochs * plan.num_validation + plan.num_test
        return (1 + _RESERVE) * (filled * steps + num_evaluated * self.evaluation_seconds) + _ENDS_SECONDS

    @property
    def line(self) -> str:
        """The measured numbers in words."""
        steps = ", ".join(f"{seconds:.3g} s a step of {side} x {side}" for side, seconds in self.step_seconds.items())
        return f"{steps}, {1 / self.evaluation_seconds:,.0f} images/s evaluated"


def measure_pace(recipe: Recipe, runtime: Runtime, *, image_size: int, num_classes: int, seconds: float) -> Pace:
    """Time the training loop for some `seconds` at each image size of the recipe, and an evaluation. A collective.

    `image_size` is the side of the images in memory. The slowest rank counts. Nothing that a later training depends on
    is changed: random generators, gradient scaler.
    """
    state = runtime.state()
    pace = _measure(recipe, runtime, random_dataset(image_size, recipe.global_batch_size, num_classes), seconds)
    runtime.accelerator.free_memory()
    runtime.load_state(state)
    return pace


def _measure(recipe: Recipe, runtime: Runtime, dataset: Dataset, seconds: float) -> Pace:
    endless = replace(
        recipe,
        epochs=1_000_000,
        validation_size=0,
        train_size=None,
        pretrained=None,
        freeze_epochs=0,
        early_stopping=replace(recipe.early_stopping, enabled=False),
        optimizer=replace(
            recipe.optimizer,
            learning_rate=_TINY_RATE,
            sgd_learning_rate=None,
            head_learning_rate=None,
            bias_learning_rate=None,
        ),
    )
    plan = make_plan(endless, world_size=runtime.world.size, sizes=dataset.sizes, device_type=runtime.device.type)
    trainer, step_seconds = build_trainer(endless, plan, dataset, runtime, Observer()), {}
    for side, _ in recipe.image_size_schedule or ((1, 1),):
        pixels = round(side * recipe.image_size)
        step_seconds[pixels] = _seconds_of_step(trainer, pixels, seconds)
    few = EvaluationSet(
        data=dataset.test,
        indices=torch.arange(min(2 * batch_size_for(recipe.image_size) * runtime.world.size, len(dataset.test))),
        class_names=dataset.class_names,
        recipe=endless,
        runtime=runtime,
    )
    evaluate = functools.partial(few.predict, trainer.state.evaluated_model, Observer())
    evaluate()
    return Pace(step_seconds=step_seconds, evaluation_seconds=_slowest(evaluate, 1, runtime) / len(few.indices))


def _seconds_of_step(trainer: Trainer, image_size: int, seconds: float) -> float:
    """Return the time of a step after a warm-up: the median of three means, over about `seconds` together."""
    trainer.batches.image_size = lambda epoch, step: image_size
    loop = endless_steps(trainer)
    for _ in range(WARMUP_STEPS + 1 if trainer.runtime.compute.replays else 1):
        loop()
    once = _slowest(loop, 1, trainer.runtime)
    count = int(seconds / once / _ROUNDS)
    if count < 1:
        return once
    return statistics.median(_slowest(loop, count, trainer.runtime) for _ in range(_ROUNDS)) / count


def _slowest(action: Callable[[], object], count: int, runtime: Runtime) -> float:
    """Return the seconds of `count` calls on the slowest rank. A collective."""
    return max(taken for (taken,) in runtime.ranks.all_gather([seconds_of(action, count, runtime)]))


def seconds_of(action: Callable[[], object], count: int, runtime: Runtime) -> float:
    """Return the seconds of `count` calls, the device's work included."""
    runtime.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        action()
    runtime.synchronize()
    return time.perf_counter() - started


def endless_steps(trainer: Trainer) -> Callable[[], object]:
    """Return a function that runs the training loop by one step, epoch after epoch."""
    epochs = itertools.count(trainer.state.step // trainer.plan.steps_per_epoch + 1)
    return functools.partial(next, itertools.chain.from_iterable(map(trainer.steps, epochs)))


def random_dataset(size: int, batch: int, num_classes: int = 10) -> Dataset:
    """Build random images: about 60 MB or four batches, and whole batches only, so that all steps are alike."""
    generator, most = torch.Generator().manual_seed(0), 20_000 * 32**2 // max(size, 32) ** 2
    count = batch * max(4, most // batch)
    images = torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.randint(num_classes, (count,), generator=generator)
    part = LabelledImages(images=images, labels=labels)
    return Dataset(name="random", class_names=tuple(map(str, range(num_classes))), train=part, test=part)
