"""Runs side by side: a row each, and the mean with its standard deviation over the seeds of one experiment."""

import csv
import io
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_dist.config.provenance import command_line
from cifar_dist.config.schema import flatten
from cifar_dist.run.results import EpochRecord, Summary
from cifar_dist.run.run_files import RunFiles

_FACTS = ("run", "status", "seed", "epochs")
# What is measured: the heading for people, the digits after the point, the factor, and the field of the CSV.
_MEASURES = (
    ("accuracy %", 2, 100, "top1"),
    ("loss", 4, 1, "loss"),
    ("training s", 1, 1, "train_seconds"),
    ("images/s", 0, 1, "images_per_second"),
)
_CSV_FACTS = (
    "top5",
    "recipe",
    "dataset",
    "best_epoch",
    "device",
    "precision",
    "world_size",
    "num_threads",
    "git_commit",
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReportedRun:
    """What a run says of itself."""

    path: Path
    config: Mapping[str, Any]
    summary: Summary
    records: Sequence[EpochRecord]

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The whole resolved recipe."""
        recipe: Mapping[str, Any] = self.config["recipe"]
        return recipe

    @property
    def dataset(self) -> str:
        """The dataset's name, of a folder its own."""
        return Path(str(self.config["dataset"]["name"])).name

    @property
    def title(self) -> str:
        """Which experiment it is."""
        return f"{self.config.get('recipe_name', 'recipe')} on {self.dataset}, seed {self.recipe['seed']}"

    @property
    def experiment(self) -> Mapping[str, Any]:
        """What it shares with the runs of other seeds."""
        summary, data = self.summary, self.config["dataset"]
        fields = flatten(self.recipe) | {"device": summary.device, "precision": summary.precision}
        fields |= {"dataset": data["name"], "content of the dataset": str(data.get("fingerprint"))[:8]}
        return {name: value for name, value in fields.items() if name != "seed"}

    @property
    def facts(self) -> dict[str, Any]:
        """What is known of it, one value a name."""
        test, summary = self.summary.test, self.summary
        seconds = sum(record.epoch_seconds for record in self.records)
        images = sum(record.images_per_second * record.epoch_seconds for record in self.records)
        return {
            "run": str(self.path),
            "status": summary.status,
            "seed": self.recipe["seed"],
            "epochs": f"{summary.epochs}/{self.recipe['epochs']}",
            "top1": None if test is None else test.top1,
            "top5": None if test is None else test.top5,
            "loss": None if test is None else test.loss,
            "train_seconds": summary.train_seconds,
            "images_per_second": images / seconds if seconds else None,
            "recipe": self.config.get("recipe_name"),
            "dataset": self.dataset,
            "best_epoch": summary.best_epoch,
            "device": summary.device,
            "precision": summary.precision,
            "world_size": summary.world_size,
            "num_threads": summary.num_threads,
            "git_commit": self.config.get("git_commit"),
        }


def short_names(runs: Sequence[ReportedRun]) -> list[str]:
    """Give the folders' own names where they tell the runs apart, else their paths below the folder of all."""
    paths = [run.path.resolve() for run in runs]
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [os.path.relpath(path, os.path.commonpath(paths)) for path in paths]
    return names


def comparison_rows(runs: Sequence[ReportedRun]) -> list[list[str]]:
    """Give the table for people: headings, a row a run, and a row for each experiment with several tested runs."""
    rows = [[*_FACTS, *(heading for heading, *_ in _MEASURES)]]
    for name, run in zip(short_names(runs), runs, strict=True):
        facts = run.facts | {"run": name}
        cells = (_number(facts[field], digits, factor) for _, digits, factor, field in _MEASURES)
        rows.append([*(str(facts[fact]) for fact in _FACTS), *cells])
    for label, count, values in _experiments(runs):
        cells = (_spread(values[field], digits, factor) for _, digits, factor, field in _MEASURES)
        rows.append([f"mean ± sd of {count} runs{label}", "", "", "", *cells])
    return rows


def comparison_notes(runs: Sequence[ReportedRun]) -> list[str]:
    """Say what a reader of the table must know."""
    notes = []
    if _experiments(runs):
        notes.append("sd: the standard deviation over runs of the same recipe that differ in their seed")
    name_of = dict(zip(map(id, runs), short_names(runs), strict=True))
    for group in filter(_share_a_seed, _alike(runs)):
        seeds = [run.recipe["seed"] for run in group]
        twice = [
            f"{name_of[id(run)]} (seed {seed})" for run, seed in zip(group, seeds, strict=True) if seeds.count(seed) > 1
        ]
        notes.append(f"no mean over these runs, which have the same recipe and the same seed: {', '.join(twice)}")
    notes += [f"{name_of[id(run)]}, in no mean, is {untested(run)}" for run in runs if run.summary.test is None]
    if names := differences(runs):
        notes.append(f"the runs differ in {', '.join(names)}")
    return notes


def untested(run: ReportedRun) -> str:
    """Return that a run is not tested yet, with the command that tests its last checkpoint, if it has one."""
    command = command_line("eval", "--ckpt", run.path)
    return f"not tested yet: {command}" if RunFiles(run.path).last.exists() else "not tested yet"


def differences(runs: Sequence[ReportedRun]) -> list[str]:
    """Give the names of what the runs do not share, the seed apart."""
    flat = [run.experiment for run in runs]
    names = sorted({name for one in flat for name in one})
    return [name for name in names if len({str(one.get(name)) for one in flat}) > 1]


def format_csv(runs: Sequence[ReportedRun]) -> str:
    """Give the table for programs: numbers in full, accuracies as fractions of 1, and nothing where there is none."""
    measures = [field for *_, field in _MEASURES]
    file = io.StringIO()
    writer = csv.DictWriter(file, [*_FACTS, *measures, *_CSV_FACTS], lineterminator="\n")
    writer.writeheader()
    for run in runs:
        writer.writerow(run.facts | {"epochs": run.summary.epochs})
    for label, count, values in _experiments(runs):
        for name, reduce in (("mean", statistics.mean), ("standard deviation", statistics.stdev)):
            numbers = {field: reduce(values[field]) for field in measures if len(values[field]) > 1}
            writer.writerow({"run": f"{name} of {count} runs{label}", **numbers})
    return file.getvalue()


def format_markdown(runs: Sequence[ReportedRun]) -> str:
    """Give the table in Markdown."""
    head, *rows = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in comparison_rows(runs)]
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *rows]
    notes = [f"\n{note}" for note in comparison_notes(runs)]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), *notes]) + "\n"


def _alike(runs: Sequence[ReportedRun]) -> list[list[ReportedRun]]:
    """Put the tested runs that differ in their seed at most together."""
    tested: dict[str, list[ReportedRun]] = {}
    for run in runs:
        if run.summary.test is not None:
            tested.setdefault(str(sorted(run.experiment.items())), []).append(run)
    return list(tested.values())


def _share_a_seed(group: Sequence[ReportedRun]) -> bool:
    return len({run.recipe["seed"] for run in group}) < len(group)


def _experiments(runs: Sequence[ReportedRun]) -> list[tuple[str, int, dict[str, list[float]]]]:
    """Give each experiment that several runs have tested: what tells it from the others, runs, values by field."""
    found, several = [], [group for group in _alike(runs) if len(group) > 1 and not _share_a_seed(group)]
    names = differences([group[0] for group in several])
    for group in several:
        told = ", ".join(f"{name}={group[0].experiment.get(name)}" for name in names[:3])
        facts = [run.facts for run in group]
        values = {field: [one[field] for one in facts if one[field] is not None] for *_, field in _MEASURES}
        if len({(one["world_size"], one["num_threads"]) for one in facts}) > 1:  # it trains the same, at another speed
            values |= {"train_seconds": [], "images_per_second": []}
        found.append((f" ({told})" if told else "", len(group), values))
    return found


def _number(value: float | None, digits: int, factor: float) -> str:
    return "-" if value is None else f"{factor * value:,.{digits}f}"


def _spread(values: Sequence[float], digits: int, factor: float) -> str:
    if len(values) < 2:
        return "-"
    mean, deviation = factor * statistics.mean(values), factor * statistics.stdev(values)
    return f"{mean:,.{digits}f} ± {deviation:,.{digits}f}"
