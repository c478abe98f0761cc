"""What stands on the page of a run, and on that of several."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifar_dist.config.files import write_atomically
from cifar_dist.config.provenance import command_line
from cifar_dist.config.recipe import Recipe, recipe_to_mapping
from cifar_dist.config.schema import flatten
from cifar_dist.display.comparison import ReportedRun, comparison_notes, comparison_rows, short_names, untested
from cifar_dist.display.curves import overlaid_panels, run_panels, style_of
from cifar_dist.display.figures import (
    MANY_CLASSES,
    SCALE_OF_MANY,
    confusion_svg,
    draw_curves,
    draw_evaluation,
    panel_svg,
    softmax_top,
)
from cifar_dist.display.html import (
    html_classes,
    html_fields,
    html_heading,
    html_images,
    html_line,
    html_list,
    html_matrix,
    html_note,
    html_page,
    html_panels,
    html_table,
    html_text,
    html_tiles,
)
from cifar_dist.display.tables import format_confusions, format_duration, format_outcome, format_percent
from cifar_dist.run.results import Evaluation

Arrays = Mapping[str, NDArray[Any]]
_MISTAKES = 24  # on the page; mistakes.png has all that were kept


def write_run(run: ReportedRun, saved: Arrays | None, figures: Path, page: Path | None) -> Iterator[Path]:
    """Draw what there is of a run into a folder, and write its page where one is wanted; give the files.

    `saved` is its test_predictions.npz, None where there is none.
    """
    summary = run.summary
    if run.records:
        curves, stopped = figures / "curves.png", summary.status == "early_stopped"
        draw_curves(run.records, curves, title=run.title, best_epoch=summary.best_epoch, stopped_early=stopped)
        yield curves
    if summary.test is not None and saved is not None:
        yield from draw_evaluation(figures, summary.test, saved, title=run.title)
    if page is not None:
        write_atomically(page, lambda file: file.write(page_of_run(run, saved or {}).encode(errors="backslashreplace")))
        yield page


def page_of_run(run: ReportedRun, saved: Arrays) -> str:
    """Give the page of a run; `saved` is its test_predictions.npz, empty where there is none."""
    summary, test = run.summary, run.summary.test
    outcome = format_outcome(summary, total_epochs=run.recipe["epochs"])
    parts = [f"<p>{outcome}.</p>", html_tiles(_tiles(run))]
    if run.records:
        stopped = summary.status == "early_stopped"
        panels = run_panels(run.records, best_epoch=summary.best_epoch, stopped_early=stopped)
        parts += [html_heading("Training"), html_panels(panel_svg(panel, legend=True) for panel in panels)]
    if test is not None:
        parts += _test_parts(test, saved)
    else:
        parts += [html_text(untested(run))]
    recipe, standard = (_as_text(each) for each in (run.recipe, recipe_to_mapping(Recipe.load())))
    changed = [name for name, value in recipe.items() if value != standard.get(name)]
    note = "Bold: another value than in standard, which stands in brackets." if changed else "As in standard."
    recipe |= {name: f"{recipe[name]} ({standard.get(name, '-')})" for name in changed}
    again = command_line("--recipe", *_arguments(run))
    parts += [html_heading("To run it again"), html_text(again)]
    parts += [html_heading("Where it comes from"), html_fields(_origin(run))]
    return html_page(run.title, [*parts, html_heading("Recipe", note), html_fields(recipe, marked=changed)])


def page_of_runs(runs: Sequence[ReportedRun], title: str) -> str:
    """Give the page of several runs."""
    names = short_names(runs)
    lines = [html_line(f"var(--c{place % 6})", style_of(place)[1]) for place in range(len(runs))]
    parts = [html_table(comparison_rows(runs), marks=lines), *(html_note(note) for note in comparison_notes(runs))]
    panels = overlaid_panels(dict(zip(names, (run.records for run in runs), strict=True)))
    if panels:
        parts += [html_heading("Training"), html_panels(panel_svg(panel, legend=False) for panel in panels)]
    for name, run in zip(names, runs, strict=True):
        parts += [html_heading(name), html_fields(_origin(run))]
    return html_page(title, parts)


def _as_text(recipe: Mapping[str, Any]) -> dict[str, str]:
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in flatten(recipe).items()}


def _tiles(run: ReportedRun) -> dict[str, str]:
    summary, test, rate = run.summary, run.summary.test, run.facts["images_per_second"]
    tiles = {"test accuracy": format_percent(None if test is None else test.top1)}
    if test is not None:
        tiles |= {"test top-5": format_percent(test.top5)} if test.top5 is not None else {}
        tiles |= {"test loss": f"{test.loss:.4f}", "test images": f"{test.num_samples:,}"}
    tiles |= {"epochs": f"{summary.epochs} of {run.recipe['epochs']}"}
    tiles |= {"best epoch": str(summary.best_epoch)} if summary.best_epoch is not None else {}
    tiles |= {"training": format_duration(summary.train_seconds), "images/s": "-" if rate is None else f"{rate:,.0f}"}
    return tiles


def _test_parts(test: Evaluation, saved: Arrays) -> list[str]:
    """Give what the test has shown: confusions, classes, images."""
    names, matrix = list(test.per_class_accuracy), np.asarray(test.confusion_matrix)
    errors = matrix - np.diag(matrix.diagonal())
    rows = []
    for place, (name, accuracy) in enumerate(test.per_class_accuracy.items()):
        other, count = errors[place].argmax(), errors[place].max()
        rows.append((name, accuracy, int(matrix[place].sum()), f"{names[other]} ({count:,})" if count else ""))
    rows.sort(key=lambda row: (row[1] is None, row[1]))
    note = f"Percent of each true class{f'; {SCALE_OF_MANY}' if len(names) > MANY_CLASSES else ''}."
    parts = [html_heading("Confusions that hurt most"), html_list(format_confusions(test, count=10) or ["none"])]
    parts += [html_heading("Confusion matrix", note), html_matrix(confusion_svg(test), large=len(names) > MANY_CLASSES)]
    parts += [html_heading("Classes", "The worst first."), html_classes(rows)]
    for heading, note, images, places in _galleries(saved):
        labels, logits = saved["labels"][places], saved["logits"][places].astype(np.float32)
        guesses = logits.argmax(1)
        captions = [
            names[label] if label == guess else f"{names[label]} → {names[guess]} {softmax_top(row):.0%}"
            for label, guess, row in zip(labels, guesses, logits, strict=True)
        ]
        parts += [html_heading(heading, note), html_images(images, captions, wrong=(labels != guesses).tolist())]
    return parts


def _galleries(saved: Arrays) -> list[tuple[str, str, NDArray[Any], NDArray[Any]]]:
    """Give headings, notes, images, and their places among the test images; an older run has no mistakes."""
    galleries = []
    what = "The true class → what it is taken for, and how surely."
    if len(saved.get("mistakes", ())):
        shown, places = saved["mistaken_images"][:_MISTAKES], saved["mistakes"][:_MISTAKES]
        galleries.append(("The most confident mistakes", what, shown, places))
    if "images" in saved:
        galleries.append(("The first test images", what, saved["images"], np.arange(len(saved["images"]))))
    return galleries


def _origin(run: ReportedRun) -> dict[str, Any]:
    """Say where a run comes from: the machine, the data, the versions."""
    summary, config = run.summary, run.config
    memory = summary.peak_memory_mib
    origin = {
        "run": run.path,
        "recipe": config.get("recipe_name"),
        "dataset": config["dataset"]["name"],
        "fingerprint of the data": config["dataset"].get("fingerprint"),
        "seed": run.recipe["seed"],
        "device": summary.device,
        "precision": summary.precision,
        "processes": summary.world_size,
        "threads of each": summary.num_threads,
        "peak memory": None if memory is None else f"{memory:,} MiB",
        **{f"plan: {name}": value for name, value in config.get("plan", {}).items()},
        **config.get("versions", {}),
        "commit": config.get("git_commit"),
    }
    return {name: value for name, value in origin.items() if value is not None}


def _arguments(run: ReportedRun) -> list[str]:
    """Give what is typed after `--recipe` to train the same once more."""
    dataset, summary = run.config["dataset"], run.summary
    arguments = [str(run.path / "config.yaml"), "--dataset", str(dataset["name"])]
    arguments += ["--data-dir", str(dataset["data_dir"])] if "data_dir" in dataset else []
    arguments += ["--num-processes", str(summary.world_size)] if summary.world_size > 1 else []
    return [*arguments, "--precision", summary.precision]
