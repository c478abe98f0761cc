"""`report`: the figures and the page of a run, or several runs side by side."""

import os

from cifar_dist.config.accelerate_config import AccelerateConfig
from cifar_dist.config.errors import EXIT_DONE
from cifar_dist.config.options import ReportOptions
from cifar_dist.config.world import World
from cifar_dist.display.report import compare_runs, read_run, report_run
from cifar_dist.display.terminal import make_console


def run(options: ReportOptions, world: World, config: AccelerateConfig) -> int:
    """Report the runs and return the exit code."""
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
