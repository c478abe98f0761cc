"""`report`: what became of runs, side by side, with mean and standard deviation over them."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from cifar_dist.config.errors import EXIT_DONE, UserError
from cifar_dist.config.options import ReportOptions
from cifar_dist.config.parsing import flatten
from cifar_dist.config.world import AccelerateConfig, World
from cifar_dist.display.tables import format_duration, format_percent, format_table, print_lines
from cifar_dist.records import Summary
from cifar_dist.training.run_directory import RunDirectory


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    path: Path
    config: Mapping[str, Any]
    summary: Summary

    @property
    def cells(self) -> list[str]:
        """Give its line of the table."""
        test, recipe = self.summary.test, self.config["recipe"]
        return [
            str(self.path),
            self.summary.status,
            str(recipe["seed"]),
            f"{self.summary.epochs}/{recipe['epochs']}",
            format_percent(None if test is None else test.top1),
            "-" if test is None else f"{test.loss:.4f}",
            format_duration(self.summary.train_seconds),
        ]


def run(options: ReportOptions, world: World, config: AccelerateConfig) -> int:
    """Print the table; give the exit code."""
    runs = [_read(path) for path in options.run_dirs]
    if world.rank == 0:
        print_lines(Console(), _lines(runs), title="report")
    return EXIT_DONE


def _read(path: Path) -> _Run:
    """Read a run's own words. Raises UserError where there are none."""
    files = RunDirectory(path)
    if not files.holds_run:
        raise UserError(f"there is no run in {path}: name the folder that holds its summary.json")
    summary = files.read_summary()
    if summary is None:
        raise UserError(f"the run in {path} has no summary.json: it has not begun to train")
    return _Run(path=path, config=files.read_config(), summary=summary)


def _lines(runs: Sequence[_Run]) -> list[str]:
    names = ["run", "status", "seed", "epochs", "accuracy", "loss", "training"]
    lines = format_table([names, *(run.cells for run in runs)])
    tested = [run.summary.test for run in runs if run.summary.test is not None]
    if len(tested) > 1:
        seconds = [run.summary.train_seconds for run in runs if run.summary.test is not None]
        lines += [
            "",
            f"mean and standard deviation of {len(tested)} runs:",
            f"  accuracy {_spread([100 * test.top1 for test in tested], 2)} %",
            f"  loss     {_spread([test.loss for test in tested], 4)}",
            f"  training {_spread(seconds, 1)} s",
        ]
    if len(tested) < len(runs):
        lines.append(f"not tested yet, and not counted: {len(runs) - len(tested)}")
    if other := _differences(runs):
        lines.append(f"the runs differ in {', '.join(other)}")
    return lines


def _spread(values: Sequence[float], digits: int) -> str:
    """Give the mean and the standard deviation of a sample."""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def _differences(runs: Sequence[_Run]) -> list[str]:
    """Give the names of what the runs do not share, the seed apart: their mean says little then."""
    flat = [flatten(run.config["recipe"]) | {"dataset": run.config["dataset"]["name"]} for run in runs]
    names = sorted({name for one in flat for name in one} - {"seed"})
    return [name for name in names if len({str(one.get(name)) for one in flat}) > 1]
