"""Resolve what one training run is: command-line values over a stored run over the recipe. Imports no torch."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from cifar_dist.config.errors import UserError
from cifar_dist.config.options import TrainOptions, check_trackers
from cifar_dist.config.own_code import refuse_untyped_code
from cifar_dist.config.plan import KNOWN_SIZES, DatasetSizes, fit_to_dataset, make_plan
from cifar_dist.config.recipe import (
    DEFAULT_RECIPE,
    Recipe,
    network_label,
    read_recipe,
    recipe_label,
    recipe_to_mapping,
    resolve_recipe,
)
from cifar_dist.config.schema import flatten, nearest
from cifar_dist.config.world import SlurmJob
from cifar_dist.run.directory import RunDirectory, numbered_names
from cifar_dist.run.results import RunMetadata, stored_threads

DEFAULT_DATASET, DEFAULT_DATA_DIR = "cifar10", Path("data")
DEFAULT_RUNS = Path("runs")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSpec:
    """All that the user asked for in one training run. Later code reads this and not the flags."""

    recipe: Recipe
    recipe_name: str
    other_model: str | None
    """The network if it is not the recipe's own."""
    dataset: str
    """A dataset's name, or the absolute path of a folder."""
    data_dir: Path
    """Absolute."""
    directory: Path | None
    """None for a new run without `--run-dir`: `default_directory`, numbered if it exists."""
    stored: RunMetadata | None
    """The metadata of the run that is resumed; None for a new run."""
    requested_precision: str | None
    trackers: tuple[str, ...]
    checkpoint_every_minutes: float | None
    checkpoint_every_steps: int | None
    slurm_job: str | None

    @property
    def default_directory(self) -> Path:
        """`runs/RECIPE-DATASET-seedN`, or `runs/RECIPE-NETWORK-DATASET-seedN` for a network that the user typed."""
        network = [] if self.other_model is None else [network_label(self.other_model)]
        return DEFAULT_RUNS / "-".join([self.recipe_name, *network, Path(self.dataset).name, f"seed{self.recipe.seed}"])

    def compute_settings(self, world_size: int) -> dict[str, Any]:
        """Return the arguments of `choose_compute` and `start` that this run determines."""
        return {
            "requested_precision": self.requested_precision,
            "num_threads": stored_threads(self.stored, world_size),
            "micro_batches": self.recipe.gradient_accumulation_steps,
        }


def resolve(options: TrainOptions, job: SlurmJob | None = None) -> RunSpec:
    """Resolve the run that was asked for, or that the Slurm job began before it was requeued.

    Raises UserError; changes nothing on disk.
    """
    run = _find_run(options)
    stored = None if run is None else run.read_metadata()

    def stored_value(name: str) -> Any:
        return None if stored is None else getattr(stored, name)

    name, base = _base_recipe(options, run, stored)
    recipe = resolve_recipe(base, options.recipe_flags, options.assignments)
    if stored is not None and recipe.validation_size == "auto":
        recipe = replace(recipe, validation_size=stored.recipe.validation_size)
    if stored is not None and options.budget is not None:  # planned when the run began
        planned = {name: getattr(stored.recipe, name) for name in ("epochs", "image_size_schedule")}
        recipe = replace(recipe, **planned)
    dataset = options.dataset or (recipe.dataset or DEFAULT_DATASET if stored is None else stored.dataset.name)
    if dataset not in KNOWN_SIZES and Path(dataset).is_dir():  # a resumed run finds it from anywhere
        dataset = str(Path(dataset).absolute())
    data_dir = options.data_dir or (DEFAULT_DATA_DIR if stored is None else Path(stored.dataset.data_dir))
    spec = RunSpec(
        recipe=recipe,
        recipe_name=name,
        other_model=recipe.model if recipe.model != base.get("model", recipe.model) else None,
        dataset=dataset,
        data_dir=data_dir.absolute(),
        directory=options.run_dir if run is None else run.path,
        stored=stored,
        requested_precision=options.precision or stored_value("precision"),
        trackers=tuple(dict.fromkeys(options.trackers or stored_value("trackers") or ())),
        checkpoint_every_minutes=options.checkpoint_every_minutes or stored_value("checkpoint_every_minutes"),
        checkpoint_every_steps=options.checkpoint_every_steps or stored_value("checkpoint_every_steps"),
        slurm_job=None if job is None else job.name,
    )
    check_trackers(spec.trackers)
    if stored is not None:
        stored.refuse_other_recipe(spec.recipe, spec.dataset)
    check_dataset_name(spec.dataset)
    if stored is None and options.run_dir is None and job is not None and job.restarts > 0:
        return _find_run_of_job(options, spec.default_directory, job.name) or spec
    return spec


def check_plan(spec: RunSpec, *, world_size: int, sizes: DatasetSizes | None = None) -> None:
    """Raise UserError if no plan can be made; `sizes` are those of a folder, which may not be known yet."""
    sizes = sizes or KNOWN_SIZES.get(spec.dataset)
    if sizes is not None:
        make_plan(fit_to_dataset(spec.recipe, sizes), world_size=world_size, sizes=sizes, device_type="cpu")


def check_dataset_name(name: str) -> None:
    """Raise UserError if there is neither a dataset nor a folder of this name."""
    if Path(name).is_absolute() and not Path(name).is_dir():  # as a run stores it
        raise UserError(f"the dataset's folder {name} is not there: name its place with --dataset")
    if name not in KNOWN_SIZES and not Path(name).is_dir():
        folders: list[str] = []
        with suppress(OSError, ValueError):  # no such folder, or a name that no file may have
            folders = [str(each) for each in Path(name).parent.iterdir() if each.is_dir()]
        raise UserError(
            f"there is no dataset or folder '{name}'{nearest(name, [*folders, *KNOWN_SIZES])}"
            f" (datasets: {', '.join(KNOWN_SIZES)}, or a folder of class folders)"
        )


def seconds_allowed(max_minutes: float | None, environ: Mapping[str, str], now: float) -> float | None:
    """Return how long a run may train from `now` (seconds since 1970): `--max-minutes`, and the Slurm job's end.

    A minute is left for the step in progress and the checkpoint. None if there is no limit.
    """
    end = environ.get("SLURM_JOB_END_TIME", "")
    limits = [60 * max_minutes] if max_minutes is not None else []
    limits += [max(0.0, int(end) - now - 60)] if end.isdecimal() and "SLURM_STEP_ID" in environ else []
    return min(limits, default=None)


def _base_recipe(
    options: TrainOptions, run: RunDirectory | None, stored: RunMetadata | None
) -> tuple[str, dict[str, Any]]:
    """Return the recipe's name, and its fields before the flags."""
    typed = flatten(options.assignments)
    if isinstance(options.recipe, Recipe):
        return "recipe", {**recipe_to_mapping(options.recipe), "dataset": options.recipe.dataset}
    if options.recipe is None and run is not None and stored is not None:
        values = recipe_to_mapping(stored.recipe)
        refuse_untyped_code(flatten(values), typed, f"{run.config}")
        return stored.recipe_name, values
    name = options.recipe or DEFAULT_RECIPE
    return recipe_label(name), read_recipe(name, typed)


def _find_run(options: TrainOptions) -> RunDirectory | None:
    """Return the run to resume; None for a new one.

    Raises UserError if there is none to resume, or if a run is in the way of a new one.
    """
    path = options.resume_dir or options.run_dir
    if path is None:
        if options.resume:
            raise UserError("--resume needs to know the run: type --resume DIR, or --run-dir DIR --resume")
        return None
    run = RunDirectory(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"the run directory {path} is a file: name a folder")
    if options.resume_dir is not None and not run.holds_run:
        raise UserError(f"there is no run in {path} to resume")
    if run.holds_run and not options.resume:
        raise UserError(f"{path} holds a run already: add --resume to resume it, or name another --run-dir")
    if not run.holds_run and (file := run.find_foreign_file()) is not None:
        raise UserError(f"{path} is no run, and a run would overwrite {file}: name another --run-dir")
    return run if run.holds_run else None


def _find_run_of_job(options: TrainOptions, path: Path, job: str) -> RunSpec | None:
    """Return the run at `path`, or at a numbered one, that a Slurm job began before it was requeued."""
    for candidate in takewhile(Path.exists, numbered_names(path)):
        with suppress(UserError):  # another run, damaged, or of another recipe that the job trained in turn
            if RunDirectory(candidate).read_config().get("slurm_job") == job:
                return resolve(replace(options, resume=True, resume_dir=candidate))
    return None
