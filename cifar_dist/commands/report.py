"""`report`: the figures and the page of a run, or several runs side by side."""

import os

from cifar_dist.config.accelerate_config import AccelerateConfig
from cifar_dist.config.errors import EXIT_DONE
from cifar_dist.config.files import writing
from cifar_dist.config.options import ReportOptions
from cifar_dist.config.world import World
from cifar_dist.display.report import (
    comparison_notes,
    comparison_rows,
    read_run,
    untested_note,
    write_comparison,
    write_run,
)
from cifar_dist.display.terminal import (
    format_evaluation,
    format_outcome,
    make_console,
    print_lines,
    print_notes,
    print_table,
)
from cifar_dist.run.directory import RunDirectory


def run(options: ReportOptions, world: World, config: AccelerateConfig) -> int:
    """Report the runs and return the exit code."""
    paths = {path.resolve(): path for path in options.run_dirs}
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [os.path.relpath(path, os.path.commonpath(paths)) for path in paths]
    runs = [read_run(path, name) for path, name in zip(paths.values(), names, strict=True)]
    if world.rank > 0:
        return EXIT_DONE
    console = make_console()
    if len(runs) > 1:
        print_table(console, comparison_rows(runs))
        lines = comparison_notes(runs)
        if options.out is None:
            written = "--out DIR writes the curves, the table as CSV and Markdown, and a page"
        else:
            with writing(options.out, "name another folder with --out"):
                options.out.mkdir(parents=True, exist_ok=True)
                written = f"written: {', '.join(write_comparison(runs, options.out))} in {options.out}"
        print_lines(console, [*lines, written], title="report")
        return EXIT_DONE
    (one,) = runs
    directory = RunDirectory(one.path)
    figures, page = options.out or directory.figures, (options.out or one.path) / "report.html"
    saved = directory.read_predictions()
    with writing(figures, "name another folder with --out"):
        figures.mkdir(parents=True, exist_ok=True)
        write_run(one, saved, figures, page)
    lines = [one.title, format_outcome(one.summary, total_epochs=one.metadata.recipe.epochs)]
    if one.summary.test is not None:
        lines += format_evaluation(one.summary.test, split="test ")
    print_lines(console, [*lines, "", f"written: {page}, and its figures in {figures}"], title="report")
    if one.summary.test is None:
        print_notes(console, [untested_note(one)])  # outside of the panel, to be copied
    return EXIT_DONE
