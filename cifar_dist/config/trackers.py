"""The names of trackers, and whether their packages are there: asked before anything is started."""

import importlib.util
from collections.abc import Sequence

from cifar_dist.config.errors import UserError
from cifar_dist.config.parsing import nearest

# Accelerate's names, each also that of the package that it needs.
TRACKERS = ("tensorboard", "wandb", "mlflow", "aim", "clearml", "comet_ml", "dvclive", "swanlab", "trackio")


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError for a tracker that nobody knows, or whose package is missing."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"unknown tracker '{name}'{nearest(name, TRACKERS)} (trackers: {', '.join(TRACKERS)})")
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # any folder of that name in the current one is found, without origin
            raise UserError(f"--tracker {name} needs the package {name}: pip install {name}")
