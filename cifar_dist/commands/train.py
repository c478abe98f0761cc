"""`train`: from what was typed to a trained, tested and documented model."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from cifar_dist.config.errors import EXIT_DONE, EXIT_FAILED, EXIT_KEYBOARD_INTERRUPT, UserError
from cifar_dist.config.loading import recipe_to_mapping
from cifar_dist.config.options import TrainOptions
from cifar_dist.config.parsing import to_mapping
from cifar_dist.config.plan import RunPlan, fit_to_dataset, make_plan
from cifar_dist.config.provenance import git_commit, package_versions
from cifar_dist.config.recipe import Recipe
from cifar_dist.config.request import TrainRequest, resolve_request
from cifar_dist.config.unsupported import refuse_several_processes, refuse_unsupported
from cifar_dist.config.world import AccelerateConfig, World, load_accelerate_config
from cifar_dist.data.dataset import Dataset
from cifar_dist.data.datasets import check_dataset_name, known_sizes, load_dataset
from cifar_dist.display.progress import Display, loading_progress, training_display
from cifar_dist.display.tables import print_header, print_result
from cifar_dist.model.schedule import learning_rate_line
from cifar_dist.records import Summary
from cifar_dist.runtime.distributed import Runtime, start
from cifar_dist.training.checkpoint import load_checkpoint, understanding
from cifar_dist.training.engine import DivergedError
from cifar_dist.training.evaluation import Predictions
from cifar_dist.training.run_directory import RunDirectory
from cifar_dist.training.session import Session
from cifar_dist.training.setup import build_trainer, pretrained_weights


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Job:
    """All that was asked for, checked, before anything is loaded or started."""

    world: World
    config: AccelerateConfig
    request: TrainRequest
    existing: RunDirectory | None
    """The run that goes on; None for a new one."""
    stored: Mapping[str, Any]
    """Its config.yaml: what was not typed comes from there. Empty for a new one."""
    checkpoint: Mapping[str, Any]
    """Empty where there is none yet."""


def run(options: TrainOptions) -> int:
    """Train as asked; give the exit code."""
    console = Console()
    job = _resolve(options)
    if job.existing is not None and (why := _nothing_left(job.existing, job.request)):
        console.print(why, highlight=False, soft_wrap=True, markup=False)
        return EXIT_DONE
    pretrained = None if options.dry_run else pretrained_weights(job.request.recipe)
    dataset = None if options.dry_run else _load(console, job.request)
    sizes = known_sizes(job.request.dataset, job.request.recipe) if dataset is None else dataset.sizes
    typed = job.request.validation_size_was_typed
    recipe = fit_to_dataset(job.request.recipe, sizes, validation_size_was_typed=typed)
    precision = options.precision or job.stored.get("precision")
    with start(job.world, job.config, typed_precision=precision, num_threads=job.stored.get("num_threads")) as runtime:
        plan = make_plan(recipe, world_size=job.world.size, sizes=sizes, device_type=runtime.device.type)
        directory = job.existing or RunDirectory(options.run_dir or _free_name(Path("runs") / job.request.label))
        if not options.quiet:
            print_header(console, _header(job, runtime, plan, recipe, directory, dataset))
        if dataset is None:
            return EXIT_DONE
        display = training_display(console, plan, job.request.recipe_name, quiet=options.quiet)
        trainer = build_trainer(recipe, plan, dataset, runtime, display, pretrained=pretrained)
        about = _describe(job.request, recipe, dataset, runtime)
        session = Session(directory, trainer, dataset, about)
        if job.checkpoint:
            with understanding(directory.last):
                session.restore(job.checkpoint)
        session.begin({**about, "plan": to_mapping(plan), "versions": package_versions(), "git_commit": git_commit()})
        return _train_and_test(console, display, session)


def _resolve(options: TrainOptions) -> _Job:
    """Turn what was typed into a job. Raises UserError; nothing on disk is changed."""
    world, config = World.from_environment(os.environ), load_accelerate_config(options.config)
    refuse_several_processes(world, config.num_processes)
    existing = _find_run(options)
    stored = {} if existing is None else existing.read_config()
    request = resolve_request(options, stored)
    refuse_unsupported(request.recipe)
    check_dataset_name(request.dataset)
    checkpoint = load_checkpoint(existing.last) if existing is not None and existing.last.exists() else {}
    return _Job(world=world, config=config, request=request, existing=existing, stored=stored, checkpoint=checkpoint)


def _find_run(options: TrainOptions) -> RunDirectory | None:
    """Give the run that is to go on, None for a new one."""
    if options.resume and options.resume_dir is None and options.run_dir is None:
        raise UserError("--resume needs to know the run: type --resume DIR, or --run-dir DIR --resume")
    path = options.resume_dir or options.run_dir
    if path is None:
        return None
    run = RunDirectory(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"the run directory {path} is a file: name a folder")
    if options.resume_dir is not None and not run.holds_run:
        raise UserError(f"there is no run in {path} to resume")
    if run.holds_run and not options.resume:
        raise UserError(f"{path} holds a run already: add --resume to go on with it, or name another --run-dir")
    return run if run.holds_run else None


def _nothing_left(run: RunDirectory, request: TrainRequest) -> str | None:
    """Say that a run is over already, where it is."""
    summary = run.read_summary()
    if summary is None or summary.test is None:
        return None
    if summary.status == "early_stopped":
        return f"{run.path} was stopped early after {summary.epochs} epochs: nothing left to do"
    if request.recipe.epochs > summary.epochs:
        return None
    if request.recipe.epochs < summary.epochs:
        raise UserError(f"epochs={request.recipe.epochs} is below the {summary.epochs} that are done in {run.path}")
    return f"{run.path} is completed ({summary.epochs} epochs, accuracy {summary.test.top1:.2%}): nothing left to do"


def _free_name(path: Path) -> Path:
    """Give the first of path, path-2, path-3, … that does not exist."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def _load(console: Console, request: TrainRequest) -> Dataset:
    progress = loading_progress(console, request.dataset)
    try:
        return load_dataset(request.dataset, request.data_dir, request.recipe, progress=progress)
    finally:
        progress.close()


def _header(
    job: _Job, runtime: Runtime, plan: RunPlan, recipe: Recipe, directory: RunDirectory, dataset: Dataset | None
) -> dict[str, str]:
    """Give what stands above a run: names and values."""
    resumed_at = job.checkpoint.get("epoch", 0)
    device = f"{runtime.device.type}, precision {runtime.precision} ({runtime.precision_reason})"
    lines = {
        "run": f"{directory.path}" + (f", going on after epoch {resumed_at}" if resumed_at else ""),
        "recipe": f"{job.request.recipe_name} on {job.request.dataset}, seed {recipe.seed}, stem {recipe.stem}",
        "device": f"{device}, {runtime.threads_line}",
        "batch": plan.equation,
        "images": plan.images_line,
        "steps": plan.steps_line,
        "learning rate": learning_rate_line(recipe, plan),
    }
    if dataset is not None and dataset.origin is not None:
        mean, std = recipe.normalization.mean, recipe.normalization.std
        lines |= {"files": dataset.origin, "normalization": f"mean {list(mean)}, std {list(std)}"}
    return lines | {"note": "; ".join(runtime.notes)} if runtime.notes else lines


def _describe(request: TrainRequest, recipe: Recipe, dataset: Dataset, runtime: Runtime) -> dict[str, Any]:
    """Give what config.yaml and every checkpoint say of their run."""
    return {
        "recipe_name": request.recipe_name,
        "recipe": recipe_to_mapping(recipe),
        "dataset": {"name": request.dataset, "data_dir": str(request.data_dir), "fingerprint": dataset.fingerprint()},
        "class_names": list(dataset.class_names),
        "world_size": runtime.world.size,
        "device": runtime.device.type,
        "precision": runtime.precision,
        "num_threads": runtime.num_threads,
    }


def _train_and_test(console: Console, display: Display, session: Session) -> int:
    try:
        with display:
            status = session.train()
            summary, predictions = session.test(status)
    except DivergedError as error:
        print(f"diverged: {error}; the last good checkpoint stays: {session.directory.path}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print(f"interrupted; go on with: python launch.py --resume {session.directory.path}", file=sys.stderr)
        return EXIT_KEYBOARD_INTERRUPT
    _draw_figures(session, summary, predictions)
    print_result(console, summary, session.trainer.plan.epochs, session.directory.path)
    return EXIT_DONE


def _draw_figures(session: Session, summary: Summary, predictions: Predictions) -> None:
    """Draw the curves, the confusion matrix and the first predictions."""
    # matplotlib takes its time to be imported, and a run that fails does not need it.
    from cifar_dist.display.figures import draw_curves, draw_evaluation

    assert summary.test is not None
    directory, dataset = session.directory, session.dataset
    images = dataset.test.images[:64].numpy()
    title = f"{session.checkpoints.header['recipe_name']} on {dataset.name}, seed {session.trainer.recipe.seed}"
    curves = directory.figures / "curves.png"
    draw_curves(directory.read_records(), curves, title=title, best_epoch=summary.best_epoch)
    labels, logits = predictions.labels.numpy(), predictions.logits.numpy()
    draw_evaluation(directory.figures, summary.test, images, labels, logits, dataset.class_names, title=title)
