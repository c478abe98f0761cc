"""Plain mappings (from YAML, `--set`, a checkpoint) into typed dataclasses and back; every refusal names its field."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from cifar_dist.config.errors import UserError

T = TypeVar("T")

_OTHER_NAMES = {
    "optimizer.learning_rate": "lr base_lr learning_rate",
    "optimizer.weight_decay": "wd l2",
    "optimizer.name": "optimizer optim opt",
    "schedule.name": "schedule scheduler lr_scheduler",
    "schedule.warmup_fraction": "warmup warmup_epochs warmup_steps",
    "early_stopping.enabled": "early_stopping early_stop",
    "global_batch_size": "batch_size batch bs train_batch_size per_device_train_batch_size",
    "gradient_accumulation_steps": "accumulate accumulation grad_accum accum_iter",
    "gradient_clipping": "clip grad_clip clip_grad max_grad_norm",
    "ema_decay": "ema",
    "validation_size": "val_size val_split",
    "image_size": "img_size imgsz size resolution",
    "model": "arch architecture net network",
}
"""What other programs call a field of the recipe."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `, did you mean X?` with the known name closest to `name` in any case, or nothing if none is close."""
    # In lower case, and without the dashes of flags, which would count as likeness.
    bare = {each.lstrip("-").lower(): each for each in known}
    close = difflib.get_close_matches(name.lstrip("-").lower(), bare, n=1, cutoff=0.6)
    return f", did you mean '{bare[close[0]]}'?" if close else ""


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Make the dataclass `cls` from a mapping that has all of its fields and no other.

    `where` is the dotted prefix used in messages. Raises UserError for an unknown or missing field, a value of the
    wrong type, and whatever the dataclass itself refuses (its ValueError names the field).
    """
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise UserError(f"unknown recipe field '{where}{key}'{_meant(str(key), hints, where)}")
    missing = [name for name in names if name not in values]
    if missing:
        raise UserError(f"recipe field '{where}{missing[0]}' is missing")
    converted = {name: convert(hints[name], values[name], f"{where}{name}") for name in names}
    try:
        return cls(**converted)
    except ValueError as error:
        raise UserError(f"{where}{error}") from None


def field_called(name: str, fields: Iterable[str]) -> str | None:
    """Return the one of the dotted `fields` that ends in `name`, else the one that has this name in other programs."""
    own = [field for field in fields if field.rpartition(".")[2] == name]
    others = [field for field, names in _OTHER_NAMES.items() if name in names.split()]
    return next(iter(own if len(own) == 1 else others), None)


def _meant(key: str, hints: Mapping[str, Any], where: str) -> str:
    """Name the field that an unknown one is for, here or one level below; else those that there are."""
    below = {name: dataclasses.fields(hint) for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    guess = field_called(key, [f"{name}.{field.name}" for name, fields in below.items() for field in fields])
    if guess is not None:
        return f", did you mean '{guess}'?"
    return nearest(key, hints) or (f" (fields of {where.rstrip('.')}: {', '.join(hints)})" if where else "")


def to_mapping(value: Any) -> Any:
    """Turn a dataclass into dicts, lists and scalars that YAML and `torch.load(weights_only=True)` both take."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_mapping(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [to_mapping(item) for item in value]
    return value


def flatten(mapping: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Give a nested mapping's leaves by their dotted names."""
    leaves: dict[str, Any] = {}
    for key, value in mapping.items():
        leaves.update(flatten(value, f"{where}{key}.") if isinstance(value, Mapping) else {f"{where}{key}": value})
    return leaves


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `over` on `base`, nested mappings field by field."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def convert(hint: Any, value: Any, where: str) -> Any:
    """Check one value against its type hint; integers become floats and lists tuples where those are asked for.

    Raises UserError that begins with `where`.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return _choice(arguments, value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        if any(isinstance(value, str) and value in typing.get_args(each) for each in arguments):
            return value
        inner = next(each for each in arguments if each is not type(None))
        if isinstance(value, str) and value.lower() == "none" and typing.get_origin(inner) is not Literal:
            raise UserError(f"{where} must not be the text '{value}', did you mean null?")
        return convert(inner, value, where)
    if origin is tuple:
        return _sequence(arguments, value, where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            meant = f", did you mean '{where}.name'?" if "name" in typing.get_type_hints(hint) else ""
            raise UserError(f"{where} must be a mapping of its fields, not {value!r}{meant}")
        return build(hint, value, f"{where}.")  # type: ignore[arg-type]
    return _scalar(hint, value, where)


def _choice(allowed: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, str) or value not in allowed:
        quoted = " (quote it: an unquoted no is a YAML boolean)" if value is False and {"no", "NO"} & {*allowed} else ""
        raise UserError(f"{where} must be one of {', '.join(allowed)}, not {value!r}{quoted}")
    return value


def _sequence(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    open_ended = len(arguments) == 2 and arguments[1] is Ellipsis
    if not isinstance(value, list | tuple) or not (open_ended or len(value) == len(arguments)):
        raise UserError(f"{where} must be a list{'' if open_ended else f' of {len(arguments)}'}, not {value!r}")
    hints = arguments[:1] * len(value) if open_ended else arguments
    return tuple(convert(hint, item, f"{where}[{i}]") for i, (hint, item) in enumerate(zip(hints, value, strict=True)))


def _scalar(hint: Any, value: Any, where: str) -> Any:
    names = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", dict: "a mapping"}
    if hint is float and not isinstance(value, bool):
        try:  # YAML 1.1 reads 5e-4 (no dot) as text
            value = float(value) if isinstance(value, int | float | str) else value
        except (ValueError, OverflowError):
            pass
    if hint is int and isinstance(value, str) and value.isdecimal() and value.startswith("0"):
        value = int(value)
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise UserError(f"{where} must be {names[hint]}, not {value!r}")
    return value
