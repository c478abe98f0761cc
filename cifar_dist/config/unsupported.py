"""What the recipe can say but this version does not do yet: refused by name rather than ignored."""

from cifar_dist.config.errors import UserError
from cifar_dist.config.recipe import Recipe
from cifar_dist.config.world import World


def refuse_unsupported(recipe: Recipe) -> None:
    """Raise UserError naming a field that is set to something this version does not do."""
    if recipe.batch_norm_group_size is not None:
        value = recipe.batch_norm_group_size
        raise UserError(f"batch_norm_group_size={value} is not supported in this version: set it to null")


def refuse_several_processes(world: World, num_processes_asked: int) -> None:
    """Raise UserError where more than one process is running or asked for."""
    if world.size > 1 or num_processes_asked > 1:
        count = max(world.size, num_processes_asked)
        raise UserError(f"{count} processes were asked for, and this version trains in one: start a single process")
