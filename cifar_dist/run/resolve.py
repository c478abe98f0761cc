"""Resolve what one training run is: command-line values over a stored run over the defaults. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from cifar_dist.config.errors import UserError
from cifar_dist.config.options import TrainOptions, check_trackers
from cifar_dist.config.plan import KNOWN_SIZES, DatasetSizes, fit_to_dataset, make_plan
from cifar_dist.config.recipe import Recipe, read_recipe, recipe_label, recipe_to_mapping, resolve_recipe
from cifar_dist.config.schema import nearest
from cifar_dist.config.world import SlurmJob
from cifar_dist.run.directory import RunDirectory, numbered_names, verify
from cifar_dist.run.results import RunMetadata

DEFAULT_RECIPE, DEFAULT_DATASET, DEFAULT_DATA_DIR = "standard", "cifar10", Path("data")
DEFAULT_RUNS = Path("runs")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSpec:
    """One training run: the only carrier of what was asked for."""

    recipe: Recipe
    recipe_name: str
    dataset: str
    """A dataset's name, or the absolute path of a folder."""
    data_dir: Path
    """Absolute."""
    directory: Path | None
    """None for a new run without `--run-dir`: the first free one of `default_directories`."""
    stored: RunMetadata | None
    """The metadata of the run that is resumed; None for a new run."""
    requested_precision: str | None
    trackers: tuple[str, ...]
    checkpoint_every_minutes: float | None
    checkpoint_every_steps: int | None
    slurm_job: str | None

    @property
    def default_directory(self) -> Path:
        """Where a new run goes; numbered if it exists."""
        return DEFAULT_RUNS / f"{self.recipe_name}-{Path(self.dataset).name}-seed{self.recipe.seed}"

    def compute_settings(self, world_size: int) -> dict[str, Any]:
        """Return `requested_precision` and `num_threads`: the stored threads give the same bits in the same world."""
        same_world = self.stored is not None and self.stored.world_size == world_size
        return {
            "requested_precision": self.requested_precision,
            "num_threads": self.stored.num_threads if self.stored is not None and same_world else None,
        }


def resolve(options: TrainOptions, job: SlurmJob | None = None) -> RunSpec:
    """Resolve the run that was asked for, or that the Slurm job began before it was requeued.

    Raises UserError; changes nothing on disk.
    """
    run = _find_run(options)
    stored = None if run is None else run.read_metadata()
    spec = _resolve(options, run, stored, job)
    check_dataset_name(spec.dataset)
    if stored is None and options.run_dir is None and job is not None and job.restarts > 0:
        own = _find_run_of_job(spec.default_directory, job.name)
        if own is not None:
            return resolve(replace(options, resume=True, resume_dir=own.path))
    return spec


def check_before_launch(options: TrainOptions, *, world_size: int, machine_rank: int = 0) -> RunSpec | None:
    """Check what needs neither torch nor the data. Raises UserError.

    Another machine than the first ignores a new run's directory, which the first may have made by now. Return None
    if such a machine cannot see the run directory to resume.
    """
    if machine_rank > 0 and not options.resume:
        options = replace(options, run_dir=None)
    elif machine_rank > 0:
        path = options.resume_dir or options.run_dir
        if path is None or not RunDirectory(path).config.exists():
            return None
    spec = resolve(options)
    check_plan(spec, world_size=world_size)
    pretrained = spec.recipe.pretrained
    if spec.stored is None and machine_rank == 0 and pretrained not in (None, "imagenet"):
        verify(Path(pretrained))
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
        known = ", ".join(KNOWN_SIZES)
        raise UserError(
            f"unknown dataset '{name}'{nearest(name, KNOWN_SIZES)} (datasets: {known}, or a folder of class folders)"
        )


def seconds_allowed(max_minutes: float | None, environ: Mapping[str, str], now: float) -> float | None:
    """Return how long a run may train from `now` (seconds since 1970): `--max-minutes`, and the Slurm job's end.

    A minute is left for the step in progress and the checkpoint. None if there is no limit.
    """
    end = environ.get("SLURM_JOB_END_TIME", "")
    limits = [60 * max_minutes] if max_minutes is not None else []
    limits += [max(0.0, int(end) - now - 60)] if end.isdecimal() and "SLURM_STEP_ID" in environ else []
    return min(limits, default=None)


def _resolve(
    options: TrainOptions, run: RunDirectory | None, stored: RunMetadata | None, job: SlurmJob | None
) -> RunSpec:
    name, base = _base_recipe(options, stored)
    recipe = resolve_recipe(base, options.recipe_flags, options.assignments)
    if stored is not None and recipe.validation_size == "auto":
        recipe = replace(recipe, validation_size=stored.recipe.validation_size)
    trackers = options.trackers or (stored.trackers if stored is not None else ())
    check_trackers(trackers := tuple(dict.fromkeys(trackers)))
    default_dataset = stored.dataset.name if stored is not None else DEFAULT_DATASET
    default_data_dir = Path(stored.dataset.data_dir) if stored is not None else DEFAULT_DATA_DIR
    spec = RunSpec(
        recipe=recipe,
        recipe_name=name,
        dataset=_absolute_folder(options.dataset or default_dataset),
        data_dir=(options.data_dir or default_data_dir).absolute(),
        directory=options.run_dir if run is None else run.path,
        stored=stored,
        requested_precision=options.precision or (stored.precision if stored is not None else None),
        trackers=trackers,
        checkpoint_every_minutes=options.checkpoint_every_minutes
        or (stored.checkpoint_every_minutes if stored is not None else None),
        checkpoint_every_steps=options.checkpoint_every_steps
        or (stored.checkpoint_every_steps if stored is not None else None),
        slurm_job=None if job is None else job.name,
    )
    if stored is not None:
        stored.refuse_other_recipe(spec.recipe, spec.dataset)
    return spec


def _base_recipe(options: TrainOptions, stored: RunMetadata | None) -> tuple[str, dict[str, Any]]:
    """Return the recipe's name, and its fields before the flags."""
    if isinstance(options.recipe, Recipe):
        return "recipe", recipe_to_mapping(options.recipe)
    if options.recipe is None and stored is not None:
        return stored.recipe_name, recipe_to_mapping(stored.recipe)
    name = options.recipe or DEFAULT_RECIPE
    return recipe_label(name), read_recipe(name)


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
        raise UserError(f"{path} holds a run already: add --resume to go on with it, or name another --run-dir")
    if not run.holds_run and (file := run.find_foreign_file()) is not None:
        raise UserError(f"{path} is no run, and a run would overwrite {file}: name another --run-dir")
    return run if run.holds_run else None


def _find_run_of_job(path: Path, job: str) -> RunDirectory | None:
    """Return the run of this name, or of a numbered one, that a Slurm job began before it was requeued."""
    for candidate in takewhile(Path.exists, numbered_names(path)):
        try:
            run = RunDirectory(candidate)
            if run.read_config().get("slurm_job") == job:
                return run
        except UserError:  # another run, damaged
            continue
    return None


def _absolute_folder(dataset: str) -> str:
    """Return a folder as an absolute path, so that a resumed run finds it from anywhere."""
    return dataset if dataset in KNOWN_SIZES or not Path(dataset).is_dir() else str(Path(dataset).absolute())
