"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

import math

from cifar_dist.config.plan import RunPlan
from cifar_dist.config.recipe import Recipe


def learning_rate(recipe: Recipe, plan: RunPlan, step: int) -> float:
    """Return the learning rate of a step, counted from 0: peak x warm-up x the schedule's factor.

    Warm-up rises linearly to 1 at the last of its steps. Then, with p the fraction of the remaining steps that is done:
    `constant` is 1, `cosine` (1 + cos(pi p)) / 2 (arXiv 1608.03983, without restarts), `triangular` 1 - p, and `step`
    gamma to the number of whole `step_epochs` since the start of the run.
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
    """Describe the learning rate at the start, at its peak and at the end."""
    last = plan.total_steps - 1
    peak = round(recipe.schedule.warmup_fraction * plan.total_steps) - 1
    parts = [f"{learning_rate(recipe, plan, 0):.4g} at the start"]
    if 0 < peak < last:
        parts.append(f"{learning_rate(recipe, plan, peak):.4g} at its peak (step {peak + 1:,})")
    return f"{recipe.schedule.name}, {', '.join(parts)}, {learning_rate(recipe, plan, last):.4g} at the end"
