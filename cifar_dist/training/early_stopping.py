"""When to stop before the last epoch, and which epoch was the best."""

from dataclasses import dataclass
from typing import Any

from cifar_dist.config.recipe import EarlyStoppingConfig
from cifar_dist.run.results import EpochRecord


def monitored_value(config: EarlyStoppingConfig, record: EpochRecord) -> float:
    """Give the monitored metric as a number that falls as it improves."""
    value = float(getattr(record, config.monitor))
    return -value if config.monitor == "val_acc" else value


@dataclass(eq=False)
class EarlyStopping:
    """Counts epochs in a row that did not improve on the best by more than `min_delta`, as the original script did."""

    config: EarlyStoppingConfig
    best: float | None = None
    epochs_without_improvement: int = 0
    stopped: bool = False
    """Whether the ranks agreed to stop."""

    def update(self, record: EpochRecord) -> bool:
        """Take in an epoch; give this process's vote on whether training should stop now."""
        if not self.config.enabled:
            return False
        value = monitored_value(self.config, record)
        if self.best is None or value < self.best - self.config.min_delta:
            self.best, self.epochs_without_improvement = value, 0
        else:
            self.epochs_without_improvement += 1
        return self.epochs_without_improvement >= self.config.patience

    def state_dict(self) -> dict[str, Any]:
        """Give what a checkpoint keeps."""
        names = ("best", "epochs_without_improvement", "stopped")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.best = state["best"]
        self.epochs_without_improvement = state["epochs_without_improvement"]
        self.stopped = state["stopped"]
