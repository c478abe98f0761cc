"""Early stopping, as in the original script."""

from dataclasses import dataclass
from typing import Any

from cifar_dist.config.recipe import EarlyStoppingConfig
from cifar_dist.run.results import EpochRecord


def monitored_value(config: EarlyStoppingConfig, record: EpochRecord) -> float:
    """Return the monitored metric, negated if higher is better."""
    value = float(getattr(record, config.monitor))
    return -value if config.monitor == "val_acc" else value


@dataclass(eq=False)
class EarlyStopping:
    """Counts consecutive epochs that did not improve on the best by more than `min_delta`."""

    config: EarlyStoppingConfig
    best: float | None = None
    epochs_without_improvement: int = 0
    stopped: bool = False
    """Whether the ranks agreed to stop."""

    def update(self, record: EpochRecord) -> bool:
        """Count an epoch. Return this rank's vote on whether to stop."""
        if not self.config.enabled:
            return False
        value = monitored_value(self.config, record)
        if self.best is None or value < self.best - self.config.min_delta:
            self.best, self.epochs_without_improvement = value, 0
        else:
            self.epochs_without_improvement += 1
        return self.epochs_without_improvement >= self.config.patience

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        names = ("best", "epochs_without_improvement", "stopped")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.best = state["best"]
        self.epochs_without_improvement = state["epochs_without_improvement"]
        self.stopped = state["stopped"]
