"""When a run is saved, and what is saved then."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cifar_dist.run.directory import RunDirectory
from cifar_dist.training.state import Best, TrainState


class CheckpointWriter:
    """Writes a run's checkpoints, at its intervals and whenever it is told to.

    The intervals are so many minutes and steps of the run, wherever in an epoch they fall. Without minutes it is one
    minute, at the end of an epoch alone, and more on a slow disk: saving takes 1 % of the time at most.
    """

    def __init__(
        self,
        run: RunDirectory,
        about: Mapping[str, Any],
        *,
        checkpoint_every_minutes: float | None = None,
        checkpoint_every_steps: int | None = None,
    ) -> None:
        """Take in `about` what every checkpoint says of its run (recipe, dataset, precision, …)."""
        self.run = run
        self.about = dict(about)
        minutes = checkpoint_every_minutes
        self.within_epochs = minutes is not None
        self._every_seconds = 60 * (1 if minutes is None else minutes)
        self._largest_share = 0.01 if minutes is None else math.inf
        self._every_steps = checkpoint_every_steps
        self._written_at = time.monotonic()
        self._seconds = 0.0
        self._written_step: int | None = None
        self._best_epoch: int | None = None

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due at the end of an epoch that ends with this step."""
        return self.due_by_time() or self.due_by_step(step)

    def due_by_time(self) -> bool:
        """Whether the last checkpoint is as old as it may become."""
        rest = max(self._every_seconds, self._seconds / self._largest_share)
        return time.monotonic() - self._written_at >= rest

    def due_by_step(self, step: int) -> bool:
        """Whether a checkpoint is due after this step."""
        return self._every_steps is not None and step % self._every_steps == 0

    def save(
        self,
        state: TrainState,
        machine: Mapping[str, Any],
        *,
        epoch_sums: Sequence[Sequence[float]] = (),
        statistics: Sequence[Sequence[float]] = (),
    ) -> None:
        """Write last.pt (its predecessor becomes previous.pt), and best.pt where another epoch is the best now.

        `machine` is what the runtime knows beside the state. Of an epoch in progress there is a row for each rank: its
        own sums and, with ghost groups, running statistics.
        """
        if self._written_step == state.step:
            return
        begun = time.monotonic()
        rows = {"epoch_sums": [list(row) for row in epoch_sums], "statistics": [list(row) for row in statistics]}
        content = {**self.about, **machine, **rows, **state.to_mapping()}
        self.run.write_checkpoint(self.run.last, content, previous=self.run.previous)
        if state.best is not None and state.best.epoch != self._best_epoch:
            self._save_best(state.best)
        self._written_at, self._written_step = time.monotonic(), state.step
        self._seconds = self._written_at - begun

    def _save_best(self, best: Best) -> None:
        content = {**self.about, "epoch": best.epoch, "record": best.record, "model": best.weights}
        self.run.write_checkpoint(self.run.best, content)
        self._best_epoch = best.epoch
