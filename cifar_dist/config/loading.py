"""Where a recipe comes from: a name or a file, then the flags that were typed, then `--set`."""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from cifar_dist.config.errors import UserError
from cifar_dist.config.parsing import merge, nearest

_RECIPES = resources.files("cifar_dist.config") / "recipes"


def recipe_names() -> list[str]:
    """Give the names of the recipes in the package, in alphabetical order."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _RECIPES.iterdir() if entry.name.endswith(".yaml"))


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """Read a YAML file that must hold a mapping. Raises UserError that names the file and, where known, the line."""
    try:
        return _mapping(path.read_text(encoding="utf-8"), f"{what} {path}")
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{what} {path} is not a text file") from None


def read_recipe(name_or_file: str) -> dict[str, Any]:
    """Read a recipe of the package by name, or a file laid over `standard`; a run's config.yaml is such a file too."""
    if name_or_file in recipe_names():
        return _mapping((_RECIPES / f"{name_or_file}.yaml").read_text(encoding="utf-8"), f"recipe {name_or_file}")
    return merge(read_recipe("standard"), stated_fields(name_or_file))


def stated_fields(name_or_file: str) -> dict[str, Any]:
    """Give what somebody's own recipe file says; a recipe of the package is nobody's own, and gives nothing."""
    if name_or_file in recipe_names():
        return {}
    path = Path(name_or_file)
    if not path.is_file():
        if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
            raise UserError(f"recipe file {path} does not exist")
        names = recipe_names()
        raise UserError(f"unknown recipe '{name_or_file}'{nearest(name_or_file, names)} (recipes: {', '.join(names)})")
    values = read_yaml(path, "recipe file")
    if not isinstance(values.get("recipe"), Mapping):
        return values
    if beside := sorted(values.keys() & read_recipe("standard").keys()):
        raise UserError(f"recipe file {path} holds a whole recipe under 'recipe', and beside it {', '.join(beside)}")
    return dict(values["recipe"])


def recipe_label(name_or_file: str) -> str:
    """Give the short name of a recipe, used for the run directory."""
    path = Path(name_or_file)
    return path.parent.name if path.name == "config.yaml" and path.parent.name else path.stem


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Turn `--set` arguments (`optimizer.learning_rate=0.1`) into a nested mapping; values are parsed as YAML."""
    result: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not all(name.strip().split(".")):
            raise UserError(f"--set takes FIELD=VALUE, not '{assignment}'")
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):
            raise UserError(f"--set {name.strip()}: '{text}' is not a YAML value") from None
        result = merge(result, nested({name.strip(): value}))
    return result


def nested(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Turn names with dots into mappings in mappings."""
    result: dict[str, Any] = {}
    for name, value in fields.items():
        for part in reversed(name.split(".")):
            value = {part: value}
        result = merge(result, value)
    return result


def _mapping(text: str, what: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        raise UserError(f"{what} is not valid YAML{line}: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{what} must be a mapping of field names to values")
    return values
