"""Where a recipe comes from: a name or a file, then the flags that were typed, then `--set`."""

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from cifar_dist.config.errors import UserError
from cifar_dist.config.parsing import flatten, merge, nearest

_RECIPES = resources.files("cifar_dist.config") / "recipes"


# In YAML 1.1 010 is the octal 8 and 1:30 is 90 in base 60. They stay text, which is a number where a field wants one.
_NO_NUMBER = ("tag:yaml.org,2002:str", re.compile(r"[-+]?(0[0-9_xb]|[0-9_]+:)"))


class _Loader(yaml.SafeLoader):
    """YAML with decimal numbers and no key twice; PyYAML reads octal ones, and takes the last of equal keys."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own attribute
        first: [_NO_NUMBER, *resolvers] for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Raise YAMLError that names key and line if a key stands twice."""
        node, seen = super().compose_mapping_node(anchor), list[str]()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key '{key.value}' stands twice", problem_mark=key.start_mark)
            seen.append(key.value)
        return node


def recipe_names() -> list[str]:
    """Give the names of the recipes in the package, in alphabetical order."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _RECIPES.iterdir() if entry.name.endswith(".yaml"))


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """Read a YAML file that must hold a mapping. Raises UserError that names the file and, where known, the line."""
    if path.is_fifo():  # of `<(...)`: other processes and a resumed run need it again
        raise UserError(f"{what} {path} is a pipe, which can be read only once: name a file")
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
    if not (path.is_file() or path.is_fifo()):
        if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
            raise UserError(f"recipe file {path} does not exist")
        names = recipe_names()
        raise UserError(f"unknown recipe '{name_or_file}'{nearest(name_or_file, names)} (recipes: {', '.join(names)})")
    values = read_yaml(path, "recipe file")
    if not isinstance(values.get("recipe"), Mapping):
        return nested(values)
    if beside := sorted(values.keys() & read_recipe("standard").keys()):
        raise UserError(f"recipe file {path} holds a whole recipe under 'recipe', and beside it {', '.join(beside)}")
    return nested(values["recipe"])


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
            value = yaml.load(text, _Loader)
        except (yaml.YAMLError, ValueError) as error:
            problem = f" ({error.problem})" if isinstance(error, yaml.MarkedYAMLError) else ""
            raise UserError(f"--set {name.strip()}: '{text}' is not a YAML value{problem}") from None
        result = merge(result, nested({name.strip(): value}))
    return result


def nested(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Turn names with dots into mappings in mappings. Raises UserError if a field stands in both forms."""
    result: dict[str, Any] = {}
    for name, value in fields.items():
        for part in reversed(str(name).split(".")):
            value = {part: value}
        if twice := flatten(result).keys() & flatten(value).keys():
            raise UserError(f"recipe field '{min(twice)}' stands twice")
        result = merge(result, value)
    return result


def _mapping(text: str, what: str) -> dict[str, Any]:
    try:
        values = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        raise UserError(f"{what} is not valid YAML{line}: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{what} must be a mapping of field names to values")
    return values
