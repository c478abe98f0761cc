"""Terminal output: the console, notes, tables and results."""

import contextlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

from cifar_dist.config.errors import printable
from cifar_dist.config.provenance import command_line
from cifar_dist.run.directory import RunDirectory
from cifar_dist.run.results import EpochRecord, Evaluation, Summary

# The terminal's own colours, which can be read on its background; Rich's bars have fixed ones.
THEME = Theme(
    {
        "bar.back": "dim",
        "bar.complete": "green",
        "bar.finished": "green",
        "bar.pulse": "green",
        "progress.download": "default",
        "progress.remaining": "default",
    }
)


def format_percent(fraction: float | None) -> str:
    """Return a fraction of 1 as a percentage with two decimals, or a dash for None."""
    return "-" if fraction is None else f"{fraction:.2%}"


def format_duration(seconds: float) -> str:
    """Return a duration in at most two units: `9.8 s`, `5 min 56 s`, `2 h 1 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole, minutes = round(seconds), round(seconds / 60)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{minutes // 60} h {minutes % 60} min"


def format_epoch(record: EpochRecord, epochs: int, *, is_best: bool, end: str = "") -> str:
    """Return an epoch as one line; `end` is the expected end of the training."""
    width = len(str(epochs))
    parts = [f"epoch {record.epoch:>{width}}/{epochs}", f"loss {record.train_loss:.3f}", f"acc {record.train_acc:6.2%}"]
    if record.val_loss is not None and record.val_acc is not None:
        parts += [f"val loss {record.val_loss:.3f}", f"val acc {record.val_acc:6.2%}"]
    parts += [f"lr {record.lr:.4g}", f"{record.images_per_second:,.0f} images/s", format_duration(record.epoch_seconds)]
    parts += [f"ends about {end}"] if end else []
    return "  ".join(parts) + ("  best" if is_best else "")


def format_outcome(summary: Summary, *, total_epochs: int) -> str:
    """Return how a run ended and how long it trained."""
    long = {"completed": "Training completed", "early_stopped": "Early stopping triggered: training ended"}
    outcome = long.get(summary.status, summary.status.capitalize())
    best = "" if summary.best_epoch is None else f", best epoch {summary.best_epoch}"
    epochs = f"{summary.epochs} of {total_epochs} epoch{'s' if total_epochs > 1 else ''}"
    return f"{outcome} after {epochs} in {format_duration(summary.train_seconds)}{best}"


def format_evaluation(evaluation: Evaluation, *, split: str = "") -> list[str]:
    """Return an evaluation as lines: totals, a bar for each class, and the most frequent confusions.

    Of more than 20 classes the 10 worst are shown.
    """
    accuracies = dict(evaluation.per_class_accuracy)
    lines = [_format_totals(evaluation, split), ""]
    names = list(accuracies)
    if len(names) > 20:
        known = [name for name in names if accuracies[name] is not None]
        names = sorted(known, key=lambda name: accuracies[name] or 0.0)[:10]
        lines.append(f"the {len(names)} worst of {len(accuracies)} classes:")
    width = max(map(cell_len, names))
    for name in names:
        bar = "█" * int(20 * (accuracies[name] or 0.0))
        line = f"{name}{' ' * (width - cell_len(name))}  {format_percent(accuracies[name]):>7}  {bar}"
        lines.append(line.rstrip())
    confusions = format_confusions(evaluation, count=3)
    return [*lines, "", "most frequent confusions:", *confusions] if confusions else lines


def _format_totals(evaluation: Evaluation, split: str) -> str:
    """Return the accuracy, from 11 classes on also the top-5 accuracy, and the loss."""
    top5 = f", top-5 {format_percent(evaluation.top5)}" if len(evaluation.per_class_accuracy) > 10 else ""
    totals = f"accuracy {format_percent(evaluation.top1)}{top5}, loss {evaluation.loss:.4f}"
    return f"{split}{totals} on {evaluation.num_samples:,} images"


def format_worst_classes(evaluation: Evaluation, *, count: int) -> list[str]:
    """Return the classes with the lowest accuracies, each with a class that it is taken for most often."""
    names, found = list(evaluation.per_class_accuracy), []
    for i, row in enumerate(evaluation.confusion_matrix):
        others = [(n, name) for name, n in zip(names, row, strict=True) if name != names[i]]
        wrong, other = max(others, default=(0, ""))
        if wrong:
            mistakes, is_alone = sum(n for n, _ in others), [n for n, _ in others].count(wrong) == 1
            words = f"{'most often ' if is_alone and wrong < mistakes else ''}taken for {other}"
            shown, words = (wrong, words) if is_alone else (mistakes, f"{words} and others")
            found.append((row[i] / sum(row), names[i], f"{words} ({shown:,} of {sum(row):,})"))
    worst = sorted(found)[:count]
    width = max((cell_len(name) for _, name, _ in worst), default=0)
    return [
        f"{name}{' ' * (width - cell_len(name))}  {format_percent(share):>7}  {words}" for share, name, words in worst
    ]


def format_confusions(evaluation: Evaluation, *, count: int) -> list[str]:
    """Return the most frequent confusions of two classes, by the share of the true class's images."""
    names = list(evaluation.per_class_accuracy)
    found = []
    for i, row in enumerate(evaluation.confusion_matrix):
        found += [(n / sum(row), n, sum(row), names[i], names[j]) for j, n in enumerate(row) if n and i != j]
    found.sort(key=lambda each: -each[0])
    return [
        f"{share:6.1%} of {true} taken for {other} ({n:,} of {of:,})" for share, n, of, true, other in found[:count]
    ]


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as aligned lines: the first column to the left, the others to the right."""
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        spaces = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [space + cell for cell, space in zip(row[1:], spaces[1:], strict=True)]
        lines.append("  ".join([row[0] + spaces[0], *cells]))
    return lines


def format_bench(result: Mapping[str, Any]) -> list[str]:
    """Return what `bench` measured: rates, our loop over the bare step with its spread, and the parts of a step."""
    ratio = f"{result['loop_over_bare']:.3f} x as fast ({result['loop_over_bare_min']:.3f} to"
    rows = [
        ["bare step", f"{result['bare_step_images_per_second']:,.0f} images/s"],
        ["our loop", f"{result['loop_images_per_second']:,.0f} images/s"],
    ]
    how = "each given to the GPU by itself, not replayed, and" if result["compiler"] == "CUDAGRAPHS" else "each"
    parts: Mapping[str, float] = result["seconds_by_part"]
    return [
        *format_table(rows),
        f"our loop is {ratio} {result['loop_over_bare_max']:.3f} in {result['rounds']} rounds)",
        "",
        f"milliseconds a step, by part, {how} waited for:",
        *(f"{name:<14}{1000 * each:>9.2f}  {each / sum(parts.values()):>6.1%}" for name, each in parts.items()),
        *([f"peak memory: {result['peak_memory_mib']:,} MiB"] if result["peak_memory_mib"] is not None else []),
    ]


def make_console(*, quiet: bool = False, stderr: bool = False) -> Console:
    """Build the console for stdout or stderr. `FORCE_COLOR` colours a pipe, and animates nothing there."""
    console = Console(quiet=quiet, stderr=stderr, emoji=False, highlight=False, theme=THEME)
    with contextlib.suppress(ValueError, AttributeError):  # a closed stream, or none
        console.is_interactive = console.is_interactive and (console.is_jupyter or console.file.isatty())
    return console


def can_draw(console: Console) -> bool:
    """Return whether this is a terminal with a movable cursor."""
    return console.is_interactive and console.is_terminal and not console.is_dumb_terminal


def print_error(text: str) -> None:
    """Print a line on stderr."""
    print(text, file=sys.stderr, flush=True)


def print_notes(console: Console, notes: Iterable[str | None]) -> None:
    """Print each note as one line, without wrapping; None and an empty note print nothing."""
    for note in filter(None, notes):
        console.print(Text(printable(note)), soft_wrap=True)


def print_lines(console: Console, lines: Sequence[str], *, title: str) -> None:
    """Print lines; on a terminal in a panel with a title, which is in the panel if it is too long for the border."""
    if can_draw(console):
        name, texts = Text(printable(title)), [Text(printable(line)) for line in lines]
        fits = name.cell_len <= console.width - 6
        text = Group(*texts) if fits else Group(name, Text(), *texts)
        console.print(Panel(text, title=name if fits else None, border_style="green", expand=False))
        return
    for line in lines:
        console.print(Text(printable(line)), soft_wrap=True)


def print_table(console: Console, rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells below a row of headings; where they do not fit, a block of lines for each row."""
    if not can_draw(console):
        print_notes(console, format_table(rows))
        return
    first, *others = zip(*rows, strict=True)
    needed = max(cell_len(word) for cell in first for word in cell.split())  # the first column may wrap
    needed += sum(1 + max(map(cell_len, column)) for column in others)
    if needed > console.width:
        width = max(map(len, rows[0]))
        for name, *cells in rows[1:]:
            console.print(Text(printable(name), style="bold"))
            named = zip(rows[0][1:], cells, strict=True)
            print_notes(console, [f"  {heading:<{width}}  {cell}" for heading, cell in named if cell])
        return
    table = Table(*rows[0], box=None, pad_edge=False, collapse_padding=needed + len(others) > console.width)
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for row in rows[1:]:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)


def print_header(console: Console, values: Mapping[str, str]) -> None:
    """Print aligned names and values; a terminal wraps a long value and indents it."""
    if not can_draw(console):
        width = max(map(len, values)) + 2
        print_notes(console, [f"{name:<{width}}{value}" for name, value in values.items()])
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in values.items():
        grid.add_row(name, Text(printable(value)))
    console.print(grid)


def print_result(
    console: Console,
    summary: Summary,
    total_epochs: int,
    directory: Path,
    own_model: Sequence[str] = (),
    font_note: str | None = None,
) -> None:
    """Print the test of a run, its worst classes and how it ended, its figures, and the commands that may follow.

    `own_model` are the arguments that name a network of the user's own.
    """
    outcome = format_outcome(summary, total_epochs=total_epochs)
    if summary.test is None:
        test = command_line("eval", "--ckpt", directory, *own_model)
        print_notes(console, [outcome, f"not tested, as --skip-test asks; test it with: {test}"])
        return
    worst, figures = format_worst_classes(summary.test, count=3), RunDirectory(directory).figures
    lines = [_format_totals(summary.test, "test "), outcome, *(["", "worst classes:", *worst] if worst else [])]
    print_lines(console, lines, title="result")
    commands = (["predict", "--ckpt", directory, "IMAGE", *own_model], ["report", directory])
    print_notes(console, [f"pictures: {figures}" if any(figures.glob("*.png")) else None, font_note])
    print_notes(console, ["next:", *(f"  {command_line(*words)}" for words in commands)])  # no panel: to be copied
