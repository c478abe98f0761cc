"""What a training run was asked to be: what was typed, over what the run being resumed was, over the defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cifar_dist.config.errors import UserError
from cifar_dist.config.options import TrainOptions, check_trackers
from cifar_dist.config.plan import KNOWN_SIZES, DatasetSizes, fit_to_dataset, make_plan
from cifar_dist.config.recipe import Recipe, read_recipe, recipe_label, recipe_to_mapping, resolve_recipe
from cifar_dist.config.schema import flatten, nearest
from cifar_dist.config.world import SlurmJob
from cifar_dist.run.run_files import RunFiles, find_run, find_run_of_job, verify

DEFAULT_RECIPE, DEFAULT_DATASET, DEFAULT_DATA_DIR = "standard", "cifar10", Path("data")
DEFAULT_RUNS = Path("runs")

# What may change between a run and its resumption.
_MAY_CHANGE = frozenset({"epochs"})


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainRequest:
    """A run's experiment and data."""

    recipe: Recipe
    recipe_name: str
    dataset: str
    data_dir: Path
    """Absolute."""
    trackers: tuple[str, ...]

    @property
    def label(self) -> str:
        """The default name of the run's folder."""
        return f"{self.recipe_name}-{Path(self.dataset).name}-seed{self.recipe.seed}"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRequest:
    """A request, and the run that it goes on with."""

    request: TrainRequest
    existing: RunFiles | None
    """None for a new run."""
    stored: Mapping[str, Any]
    """The existing run's config.yaml: what was not typed comes from there. Empty for a new run."""


def resolve_run(options: TrainOptions, job: SlurmJob | None = None) -> RunRequest:
    """Resolve what was typed, beside the run that it names, or that the Slurm job began before it was requeued.

    Raises UserError; nothing on disk is changed.
    """
    existing = find_run(run_dir=options.run_dir, resume=options.resume, resume_dir=options.resume_dir)
    stored = {} if existing is None else existing.read_config()
    if existing is not None:
        resolve_stored_recipe(stored, f"run configuration {existing.config}")
    request = resolve_request(options, stored)
    check_dataset_name(request.dataset)
    if existing is None and options.run_dir is None and job is not None and job.restarts > 0:
        own = find_run_of_job(DEFAULT_RUNS / request.label, job.name)
        if own is not None:
            return resolve_run(replace(options, resume=True, resume_dir=own.path))
    return RunRequest(request=request, existing=existing, stored=stored)


def check_before_launch(options: TrainOptions, *, world_size: int, machine_rank: int = 0) -> TrainRequest | None:
    """Check what needs neither torch nor the data before either is loaded; return the request. Raises UserError.

    On another machine than the first a new run's directory is not looked at (the first may have made it by now), and
    of a run that goes on nothing is known where its directory is not there: None.
    """
    if machine_rank > 0 and not options.resume:
        options = replace(options, run_dir=None)
    elif machine_rank > 0:
        path = options.resume_dir or options.run_dir
        if path is None or not RunFiles(path).config.exists():
            return None
    run = resolve_run(options)
    check_plan(run.request, world_size=world_size)
    pretrained = run.request.recipe.pretrained
    if run.existing is None and machine_rank == 0 and pretrained not in (None, "imagenet"):
        verify(Path(pretrained))
    return run.request


def computed_with(about: Mapping[str, Any], typed_precision: str | None, world_size: int) -> dict[str, Any]:
    """Give `typed_precision` and `num_threads`: as typed, else as what is gone on with was computed (`about`).

    The number of threads counts in a world of the same size alone: with both, its bits come again.
    """
    same_world = about.get("world_size") == world_size
    return {
        "typed_precision": typed_precision or about.get("precision"),
        "num_threads": about.get("num_threads") if same_world else None,
    }


def seconds_allowed(max_minutes: float | None, environ: Mapping[str, str], now: float) -> float | None:
    """Give how long a run may train from `now` (seconds since 1970): what was typed, and Slurm's end of the job.

    A minute is left for the step in progress and the checkpoint. None: no end is known.
    """
    end = environ.get("SLURM_JOB_END_TIME", "")
    limits = [60 * max_minutes] if max_minutes is not None else []
    limits += [max(0.0, int(end) - now - 60)] if end.isdecimal() and "SLURM_STEP_ID" in environ else []
    return min(limits, default=None)


def check_plan(request: TrainRequest, *, world_size: int, sizes: DatasetSizes | None = None) -> None:
    """Raise UserError if no plan can be made; `sizes` are those of a folder, which may not be known yet."""
    sizes = sizes or KNOWN_SIZES.get(request.dataset)
    if sizes is not None:
        make_plan(fit_to_dataset(request.recipe, sizes), world_size=world_size, sizes=sizes, device_type="cpu")


def check_dataset_name(name: str) -> None:
    """Raise UserError where there is neither a dataset nor a folder of this name."""
    if Path(name).is_absolute() and not Path(name).is_dir():  # as a run knows it
        raise UserError(f"the dataset's folder {name} is not there: name its place with --dataset")
    if name not in KNOWN_SIZES and not Path(name).is_dir():
        known = ", ".join(KNOWN_SIZES)
        raise UserError(
            f"unknown dataset '{name}'{nearest(name, KNOWN_SIZES)} (datasets: {known}, or a folder of class folders)"
        )


def resolve_request(options: TrainOptions, stored: Mapping[str, Any]) -> TrainRequest:
    """Resolve what was typed; `stored` is the config.yaml of the run being resumed, empty for a new run.

    Raises UserError, also where a resumed run is asked to become another one: each field that differs is named.
    """
    data = stored.get("dataset", {})
    if isinstance(options.recipe, Recipe):
        name, base = "recipe", recipe_to_mapping(options.recipe)
    elif options.recipe is not None or not stored:
        name, base = recipe_label(options.recipe or DEFAULT_RECIPE), read_recipe(options.recipe or DEFAULT_RECIPE)
    else:
        name, base = str(stored.get("recipe_name", "recipe")), dict(stored["recipe"])
    recipe = resolve_recipe(base, options.recipe_flags, options.assignments)
    if stored and recipe.validation_size == "auto":  # the number is known by now
        recipe = resolve_recipe(recipe_to_mapping(recipe), {"validation_size": stored["recipe"]["validation_size"]})
    data_dir = options.data_dir or Path(data.get("data_dir", DEFAULT_DATA_DIR))
    trackers = tuple(dict.fromkeys(options.trackers or stored.get("trackers") or ()))
    check_trackers(trackers)
    request = TrainRequest(
        trackers=trackers,
        recipe=recipe,
        recipe_name=name,
        dataset=_absolute_folder(options.dataset or str(data.get("name", DEFAULT_DATASET))),
        data_dir=data_dir.absolute(),
    )
    if stored:
        refuse_other_recipe(request, stored)
    return request


def resolve_stored_recipe(about: Mapping[str, Any], where: str) -> Recipe:
    """Give the recipe that a run's own words hold. Raises UserError that says where they are."""
    try:
        return resolve_recipe(about["recipe"])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _absolute_folder(dataset: str) -> str:
    """Give a folder by its absolute path, so that a resumed run finds it from anywhere; a name stays a name."""
    return dataset if dataset in KNOWN_SIZES or not Path(dataset).is_dir() else str(Path(dataset).absolute())


def refuse_other_recipe(request: TrainRequest, then: Mapping[str, Any]) -> None:
    """Raise UserError, naming each field, where a run that goes on would become another one.

    `then` is what its config.yaml or a checkpoint says of it. A folder may have moved: its content is compared later.
    """
    stored = resolve_stored_recipe(then, "the run")
    old, new = (flatten(recipe_to_mapping(recipe)) for recipe in (stored, request.recipe))
    fields = [field for field in sorted(new.keys() | old.keys()) if field not in _MAY_CHANGE]
    changed = [f"{field} {old.get(field)} -> {new.get(field)}" for field in fields if old.get(field) != new.get(field)]
    names = str(then["dataset"]["name"]), request.dataset
    if names[0] != names[1] and not KNOWN_SIZES.keys().isdisjoint(names):
        changed.insert(0, f"dataset {names[0]} -> {names[1]}")  # of many the first are named
    _refuse(changed)


def refuse_other_data(now: Mapping[str, Any], then: Mapping[str, Any]) -> None:
    """Raise UserError where the data that was read is not what a run began with; both are what its files say of it."""
    changed = []
    old, new = list(then["class_names"]), list(now["class_names"])
    if len(old) != len(new):
        changed.append(f"number of classes {len(old)} -> {len(new)}")
    elif old != new:
        changed.append("names of classes " + ", ".join(f"{a} -> {b}" for a, b in zip(old, new, strict=True) if a != b))
    elif then["dataset"]["fingerprint"] != now["dataset"]["fingerprint"]:
        changed.append(f"content of the dataset {now['dataset']['name']}")
    _refuse(changed)


def _refuse(changed: list[str]) -> None:
    if changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        what = f"this differs: {', '.join(changed[:5])}{more}"
        raise UserError(f"a resumed run stays what it was, and {what}; type a new --run-dir")
