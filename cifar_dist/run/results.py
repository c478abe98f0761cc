"""What a run says of itself: plain data, to and from JSON, and the observer that hears it while it happens."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Status = Literal["running", "completed", "early_stopped", "interrupted", "diverged"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochRecord:
    """One line of metrics.jsonl. Accuracies are fractions of 1; what there is none of is None."""

    epoch: int
    """From 1."""
    step: int
    """Optimiser steps done since the start of the run."""
    lr: float
    """The learning rate last used."""
    train_loss: float
    train_acc: float
    val_loss: float | None
    val_acc: float | None
    images_per_second: float
    epoch_seconds: float
    """Time spent training, evaluation apart."""
    world_size: int

    def to_json(self) -> str:
        """Give the record as one line."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> "EpochRecord":
        """Read a line of metrics.jsonl. Raises ValueError or TypeError where it is none."""
        return cls(**_known_fields(cls, json.loads(line)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """How well weights do on a set of images, each counted once."""

    num_samples: int
    loss: float
    top1: float
    top5: float | None
    """None where there are five classes or fewer."""
    per_class_accuracy: Mapping[str, float | None]
    """None where a class has no image."""
    confusion_matrix: Sequence[Sequence[int]]
    """Rows are the true classes, columns the predicted ones."""

    def to_mapping(self) -> dict[str, Any]:
        """Give plain values for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """The most likely classes of one image file."""

    file: str
    classes: Sequence[tuple[str, float]]
    """(name, probability), the likeliest first; empty if the file could not be read."""
    error: str | None = None
    """Why the file could not be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """summary.json: what became of a run."""

    status: Status
    epochs: int
    """Epochs done."""
    best_epoch: int | None
    best_val_acc: float | None = None
    """The validation accuracy of `best_epoch`."""
    train_seconds: float
    """Time spent training over all starts of the run, evaluation apart."""
    world_size: int
    device: str
    precision: str
    num_threads: int
    peak_memory_mib: int | None
    test: Evaluation | None

    def to_json(self) -> str:
        """Give the summary as JSON with one field a line."""
        fields = dataclasses.asdict(self).items()
        return (
            "{\n" + ",\n".join(f' "{name}": {json.dumps(value, allow_nan=False)}' for name, value in fields) + "\n}\n"
        )

    @classmethod
    def from_json(cls, text: str) -> "Summary":
        """Read a summary.json. Raises ValueError or TypeError where it is none."""
        values = _known_fields(cls, json.loads(text))
        test = values.pop("test")
        return cls(**values, test=None if test is None else Evaluation(**_known_fields(Evaluation, test)))


def _known_fields(record: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Give a record's fields. A newer version may have written more of them, and an older one none that may be None.

    Raises TypeError where the values are no mapping.
    """
    if not isinstance(values, dict):
        raise TypeError(f"{type(values).__name__} is no record")
    fields = dataclasses.fields(record)
    later = {field.name: None for field in fields if type(None) in get_args(field.type)}
    return later | {field.name: values[field.name] for field in fields if field.name in values}


class Observer:
    """Hears what a run does. This one does nothing, so that a caller who does not care needs no `if`."""

    def on_earlier_epochs(self, records: Sequence[EpochRecord], best_epoch: int | None) -> None:
        """A run goes on that has done these epochs already."""

    def on_epoch_start(self, epoch: int, lr: float) -> None:
        """An epoch (from 1) begins, at this learning rate."""

    def on_step(self, step_in_epoch: int, loss: float | None) -> None:
        """A step is done (counted from 1); the loss comes every `report_every_steps` only."""

    def on_evaluation(self, done: int, total: int) -> None:
        """So many of the images of an evaluation are done."""

    def on_epoch_end(self, record: EpochRecord, is_best: bool) -> None:
        """An epoch is over."""

    def on_note(self, text: str) -> None:
        """Something happened that a person should read."""
