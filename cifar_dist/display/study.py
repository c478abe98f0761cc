"""A study of `tune`: its progress, the table of the best trials, and its figures."""

import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cifar_dist.config.errors import printable
from cifar_dist.config.provenance import command_line
from cifar_dist.display.progress import Display
from cifar_dist.display.terminal import can_draw, format_percent, format_table, print_lines, print_notes
from cifar_dist.run.results import EpochRecord
from cifar_dist.run.study import best_trial

_ENDS = {"COMPLETE": "completed", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}
_LIVE_TRIALS, _REPORTED_TRIALS = 5, 10
_LEAST_FOR_IMPORTANCES = 4


def format_value(value: Any) -> str:
    """Return the value of a field with three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def format_values(values: Mapping[str, Any]) -> str:
    """Return values with the names of their fields."""
    return "  ".join(f"{name.rpartition('.')[2]} {format_value(value)}" for name, value in values.items())


def trial_rows(trials: Sequence[Any], most: int) -> list[list[str]]:
    """Return headings and a row for each of the best trials: completed ones by value, then pruned ones, then others."""
    order = {"COMPLETE": 0, "PRUNED": 1}
    ordered = sorted(trials, key=lambda each: (order.get(each.state.name, 2), -(each.value or 0.0), each.number))[:most]
    names = list(dict.fromkeys(name for each in ordered for name in each.params))
    rows = [["trial", "status", "val acc", "epochs", *(name.rpartition(".")[2].replace("_", " ") for name in names)]]
    for each in ordered:
        values = [format_value(each.params[name]) if name in each.params else "-" for name in names]
        best = max(each.intermediate_values.values(), default=None)
        epochs = str(max(each.intermediate_values, default=0))
        rows.append([str(each.number), _ENDS[each.state.name], format_percent(each.value or best), epochs, *values])
    return rows


class StudyView(Display):
    """Print a line for each trial that begins or ends; the base of the live view."""

    def __init__(self, console: Console, trials: Callable[[], Sequence[Any]]) -> None:
        super().__init__(console)
        self.trials = trials
        self._has_waited = False

    def on_start(self, number: int, values: Mapping[str, Any], *, is_taken_over: bool) -> None:
        """A trial begins, or goes on after its worker was gone."""
        self.on_note(f"trial {number} {'goes on' if is_taken_over else 'begins'}: {format_values(values)}")

    def on_epoch(self, number: int, record: EpochRecord, epochs: int) -> None:
        """An epoch of the trial is done."""
        accuracy = format_percent(record.val_acc)
        self.heartbeat(lambda: f"trial {number}: epoch {record.epoch}/{epochs}  val acc {accuracy}")

    def on_end(self, number: int) -> None:
        """The trial has ended."""
        self.on_note(self.describe_end(number))

    def describe_end(self, number: int) -> str:
        """Return how a trial ended, and which one is the best so far."""
        trials = self.trials()
        trial, best = trials[number], best_trial(trials)
        value = "" if trial.value is None else f", val acc {trial.value:.2%}"
        reason = f": {trial.user_attrs['reason']}" if "reason" in trial.user_attrs else ""
        best_text = "" if best is None else f"  (best: trial {best.number}, {best.value:.2%})"
        return f"trial {number} {_ENDS[trial.state.name]}{value}{reason}{best_text}"

    def on_wait(self, numbers: Sequence[int]) -> None:
        """No trial is left but those of other workers."""
        if not self._has_waited:
            self.on_note(f"waiting for the trials of other workers: {', '.join(map(str, numbers))}")
        self._has_waited = True


class LiveStudy(StudyView):
    """Draw the best trials and the running one; failures stay above as lines."""

    def __init__(self, console: Console, trials: Callable[[], Sequence[Any]]) -> None:
        super().__init__(console, trials)
        self._rows, self._running = trial_rows(trials(), _LIVE_TRIALS), ""
        self._live = Live(self, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the table and the trial in progress."""
        if len(self._rows) > 1:
            yield make_table(console, self._rows)
        yield Text(self._running, overflow="ellipsis", no_wrap=True)

    def on_start(self, number: int, values: Mapping[str, Any], *, is_taken_over: bool) -> None:
        """Show the trial below the table."""
        self._running = printable(f"trial {number}: {format_values(values)}")

    def on_epoch(self, number: int, record: EpochRecord, epochs: int) -> None:
        """Show the epoch."""
        self._running = f"trial {number}: epoch {record.epoch}/{epochs}  val acc {format_percent(record.val_acc)}"

    def on_end(self, number: int) -> None:
        """Update the table, and print a failure."""
        trials = self.trials()
        self._rows = trial_rows([each for each in trials if each.state.is_finished()], _LIVE_TRIALS)
        if trials[number].state.name == "FAIL":
            self.on_note(self.describe_end(number))


def make_table(console: Console, rows: Sequence[Sequence[str]]) -> Table | Text:
    """Build the table of a terminal; its first row is the best. In a narrow one, a trial's fields are below it."""
    table = Table(*rows[0], box=None, padding=(0, 1), collapse_padding=True, pad_edge=False, header_style="bold")
    longest = [max(map(len, cells), default=0) for _, *cells in zip(*rows, strict=True)]
    one_line = sum(max(len(head), cell) + 1 for head, cell in zip(rows[0], longest, strict=True))
    for column, head, cell in zip(table.columns, rows[0], longest, strict=True):
        column.justify = "right"
        if one_line > console.width:  # the headings are broken at their spaces
            column.width = max(cell, *map(len, head.split()))
    for index, row in enumerate(rows[1:]):
        table.add_row(*row, style="bold green" if index == 0 and row[1] == "completed" else None)
    if sum((column.width or 0) + 1 for column in table.columns) <= console.width:
        return table
    lines = []
    for number, status, accuracy, epochs, *values in rows[1:]:
        lines.append(f"trial {number}  {status}  val acc {accuracy}  epochs {epochs}")
        fields = (f"{name} {value}".replace(" ", "\xa0") for name, value in zip(rows[0][4:], values, strict=True))
        lines += textwrap.wrap("  ".join(fields), console.width, initial_indent="  ", subsequent_indent="  ")
    return Text("\n".join(lines).replace("\xa0", " "))


def study_view(console: Console, trials: Callable[[], Sequence[Any]]) -> StudyView:
    """Build the view of a study for this console."""
    return (LiveStudy if can_draw(console) else StudyView)(console, trials)


def print_study(console: Console, trials: Sequence[Any], path: Path, dataset: str, own_model: Sequence[str]) -> None:
    """Print the best trials, how many ended how, the reasons of failures, and the commands that may follow.

    `own_model` are the arguments that name a network of the user's own.
    """
    rows = trial_rows(trials, _REPORTED_TRIALS)
    if can_draw(console):
        console.print(make_table(console, rows))
    else:
        print_notes(console, format_table(rows))
    counts = {word: sum(each.state.name == name for each in trials) for name, word in _ENDS.items()}
    total = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    failed = [
        f"trial {each.number} failed: {each.user_attrs.get('reason')}" for each in trials if each.state.name == "FAIL"
    ]
    print_lines(console, [f"{len(trials)} trials: {total}", *failed[-_LIVE_TRIALS:]], title="study")
    if (best := best_trial(trials)) is not None:
        commands: list[list[Any]] = [
            ["report", path],
            ["--resume", path / "trials" / f"{best.number:04}", *own_model],
            ["--recipe", path / "best.yaml", "--dataset", dataset, "--seed", 1],
        ]
        hints = ("draw the figures", "test the best trial", "train its recipe with another seed")
        lines = [f"  {command_line(*words)}    {hint}" for words, hint in zip(commands, hints, strict=True)]
        print_notes(console, ["next:", *lines])


def draw_study(study: Any, folder: Path) -> Iterator[str]:
    """Draw history.png, importances.png and slices.png, as far as there are trials enough. Yield their names."""
    import matplotlib.pyplot as plt
    from optuna import visualization
    from optuna.exceptions import ExperimentalWarning
    from optuna.importance import PedAnovaImportanceEvaluator

    completed = [each for each in study.get_trials(deepcopy=False) if each.state.name == "COMPLETE"]
    plots: dict[str, Callable[[], Any]] = {
        "history": lambda: visualization.matplotlib.plot_optimization_history(study, target_name="validation accuracy"),
        "importances": lambda: visualization.matplotlib.plot_param_importances(
            study, evaluator=PedAnovaImportanceEvaluator(), target_name="validation accuracy"
        ),
        "slices": lambda: visualization.matplotlib.plot_slice(study, target_name="validation accuracy"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, plot in plots.items():
        if not completed or (name == "importances" and len(completed) < _LEAST_FOR_IMPORTANCES):
            continue
        with warnings.catch_warnings(), plt.rc_context():
            warnings.simplefilter("ignore", ExperimentalWarning)
            plt.switch_backend("agg")
            plot()
            figure = plt.gcf()
            figure.suptitle("")
            _tidy(figure.axes, has_accuracies=name != "importances")
            figure.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")
            plt.close(figure)
        yield f"{name}.png"


def _tidy(axes: Sequence[Any], *, has_accuracies: bool) -> None:
    """Shorten the names of fields, remove labels between powers of ten, turn words, and show accuracies in percent."""
    for each in axes:
        each.set_xlabel(each.get_xlabel().rpartition(".")[2])
        if each.get_xscale() == "log":
            each.xaxis.set_minor_formatter("")
        names = [label.get_text() for label in each.get_xticklabels()]
        if any(name.startswith("'") for name in names):  # a categorical field
            each.set_xticks(each.get_xticks(), [name.strip("'") for name in names], rotation=30, ha="right")
        if has_accuracies and each.get_ylabel() != "Trial":
            each.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
