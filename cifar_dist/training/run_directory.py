"""What a run leaves on disk, in the one folder that it is given."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from torch import Tensor

from cifar_dist.config.errors import UserError
from cifar_dist.config.loading import read_yaml
from cifar_dist.records import EpochRecord, Summary
from cifar_dist.training.checkpoint import save_checkpoint, write_atomically
from cifar_dist.training.state import TrainState


class RunDirectory:
    """The files of one run. Nothing is made before `create`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.predictions = path / "test_predictions.npz"
        self.figures = path / "figures"
        self.last = path / "checkpoints" / "last.pt"
        self.previous = path / "checkpoints" / "previous.pt"
        self.best = path / "checkpoints" / "best.pt"

    @property
    def holds_run(self) -> bool:
        """Whether a run has left something here."""
        return any(file.exists() for file in (self.config, self.metrics, self.summary, self.last))

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
        write_atomically(self.config, lambda file: file.write(text.encode()))

    def read_config(self) -> dict[str, Any]:
        """Read config.yaml. Raises UserError where it is missing or damaged."""
        config = read_yaml(self.config, "run configuration")
        if not isinstance(config.get("recipe"), dict) or not isinstance(config.get("dataset"), dict):
            raise UserError(f"run configuration {self.config} lacks its recipe or dataset")
        return config

    def append_record(self, record: EpochRecord) -> None:
        """Add a line to metrics.jsonl, whole and on disk."""
        with self.metrics.open("ab") as file:
            file.write(record.to_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

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

    def cut_records(self, step: int) -> list[EpochRecord]:
        """Cut metrics.jsonl back to what a checkpoint at `step` knows; give what is left."""
        kept = [record for record in self.read_records() if record.step <= step]
        text = "".join(record.to_json() + "\n" for record in kept)
        write_atomically(self.metrics, lambda file: file.write(text.encode()))
        return kept

    def write_summary(self, summary: Summary) -> None:
        """Write summary.json."""
        write_atomically(self.summary, lambda file: file.write(summary.to_json().encode()))

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
        write_atomically(self.predictions, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]


class CheckpointWriter:
    """Writes a run's checkpoints: at epoch ends, at most one in `every_seconds`, and whenever it is told to."""

    def __init__(self, run: RunDirectory, header: Mapping[str, Any], *, every_seconds: float = 60.0) -> None:
        """Take in `header` what every checkpoint says of its run (recipe, dataset, precision, …)."""
        self.run = run
        self.header = dict(header)
        self.every_seconds = every_seconds
        self._written_at = time.monotonic()
        self._written_epoch: int | None = None
        self._best_epoch: int | None = None

    def save_if_due(self, state: TrainState, scaler: Mapping[str, Any] | None) -> None:
        """Save, unless the last checkpoint is younger than `every_seconds`."""
        if time.monotonic() - self._written_at >= self.every_seconds:
            self.save(state, scaler)

    def save(self, state: TrainState, scaler: Mapping[str, Any] | None) -> None:
        """Write last.pt (its predecessor becomes previous.pt), and best.pt where another epoch is the best now."""
        if self._written_epoch == state.epoch:
            return
        content = {**self.header, "kind": "last", "scaler": scaler, **state.to_mapping()}
        save_checkpoint(self.run.last, content, previous=self.run.previous)
        if state.best is not None and state.best.epoch != self._best_epoch:
            self._save_best(state.best.epoch, state.best.weights)
        self._written_at, self._written_epoch = time.monotonic(), state.epoch

    def _save_best(self, epoch: int, weights: Mapping[str, Tensor]) -> None:
        content = {**self.header, "kind": "best", "epoch": epoch, "model": dict(weights)}
        save_checkpoint(self.run.best, content)
        self._best_epoch = epoch
