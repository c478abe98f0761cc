"""`train`: from what was typed to a trained, tested and documented model."""

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from rich.console import Console

from cifar_dist.config.accelerate_config import AccelerateConfig, planned_processes, planned_world
from cifar_dist.config.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_KEYBOARD_INTERRUPT, UserError
from cifar_dist.config.options import TrainOptions
from cifar_dist.config.plan import RunPlan, fit_to_dataset, make_plan
from cifar_dist.config.provenance import command_line, version_note
from cifar_dist.config.recipe import Recipe
from cifar_dist.config.world import SlurmJob, World
from cifar_dist.data.cifar import ARCHIVES, where_found
from cifar_dist.data.dataset import Dataset, known_sizes, load_dataset
from cifar_dist.display.progress import Display, loading_progress, training_display
from cifar_dist.display.terminal import (
    make_console,
    print_error,
    print_header,
    print_notes,
    print_result,
)
from cifar_dist.model.schedule import learning_rate_line
from cifar_dist.run.directory import RunDirectory, UnwrittenRun
from cifar_dist.run.lock import RunLock
from cifar_dist.run.opening import begin_session, checkpoint_intervals, describe, new_directory, open_run
from cifar_dist.run.resolve import TrainRequest, computed_with, resolve_run, seconds_allowed
from cifar_dist.run.results import Summary
from cifar_dist.run.saving import CheckpointWriter
from cifar_dist.run.session import Session
from cifar_dist.runtime.device import ComputeSettings, check_world, choose_compute
from cifar_dist.runtime.distributed import connect, start
from cifar_dist.runtime.interrupt import Interrupt
from cifar_dist.runtime.ranks import Ranks
from cifar_dist.training.setup import build_trainer
from cifar_dist.training.trainer import DivergedError, InterruptedRun


def run(options: TrainOptions, world: World, config: AccelerateConfig) -> int:
    """Train as asked; give the exit code."""
    if options.dry_run:
        return _show_plan(make_console(quiet=world.rank > 0), options, world, config)
    return train(options, world, config, make_console(quiet=world.rank > 0))[0]


def train(
    options: TrainOptions,
    world: World,
    config: AccelerateConfig,
    console: Console,
    on_failure: Callable[[str], None] = print_error,
) -> tuple[int, Summary | None]:
    """Train as asked. Return the exit code, and on all ranks the summary of a run that came to its end.

    On rank 0, `on_failure` is called with the reason of another end.
    """
    interrupt = Interrupt(seconds=seconds_allowed(options.max_minutes, os.environ, time.time()))
    slurm_job = SlurmJob.from_environment(os.environ)
    with connect(world, config) as ranks, RunLock(slurm_job) as lock:
        opened = ranks.broadcast_from_main(
            lambda: open_run(options, world, slurm_job, lock, lambda text: print_notes(console, [text]))
        )
        if opened.nothing_left is not None:
            print_notes(console, [opened.nothing_left])
            return EXIT_DONE, ranks.broadcast_from_main(RunDirectory(opened.directory).read_summary)
        request, stored = opened.run.request, opened.run.stored
        dataset, fingerprint = _load_alike(console, request, ranks)
        how = computed_with(stored, options.precision, world.size)
        runtime = start(ranks, config, **how, micro_batches=request.recipe.gradient_accumulation_steps)
        with ranks.together():
            recipe = fit_to_dataset(request.recipe, dataset.sizes)
            plan = make_plan(recipe, world_size=world.size, sizes=dataset.sizes, device_type=runtime.device.type)
        if not options.quiet:
            step = opened.checkpoint.get("step")
            where = f"{opened.directory}" + (f", going on after {plan.place_of(step)}" if step else "")
            notes = [opened.damage, version_note(stored.get("versions", {})), None if stored else plan.few_steps_note]
            lines = _header(where, request, runtime.compute, plan, recipe, notes)
            print_header(console, lines | _data_lines(dataset, recipe))
        display = training_display(
            console,
            plan,
            quiet=options.quiet or not ranks.is_main,
            facts=f"{runtime.compute.short} · {world.size} process{'es' if world.size > 1 else ''}",
            memory=runtime.peak_memory_mib,
        )
        trainer = build_trainer(
            recipe, plan, dataset, runtime, display, interrupt=interrupt, pretrained=opened.pretrained
        )
        about = describe(request, recipe, dataset.class_names, fingerprint, runtime)
        directory = RunDirectory(opened.directory, lock) if ranks.is_main else UnwrittenRun(opened.directory)
        intervals = checkpoint_intervals(options, stored)
        checkpoints = CheckpointWriter(directory, about, **intervals)
        session = Session(checkpoints, trainer, dataset)
        with ranks.together():
            begin_session(session, opened, slurm_job, intervals)
        return _train_and_test(console, display, session, _how_to_go_on(options, opened.directory), on_failure)


def _how_to_go_on(options: TrainOptions, directory: Path) -> str:
    """Give the command that resumes the run in the same world."""
    world = ["--config", options.config] if options.config else []
    world += ["--num-processes", str(options.num_processes)] if options.num_processes else []
    return command_line(*world, "--resume", directory)


def _show_plan(console: Console, options: TrainOptions, world: World, config: AccelerateConfig) -> int:
    """Print what would be done, and by whom; nothing is started, read or written, and no data is needed."""
    run = resolve_run(options)
    request, stored = run.request, run.stored
    future = planned_world(world, config)
    how = computed_with(stored, options.precision, future.size)
    micro_batches = request.recipe.gradient_accumulation_steps
    compute = choose_compute(config, os.environ, future, **how, micro_batches=micro_batches)
    check_world(future, compute.device_type, os.environ)
    sizes = known_sizes(request.dataset)
    recipe = fit_to_dataset(request.recipe, sizes)
    plan = make_plan(recipe, world_size=future.size, sizes=sizes, device_type=compute.device_type)
    directory = run.existing.path if run.existing is not None else new_directory(options, request)
    notes = [version_note(stored.get("versions", {})), None if stored else plan.few_steps_note]
    lines = _header(f"{directory}", request, compute, plan, recipe, notes)
    if request.dataset in ARCHIVES:
        lines["data"] = where_found(ARCHIVES[request.dataset], request.data_dir)
    print_header(console, lines | {"would start": planned_processes(world, config)})
    return EXIT_DONE


def _load_alike(console: Console, request: TrainRequest, ranks: Ranks) -> tuple[Dataset, str]:
    """Give the dataset and its fingerprint. Raises UserError where a machine has other files than that of rank 0."""
    dataset = ranks.main_process_first(lambda: _load(console, request))
    fingerprint = dataset.fingerprint()
    expected = ranks.broadcast_from_main(lambda: fingerprint)
    with ranks.together():
        if fingerprint != expected:
            raise UserError(f"{request.dataset} is not the same on {platform.node()} as on the machine of rank 0")
    return dataset, fingerprint


def _load(console: Console, request: TrainRequest) -> Dataset:
    with loading_progress(console, request.dataset) as progress:
        return load_dataset(request.dataset, request.data_dir, request.recipe, progress=progress)


def _header(
    run: str,
    request: TrainRequest,
    compute: ComputeSettings,
    plan: RunPlan,
    recipe: Recipe,
    notes: Sequence[str | None] = (),
) -> dict[str, str]:
    """Return the lines above a run: names and values."""
    lines = {
        "run": run,
        "recipe": f"{request.recipe_name} on {request.dataset}, seed {recipe.seed}, stem {recipe.stem}",
        "device": compute.line,
        **plan.lines,
        "learning rate": learning_rate_line(recipe, plan),
    }
    told = "; ".join(note for note in (*compute.notes, *notes) if note)
    return lines | {"note": told} if told else lines


def _data_lines(dataset: Dataset, recipe: Recipe) -> dict[str, str]:
    """Say where the images of a folder come from, and how they are normalised."""
    if dataset.origin is None:
        return {}
    mean, std = recipe.normalization.mean, recipe.normalization.std
    return {"files": dataset.origin, "normalization": f"mean {list(mean)}, std {list(std)}"}


def _train_and_test(
    console: Console, display: Display, session: Session, how_to_go_on: str, on_failure: Callable[[str], None]
) -> tuple[int, Summary | None]:
    try:
        with session.trainer.interrupt:
            try:
                with display:
                    status = session.train()
                    summary, saved = session.test(status)
            except (DivergedError, InterruptedRun) as end:
                return _leave_early(session, end, how_to_go_on, on_failure), None
            if session.runtime.is_main:  # a signal finds nothing left to save, and waits for the end
                session.directory.write_summary(summary)  # with it the run is done, whatever becomes of its figures
                _draw_figures(session, saved)
                session.trackers.log_test(summary, session.state.step, session.directory.figures)
    except OSError as error:  # a full or vanished disk, or a run that another process has
        text, code = session.directory.what_is_lost(error, how_to_go_on), EXIT_FAILED
        session.runtime.ranks.abandoned = True
    except KeyboardInterrupt:
        text, code = f"interrupted; go on with: {how_to_go_on}", EXIT_KEYBOARD_INTERRUPT
        session.runtime.ranks.abandoned = True
    else:
        session.trackers.finish()
        print_result(console, summary, session.trainer.plan.epochs, session.directory.path)
        return EXIT_DONE, summary
    session.trackers.finish()
    if session.runtime.is_main:
        on_failure(text)
    return code, None


def _leave_early(
    session: Session,
    end: DivergedError | InterruptedRun,
    how_to_go_on: str,
    on_failure: Callable[[str], None] = print_error,
) -> int:
    """Close what is open and say how a run ended that all processes leave together; give the exit code."""
    if isinstance(end, DivergedError):
        path = session.directory.path
        left = "the last good checkpoint stays" if session.directory.last.exists() else "there was no checkpoint yet"
        text, code = f"diverged: {end}; {left}: {path}", EXIT_FAILED
    else:
        place = session.trainer.plan.place_of(session.state.step)
        text, code = f"interrupted in {place}, and saved; go on with: {how_to_go_on}", EXIT_INTERRUPTED
    session.trackers.finish()
    if session.runtime.is_main:
        on_failure(text)
    session.leave_together()
    return code


def _draw_figures(session: Session, saved: Mapping[str, NDArray[Any]]) -> None:
    """Draw the curves, the confusion matrix and the first predictions; a page that `report` has written is renewed."""
    directory = session.directory
    path, page = directory.path, directory.path / "report.html"
    try:
        # matplotlib takes its time to be imported, and a run that fails does not need it.
        from cifar_dist.display.report import read_run, write_run

        write_run(read_run(path), saved, directory.figures, page if page.exists() else None)
    except Exception as error:  # somebody's backend, fonts or disk: a result is worth more than its figures
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        again = command_line("report", path)
        session.trainer.observer.on_note(f"the figures could not be drawn: {reason}; draw them with: {again}")
