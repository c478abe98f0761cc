"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler's memory."""

import math

from cifar_dist.config.plan import RunPlan
from cifar_dist.config.recipe import Recipe


def learning_rate(recipe: Recipe, plan: RunPlan, step: int) -> float:
    """Give the learning rate of a step, counted from 0: the peak, times warm-up, times the schedule's factor.

    Warm-up rises linearly and reaches 1 at the last of its steps. After it, with p the part of the remaining steps that
    is done: `constant` stays at 1, `cosine` is (1 + cos(pi p)) / 2 (arXiv 1608.03983, without restarts), `triangular`
    is 1 - p, and `step` is gamma to the number of whole `step_epochs` since the start of the run.
    """
    schedule = recipe.schedule
    warmup_steps = round(schedule.warmup_fraction * plan.total_steps)
    if step < warmup_steps:
        return recipe.optimizer.learning_rate * (step + 1) / warmup_steps
    part = (step - warmup_steps) / max(plan.total_steps - warmup_steps, 1)
    factor = 1.0
    if schedule.name == "cosine":
        factor = (1 + math.cos(math.pi * part)) / 2
    elif schedule.name == "triangular":
        factor = 1 - part
    elif schedule.name == "step":
        assert schedule.step_epochs is not None and schedule.gamma is not None
        factor = schedule.gamma ** (step // (schedule.step_epochs * plan.steps_per_epoch))
    return recipe.optimizer.learning_rate * factor


def learning_rate_line(recipe: Recipe, plan: RunPlan) -> str:
    """Say in words how the learning rate goes."""
    last = plan.total_steps - 1
    peak = round(recipe.schedule.warmup_fraction * plan.total_steps) - 1
    parts = [f"{learning_rate(recipe, plan, 0):.4g} at the start"]
    if 0 < peak < last:
        parts.append(f"{learning_rate(recipe, plan, peak):.4g} at its peak (step {peak + 1:,})")
    return f"{recipe.schedule.name}, {', '.join(parts)}, {learning_rate(recipe, plan, last):.4g} at the end"
