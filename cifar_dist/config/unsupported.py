"""What the recipe can say but this version does not do yet: refused by name rather than ignored."""

from typing import Any

from cifar_dist.config.errors import UserError
from cifar_dist.config.loading import recipe_to_mapping
from cifar_dist.config.parsing import flatten
from cifar_dist.config.recipe import Recipe
from cifar_dist.config.world import World

_WORKS_ONLY_AS: dict[str, tuple[Any, ...]] = {
    "pretrained": (None,),
    "freeze_epochs": (0,),
    "dropout": (0,),
    "batch_norm_group_size": (None,),
    "gradient_accumulation_steps": (1,),
    "image_size": (32,),
    "image_size_schedule": (None,),
    "label_smoothing": (0,),
    "ema_decay": (0,),
    "gradient_clipping": (None,),
    "optimizer.name": ("sgd",),
    "optimizer.nesterov": (False,),
    "schedule.name": ("constant",),
    "schedule.warmup_fraction": (0,),
    "augmentation.crop_mode": ("zeros",),
    "augmentation.flip": ("none", "random"),
    "augmentation.affine_degrees": (0,),
    "augmentation.affine_translate": (0,),
    "augmentation.affine_scale": (0,),
    "augmentation.cutout": (0,),
    "augmentation.mixup": (0,),
    "augmentation.cutmix": (0,),
}


def refuse_unsupported(recipe: Recipe) -> None:
    """Raise UserError naming the first field that is set to something this version does not do."""
    values = flatten(recipe_to_mapping(recipe))
    for field, working in _WORKS_ONLY_AS.items():
        if values[field] not in working:
            allowed = " or ".join("null" if value is None else str(value).lower() for value in working)
            raise UserError(f"{field}={values[field]} is not supported in this version: set it to {allowed}")


def refuse_several_processes(world: World, num_processes_asked: int) -> None:
    """Raise UserError where more than one process is running or asked for."""
    if world.size > 1 or num_processes_asked > 1:
        count = max(world.size, num_processes_asked)
        raise UserError(f"{count} processes were asked for, and this version trains in one: start a single process")
