"""How a run opens: what was asked for becomes a run, its folder is locked, and what is known is written down.

A resumed run's way: `open_run` resolves what was typed over the run's own words (run/resolve.py), locks the folder
and loads its checkpoint; once data, model and plan are there, `begin_session` has the session restore the state.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cifar_dist.config.errors import UserError
from cifar_dist.config.files import writing
from cifar_dist.config.options import TrainOptions
from cifar_dist.config.provenance import git_commit, package_versions
from cifar_dist.config.recipe import Recipe, recipe_to_mapping
from cifar_dist.config.schema import flatten, to_mapping
from cifar_dist.config.world import SlurmJob, World
from cifar_dist.run.checkpoint import load_checkpoint, refusing_foreign_content
from cifar_dist.run.directory import RunDirectory
from cifar_dist.run.lock import RunLock
from cifar_dist.run.resolve import (
    DEFAULT_RUNS,
    RunRequest,
    TrainRequest,
    check_plan,
    refuse_other_data,
    refuse_other_recipe,
    resolve_run,
)
from cifar_dist.run.run_files import RunFiles, check_stored, first_good, names_in_turn
from cifar_dist.run.session import Session
from cifar_dist.run.weights import pretrained_weights
from cifar_dist.runtime.distributed import Runtime


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class OpenedRun:
    """All that was asked for, checked, and what rank 0 alone reads: the same on all ranks."""

    run: RunRequest
    directory: Path
    checkpoint: Mapping[str, Any]
    """Empty where there is none yet."""
    pretrained: dict[str, Tensor] | None
    damage: str | None
    """What is wrong with the last checkpoint, where an older one is used."""
    nothing_left: str | None
    """Why there is nothing to do, where that is so."""


def open_run(
    options: TrainOptions, world: World, slurm_job: SlurmJob | None, lock: RunLock, note: Callable[[str], None]
) -> OpenedRun:
    """Resolve what was typed, and lock the run that goes on; `note` hears of a download.

    Raises UserError; nothing else is changed.
    """
    run = resolve_run(options, slurm_job)
    check_plan(run.request, world_size=world.size)
    existing, checkpoint, damage, nothing_left = run.existing, None, None, None
    if existing is not None:
        nothing_left = RunDirectory(existing.path).nothing_left(run.request.recipe.epochs)
    if existing is not None and nothing_left is None:
        with writing(existing.path, "free space or mend the rights there"):
            lock.take(existing.path)
        checkpoint, damage = first_good(existing, load_checkpoint)
        if checkpoint is None:
            _refuse_to_begin_again(existing)
        else:
            file = _good_file(existing, damage)
            with refusing_foreign_content(file):
                check_stored(checkpoint, f"checkpoint {file}")
                refuse_other_recipe(run.request, checkpoint)
    return OpenedRun(
        run=run,
        directory=new_directory(options, run.request, lock) if existing is None else existing.path,
        checkpoint=checkpoint or {},
        damage=damage,
        pretrained=None if checkpoint or nothing_left else pretrained_weights(run.request.recipe, note),
        nothing_left=nothing_left,
    )


def _good_file(run: RunFiles, damage: str | None) -> Path:
    """Give the checkpoint that a run goes on from."""
    return run.last if damage is None else run.previous


def _refuse_to_begin_again(run: RunFiles) -> None:
    """Raise UserError where a run that has been tested has lost its checkpoints: from the start it would be another."""
    summary = RunDirectory(run.path).read_summary()
    if summary is not None and summary.test is not None:
        raise UserError(f"the checkpoints of {run.path} are gone, and it cannot go on: type a new --run-dir")


def new_directory(options: TrainOptions, request: TrainRequest, lock: RunLock | None = None) -> Path:
    """Return the folder of a new run: as typed, else the first of its names that is free, made and locked by `lock`."""
    names = names_in_turn(DEFAULT_RUNS / request.label)
    if options.run_dir is not None or lock is None:
        return options.run_dir or next(name for name in names if not name.exists())
    with writing(DEFAULT_RUNS, "free space or mend the rights there, or name another --run-dir"):
        return lock.claim(names)


def describe(
    request: TrainRequest, recipe: Recipe, class_names: Sequence[str], fingerprint: str, runtime: Runtime
) -> dict[str, Any]:
    """Give what config.yaml and every checkpoint say of their run."""
    return {
        "recipe_name": request.recipe_name,
        "recipe": recipe_to_mapping(recipe),
        "dataset": {"name": request.dataset, "data_dir": str(request.data_dir), "fingerprint": fingerprint},
        "class_names": list(class_names),
        "world_size": runtime.world.size,
        "device": runtime.device.type,
        "precision": runtime.precision,
        "num_threads": runtime.num_threads,
    }


def checkpoint_intervals(options: TrainOptions, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Give how often the run is saved: as typed now, else as typed when it began."""
    names = ("checkpoint_every_minutes", "checkpoint_every_steps")
    typed = {name: getattr(options, name) for name in names}
    return {name: stored.get(name) if value is None else value for name, value in typed.items()}


def begin_session(
    session: Session,
    opened: OpenedRun,
    slurm_job: SlurmJob | None,
    intervals: Mapping[str, float | None],
) -> None:
    """Go on from the checkpoint, where there is one, write what is known, and start the trackers. Raises UserError."""
    directory, about = session.directory, session.checkpoints.about
    with refusing_foreign_content(_good_file(directory, opened.damage)):
        if then := opened.checkpoint or opened.run.stored:
            refuse_other_data(about, then)
        if opened.checkpoint:
            session.restore(opened.checkpoint)
    if opened.damage is not None and directory.last.exists():
        directory.set_aside(directory.last)
    marks = {
        **intervals,
        "trackers": list(opened.run.request.trackers),
        "plan": to_mapping(session.trainer.plan),
        "versions": package_versions(),
        "git_commit": git_commit(),
    }
    marks |= {} if slurm_job is None else {"slurm_job": slurm_job.name}
    session.begin(about | marks, is_new=opened.run.existing is None)
    if session.runtime.is_main and opened.run.request.trackers:
        parameters = flatten(about["recipe"]) | {name: about[name] for name in ("world_size", "device", "precision")}
        folder, name = opened.directory / "tracking", opened.directory.name
        session.trackers.start(opened.run.request.trackers, folder, name, parameters, session.state.step)
