"""The results of a run as plain data, to and from JSON, and the observer of a run in progress."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Status = Literal["running", "completed", "early_stopped", "interrupted", "diverged"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochRecord:
    """One line of metrics.jsonl. Accuracies are fractions of 1."""

    epoch: int
    """From 1."""
    step: int
    """Optimizer steps since the start of the run."""
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
        """Return the record as one line."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> "EpochRecord":
        """Parse a line of metrics.jsonl. Raises ValueError or TypeError."""
        return cls(**_known_fields(cls, json.loads(line)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Metrics of weights on a set of images, each counted once."""

    num_samples: int
    loss: float
    top1: float
    top5: float | None
    """None with five classes or fewer."""
    per_class_accuracy: Mapping[str, float | None]
    """None for a class without images."""
    confusion_matrix: Sequence[Sequence[int]]
    """Rows are the true classes, columns the predicted ones."""

    def to_mapping(self) -> dict[str, Any]:
        """Return plain values for JSON."""
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
    """summary.json."""

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
        """Return JSON with one field a line."""
        fields = dataclasses.asdict(self).items()
        return (
            "{\n" + ",\n".join(f' "{name}": {json.dumps(value, allow_nan=False)}' for name, value in fields) + "\n}\n"
        )

    @classmethod
    def from_json(cls, text: str) -> "Summary":
        """Parse summary.json. Raises ValueError or TypeError."""
        values = _known_fields(cls, json.loads(text))
        test = values.pop("test")
        return cls(**values, test=None if test is None else Evaluation(**_known_fields(Evaluation, test)))


def _known_fields(record: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a record. Unknown ones are dropped, missing optional ones are None. Raises TypeError."""
    if not isinstance(values, dict):
        raise TypeError(f"{type(values).__name__} is no record")
    fields = dataclasses.fields(record)
    later = {field.name: None for field in fields if type(None) in get_args(field.type)}
    return later | {field.name: values[field.name] for field in fields if field.name in values}


class Observer:
    """Callbacks of a run in progress. This one does nothing."""

    def on_earlier_epochs(self, records: Sequence[EpochRecord], best_epoch: int | None) -> None:
        """A resumed run has done these epochs."""

    def on_epoch_start(self, epoch: int, lr: float) -> None:
        """An epoch, counted from 1, begins at this learning rate."""

    def on_step(self, step_in_epoch: int, loss: float | None) -> None:
        """A step, counted from 1, is done. The loss comes every `report_every_steps` steps."""

    def on_evaluation(self, done: int, total: int) -> None:
        """So many images of an evaluation are done."""

    def on_epoch_end(self, record: EpochRecord, is_best: bool) -> None:
        """An epoch is over."""

    def on_note(self, text: str) -> None:
        """Print a note for the user."""
