"""The search space of `tune`: the recipe fields that vary, and their values."""

import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from cifar_dist.config.errors import UserError
from cifar_dist.config.recipe import Recipe, find_field
from cifar_dist.config.schema import build, convert, flatten, nearest, read_yaml, to_mapping

_NOT_SEARCHED = ("validation_size", "seed", "dataset")
"""They decide which images are held out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """The numbers from `low` to `high`, both included."""

    low: int | float
    high: int | float
    log: bool = False
    """Whether orders of magnitude are equally likely."""
    step: int | float | None = None

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"high must be at least low={self.low}, not {self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log needs low above 0, and no step")
        if self.step is not None and self.step <= 0:
            raise ValueError(f"step must be above 0, not {self.step}")
        if self.step is not None and (Decimal(str(self.high)) - Decimal(str(self.low))) % Decimal(str(self.step)):
            raise ValueError(f"step={self.step} does not lead from low={self.low} to high={self.high}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """One of these values."""

    choices: tuple[bool | int | float | str | None, ...]


Space = Mapping[str, Range | Choices]
"""By dotted name of the recipe field."""


def read_space(path: Path) -> Space:
    """Read a space file. Raises UserError."""
    return parse_space(read_yaml(path, "space file"), f"space file {path}")


def parse_space(values: Mapping[str, Any], where: str) -> Space:
    """Parse a mapping of dotted field names to `low`, `high`, `log`, `step`, or to `choices`. Raises UserError."""
    if not values:
        raise UserError(
            f"{where} is empty: name a recipe field, such as optimizer.learning_rate: {{low: 0.01, high: 1}}"
        )
    return {name: _parse_field(name, given, where) for name, given in values.items()}


def _parse_field(name: str, given: Any, where: str) -> Range | Choices:
    hints, what = dict(_field_hints(Recipe)), f"{where}: {name}"
    if name not in hints:
        meant = find_field(name.rpartition(".")[2])
        hint = f", did you mean '{meant}'?" if meant else nearest(name, hints) or " (write group.field)"
        raise UserError(f"{where}: unknown recipe field '{name}'{hint}")
    if name in _NOT_SEARCHED:
        raise UserError(f"{what} decides which images are held out, and trials could not be compared: leave it out")
    if not isinstance(given, Mapping) or not (given.keys() >= {"low", "high"} or given.keys() == {"choices"}):
        raise UserError(f"{what} must have low and high (and log or step), or choices alone")
    if "low" in given:
        found = build(Range, given, f"{what}.", kind="key")
        numbers = {key: convert(hints[name], getattr(found, key), f"{what}.{key}") for key in ("low", "high")}
        if not {type(each) for each in numbers.values()} <= {int, float}:
            raise UserError(f"{what} is no number: it must have choices")
        if type(numbers["low"]) is int and type(found.step) is float:
            raise UserError(f"{what}.step must be a whole number, not {found.step}")
        return Range(**numbers, log=found.log, step=found.step)
    choices = given["choices"]
    if not isinstance(choices, list | tuple) or not choices:
        raise UserError(f"{what}.choices must be a list of values, not {choices!r}")
    converted = tuple(convert(hints[name], each, f"{what}.choices") for each in choices)
    if any(isinstance(each, tuple) for each in converted):
        raise UserError(f"{what} is a list, which cannot be searched: leave it out")
    return Choices(choices=converted)


def _field_hints(cls: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        yield from _field_hints(hint, f"{name}.") if is_dataclass(hint) else [(f"{prefix}{name}", hint)]


def default_space(recipe: Recipe) -> Space:
    """Return ranges around a recipe: rates, decay, batch, warm-up, smoothing, augmentation."""
    fields, batch = flatten(to_mapping(recipe)), recipe.global_batch_size
    rates = ("learning_rate", "sgd_learning_rate", "head_learning_rate", "bias_learning_rate")
    factors = {f"optimizer.{name}": 5 for name in rates} | {"optimizer.weight_decay": 10}
    ranges: dict[str, Range | Choices] = {
        name: Range(low=float(f"{value / factor:.3g}"), high=float(f"{value * factor:.3g}"), log=True)
        for name, factor in factors.items()
        if (value := fields[name])
    }
    return ranges | {
        "global_batch_size": Choices(choices=(max(2, batch // 2), batch, batch * 2)),
        "schedule.warmup_fraction": Range(low=0.0, high=0.4),
        "label_smoothing": Range(low=0.0, high=0.2),
        "augmentation.crop_padding": Range(low=0, high=4),
        "augmentation.flip": Choices(choices=("none", "random", "alternating")),
        "augmentation.cutout": Range(low=0, high=12, step=4),
    }
