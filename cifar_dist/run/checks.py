"""What can be refused before torch is imported, which takes seconds: paths, recipes and plans that were typed."""

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cifar_dist.config.errors import UserError
from cifar_dist.config.options import (
    FIELDS_OF_WEIGHTS,
    BenchOptions,
    EvalOptions,
    ExportOptions,
    Options,
    PredictOptions,
    ReportOptions,
    TrainOptions,
    TuneOptions,
)
from cifar_dist.config.plan import KNOWN_SIZES, make_plan, num_held_out
from cifar_dist.config.recipe import DEFAULT_RECIPE, Recipe, read_recipe, resolve_recipe
from cifar_dist.config.schema import flatten
from cifar_dist.run.directory import RunDirectory, check_output, find_checkpoint, load_newest, verify
from cifar_dist.run.resolve import RunSpec, check_dataset_name, check_plan, resolve

EXPORT_PACKAGES = {".pth": (), ".safetensors": (), ".onnx": ("onnx", "onnxscript", "onnxruntime")}
"""The suffixes of formats that `export` writes, and the packages that each needs."""

FOR_SPEED: dict[str, Any] = {
    "validation_size": 0,
    "train_size": None,
    "early_stopping": {"enabled": False},
    "epochs": 1_000_000,
    "image_size_schedule": None,  # all loops see images of one size
    "freeze_epochs": 0,
}
"""Fields of the recipe whose loop `bench` measures: an endless run of equal steps."""


def check_before_torch(options: Options, *, world_size: int, machine_rank: int) -> RunSpec | None:
    """Raise UserError for what is known to be wrong. Return the run of `train` if it has something to do."""
    if isinstance(options, TrainOptions):
        return check_training(options, world_size=world_size, machine_rank=machine_rank)
    if isinstance(options, TuneOptions):
        return check_tuning(options, world_size=world_size)
    if machine_rank > 0:  # the first machine alone reads and writes
        return None
    if isinstance(options, EvalOptions):
        check_evaluation(options)
        if options.dataset is not None and options.dataset not in KNOWN_SIZES:
            from cifar_dist.data.folder import list_folder

            list_folder(Path(options.dataset), for_training=False)
    elif isinstance(options, PredictOptions):
        from cifar_dist.data.folder import find_images

        check_output("--json", options.json, options.checkpoint, options.recipe, options.config)
        _check_weights(options)
        find_images(options.images)
    elif isinstance(options, ExportOptions):
        _check_export(options)
    elif isinstance(options, ReportOptions):
        from cifar_dist.run.study import is_study

        for path in options.run_dirs:
            if is_study(path):
                check_packages("report", ["optuna"])
                if len(options.run_dirs) > 1:
                    raise UserError(f"{path} is a study, which is reported alone: name no other folder")
            elif not RunDirectory(path).holds_run:
                raise UserError(f"there is no run in {path}: name the folder that holds its summary.json")
    elif isinstance(options, BenchOptions):
        check_output("--json", options.json, options.recipe, options.config)
        make_plan(recipe_for_speed(options), world_size=world_size, sizes=KNOWN_SIZES["cifar10"], device_type="cpu")
    return None


def check_evaluation(options: EvalOptions) -> None:
    """Raise UserError for a path or name of `eval` that cannot be used."""
    check_output("--json", options.json, options.checkpoint, options.recipe, options.config)
    if options.figures is not None and options.figures.exists() and not options.figures.is_dir():
        raise UserError(f"--figures {options.figures} is a file: name a folder")
    _check_weights(options)
    if options.dataset is not None:
        check_dataset_name(options.dataset)


def recipe_for_speed(options: BenchOptions) -> Recipe:
    """Return the recipe whose training loop is measured. Raises UserError."""
    return resolve_recipe(read_recipe(options.recipe, flatten(options.assignments)), FOR_SPEED, options.assignments)


def check_training(options: TrainOptions, *, world_size: int, machine_rank: int = 0) -> RunSpec | None:
    """Return the run if it has something to do. Raises UserError for a mistake that needs neither torch nor archives.

    Other machines than the first do not check a new run's directory: the first may have created it already. They
    return None if they cannot see the run directory to resume.
    """
    if machine_rank > 0 and not options.resume:
        options = replace(options, run_dir=None)
    elif machine_rank > 0 and not RunDirectory(options.resume_dir or options.run_dir or Path()).config.exists():
        return None
    spec = resolve(options)
    check_plan(spec, world_size=world_size)
    pretrained = spec.recipe.pretrained
    if spec.stored is None and machine_rank == 0 and pretrained not in (None, "imagenet"):
        verify(Path(pretrained))
    if spec.stored is not None and spec.directory is not None and not options.dry_run:
        run = RunDirectory(spec.directory)
        if run.finished(spec.recipe.epochs) is not None:
            return None
        load_newest(run, verify)
    if spec.dataset not in KNOWN_SIZES:
        from cifar_dist.data.folder import check_memory, folder_sizes

        sizes = folder_sizes(Path(spec.dataset))
        check_plan(spec, world_size=world_size, sizes=sizes)
        check_memory(sizes.num_train + sizes.num_test + sizes.num_validation, spec.recipe.image_size)
    return spec


def check_tuning(options: TuneOptions, *, world_size: int) -> RunSpec:
    """Return the training that the trials vary. Raises UserError."""
    if options.lr_range:
        spec = resolve(options.as_training())
    else:
        from cifar_dist.run.study import resolve_study

        check_packages("tune", ["optuna", *(["scipy"] if options.sampler == "gp" else [])])
        _, _, spec = resolve_study(options)
    check_plan(spec, world_size=world_size)
    sizes = KNOWN_SIZES.get(spec.dataset)
    if sizes is None:
        from cifar_dist.data.folder import folder_sizes

        sizes = folder_sizes(Path(spec.dataset))
        check_plan(spec, world_size=world_size, sizes=sizes)
    if num_held_out(spec.recipe, sizes) == 0 and not options.lr_range:
        raise UserError(
            "tune compares trials on validation images, and none is held out: --set validation_size=N (auto needs 500"
            " training images)"
        )
    return spec


def check_packages(what: str, packages: Sequence[str]) -> None:
    """Raise UserError, with the command that installs them, if one of the packages is missing."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{what} needs the package {package}: pip install {' '.join(packages)}")


def _check_weights(options: EvalOptions | PredictOptions | ExportOptions) -> None:
    find_checkpoint(options.checkpoint)
    typed = flatten(options.assignments)
    if others := [name for name in typed if name.partition(".")[0] not in FIELDS_OF_WEIGHTS]:
        raise UserError(f"--set {others[0]} concerns a training: here it takes {', '.join(FIELDS_OF_WEIGHTS)}")
    if options.recipe is not None or typed:
        resolve_recipe(read_recipe(options.recipe or DEFAULT_RECIPE, typed), options.assignments)


def _check_export(options: ExportOptions) -> None:
    out, kind = options.out, options.out.suffix
    if kind not in EXPORT_PACKAGES:
        raise UserError(f"--out {out} must end in {', '.join(EXPORT_PACKAGES)}, not in '{kind}'")
    if out.exists():
        raise UserError(f"--out {out} exists already: name a new file")
    check_output("--out", out)
    check_packages(kind, EXPORT_PACKAGES[kind])
    _check_weights(options)
