"""`train`: train a recipe, evaluate it once on the test images, and write the run directory."""

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from rich.console import Console

from cifar_dist.config.accelerate_config import AccelerateConfig, planned_processes, planned_world
from cifar_dist.config.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_KEYBOARD_INTERRUPT, UserError
from cifar_dist.config.options import TrainOptions
from cifar_dist.config.own_code import load_functions, own_sources, words_to_type
from cifar_dist.config.plan import RunPlan, fit_to_dataset, make_plan
from cifar_dist.config.provenance import command_line, git_commit, package_versions, version_note
from cifar_dist.config.recipe import Recipe, describe_network, recipe_to_mapping
from cifar_dist.config.schema import flatten, to_mapping
from cifar_dist.config.world import SlurmJob, World
from cifar_dist.data.cifar import ARCHIVES, where_found
from cifar_dist.data.dataset import Dataset, known_sizes, load_dataset
from cifar_dist.display.progress import Display, loading_progress, training_display
from cifar_dist.display.terminal import (
    format_duration,
    make_console,
    print_error,
    print_header,
    print_notes,
    print_result,
)
from cifar_dist.model.networks import build_network
from cifar_dist.model.optimizer import learning_rate_line
from cifar_dist.run.budget import measure_run
from cifar_dist.run.directory import RunDirectory, numbered_names
from cifar_dist.run.lock import RunLock
from cifar_dist.run.prepare import PreparedRun, RunRecorder, check_epochs, prepare_run, restore
from cifar_dist.run.resolve import RunSpec, resolve, seconds_allowed
from cifar_dist.run.results import DatasetMetadata, Evaluation, RunMetadata, Status, Summary
from cifar_dist.run.tracking import Trackers
from cifar_dist.runtime.device import ComputeSettings, check_world, choose_compute
from cifar_dist.runtime.distributed import Runtime, connect, start
from cifar_dist.runtime.ranks import Ranks
from cifar_dist.runtime.signals import Interrupt
from cifar_dist.training.evaluation import EvaluationSet
from cifar_dist.training.setup import build_trainer, probe
from cifar_dist.training.trainer import DivergedError, InterruptedRun, Trainer


def run(options: TrainOptions, world: World, config: AccelerateConfig) -> int:
    """Train, or print the plan of a dry run. Return the exit code."""
    console = make_console(quiet=world.rank > 0)
    return _dry_run(console, options, world, config) if options.dry_run else train(options, world, config, console)[0]


def train(
    options: TrainOptions,
    world: World,
    config: AccelerateConfig,
    console: Console,
    on_failure: Callable[[str], None] = print_error,
) -> tuple[int, Summary | None]:
    """Train and test. Return the exit code, and on all ranks the summary of a run that has ended.

    Rank 0 calls `on_failure` with the reason if the run does not end.
    """
    begun = time.monotonic()
    interrupt = Interrupt(seconds=seconds_allowed(options.max_minutes, os.environ, time.time()))
    job = SlurmJob.from_environment(os.environ)
    with connect(world, config) as ranks, RunLock(is_restart=job is not None and job.restarts > 0) as lock:
        prepared = ranks.broadcast_from_main(
            lambda: prepare_run(options, world.size, job, lock, lambda text: print_notes(console, [text]))
        )
        if prepared.finished is not None:
            print_notes(console, [prepared.finished])
            return EXIT_DONE, ranks.broadcast_from_main(RunDirectory(prepared.directory).read_summary)
        spec = prepared.spec
        with ranks.together():
            load_functions(flatten(recipe_to_mapping(spec.recipe)))
        dataset, fingerprint = _load_dataset(console, spec, ranks)
        runtime = start(ranks, config, **spec.compute_settings(world.size))
        if options.budget is not None and spec.stored is None:
            spec, line = _fit_to_budget(options, spec, dataset, runtime, begun)
            prepared = replace(prepared, spec=spec)
            print_notes(console, [None if options.quiet else line])
        trainer, recorder, display = _build(console, prepared, dataset, fingerprint, runtime, interrupt, options.quiet)
        resume_command = _resume_command(options, prepared.directory, spec.recipe)
        try:
            with interrupt:
                try:
                    with display:
                        trainer.fit()
                        recorder.save(trainer.state)
                        tested = None if options.skip_test else _test(trainer, dataset)
                except (DivergedError, InterruptedRun) as end:
                    return _end_early(trainer, recorder, end, resume_command, on_failure), None
                except KeyboardInterrupt:
                    recorder.write_summary("interrupted", trainer.state)
                    raise
                summary, font_note = _write_results(trainer, recorder, tested)
        except OSError as error:  # a full or vanished disk
            text, code = recorder.directory.explain_write_error(error, resume_command), EXIT_FAILED
        except KeyboardInterrupt:
            text, code = f"interrupted; resume with: {resume_command}", EXIT_KEYBOARD_INTERRUPT
        except Exception as error:  # such as that of a lost process
            error.add_note(f"resume with: {resume_command}")
            raise
        else:
            recorder.trackers.finish()
            own_model = words_to_type({"model": spec.recipe.model})
            print_result(console, summary, trainer.plan.epochs, prepared.directory, own_model, font_note)
            return EXIT_DONE, summary
        ranks.abandoned = True
        recorder.trackers.finish()
        if ranks.is_main:
            on_failure(text)
        return code, None


def _fit_to_budget(
    options: TrainOptions, spec: RunSpec, dataset: Dataset, runtime: Runtime, begun: float
) -> tuple[RunSpec, str]:
    """Return the run with the epochs that fit into `--budget`, and a line that describes it."""
    fitted, pace = measure_run(options, spec, dataset.sizes, runtime, begun)
    line = f"--budget {options.budget}: --epochs {fitted.recipe.epochs}; {pace.line}"
    if fitted.recipe.image_size_schedule != spec.recipe.image_size_schedule:
        ends = ", ".join(f"{end:.0%}" for _, end in fitted.recipe.image_size_schedule or ())
        line += f"; images grow at {ends.removesuffix(', 100%')} of the steps"
    return fitted, line


def _build(
    console: Console,
    prepared: PreparedRun,
    dataset: Dataset,
    fingerprint: str,
    runtime: Runtime,
    interrupt: Interrupt,
    quiet: bool,
) -> tuple[Trainer, RunRecorder, Display]:
    """Print the plan, build the trainer, restore it, and begin to record. Raises UserError on all ranks."""
    spec, ranks, size = prepared.spec, runtime.ranks, runtime.world.size
    with ranks.together():
        recipe = fit_to_dataset(spec.recipe, dataset.sizes)
        plan = make_plan(recipe, world_size=size, sizes=dataset.sizes, device_type=runtime.device.type)
        check_epochs(prepared, plan)
    if not quiet:
        step = (prepared.checkpoint or {}).get("step")
        where = f"{prepared.directory}" + (f", resumed in {plan.place_of(step + 1)}" if step else "")
        if spec.stored is not None and not step:
            where += ", from its first step: there is no checkpoint yet"
        lines = _header(where, spec, runtime.compute, plan, recipe, prepared.damage)
        if dataset.origin is not None:
            mean, std = list(recipe.normalization.mean), list(recipe.normalization.std)
            lines |= {"files": dataset.origin, "normalization": f"mean {mean}, std {std}"}
        print_header(console, lines)
    processes = f"{size} process{'es' if size > 1 else ''}"
    display = training_display(
        console,
        plan,
        quiet=quiet or not ranks.is_main,
        facts=f"{runtime.compute.short} · {processes}",
        memory=runtime.peak_memory_mib,
    )
    data = DatasetMetadata(name=spec.dataset, data_dir=str(spec.data_dir), fingerprint=fingerprint)
    metadata = _describe(spec, recipe, plan, data, dataset.class_names, runtime)
    recorder = RunRecorder(RunDirectory(prepared.directory), metadata, runtime, Trackers(display.on_note))
    trainer = build_trainer(
        recipe, plan, dataset, runtime, display, interrupt=interrupt, recorder=recorder, pretrained=prepared.pretrained
    )
    with ranks.together():
        restore(prepared, trainer, metadata)
        records = recorder.begin(trainer.state, prepared.damage)
    best = trainer.state.best
    display.on_earlier_epochs(records, None if best is None else best.epoch)
    if ranks.is_main:
        recorder.trackers.start(metadata, prepared.directory, trainer.state.step)
    return trainer, recorder, display


def _describe(
    spec: RunSpec, recipe: Recipe, plan: RunPlan, data: DatasetMetadata, class_names: tuple[str, ...], runtime: Runtime
) -> RunMetadata:
    """Return what config.yaml and checkpoints store of a run."""
    return RunMetadata(
        recipe_name=spec.recipe_name,
        recipe=recipe,
        dataset=data,
        class_names=class_names,
        world_size=runtime.world.size,
        device=runtime.device.type,
        precision=runtime.precision,
        num_threads=runtime.num_threads,
        checkpoint_every_minutes=spec.checkpoint_every_minutes,
        checkpoint_every_steps=spec.checkpoint_every_steps,
        trackers=spec.trackers,
        sources=own_sources(flatten(recipe_to_mapping(recipe))),
        plan=to_mapping(plan),
        versions=package_versions(),
        git_commit=git_commit(),
        slurm_job=spec.slurm_job,
    )


def _test(trainer: Trainer, dataset: Dataset) -> tuple[Evaluation, dict[str, NDArray[Any]]]:
    """Evaluate the selected weights on the test images. Return the result and the arrays for the figures."""
    state, data = trainer.state, dataset.test
    if trainer.recipe.selection == "best" and state.best is not None:
        state.evaluated_model.load_state_dict(state.best.weights)
    test_set = EvaluationSet(
        data=data,
        indices=torch.arange(len(data)),
        class_names=dataset.class_names,
        recipe=trainer.recipe,
        runtime=trainer.runtime,
    )
    logits = test_set.predict(state.evaluated_model, trainer.observer)
    evaluation = test_set.summarize(logits)
    trainer.check_finite(evaluation.loss)
    return evaluation, test_set.figure_arrays(logits)


def _end_early(
    trainer: Trainer,
    recorder: RunRecorder,
    end: DivergedError | InterruptedRun,
    resume_command: str,
    on_failure: Callable[[str], None],
) -> int:
    """Write the status of a run that diverged or was interrupted. Return the exit code. All ranks call this."""
    directory, ranks = recorder.directory, trainer.runtime.ranks
    if isinstance(end, DivergedError):
        recorder.write_summary("diverged", trainer.state)
        left = "has its last good checkpoint" if directory.last.exists() else "has no checkpoint yet"
        text, code = f"diverged: {end}; {directory.path} {left}", EXIT_FAILED
    else:
        recorder.write_summary("interrupted", trainer.state)
        place = trainer.plan.place_of(trainer.state.step)
        text, code = f"interrupted in {place}, and saved; resume with: {resume_command}", EXIT_INTERRUPTED
    recorder.trackers.finish()
    if ranks.is_main:
        on_failure(text)
    if ranks.world.size > 1:  # with Slurm the first process that ends may have the others killed
        trainer.interrupt.ignore()
    ranks.barrier()
    return code


def _write_results(
    trainer: Trainer, recorder: RunRecorder, tested: tuple[Evaluation, Mapping[str, NDArray[Any]]] | None
) -> tuple[Summary, str | None]:
    """Write predictions, summary and figures; of an untested run the summary alone. Return it, and `run_font_note`.

    Without figures the run is complete: their failure is a note.
    """
    directory, ranks = recorder.directory, trainer.runtime.ranks
    evaluation, arrays = tested or (None, {})
    if ranks.is_main and tested:
        directory.write_predictions(**arrays)
    memory = ranks.all_gather([trainer.runtime.peak_memory_mib() or 0])
    largest = int(max(peak for (peak,) in memory)) or None
    status: Status = "early_stopped" if trainer.stopped_early else "completed"
    summary = recorder.write_summary(status, trainer.state, evaluation, peak_memory_mib=largest)
    if not ranks.is_main or not tested:
        return summary, None
    page, font_note = directory.path / "report.html", None
    try:
        from cifar_dist.display.report import read_run, run_font_note, write_run  # imports matplotlib

        run = read_run(directory.path, directory.path.name)
        write_run(run, arrays, directory.figures, page if page.exists() else None)
        font_note = run_font_note(run)
    except Exception as error:  # a backend, fonts, the disk: the result matters more
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        again = command_line("report", directory.path)
        trainer.observer.on_note(f"the figures could not be drawn: {reason}; draw them with: {again}")
    recorder.trackers.log_test(summary, trainer.state.step, directory.figures)
    return summary, font_note


def _dry_run(console: Console, options: TrainOptions, world: World, config: AccelerateConfig) -> int:
    """Print the plan, with `--measure` also the time that it takes here. Writes nothing, and needs no data."""
    spec = resolve(options)
    future = planned_world(world, config)
    compute = choose_compute(config, os.environ, future, **spec.compute_settings(future.size))
    check_world(future, compute.device_type, os.environ)
    sizes, pace, begun = known_sizes(spec.dataset), None, time.monotonic()
    if options.measure:
        with connect(world, config) as ranks:
            runtime = start(ranks, config, **spec.compute_settings(world.size), doing="measuring")
            spec, pace = measure_run(options, spec, sizes, runtime, begun)
    recipe = fit_to_dataset(spec.recipe, sizes)
    plan = make_plan(recipe, world_size=future.size, sizes=sizes, device_type=compute.device_type)
    probe(build_network(recipe, sizes.num_classes), recipe, plan, sizes.num_classes)
    free = next(path for path in numbered_names(spec.default_directory) if not path.exists())
    lines = _header(f"{spec.directory or free}", spec, compute, plan, recipe)
    if spec.dataset in ARCHIVES:
        lines["data"] = where_found(ARCHIVES[spec.dataset], spec.data_dir)
    if pace is not None:
        most = "at most" if recipe.early_stopping.enabled else "about"
        lines["time"] = f"{most} {format_duration(pace.seconds(plan))}: {pace.line}"
    else:
        lines["would start"] = planned_processes(world, config)
    print_header(console, lines)
    return EXIT_DONE


def _load_dataset(console: Console, spec: RunSpec, ranks: Ranks) -> tuple[Dataset, str]:
    """Load the dataset. Return it with its fingerprint. Raises UserError if it is not the same on all ranks."""

    def load() -> Dataset:
        with loading_progress(console, spec.dataset) as progress:
            return load_dataset(spec.dataset, spec.data_dir, spec.recipe, progress=progress)

    dataset = ranks.main_process_first(load)
    fingerprint = dataset.fingerprint()
    expected = ranks.broadcast_from_main(lambda: fingerprint)
    with ranks.together():
        if fingerprint != expected:
            raise UserError(f"{spec.dataset} is not the same on {platform.node()} as on the machine of rank 0")
    return dataset, fingerprint


def _header(
    where: str, spec: RunSpec, compute: ComputeSettings, plan: RunPlan, recipe: Recipe, damage: str | None = None
) -> dict[str, str]:
    """Return the lines that are printed before a run: names and values."""
    lines = {
        "run": where,
        "recipe": f"{spec.recipe_name} on {spec.dataset}, seed {recipe.seed}, {describe_network(recipe)}",
        "device": compute.line,
        **plan.lines,
        "learning rate": learning_rate_line(recipe, plan),
    }
    if spec.recipe.validation_size == "auto" and plan.num_validation == 0:
        reason = "0 validation (too few images to hold some out)"
        lines["images"] = lines["images"].replace("0 validation", reason)
    note, processes = plan.few_steps_note, None
    if spec.stored is not None:
        note, before = version_note(spec.stored.versions), spec.stored.world_size
        if before != plan.world_size:
            processes = f"{before} process{'es' if before > 1 else ''} before, {plan.world_size} now: rounding differs"
    notes = "; ".join(each for each in (*compute.notes, damage, note, processes) if each)
    return lines | {"note": notes} if notes else lines


def _resume_command(options: TrainOptions, directory: Path, recipe: Recipe) -> str:
    """Return the command that resumes the run in the same world."""
    world = ["--config", options.config] if options.config else []
    world += ["--num-processes", str(options.num_processes)] if options.num_processes else []
    return command_line(*world, "--resume", directory, *words_to_type(flatten(recipe_to_mapping(recipe))))
