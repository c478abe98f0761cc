"""Typed loading: YAML and plain mappings become checked dataclasses, and dataclasses become mappings again.

One schema of our own, not pydantic: the YAML rules, the layers, the hints and the wording of errors would stay ours,
so that it would save some 60 lines. Its import takes 0.17 s, and `--help` may take 0.3 s.
"""

import contextlib
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import yaml

from cifar_dist.config.errors import UserError

T = TypeVar("T")
_NAMES = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", dict: "a mapping"}


class Check(NamedTuple):
    """A limit of a field, as in `Annotated[int, Check(...)]`; `allowed` is in words, for "must be ..."."""

    is_allowed: Callable[[Any], bool]
    allowed: str


class _Loader(yaml.SafeLoader):
    """YAML without octal and base-60 numbers, and without repeated keys.

    In YAML 1.1, 010 is 8 and 1:30 is 90. Here they stay text, which `convert` reads as a decimal number or refuses.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own attribute
        first: [("tag:yaml.org,2002:str", re.compile(r"[-+]?(0[0-9_xb]|[0-9_]+:)")), *resolvers]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Raise YAMLError that names key and line if a key stands twice."""
        node, seen = super().compose_mapping_node(anchor), list[str]()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key '{key.value}' stands twice", problem_mark=key.start_mark)
            seen.append(key.value)
        return node


def parse_yaml(text: str, what: str) -> Any:
    """Parse YAML. Raises UserError that begins with `what` and names the line, where it is known."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        raise UserError(f"{what} is not valid YAML{line}: {getattr(error, 'problem', None) or error}") from None


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """Read a YAML file that must hold a mapping. Raises UserError that names the file."""
    if path.is_fifo():  # of `<(...)`: other processes and a resumed run need it again
        raise UserError(f"{what} {path} is a pipe, which can be read only once: name a file")
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), f"{what} {path}")
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{what} {path} is not a text file") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{what} {path} must be a mapping of field names to values")
    return values


def build(cls: type[T], values: Mapping[str, Any], where: str = "", *, kind: str = "recipe field") -> T:
    """Build a dataclass from a mapping of its fields; fields with defaults may be missing.

    Raises UserError for an unknown or missing field, for a value of another type, and for the dataclass's ValueError.
    Messages name a field by `where` and its name.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    converted = {name: convert(hints[name], values[name], f"{where}{name}") for name in fields if name in values}
    for name in values:
        if name not in fields:
            hint = nearest(str(name), fields) or (f" (known are {', '.join(fields)})" if where else "")
            raise UserError(f"unknown {kind} '{where}{name}'{hint}")
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"{kind} '{where}{name}' is missing")
    try:
        return cls(**converted)
    except ValueError as error:
        raise UserError(f"{where}{error}") from None


def convert(hint: Any, value: Any, where: str) -> Any:
    """Return a value checked against a type hint; numbers become floats, and lists tuples, where the hint says so.

    Raises UserError that begins with `where`.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        converted = convert(arguments[0], value, where)
        for check in arguments[1:]:
            if not check.is_allowed(converted):
                raise UserError(f"{where} must be {check.allowed}, not {value!r}")
        return converted
    if origin in (typing.Union, types.UnionType):
        *others, last = [each for each in arguments if each is not type(None)]
        if len(others) + 1 < len(arguments):
            if value is None:
                return None
            if str(value).lower() == "none":
                raise UserError(f"{where} must not be the text '{value}', did you mean null?")
        for other in others:
            with contextlib.suppress(UserError):
                return convert(other, value, where)
        return convert(last, value, where)
    if origin is tuple:
        open_ended = arguments[1:] == (Ellipsis,)
        if not isinstance(value, list | tuple) or not (open_ended or len(value) == len(arguments)):
            hint = f": type [{value}]" if isinstance(value, str) and "," in value else ""
            raise UserError(
                f"{where} must be a list{'' if open_ended else f' of {len(arguments)}'}, not {value!r}{hint}"
            )
        hints = arguments[:1] * len(value) if open_ended else arguments
        return tuple(convert(hints[index], item, f"{where}[{index}]") for index, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"{where} must be a mapping of its fields, not {value!r}")
        return build(hint, value, f"{where}.")  # type: ignore[arg-type]
    if origin is Literal:
        if value not in arguments:
            is_no = value is False and {"no", "NO"} & {*arguments}
            quote = " (quote it: an unquoted no is a YAML boolean)" if is_no else ""
            raise UserError(f"{where} must be one of {', '.join(arguments)}, not {value!r}{quote}")
        return value
    return _convert_scalar(hint, value, where)


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    converted = value  # YAML leaves 5e-4 (no dot) and 010 as text
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            converted = float(value)
    elif hint is int and isinstance(value, str) and re.fullmatch("0[0-9]*", value):
        converted = int(value)
    if type(converted) is not hint or (hint is float and not math.isfinite(converted)):
        raise UserError(f"{where} must be {_NAMES[hint]}, not {value!r}")
    return converted


def to_mapping(value: Any) -> Any:
    """Convert dataclasses to dicts, lists and scalars, which YAML and `torch.load(weights_only=True)` both read.

    Fields with `compare=False` are left out.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field for field in dataclasses.fields(value) if field.compare]
        return {field.name: to_mapping(getattr(value, field.name)) for field in fields}
    return [to_mapping(item) for item in value] if isinstance(value, list | tuple) else value


def flatten(mapping: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return the leaves of a nested mapping by their dotted names."""
    leaves: dict[str, Any] = {}
    for key, value in mapping.items():
        leaves |= flatten(value, f"{where}{key}.") if isinstance(value, Mapping) else {f"{where}{key}": value}
    return leaves


def nested(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted names as nested mappings. Raises UserError if a field stands twice."""
    result: dict[str, Any] = {}
    for name, value in fields.items():
        for part in reversed(str(name).split(".")):
            value = {part: value}
        if twice := flatten(result).keys() & flatten(value).keys():
            raise UserError(f"recipe field '{min(twice)}' stands twice")
        result = merge(result, value)
    return result


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Override `base` by `over`, nested mappings field by field."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `, did you mean 'X'?` with the known name closest to `name`, or nothing if none is close."""
    # In lower case, and without the dashes of flags, which would count as likeness.
    bare = {each.lstrip("-").lower(): each for each in known}
    close = difflib.get_close_matches(name.lstrip("-").lower(), bare, n=1)
    return f", did you mean '{bare[close[0]]}'?" if close else ""
