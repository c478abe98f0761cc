"""The console, and what commands print on it: plain lines in a pipe or a file, panels and tables on a terminal."""

import contextlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cifar_dist.config.errors import printable
from cifar_dist.config.provenance import command_line
from cifar_dist.display.tables import format_evaluation, format_outcome, format_table
from cifar_dist.run.results import Summary


def make_console(*, quiet: bool = False, stderr: bool = False) -> Console:
    """Build the console for stdout or stderr. `FORCE_COLOR` colours a pipe, and animates nothing there."""
    console = Console(quiet=quiet, stderr=stderr, emoji=False, highlight=False)
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
    """Print lines; on a terminal in a panel with a title."""
    if can_draw(console):
        text = Group(*(Text(printable(line)) for line in lines))
        console.print(Panel(text, title=Text(printable(title)), border_style="green", expand=False))
        return
    for line in lines:
        console.print(Text(printable(line)), soft_wrap=True)


def print_table(console: Console, rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells below a row of headings; a narrow terminal wraps cells, not rows."""
    if not can_draw(console):
        print_notes(console, format_table(rows))
        return
    table = Table(*rows[0], box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
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


def print_result(console: Console, summary: Summary, total_epochs: int, directory: Path) -> None:
    """Print the outcome and the test of a run, and the commands that may follow."""
    assert summary.test is not None
    outcome = format_outcome(summary, total_epochs=total_epochs)
    print_lines(console, [outcome, *format_evaluation(summary.test, split="test ")], title="result")
    commands = (
        ["report", directory],
        ["predict", "--ckpt", directory, "IMAGE"],
        ["export", "--ckpt", directory, "--out", "model.pth"],
    )
    print_notes(console, ["next:", *(f"  {command_line(*words)}" for words in commands)])  # no panel: to be copied
