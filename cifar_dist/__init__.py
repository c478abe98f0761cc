"""A training launcher for image classifiers that trains the same on every device and world size."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cifar_dist.api import evaluate, load_model, predict, train
    from cifar_dist.config.errors import UserError
    from cifar_dist.config.recipe import Recipe

__all__ = ["Recipe", "UserError", "evaluate", "load_model", "predict", "train"]
__version__ = "0.1.0"


def __dir__() -> list[str]:
    """Return the module's names, for completion in a notebook."""
    return sorted([*globals(), *__all__])


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: the command line's --help needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module 'cifar_dist' has no attribute '{name}'")
    rooms = {"Recipe": "config.recipe", "UserError": "config.errors"}
    return getattr(importlib.import_module(f"cifar_dist.{rooms.get(name, 'api')}"), name)
