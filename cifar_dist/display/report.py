"""Reports of runs: the table that compares them, also in Markdown, and the page of one run or of several."""

import base64
import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from numpy.typing import NDArray
from rich.console import Console

from cifar_dist.config.errors import UserError
from cifar_dist.config.files import write_output, writing
from cifar_dist.config.options import FULL_NAMES
from cifar_dist.config.own_code import words_to_type
from cifar_dist.config.provenance import command_line
from cifar_dist.config.recipe import Recipe, describe_recipe, recipe_to_mapping
from cifar_dist.config.schema import flatten
from cifar_dist.display.terminal import (
    format_confusions,
    format_evaluation,
    format_outcome,
    print_lines,
    print_notes,
    print_table,
)
from cifar_dist.run.directory import RunDirectory
from cifar_dist.run.lock import is_locked
from cifar_dist.run.results import EpochRecord, RunMetadata, Status, Summary

_ADVICE = "name another folder with --out"
_CONTENT = "content of the dataset"
# Columns of the table: heading, digits after the point, factor, and the name in `ReportedRun.measures`.
_MEASURES = (
    ("accuracy %", 2, 100, "top1"),
    ("loss", 4, 1, "loss"),
    ("training s", 1, 1, "train_seconds"),
    ("images/s", 0, 1, "images_per_second"),
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReportedRun:
    """The results of a run, and its metadata."""

    name: str
    """The name of its folder, or enough of its path to be unique among the reported runs."""
    path: Path
    metadata: RunMetadata
    summary: Summary
    records: Sequence[EpochRecord]

    @property
    def title(self) -> str:
        """Recipe, network if it is another one than the recipe's, dataset and seed."""
        recipe = self.metadata.recipe
        return f"{describe_recipe(self.metadata.recipe_name, recipe)} on {self.dataset_name}, seed {recipe.seed}"

    @property
    def dataset_name(self) -> str:
        """The name of the dataset, or of its folder."""
        return Path(self.metadata.dataset.name).name

    @property
    def experiment(self) -> dict[str, Any]:
        """The fields that the runs of one experiment share; they differ in the seed."""
        data, fields = self.metadata.dataset, flatten(recipe_to_mapping(self.metadata.recipe))
        del fields["seed"]
        fields |= {"device": self.summary.device, "precision": self.summary.precision, "dataset": data.name}
        return fields | {_CONTENT: data.fingerprint[:8]}

    @property
    def measures(self) -> dict[str, float | None]:
        """The values by which runs are compared; None where there is none yet."""
        seconds = sum(record.epoch_seconds for record in self.records)
        images = sum(record.images_per_second * record.epoch_seconds for record in self.records)
        test = self.summary.test
        return {
            "top1": None if test is None else test.top1,
            "loss": None if test is None else test.loss,
            "train_seconds": self.summary.train_seconds,
            "images_per_second": images / seconds if seconds else None,
        }


def read_run(path: Path, name: str) -> ReportedRun:
    """Read the results of a run. Raise UserError if there are none."""
    directory = RunDirectory(path)
    try:
        summary, records, metadata = directory.read_summary(), directory.read_records(), directory.read_metadata()
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from None
    if summary is None:
        raise UserError(f"the run in {path} has no summary.json: it has not begun to train")
    if summary.status == "running":  # summary.json is from the start of the run, or the run was killed
        seconds = max(summary.train_seconds, sum(record.epoch_seconds for record in records))
        epochs = records[-1].epoch if records else summary.epochs
        status: Status = "running" if is_locked(path) else "interrupted"
        summary = replace(summary, status=status, epochs=epochs, train_seconds=seconds)
    return ReportedRun(name=name, path=path, metadata=metadata, summary=summary, records=records)


def comparison_rows(runs: Sequence[ReportedRun]) -> list[list[str]]:
    """Return headings, a row for each run, and the mean and standard deviation over the seeds of each experiment."""
    rows = [["run", "status", "seed", "epochs", *(heading for heading, *_ in _MEASURES)]]
    for run in runs:
        numbers = [_format_mean([run.measures[name]], digits, factor) for _, digits, factor, name in _MEASURES]
        epochs = f"{run.summary.epochs}/{run.metadata.recipe.epochs}"
        rows.append([run.name, run.summary.status, str(run.metadata.recipe.seed), epochs, *numbers])
    for label, count, values in _seed_groups(runs):
        numbers = [_format_mean(values[name], digits, factor) for _, digits, factor, name in _MEASURES]
        rows.append([f"mean ± sd of {count} runs{label}", "", "", "", *numbers])
    return rows


def comparison_notes(runs: Sequence[ReportedRun]) -> list[str]:
    """Return notes on the table: the runs that are in no mean, with the reason, and the fields that differ."""
    notes = []
    for group in _same_experiment(runs):
        count = Counter(run.metadata.recipe.seed for run in group)
        if names := ", ".join(f"{run.name} (seed {s})" for run in group if count[s := run.metadata.recipe.seed] > 1):
            notes.append(f"no mean over these runs, which have the same recipe and the same seed: {names}")
    notes += [f"{run.name} is in no mean: {untested_note(run)}" for run in runs if run.summary.test is None]
    if differing := _differing_fields(runs):
        notes.append(f"the runs differ in {', '.join(differing)}")
    return notes


def untested_note(run: ReportedRun) -> str:
    """Describe an untested run, with the command that resumes it or tests its last checkpoint."""
    if run.summary.status == "interrupted":
        own_code = words_to_type(flatten(recipe_to_mapping(run.metadata.recipe)))
        world = ["--num-processes", run.summary.world_size] if run.summary.world_size > 1 else []
        return f"not at its end; resume with: {command_line(*world, '--resume', run.path, *own_code)}"
    command = command_line("eval", "--ckpt", run.path, *words_to_type({"model": run.metadata.recipe.model}))
    return f"not tested yet: {command}" if RunDirectory(run.path).last.exists() else "not tested yet"


def format_markdown(runs: Sequence[ReportedRun]) -> str:
    """Return the table and its notes in Markdown."""
    head, *rows = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in comparison_rows(runs)]
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "".join(f"\n{n}\n" for n in comparison_notes(runs))


def report_run(run: ReportedRun, out: Path | None, console: Console) -> None:
    """Write the figures and the page of a run, by default into its directory, and print its results."""
    directory = RunDirectory(run.path)
    figures, page = out or directory.figures, (out or run.path) / "report.html"
    saved = directory.read_predictions()
    with writing(figures, _ADVICE):
        write_run(run, saved, figures, page)
    lines = [run.title, format_outcome(run.summary, total_epochs=run.metadata.recipe.epochs)]
    if run.summary.test is not None:
        lines += format_evaluation(run.summary.test, split="test ")
    print_lines(console, [*lines, "", f"written: {page}, and its figures in {figures}"], title="report")
    # Outside of the panel, to be copied.
    print_notes(console, [run_font_note(run, out), untested_note(run) if run.summary.test is None else None])


def compare_runs(runs: Sequence[ReportedRun], out: Path | None, console: Console) -> None:
    """Print the table of several runs; with `out`, write it there too, with their curves and a page."""
    print_table(console, comparison_rows(runs))
    written = "--out DIR writes the curves, the table in Markdown, and a page"
    if out is not None:
        with writing(out, _ADVICE):
            written = f"written: {', '.join(write_comparison(runs, out))} in {out}"
    print_lines(console, [*comparison_notes(runs), written], title="report")
    if out is not None:
        from cifar_dist.display.figures import font_note

        again = command_line("report", *(run.path for run in runs), "--out", out)
        print_notes(console, [font_note([run.name for run in runs], again)])


def run_font_note(run: ReportedRun, out: Path | None = None) -> str | None:
    """Return a note if no font draws the class names in the run's figures, else None."""
    from cifar_dist.display.figures import font_note

    words = ["report", run.path, *(["--out", out] if out is not None else [])]
    return font_note([*run.metadata.class_names, run.dataset_name], command_line(*words))


def write_run(run: ReportedRun, saved: Mapping[str, NDArray[Any]] | None, figures: Path, page: Path | None) -> None:
    """Draw the figures of a run, and write its page if one is asked for; `saved` is its test_predictions.npz."""
    from cifar_dist.display.figures import draw_curves, draw_evaluation

    figures.mkdir(parents=True, exist_ok=True)
    summary, test, files = run.summary, run.summary.test, []
    if run.records:
        files.append(figures / "curves.png")
        early_stop = run.records[-1].epoch if summary.status == "early_stopped" else None
        marks = {"best epoch": summary.best_epoch, "early stop": early_stop}
        draw_curves({run.name: run.records}, files[0], title=run.title, marks=marks)
    if test is not None and saved is not None:
        files += draw_evaluation(figures, test, saved, title=run.title)
    if page is None:
        return
    standard, recipe = (flatten(recipe_to_mapping(each)) for each in (Recipe.load(), run.metadata.recipe))
    show = partial(json.dumps, ensure_ascii=False)
    changed = [
        f"{name}: {show(value)}  (standard: {show(standard.get(name))})"
        for name, value in recipe.items()
        if value != standard.get(name)
    ]
    data = run.metadata.dataset
    words = ["--recipe", run.path / "config.yaml", "--dataset", data.name]
    words += ["--data-dir", data.data_dir] if data.name in ("cifar10", "cifar100") else []
    words += ["--num-processes", summary.world_size] if summary.world_size > 1 else []
    texts = {
        "Most frequent confusions": "" if test is None else "\n".join(format_confusions(test, count=10)),
        "To run it again": command_line(*words, "--precision", summary.precision, *words_to_type(recipe)),
        "Recipe: differences from standard": "\n".join(changed),
        "config.yaml": RunDirectory(run.path).config.read_text(encoding="utf-8"),
    }
    notes = [
        f"{format_outcome(summary, total_epochs=run.metadata.recipe.epochs)}.",
        f"device: {summary.device}, precision: {FULL_NAMES[summary.precision]}, processes: {summary.world_size},"
        f" threads of each: {summary.num_threads}",
        *([untested_note(run)] if test is None else []),
    ]
    _write_page(page, files, title=run.title, table=comparison_rows([run]), notes=notes, texts=texts)


def write_comparison(runs: Sequence[ReportedRun], folder: Path) -> list[str]:
    """Write the curves of several runs, their table in Markdown, and a page; return the names of the files."""
    from cifar_dist.display.figures import draw_curves

    folder.mkdir(parents=True, exist_ok=True)
    title, figures, page = f"{len(runs)} runs", [], folder / "report.html"
    if any(run.records for run in runs):
        figures.append(folder / "curves.png")
        draw_curves({run.name: run.records for run in runs}, figures[0], title=title, marks={})
    table = folder / "report.md"
    write_output(table, format_markdown(runs).encode(errors="backslashreplace"))
    _write_page(page, figures, title=title, table=comparison_rows(runs), notes=comparison_notes(runs), texts={})
    return [path.name for path in (*figures, table, page)]


def _write_page(path: Path, figures: Sequence[Path], **content: Any) -> None:
    """Render report.html with embedded figures."""
    images = {file.stem: base64.b64encode(file.read_bytes()).decode() for file in figures}
    templates = jinja2.Environment(loader=jinja2.PackageLoader("cifar_dist", "display"), autoescape=True)
    page = templates.get_template("report.html").render(figures=images, **content)
    write_output(path, page.encode(errors="backslashreplace"))


def _same_experiment(runs: Sequence[ReportedRun]) -> list[list[ReportedRun]]:
    """Group the tested runs that differ in their seed at most."""
    groups: dict[str, list[ReportedRun]] = {}
    for run in runs:
        if run.summary.test is not None:
            groups.setdefault(str(sorted(run.experiment.items())), []).append(run)
    return list(groups.values())


def _seed_groups(runs: Sequence[ReportedRun]) -> list[tuple[str, int, dict[str, list[float | None]]]]:
    """Return a label, the number of runs and the values by field for each experiment with several seeds."""
    groups = [
        group for group in _same_experiment(runs) if len({run.metadata.recipe.seed for run in group}) == len(group) > 1
    ]
    differing, found = _differing_fields([group[0] for group in groups])[:3], []
    for group in groups:
        label = ", ".join(f"{name}={group[0].experiment.get(name)}" for name in differing)
        values = {name: [run.measures[name] for run in group] for *_, name in _MEASURES}
        if len({(run.summary.world_size, run.summary.num_threads) for run in group}) > 1:  # no mean of times
            values |= {"train_seconds": [], "images_per_second": []}
        found.append((f" ({label})" if label else "", len(group), values))
    return found


def _differing_fields(runs: Sequence[ReportedRun]) -> list[str]:
    """Return the names of the fields, seed apart, that have more than one value."""
    experiments = [run.experiment for run in runs]
    names = sorted({name for fields in experiments for name in fields})
    differing = [name for name in names if len({str(fields.get(name)) for fields in experiments}) > 1]
    # The fingerprint of a folder is that of its resized images.
    contents = {(fields["image_size"], fields[_CONTENT]) for fields in experiments}
    is_resized = len(contents) == len({size for size, _ in contents})
    return [name for name in differing if name != _CONTENT or not is_resized]


def _format_mean(values: Sequence[float | None], digits: int, factor: float) -> str:
    known = [factor * value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{statistics.mean(known):,.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):,.{digits}f}"
