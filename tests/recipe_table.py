"""Write the table of the recipe's fields in docs/recipes.md from the dataclasses: `python -m tests.recipe_table`."""

import ast
import dataclasses
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from cifar_dist.config import recipe
from cifar_dist.config.recipe import Recipe, read_recipe
from cifar_dist.config.schema import flatten

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
BEGIN, END = "<!-- fields: python -m tests.recipe_table -->\n", "<!-- end of fields -->\n"
HEADER = "| field | values | `standard` | what it does |\n|---|---|---|---|\n"
_NAMES = {bool: "true, false", int: "integer", float: "number", str: "text", type(None): "null"}


def table() -> str:
    """Return the table in Markdown, one row a field."""
    documentation, defaults = read_docstrings(), flatten(read_recipe("standard"))
    rows = []
    for section, cls in [("", Recipe), *((f"{each.name}.", each.type) for each in dataclasses.fields(Recipe))]:
        hints = typing.get_type_hints(cls, include_extras=True) if dataclasses.is_dataclass(cls) else {}
        for name, hint in hints.items():
            if not dataclasses.is_dataclass(hint):
                default = yaml.safe_dump(defaults.get(section + name), default_flow_style=True).split("\n")[0]
                cells = (f"`{section}{name}`", values(hint), f"`{default}`", documentation[cls.__name__, name])
                rows.append(" | ".join(cell.replace("|", r"\|") for cell in cells))
    return HEADER + "".join(f"| {row} |\n" for row in rows)


def read_docstrings() -> dict[tuple[str, str], str]:
    """Return what stands below each field of a class in config/recipe.py, as one line."""
    found = {}
    for cls in ast.parse(Path(recipe.__file__).read_text(encoding="utf-8")).body:
        for field, below in zip(getattr(cls, "body", []), getattr(cls, "body", [])[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                found[cls.name, field.target.id] = " ".join(below.value.value.split())
    return found


def values(hint: Any) -> str:
    """Return in words what a field may be."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{each}`" for each in arguments)
    if origin is Annotated:
        kind, allowed = values(arguments[0]), " ".join(check.allowed for check in arguments[1:])
        if typing.get_origin(arguments[0]) is tuple:
            return kind
        return allowed if "or null" in allowed else f"{kind} {allowed}"
    if origin in (typing.Union, types.UnionType):
        texts = [values(each) for each in arguments]
        return next((text for text in texts if "or null" in text), ", ".join(texts))  # it describes them all
    if origin is tuple:
        return "list" if ... in arguments else f"{len(arguments)} numbers"
    return _NAMES[hint]


def with_table(page: str) -> str:
    """Return the page with today's table between the marks."""
    return re.sub(f"(?s)(?<={re.escape(BEGIN)}).*(?={re.escape(END)})", lambda _: table(), page)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
