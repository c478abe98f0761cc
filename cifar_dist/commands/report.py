"""`report`: what became of a run, in pictures and on a page; of several, side by side."""

import csv
import io
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from cifar_dist.config.errors import EXIT_DONE, UserError
from cifar_dist.config.options import ReportOptions
from cifar_dist.config.parsing import flatten
from cifar_dist.config.world import AccelerateConfig, World
from cifar_dist.display.page import html_heading, html_numbers, html_page, html_picture, html_table, html_text
from cifar_dist.display.tables import (
    format_class_bars,
    format_confusions,
    format_duration,
    format_outcome,
    format_percent,
    format_table,
    print_lines,
)
from cifar_dist.records import EpochRecord, Summary
from cifar_dist.training.run_directory import RunDirectory

_HEADINGS = ["run", "status", "seed", "epochs", "accuracy", "loss", "training", "images/s"]
_PICTURES = {
    "curves.png": "Loss, accuracy and learning rate by epoch",
    "per_class.png": "Accuracy by class",
    "confusion.png": "Confusion matrix",
    "predictions.png": "The first test images, with what was predicted",
    "mistakes.png": "The surest mistakes",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    files: RunDirectory
    config: Mapping[str, Any]
    summary: Summary
    records: Sequence[EpochRecord]

    @property
    def title(self) -> str:
        """Say which experiment it is."""
        dataset, seed = Path(str(self.config["dataset"]["name"])).name, self.config["recipe"]["seed"]
        return f"{self.config.get('recipe_name', 'recipe')} on {dataset}, seed {seed}"

    @property
    def images_per_second(self) -> float | None:
        """Give the mean over all epochs."""
        seconds = sum(record.epoch_seconds for record in self.records)
        images = sum(record.images_per_second * record.epoch_seconds for record in self.records)
        return images / seconds if seconds else None

    @property
    def cells(self) -> list[str]:
        """Give its line of the table."""
        test, recipe, rate = self.summary.test, self.config["recipe"], self.images_per_second
        return [
            str(self.files.path),
            self.summary.status,
            str(recipe["seed"]),
            f"{self.summary.epochs}/{recipe['epochs']}",
            format_percent(None if test is None else test.top1),
            "-" if test is None else f"{test.loss:.4f}",
            format_duration(self.summary.train_seconds),
            "-" if rate is None else f"{rate:,.0f}",
        ]


def run(options: ReportOptions, world: World, config: AccelerateConfig) -> int:
    """Print the table, draw and write; give the exit code."""
    runs = [_read(path) for path in options.run_dirs]
    if world.rank > 0:
        return EXIT_DONE
    written: list[Path] = []
    if len(runs) == 1 or options.out is not None:
        figures = options.out or runs[0].files.figures
        page = (options.out or runs[0].files.path) / "report.html"
        try:
            figures.mkdir(parents=True, exist_ok=True)
            written = _write_one(runs[0], figures, page) if len(runs) == 1 else _write_many(runs, figures, page)
        except OSError as error:
            raise UserError(f"cannot write {error.filename or figures}: {error.strerror or error}") from None
    lines = _lines(runs) + ([] if written else ["--out DIR draws their curves and writes the table and a page"])
    lines += ["", f"written: {', '.join(map(str, written))}"] if written else []
    print_lines(Console(), lines, title="report")
    return EXIT_DONE


def _read(path: Path) -> _Run:
    """Read a run's own words. Raises UserError where there are none."""
    files = RunDirectory(path)
    if not files.holds_run:
        raise UserError(f"there is no run in {path}: name the folder that holds its summary.json")
    summary = files.read_summary()
    if summary is None:
        raise UserError(f"the run in {path} has no summary.json: it has not begun to train")
    return _Run(files=files, config=files.read_config(), summary=summary, records=files.read_records())


def _write_one(run: _Run, figures: Path, page: Path) -> list[Path]:
    """Draw what there is of a run, and write its page."""
    from cifar_dist.display.figures import draw_curves, draw_evaluation  # matplotlib takes its time

    test, stopped = run.summary.test, run.summary.status == "early_stopped"
    if run.records:
        best = run.summary.best_epoch
        draw_curves(run.records, figures / "curves.png", title=run.title, best_epoch=best, stopped_early=stopped)
    if test is not None and run.files.predictions.exists():
        saved = np.load(run.files.predictions)
        mistakes = (saved["mistakes"], saved["mistaken_images"]) if "mistakes" in saved else None
        logits, names = saved["logits"].astype(np.float32), [str(name) for name in saved["class_names"]]
        draw_evaluation(
            figures, test, saved["images"], saved["labels"], logits, names, title=run.title, mistakes=mistakes
        )
    drawn = {name: text for name, text in _PICTURES.items() if (figures / name).exists()}
    page.write_text(html_page(run.title, _parts(run, figures, drawn)), encoding="utf-8")
    return [page, *(figures / name for name in drawn)]


def _parts(run: _Run, figures: Path, drawn: Mapping[str, str]) -> list[str]:
    """Give what stands on the page of one run."""
    summary, test, config = run.summary, run.summary.test, run.config
    rate, versions = run.images_per_second, config.get("versions", {})
    numbers = {
        "test accuracy": format_percent(None if test is None else test.top1),
        "epochs": f"{summary.epochs} of {config['recipe']['epochs']}",
        "training": format_duration(summary.train_seconds),
        "images/s": "-" if rate is None else f"{rate:,.0f}",
        "device": f"{summary.device}, {summary.precision}",
        "processes": str(summary.world_size),
    }
    parts = [html_numbers(numbers), f"<p>{format_outcome(summary, total_epochs=config['recipe']['epochs'])}.</p>"]
    for name, text in drawn.items():
        parts += [html_heading(text), html_picture(figures / name, text)]
    if test is not None:
        classes = [[name, format_percent(value)] for name, value in test.per_class_accuracy.items()]
        worst = format_confusions(test, count=10)
        parts += [html_heading("What is mistaken most"), html_text("\n".join(worst) or "nothing")]
        parts += [html_heading("Classes"), html_table([["class", "accuracy"], *classes])]
    rows = [[name, str(value)] for name, value in flatten(config["recipe"]).items()]
    about = {**{name: str(value) for name, value in versions.items()}, "commit": str(config.get("git_commit"))}
    parts += [html_heading("Recipe"), html_table([["field", "value"], *rows])]
    parts += [html_heading("Where it comes from"), html_table([["", ""], *([k, v] for k, v in about.items())])]
    again = f"python launch.py --recipe {run.files.path}/config.yaml --dataset {config['dataset']['name']}"
    return [*parts, html_heading("To run it again"), html_text(again)]


def _write_many(runs: Sequence[_Run], folder: Path, page: Path) -> list[Path]:
    """Draw runs over each other, and write their table as CSV, as Markdown and on a page."""
    from cifar_dist.display.figures import draw_overlay

    names = _short_names([run.files.path for run in runs])
    begun = {name: run.records for name, run in zip(names, runs, strict=True) if run.records}
    rows, title = [_HEADINGS, *(run.cells for run in runs)], f"{len(runs)} runs"
    written = [folder / "report.csv", folder / "report.md", page]
    if begun:
        draw_overlay(begun, folder / "curves.png", title=title)
        written.append(folder / "curves.png")
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([_CSV, *(_values(run) for run in runs)])
    written[0].write_text(table.getvalue(), encoding="utf-8")
    cells = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    words = _words(runs)
    markdown = [cells[0], "|" + "---|" * len(_HEADINGS), *cells[1:], "", *words, ""]
    written[1].write_text("\n".join(markdown), encoding="utf-8")
    parts = [html_table(rows), html_text("\n".join(words))] if words else [html_table(rows)]
    parts += [html_picture(folder / "curves.png", "the runs' losses and accuracies by epoch")] if begun else []
    page.write_text(html_page(title, parts), encoding="utf-8")
    return written


_CSV = ["run", "status", "seed", "epochs", "top1", "top5", "loss", "train_seconds", "images_per_second", "best_epoch"]


def _values(run: _Run) -> list[Any]:
    """Give a run's line of the CSV: numbers in full, and nothing where there is none."""
    summary, test = run.summary, run.summary.test
    tested = [None, None, None] if test is None else [test.top1, test.top5, test.loss]
    seed, path = run.config["recipe"]["seed"], str(run.files.path)
    speed = [summary.train_seconds, run.images_per_second, summary.best_epoch]
    return [path, summary.status, seed, summary.epochs, *tested, *speed]


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Give the folders' own names where they tell the runs apart, else where they lie below what they share."""
    whole = [path.resolve() for path in paths]
    names = [path.name for path in whole]
    if len(set(names)) == len(names):
        return names
    shared = os.path.commonpath([str(path.parent) for path in whole])
    return [str(path.relative_to(shared)) for path in whole]


def _lines(runs: Sequence[_Run]) -> list[str]:
    lines = format_table([_HEADINGS, *(run.cells for run in runs)])
    if len(runs) == 1 and (test := runs[0].summary.test) is not None:
        return [*lines, "", *format_class_bars(test), "", *format_confusions(test)]
    words = _words(runs)
    return [*lines, *(["", *words] if words else [])]


def _words(runs: Sequence[_Run]) -> list[str]:
    """Say what the table says as a whole."""
    lines = []
    tested = [(run, run.summary.test) for run in runs if run.summary.test is not None]
    if len(tested) > 1:
        rates = [run.images_per_second for run, _ in tested if run.images_per_second is not None]
        lines += [
            f"mean and standard deviation of {len(tested)} runs:",
            f"  accuracy {_spread([100 * test.top1 for _, test in tested], 2)} %",
            f"  loss     {_spread([test.loss for _, test in tested], 4)}",
            f"  training {_spread([run.summary.train_seconds for run, _ in tested], 1)} s",
        ]
        lines += [f"  images/s {_spread(rates, 0)}"] if len(rates) > 1 else []
    if len(tested) < len(runs):
        lines.append(f"not tested yet, and not counted: {len(runs) - len(tested)}")
    if other := _differences(runs):
        lines.append(f"the runs differ in {', '.join(other)}")
    return lines


def _spread(values: Sequence[float], digits: int) -> str:
    """Give the mean and the standard deviation of a sample."""
    return f"{statistics.mean(values):,.{digits}f} ± {statistics.stdev(values):,.{digits}f}"


def _differences(runs: Sequence[_Run]) -> list[str]:
    """Give the names of what the runs do not share, the seed apart: their mean says little then."""
    flat = [flatten(run.config["recipe"]) | {"dataset": run.config["dataset"]["name"]} for run in runs]
    names = sorted({name for one in flat for name in one} - {"seed"})
    return [name for name in names if len({str(one.get(name)) for one in flat}) > 1]
