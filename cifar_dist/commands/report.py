"""`report`: what became of a run, in pictures and on a page; of several, side by side."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cifar_dist.config.accelerate_config import AccelerateConfig
from cifar_dist.config.errors import EXIT_DONE, UserError
from cifar_dist.config.files import write_output, writing
from cifar_dist.config.options import ReportOptions
from cifar_dist.config.world import World
from cifar_dist.display.comparison import (
    ReportedRun,
    comparison_notes,
    comparison_rows,
    format_csv,
    format_markdown,
    short_names,
    untested,
)
from cifar_dist.display.console import check_drawing, make_console
from cifar_dist.display.tables import (
    format_class_bars,
    format_evaluation_totals,
    format_outcome,
    format_worst_confusions,
    print_lines,
    print_notes,
    print_table,
)
from cifar_dist.run.directory import RunDirectory
from cifar_dist.run.results import EpochRecord, Summary

# matplotlib takes its time to be imported: what needs it is imported where it is used. torch is not needed.


def run(options: ReportOptions, world: World, config: AccelerateConfig) -> int:
    """Draw, write and print; give the exit code."""
    runs = [_read(path) for path in {path.resolve(): path for path in options.run_dirs}.values()]
    if world.rank > 0:
        return EXIT_DONE
    console = make_console()
    if len(runs) == 1 or options.out is not None:
        check_drawing()
    if len(runs) == 1:
        figures = options.out or RunDirectory(runs[0].path).figures
        written = _write_files(figures, _one(runs[0], figures, (options.out or runs[0].path) / "report.html"))
        lines = _in_words(runs[0], console.width)
    else:
        written = [] if options.out is None else _write_files(options.out, _several(runs, options.out))
        print_table(console, comparison_rows(runs))
        lines = comparison_notes(runs)
    last = [f"written: {name}" for name in _by_folder(written)]
    last = last or ["--out DIR writes the curves, the table as CSV and Markdown, and a page"]
    print_lines(console, [*lines, *([""] if lines else []), *last], title="report")
    if len(runs) == 1 and runs[0].summary.test is None:
        print_notes(console, [untested(runs[0])])  # no panel, so that it can be copied whole
    return EXIT_DONE


def _read(path: Path) -> ReportedRun:
    """Read a run's own words. Raises UserError where there are none."""
    files = RunDirectory(path)
    try:
        summary, records = files.read_summary(), files.read_records()
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from None
    if summary is None:
        raise UserError(f"the run in {path} has no summary.json: it has not begun to train")
    config = files.read_config()
    if summary.status == "running" and records:  # or killed: what it wrote when it began is long outdated
        summary = _up_to_now(summary, records, config)
    for where, name in ((config["recipe"], "seed"), (config["recipe"], "epochs"), (config["dataset"], "name")):
        if name not in where:
            raise UserError(f"run configuration {files.config} is damaged: it lacks '{name}'")
    return ReportedRun(path=path, config=config, summary=summary, records=records)


def _up_to_now(summary: Summary, records: Sequence[EpochRecord], config: Mapping[str, Any]) -> Summary:
    """Say of a run that has not ended what its epochs say."""
    monitor = config["recipe"].get("early_stopping", {}).get("monitor", "val_loss")
    values = {record.epoch: getattr(record, monitor, None) for record in records}
    known = {epoch: -value if monitor == "val_acc" else value for epoch, value in values.items() if value is not None}
    held_out = records[-1].val_loss is not None
    return replace(
        summary,
        epochs=records[-1].epoch,
        best_epoch=min(known, key=known.__getitem__) if known and held_out else None,
        train_seconds=max(summary.train_seconds, sum(record.epoch_seconds for record in records)),
    )


def _write_files(folder: Path, files: Iterator[Path]) -> list[Path]:
    """Write files into a folder. Raises UserError where that cannot be."""
    with writing(folder, "name another folder with --out"):
        folder.mkdir(parents=True, exist_ok=True)
        return list(files)


def _by_folder(files: Sequence[Path]) -> list[str]:
    """Return each folder with the names of its files."""
    folders: dict[Path, list[str]] = {}
    for file in files:
        folders.setdefault(file.parent, []).append(file.name)
    return [f"{', '.join(names)} in {folder}" for folder, names in folders.items()]


def _one(run: ReportedRun, figures: Path, page: Path) -> Iterator[Path]:
    """Draw what there is of a run, and write its page; give the files."""
    from cifar_dist.display.page import write_run

    saved = RunDirectory(run.path).read_predictions() if run.summary.test is not None else None
    yield from write_run(run, saved, figures, page)


def _several(runs: Sequence[ReportedRun], folder: Path) -> Iterator[Path]:
    """Draw runs over each other, and write their table as CSV, as Markdown and on a page; give the files."""
    from cifar_dist.display.figures import draw_overlay
    from cifar_dist.display.page import page_of_runs

    title = f"{len(runs)} runs"
    if any(run.records for run in runs):
        records = (run.records for run in runs)
        draw_overlay(dict(zip(short_names(runs), records, strict=True)), folder / "curves.png", title=title)
        yield folder / "curves.png"
    texts = {"csv": format_csv(runs), "md": format_markdown(runs), "html": page_of_runs(runs, title)}
    for suffix, text in texts.items():
        path = folder / f"report.{suffix}"
        write_output(path, text.encode(errors="backslashreplace"))
        yield path


def _in_words(run: ReportedRun, width: int) -> list[str]:
    """Give what became of a run as text."""
    lines, test = [run.title, format_outcome(run.summary, total_epochs=run.recipe["epochs"])], run.summary.test
    if test is None:
        return lines
    lines += [f"test {format_evaluation_totals(test)}", "", *format_class_bars(test, width=width)]
    return [*lines, *format_worst_confusions(test)]
