"""What a run stores: its metadata, a record for each epoch, and the summary; and the observer of a run in progress."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self, get_args

from cifar_dist.config.errors import UserError
from cifar_dist.config.own_code import OWN_CODE_FIELDS, is_own_code, own_sources
from cifar_dist.config.plan import KNOWN_SIZES
from cifar_dist.config.recipe import Count, Positive, Recipe, recipe_to_mapping
from cifar_dist.config.schema import build, flatten, to_mapping

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
        return json.dumps(asdict(self), allow_nan=False)

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

    @property
    def is_complete(self) -> bool:
        """Whether the run came to its end, tested or not."""
        return self.status in ("completed", "early_stopped")

    def to_json(self) -> str:
        """Return JSON with one field a line."""
        lines = (f' "{name}": {json.dumps(value, allow_nan=False)}' for name, value in asdict(self).items())
        return "{\n" + ",\n".join(lines) + "\n}\n"

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
    optional = {each.name: None for each in fields(record) if type(None) in get_args(each.type)}
    return optional | {each.name: values[each.name] for each in fields(record) if each.name in values}


class Observer:
    """Callbacks of a run in progress. This one does nothing."""

    def on_earlier_epochs(self, records: Sequence[EpochRecord], best_epoch: int | None) -> None:
        """A resumed run has done these epochs."""

    def on_epoch_start(self, epoch: int) -> None:
        """An epoch, counted from 1, begins."""

    def on_step(self, step_in_epoch: int, loss: float | None) -> None:
        """A step, counted from 1, is done. `loss` is a number every `agree_every_steps` steps."""

    def on_evaluation(self, done: int, total: int) -> None:
        """So many images of an evaluation are done."""

    def on_epoch_end(self, record: EpochRecord, is_best: bool) -> None:
        """An epoch is done."""

    def on_note(self, text: str) -> None:
        """Print a note for the user."""


FORMAT_VERSION = 3
"""Of config.yaml and checkpoints. Versions 1 and 2 had other recipe fields."""

_MAY_CHANGE = frozenset({"epochs"})
"""Recipe fields that a resumed run may change."""


def check_format(content: Mapping[str, Any], where: str) -> None:
    """Raise UserError unless `content` has this version's format."""
    version = content.get("format_version", 1)
    if version != FORMAT_VERSION:
        raise UserError(
            f"{where} has format {version}, and this version reads {FORMAT_VERSION}:"
            " use the version of cifar-dist that wrote it"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetMetadata:
    """The images that a run was trained on."""

    name: str
    """A dataset's name, or the absolute path of a folder."""
    data_dir: str
    fingerprint: str
    """Hash of class names, images and labels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunMetadata:
    """The metadata of a run, in config.yaml and in every checkpoint."""

    recipe_name: str
    recipe: Recipe
    dataset: DatasetMetadata
    class_names: tuple[str, ...]
    world_size: Count
    device: str
    precision: Literal["no", "fp16", "bf16"]
    num_threads: Count
    checkpoint_every_minutes: Positive | None = None
    checkpoint_every_steps: Count | None = None
    trackers: tuple[str, ...] = ()
    sources: dict = field(default_factory=dict)  # type: ignore[type-arg]
    """`source_hash` of each function of the user's that the recipe names, by field."""
    plan: dict = field(default_factory=dict)  # type: ignore[type-arg]
    versions: dict = field(default_factory=dict)  # type: ignore[type-arg]
    git_commit: str | None = None
    slurm_job: str | None = None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str) -> Self:
        """Validate stored metadata. Raises UserError that names the file (`where`) and the field."""
        known = {each.name: values[each.name] for each in fields(cls) if each.name in values}
        try:
            return build(cls, known, kind="field")
        except UserError as error:
            raise UserError(f"{where} is damaged: {error}") from None

    def to_mapping(self) -> dict[str, Any]:
        """Return plain values for YAML and for `torch.load(weights_only=True)`."""
        mapping: dict[str, Any] = to_mapping(self)
        if self.slurm_job is None:
            del mapping["slurm_job"]
        return mapping

    def refuse_other_recipe(self, recipe: Recipe, dataset: str) -> None:
        """Raise UserError, naming each field, if a resumed run would train another recipe or dataset.

        A folder may have moved: its content is compared later.
        """
        old, new = (flatten(recipe_to_mapping(each)) for each in (self.recipe, recipe))
        names = [name for name in sorted(new) if name not in _MAY_CHANGE and old[name] != new[name]]
        moved = {name for name in OWN_CODE_FIELDS if is_own_code(old.get(name)) and is_own_code(new.get(name))}
        changed = [f"{name} {old[name]} -> {new[name]}" for name in names if name not in moved]
        sources = own_sources(new)
        changed += [f"the source of {new[name]}" for name in sorted(moved) if self.sources.get(name) != sources[name]]
        datasets = {self.dataset.name, dataset}
        if len(datasets) > 1 and datasets & KNOWN_SIZES.keys():
            changed.insert(0, f"dataset {self.dataset.name} -> {dataset}")
        _refuse(changed)

    def refuse_other_data(self, now: "RunMetadata") -> None:
        """Raise UserError if the dataset that was loaded is not the one that the run began with."""
        old, new = self.class_names, now.class_names
        if len(old) != len(new):
            _refuse([f"number of classes {len(old)} -> {len(new)}"])
        _refuse([f"class name {before} -> {after}" for before, after in zip(old, new, strict=True) if before != after])
        if self.dataset.fingerprint != now.dataset.fingerprint:
            _refuse([f"content of the dataset {now.dataset.name}"])


def stored_threads(metadata: RunMetadata | None, world_size: int) -> int | None:
    """Return a stored run's number of threads, for the same bits, if the world size is the same; else None."""
    return metadata.num_threads if metadata is not None and metadata.world_size == world_size else None


def _refuse(changed: list[str]) -> None:
    if changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        what = f"this differs: {', '.join(changed[:5])}{more}"
        raise UserError(f"a resumed run stays what it was, and {what}; undo that, or type a new --run-dir")
