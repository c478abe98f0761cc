"""What a run leaves on disk, in the one folder that it is given."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import yaml
from numpy.typing import NDArray
from torch import Tensor

from cifar_dist.config.errors import UserError
from cifar_dist.config.run_files import RunFiles
from cifar_dist.records import EpochRecord, Summary
from cifar_dist.training.checkpoint import save_checkpoint, write_atomically
from cifar_dist.training.state import TrainState


class RunDirectory(RunFiles):
    """The files of one run, written and read. Nothing is made before `create`."""

    def create(self) -> None:
        """Make the folders. Raises UserError where that cannot be."""
        try:
            self.last.parent.mkdir(parents=True, exist_ok=True)
            self.figures.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the run directory {self.path}: {error.strerror}") from None

    def write_config(self, content: Mapping[str, Any]) -> None:
        """Write config.yaml: all that is needed to run it again."""
        text = yaml.safe_dump(dict(content), sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
        self.write(self.config, lambda file: file.write(text.encode()))

    def append_record(self, record: EpochRecord) -> None:
        """Add a line to metrics.jsonl, whole and on disk."""
        self.append(self.metrics, record.to_json().encode() + b"\n")

    def read_records(self) -> list[EpochRecord]:
        """Read metrics.jsonl; a last line that was cut off is left out."""
        records = []
        lines = self.metrics.read_bytes().splitlines() if self.metrics.exists() else []
        for line in lines:
            try:
                records.append(EpochRecord.from_json(line.decode()))
            except (ValueError, TypeError):
                break
        return records

    def cut_records(self, epochs: int) -> list[EpochRecord]:
        """Cut metrics.jsonl back to so many epochs, which is what a checkpoint knows; give what is left."""
        kept = [record for record in self.read_records() if record.epoch <= epochs]
        text = "".join(record.to_json() + "\n" for record in kept)
        self.write(self.metrics, lambda file: file.write(text.encode()))
        return kept

    def write_summary(self, summary: Summary) -> None:
        """Write summary.json."""
        self.write(self.summary, lambda file: file.write(summary.to_json().encode()))

    def read_summary(self) -> Summary | None:
        """Read summary.json; None where there is none. Raises UserError where it is damaged."""
        if not self.summary.exists():
            return None
        try:
            return Summary.from_json(self.summary.read_text(encoding="utf-8"))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"{self.summary} is damaged: remove it to go on without it") from None

    def write_predictions(self, **arrays: NDArray[Any]) -> None:
        """Write test_predictions.npz: what the figures need, without the data."""
        self.write(self.predictions, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]

    def set_aside(self, damaged: Path) -> None:
        """Give a damaged checkpoint another name, so that it does not become the previous one."""
        number = 1
        while (kept := damaged.with_name(f"damaged-{number}.pt")).exists():
            number += 1
        damaged.replace(kept)

    def write_checkpoint(self, path: Path, content: dict[str, Any], *, previous: Path | None = None) -> None:
        """Write a checkpoint; what was at `path` becomes `previous`."""
        save_checkpoint(path, content, previous=previous)

    def write(self, path: Path, write: Callable[[BinaryIO], Any]) -> None:
        """Write a file so that it is there whole or not at all."""
        write_atomically(path, write)

    def append(self, path: Path, line: bytes) -> None:
        """Add a line to a file, whole and on disk."""
        with path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


class UnwrittenRun(RunDirectory):
    """The run as the other ranks have it: they do all that rank 0 does, and write nothing."""

    def create(self) -> None:
        """Make nothing."""

    def set_aside(self, damaged: Path) -> None:
        """Rename nothing."""

    def write_checkpoint(self, path: Path, content: dict[str, Any], *, previous: Path | None = None) -> None:
        """Write nothing."""

    def write(self, path: Path, write: Callable[[BinaryIO], Any]) -> None:
        """Write nothing."""

    def append(self, path: Path, line: bytes) -> None:
        """Write nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rhythm:
    """How often a run is saved."""

    every_seconds: float = 60.0
    within_epochs: bool = False
    """Whether the seconds count in the middle of an epoch too, and not only at its end."""
    every_steps: int | None = None
    """Steps of the run, wherever they fall."""


class CheckpointWriter:
    """Writes a run's checkpoints, in its rhythm and whenever it is told to."""

    def __init__(self, run: RunDirectory, header: Mapping[str, Any], rhythm: Rhythm | None = None) -> None:
        """Take in `header` what every checkpoint says of its run (recipe, dataset, precision, …)."""
        self.run = run
        self.header = dict(header)
        self.rhythm = rhythm or Rhythm()
        self._written_at = time.monotonic()
        self._written_step: int | None = None
        self._best_epoch: int | None = None

    def save_if_due(self, state: TrainState, scaler: Mapping[str, Any] | None) -> None:
        """Save at the end of an epoch, unless the rhythm has it later."""
        if self.due_by_time() or self.due_by_step(state.step):
            self.save(state, scaler)

    def due_by_time(self) -> bool:
        """Whether the last checkpoint is as old as the rhythm allows."""
        return time.monotonic() - self._written_at >= self.rhythm.every_seconds

    def due_by_step(self, step: int) -> bool:
        """Whether the rhythm has a checkpoint after this step."""
        return self.rhythm.every_steps is not None and step % self.rhythm.every_steps == 0

    def save(
        self,
        state: TrainState,
        scaler: Mapping[str, Any] | None,
        *,
        epoch_sums: Sequence[Sequence[float]] = (),
        statistics: Sequence[Sequence[float]] = (),
    ) -> None:
        """Write last.pt (its predecessor becomes previous.pt), and best.pt where another epoch is the best now.

        Of an epoch in progress, each rank's own sums and, with ghost groups, running statistics: a row for each rank.
        """
        if self._written_step == state.step:
            return
        rows = {"epoch_sums": [list(row) for row in epoch_sums], "statistics": [list(row) for row in statistics]}
        content = {**self.header, "kind": "last", "scaler": scaler, **rows, **state.to_mapping()}
        self.run.write_checkpoint(self.run.last, content, previous=self.run.previous)
        if state.best is not None and state.best.epoch != self._best_epoch:
            self._save_best(state.best.epoch, state.best.weights)
        self._written_at, self._written_step = time.monotonic(), state.step

    def _save_best(self, epoch: int, weights: Mapping[str, Tensor]) -> None:
        content = {**self.header, "kind": "best", "epoch": epoch, "model": dict(weights)}
        self.run.write_checkpoint(self.run.best, content)
        self._best_epoch = epoch
