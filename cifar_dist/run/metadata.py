"""What a run stores about itself, in config.yaml and in every checkpoint. Users may have edited it. No torch."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, Self, get_origin, get_type_hints

from cifar_dist.config.errors import UserError
from cifar_dist.config.plan import KNOWN_SIZES
from cifar_dist.config.recipe import Recipe, recipe_to_mapping, resolve_recipe
from cifar_dist.config.schema import convert, flatten, to_mapping

FORMAT_VERSION = 2
"""Of config.yaml and checkpoints. Version 1 had recipe fields that are gone."""

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
    """Which images a run was trained on."""

    name: str
    """A dataset's name, or the absolute path of a folder."""
    data_dir: str
    fingerprint: str
    """Hash of class names, images and labels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunMetadata:
    """What config.yaml and every checkpoint say about their run."""

    recipe_name: str
    recipe: Recipe
    dataset: DatasetMetadata
    class_names: tuple[str, ...]
    world_size: int
    device: str
    precision: Literal["no", "fp16", "bf16"]
    num_threads: int
    checkpoint_every_minutes: float | None = None
    checkpoint_every_steps: int | None = None
    trackers: tuple[str, ...] = ()
    plan: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    git_commit: str | None = None
    slurm_job: str | None = None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str) -> Self:
        """Validate stored metadata. Raises UserError that names the file (`where`) and the field."""
        hints, converted = get_type_hints(cls), dict[str, Any]()
        for each in fields(cls):
            if each.name in values:
                converted[each.name] = _converted(hints[each.name], values[each.name], where, each.name)
            elif each.default is MISSING and each.default_factory is MISSING:
                raise UserError(f"{where} is damaged: {each.name} is missing")
        for name in ("world_size", "num_threads", "checkpoint_every_minutes", "checkpoint_every_steps"):
            number = converted.get(name)
            if number is not None and not number > 0:
                raise UserError(f"{where} is damaged: {name} must be a number above 0, not {number!r}")
        return cls(**converted)

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
        changed = [f"{name} {old[name]} -> {new[name]}" for name in names]
        datasets = {self.dataset.name, dataset}
        if len(datasets) > 1 and datasets & KNOWN_SIZES.keys():
            changed.insert(0, f"dataset {self.dataset.name} -> {dataset}")
        _refuse(changed)

    def refuse_other_data(self, now: "RunMetadata") -> None:
        """Raise UserError if the dataset that was loaded is not the one that the run began with."""
        old, new = self.class_names, now.class_names
        if len(old) != len(new):
            _refuse([f"number of classes {len(old)} -> {len(new)}"])
        pairs = [f"{before} -> {after}" for before, after in zip(old, new, strict=True) if before != after]
        if pairs:
            _refuse([f"names of classes {', '.join(pairs)}"])
        if self.dataset.fingerprint != now.dataset.fingerprint:
            _refuse([f"content of the dataset {now.dataset.name}"])


def _converted(hint: Any, value: Any, where: str, name: str) -> Any:
    """Return one field, checked against its type. Raises UserError that names it."""
    what = f"{where} is damaged: {name}"
    if hint is Recipe:
        try:
            return resolve_recipe(convert(dict, value, what))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    if hint is DatasetMetadata:
        stored = convert(dict, value, what)
        named = {each.name: convert(str, stored.get(each.name), f"{what}.{each.name}") for each in fields(hint)}
        return DatasetMetadata(**named)
    return convert(dict if get_origin(hint) is Mapping else hint, value, what)


def _refuse(changed: list[str]) -> None:
    if changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        what = f"this differs: {', '.join(changed[:5])}{more}"
        raise UserError(f"a resumed run stays what it was, and {what}; type a new --run-dir")
