"""What can be refused before torch is imported, which takes seconds: paths, recipes and plans that were typed."""

import importlib.util
from pathlib import Path
from typing import Any

from cifar_dist.config.errors import UserError
from cifar_dist.config.options import (
    BenchOptions,
    DoctorOptions,
    EvalOptions,
    ExportOptions,
    Options,
    PredictOptions,
    ReportOptions,
)
from cifar_dist.config.plan import KNOWN_SIZES, make_plan
from cifar_dist.config.recipe import Recipe, read_recipe, resolve_recipe
from cifar_dist.run.directory import RunDirectory, check_json, check_output, find_checkpoint
from cifar_dist.run.resolve import check_dataset_name

EXPORT_PACKAGES = {".pth": (), ".safetensors": (), ".onnx": ("onnx", "onnxscript", "onnxruntime")}
"""The suffixes of formats that `export` writes, and the packages that each needs."""

FOR_SPEED: dict[str, Any] = {
    "validation_size": 0,
    "early_stopping": {"enabled": False},
    "epochs": 1_000_000,
    "image_size_schedule": None,  # all loops see images of one size
    "freeze_epochs": 0,
}
"""Fields of a recipe whose loop `bench` measures: an endless run of equal steps."""


def check_options(options: Options, *, world_size: int) -> None:
    """Check the options of a command other than `train`. Raises UserError."""
    if isinstance(options, EvalOptions):
        check_evaluation(options)
    elif isinstance(options, PredictOptions):
        check_json(options.json, options.checkpoint, options.recipe, options.config)
        _check_weights(options.checkpoint, options.recipe)
    elif isinstance(options, ExportOptions):
        _check_export(options)
    elif isinstance(options, ReportOptions):
        for path in options.run_dirs:
            if not RunDirectory(path).holds_run:
                raise UserError(f"there is no run in {path}: name the folder that holds its summary.json")
    elif isinstance(options, BenchOptions):
        check_json(options.json, options.recipe, options.config)
        make_plan(recipe_for_speed(options), world_size=world_size, sizes=KNOWN_SIZES["cifar10"], device_type="cpu")
    elif isinstance(options, DoctorOptions) and options.recipe is not None:
        resolve_recipe(read_recipe(options.recipe))


def check_evaluation(options: EvalOptions) -> None:
    """Check the paths and names that were typed for `eval`. Raises UserError."""
    check_json(options.json, options.checkpoint, options.recipe, options.config)
    if options.figures is not None and options.figures.exists() and not options.figures.is_dir():
        raise UserError(f"--figures {options.figures} is a file: name a folder")
    _check_weights(options.checkpoint, options.recipe)
    if options.dataset is not None:
        check_dataset_name(options.dataset)


def recipe_for_speed(options: BenchOptions) -> Recipe:
    """Return the recipe whose training loop is measured. Raises UserError."""
    return resolve_recipe(read_recipe(options.recipe), FOR_SPEED, options.assignments)


def _check_weights(checkpoint: Path, recipe: str | None) -> None:
    find_checkpoint(checkpoint)
    if recipe is not None:
        resolve_recipe(read_recipe(recipe))


def _check_export(options: ExportOptions) -> None:
    out, kind = options.out, options.out.suffix
    if kind not in EXPORT_PACKAGES:
        raise UserError(f"--out {out} must end in {', '.join(EXPORT_PACKAGES)}, not in '{kind}'")
    if out.exists():
        raise UserError(f"--out {out} exists already: name a new file")
    check_output("--out", out)
    for package in EXPORT_PACKAGES[kind]:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{kind} needs the package {package}: pip install {' '.join(EXPORT_PACKAGES[kind])}")
    _check_weights(options.checkpoint, options.recipe)
