"""The state of a training in progress, to a checkpoint and back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cifar_dist.config.recipe import EarlyStoppingConfig
from cifar_dist.config.schema import to_mapping
from cifar_dist.model.layers import Groups, running_statistics
from cifar_dist.model.optimizer import ExponentialMovingAverage, load_optimizer_state
from cifar_dist.model.pretrained import load_weights
from cifar_dist.run.results import EpochRecord
from cifar_dist.training.evaluation import RunningSums


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
        return {name: value for name, value in vars(self).items() if name != "config"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name in self.state_dict():
            setattr(self, name, state[name])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Best:
    """The best epoch so far."""

    epoch: int
    value: float
    """The monitored metric, falling as it improves."""
    weights: dict[str, Tensor]
    """On the CPU, kept in memory between the writing of checkpoints."""
    record: dict[str, Any]
    """The epoch's line of metrics.jsonl."""


@dataclass(kw_only=True, eq=False)
class TrainState:
    """What changes while a model is trained."""

    model: nn.Module
    """Unwrapped, on the device."""
    optimizer: torch.optim.Optimizer
    early_stopping: EarlyStopping
    epoch: int = 0
    """Epochs done."""
    step: int = 0
    """Optimizer steps done."""
    train_seconds: float = 0.0
    """Of the epochs done, over all starts of the run."""
    epoch_seconds: float = 0.0
    """Of the epoch in progress."""
    sums: RunningSums
    """Of the epoch in progress, this process's part."""
    best: Best | None = None
    ema: ExponentialMovingAverage | None = None
    groups: Groups | None = None
    """BatchNorm's ghost groups, if there are any."""

    @property
    def evaluated_model(self) -> nn.Module:
        """The model that is validated, selected and tested: the average, if there is one."""
        return self.model if self.ema is None else self.ema.model

    @property
    def own_statistics(self) -> list[Tensor]:
        """BatchNorm's running statistics if they follow this rank's own images, as with ghost groups.

        They must be averaged over the ranks before they are evaluated or saved.
        """
        if self.groups is None:
            return []
        return running_statistics(self.model, *([] if self.ema is None else [self.ema.model]))

    def set_own_statistics(self, values: Sequence[float]) -> None:
        """Set `own_statistics` to these values, concatenated."""
        tensors = self.own_statistics
        parts = torch.split(torch.tensor(values, dtype=torch.float64), [len(tensor) for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part)

    def to_mapping(self) -> dict[str, Any]:
        """Return the state as plain containers and tensors."""
        return {
            "model": dict(self.model.state_dict()),
            **({} if self.ema is None else {"model_ema": dict(self.ema.model.state_dict())}),
            "optimizer": self.optimizer.state_dict(),
            "early_stopping": self.early_stopping.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "train_seconds": self.train_seconds,
            "epoch_seconds": self.epoch_seconds,
            "best": to_mapping(self.best),
        }

    def restore(self, content: Mapping[str, Any]) -> None:
        """Restore what `to_mapping` returned. Raises UserError if the weights do not fit the model."""
        load_weights(self.model, content["model"])
        if self.ema is not None:
            load_weights(self.ema.model, content["model_ema"])
        load_optimizer_state(self.optimizer, content["optimizer"])
        self.early_stopping.load_state_dict(content["early_stopping"])
        self.epoch, self.step = content["epoch"], content["step"]
        self.train_seconds, self.epoch_seconds = content["train_seconds"], content["epoch_seconds"]
        self.best = None if content["best"] is None else Best(**content["best"])


def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a model's state dict on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
