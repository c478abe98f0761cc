"""`report`: the figures and the page of a run, several runs side by side, or a study of `tune`."""

import os
from pathlib import Path

from cifar_dist.config.accelerate_config import AccelerateConfig
from cifar_dist.config.errors import EXIT_DONE, UserError
from cifar_dist.config.files import writing
from cifar_dist.config.options import ReportOptions
from cifar_dist.config.own_code import words_to_type
from cifar_dist.config.recipe import recipe_to_mapping
from cifar_dist.config.schema import flatten
from cifar_dist.config.world import World
from cifar_dist.display.report import compare_runs, read_run, report_run
from cifar_dist.display.study import draw_study, print_study
from cifar_dist.display.terminal import make_console, print_notes
from cifar_dist.run.study import Study, is_study, read_definition


def run(options: ReportOptions, world: World, config: AccelerateConfig) -> int:
    """Report the runs and return the exit code."""
    if is_study(options.run_dirs[0]):
        if world.rank == 0:
            _report_study(options.run_dirs[0], options.out)
        return EXIT_DONE
    paths = {path.resolve(): path for path in options.run_dirs}
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [os.path.relpath(path, os.path.commonpath(paths)) for path in paths]
    runs = [read_run(path, name) for path, name in zip(paths.values(), names, strict=True)]
    if world.rank == 0:
        if len(runs) > 1:
            compare_runs(runs, options.out, make_console())
        else:
            report_run(runs[0], options.out, make_console())
    return EXIT_DONE


def _report_study(path: Path, out: Path | None) -> None:
    definition, console = read_definition(path), make_console()
    assert definition is not None
    with writing(path, "a report locks the study: copy it to a folder of your own"):
        study = Study(path, definition)
    if not study.all_trials():
        raise UserError(f"the study {path} has no trial yet: start it with tune")
    own_model = words_to_type(flatten(recipe_to_mapping(definition.recipe)))
    print_study(console, study.all_trials(), path, definition.dataset, own_model)
    with writing(out or path, "name another folder with --out"):
        files = list(draw_study(study.optuna_study, out or path))
    print_notes(console, [f"written: {', '.join(files)} in {out or path}" if files else None])
