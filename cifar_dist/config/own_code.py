"""Functions of your own, named `package.module:function` or `file.py:function`.

Only a command line, a Python call or a recipe file of yours may name one. The name in a file of a run imports nothing.
"""

import functools
import hashlib
import importlib
import importlib.util
import inspect
import re
import shlex
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cifar_dist.config.errors import UserError
from cifar_dist.config.schema import nearest

OWN_CODE_FIELDS = ("model", "augmentation.custom")
"""Recipe fields that may name a function."""

_REGISTERED: dict[str, Callable[..., Any]] = {}


def is_own_code(name: object) -> bool:
    """Return whether the name is that of a function of your own, and not of this package."""
    return isinstance(name, str) and ":" in name


def register(function: Callable[..., Any]) -> str:
    """Make a function known to this process, for `train(model=function)`. Return its name. Raises UserError.

    A `functools.partial` has the name of its function.
    """
    named = _function_of(function)
    if not hasattr(named, "__qualname__"):
        raise UserError(f"model is {type(named).__name__}: pass a name, or a function that returns the network")
    name = f"{named.__module__}:{named.__qualname__}"
    _REGISTERED[name] = function
    return name


def load_function(name: str) -> Callable[..., Any]:
    """Import the function `package.module:function` or `file.py:function`. Raises UserError."""
    if name in _REGISTERED:
        return _REGISTERED[name]
    path, attribute = _split(name)
    try:
        absolute = str(Path(path).absolute()) if path.endswith(".py") else path
        module = _import(absolute, source_hash(name))
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # of the user's module
        raise UserError(f"cannot import {path}: {type(error).__name__}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        own = (each for each in vars(module).values() if getattr(each, "__module__", None) == module.__name__)
        names = [each.__name__ for each in own if callable(each) and hasattr(each, "__name__")]
        there = f" (functions: {', '.join(names)})" if names else ""
        raise UserError(f"{path} has no function '{attribute}'{nearest(attribute, names)}{there}")
    return function


def load_functions(recipe: Mapping[str, Any]) -> None:
    """Import each function that a recipe (with dotted names) uses. Raises UserError."""
    for field in OWN_CODE_FIELDS:
        if is_own_code(recipe.get(field)):
            load_function(recipe[field])


def source_hash(name: str) -> str:
    """Return the SHA-256 of the file that defines a function (of its source, for a registered one). Raises UserError.

    Files that this one imports do not count. The arguments of a `functools.partial` do, as Python prints them.
    """
    if name in _REGISTERED:
        function = _REGISTERED[name]
        try:
            source = inspect.getsource(_function_of(function))
        except (OSError, TypeError):
            return "unknown"  # typed into an interactive Python
        bound = f"{function.args} {function.keywords}" if isinstance(function, functools.partial) else ""
        bound = re.sub(r" at 0x[0-9a-f]+", "", bound)  # of a function: its address differs in every process
        return hashlib.sha256((source + bound).encode()).hexdigest()
    path, _ = _split(name)
    file = _file_of(path)
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None


def own_sources(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Return `source_hash` of each function that a recipe (with dotted names) uses, by field. Raises UserError."""
    return {field: source_hash(recipe[field]) for field in OWN_CODE_FIELDS if is_own_code(recipe.get(field))}


def words_to_type(recipe: Mapping[str, Any]) -> list[str]:
    """Return the arguments that name a recipe's functions (of the user) again; the recipe has dotted names."""
    words = [f"{field}={recipe[field]}" for field in OWN_CODE_FIELDS if is_own_code(recipe.get(field))]
    return ["--set", *words] if words else []


def refuse_untyped_code(stored: Mapping[str, Any], typed: Mapping[str, Any], where: str) -> None:
    """Raise UserError if a run's file names a function that the user has not typed again. Both have dotted names."""
    for field in OWN_CODE_FIELDS:
        if is_own_code(stored.get(field)) and field not in typed:
            what = "network" if field == "model" else "augmentation"
            raise UserError(
                f"{where} needs the code of its {what}: add --set {shlex.quote(f'{field}={stored[field]}')}"
            )


def _function_of(function: Callable[..., Any]) -> Callable[..., Any]:
    return function.func if isinstance(function, functools.partial) else function


def _split(name: str) -> tuple[str, str]:
    path, _, attribute = name.rpartition(":")
    if not path or not attribute.isidentifier():
        raise UserError(f"'{name}' names no function: type file.py:function or package.module:function")
    return path, attribute


def _file_of(path: str) -> Path:
    if path.endswith(".py"):
        return Path(path)
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as with `python -m`
    try:
        spec = importlib.util.find_spec(path)
    except Exception as error:  # of a parent package
        raise UserError(f"cannot import {path}: {type(error).__name__}: {error}") from error
    if spec is None:
        raise UserError(f"there is no Python module {path}: start where it lies, or type file.py:function")
    if spec.origin is None or not spec.origin.endswith(".py"):
        raise UserError(f"module {path} has no Python source: type file.py:function or package.module:function")
    return Path(spec.origin)


@functools.cache
def _import(path: str, digest: str) -> Any:
    """Import a file or a module. `digest` makes a changed file a new import."""
    if not path.endswith(".py"):
        return importlib.import_module(path)
    file = Path(path)
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))  # for the modules beside it
    module = types.ModuleType(f"{file.stem}_{digest[:8]}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # for dataclasses and pickle
    # Not by an import loader: its bytecode cache may be that of another source of the same size and second.
    exec(compile(file.read_bytes(), file, "exec"), vars(module))
    return module
