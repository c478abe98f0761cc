"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler's memory."""

from cifar_dist.config.recipe import Recipe


def learning_rate(recipe: Recipe, step: int) -> float:
    """Give the learning rate of a step (counted from 0). The only schedule so far is `constant`."""
    del step
    return recipe.optimizer.learning_rate
