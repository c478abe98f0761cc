"""What a person sees on a terminal while a run trains: where it is, the last epochs, and how long it will take."""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Self, TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from cifar_dist.config.plan import RunPlan
from cifar_dist.display.console import can_draw
from cifar_dist.display.progress import Display, ExpectedEnd, PlainTraining
from cifar_dist.display.tables import format_duration
from cifar_dist.run.results import EpochRecord

_NUM_EPOCHS = 6
_WIDE = 80  # columns of a terminal, from which on numbers have room beside the bars

# Headings, and how an epoch is shown.
_COLUMNS: dict[str, Callable[[EpochRecord], str]] = {
    "epoch": lambda record: str(record.epoch),
    "train loss": lambda record: f"{record.train_loss:.3f}",
    "train acc": lambda record: f"{record.train_acc:.2%}",
    "val loss": lambda record: "-" if record.val_loss is None else f"{record.val_loss:.3f}",
    "val acc": lambda record: "-" if record.val_acc is None else f"{record.val_acc:.2%}",
    "lr": lambda record: f"{record.lr:.4g}",
    "images /s": lambda record: f"{record.images_per_second:,.0f}",
    "time": lambda record: format_duration(record.epoch_seconds),
}
_LEFT_OUT_FIRST = ("time", "lr", "images /s", "val loss", "train acc")  # where the terminal is too narrow


class _WhereWide(TextColumn):
    """Text beside a bar, where the terminal has room for both."""

    def __init__(self, console: Console) -> None:
        super().__init__("{task.fields[shown]}")
        self.console = console

    def render(self, task: Task) -> Text:
        """Give the text, or nothing."""
        return super().render(task) if self.console.width >= _WIDE else Text("")


class LiveTraining(Display):
    """The last epochs and bars, redrawn in place; what is printed meanwhile goes above."""

    def __init__(
        self, console: Console, plan: RunPlan, recipe_name: str, facts: str, memory: Callable[[], int | None]
    ) -> None:
        super().__init__(console)
        self.plan, self.facts, self.memory = plan, facts, memory
        self.end = ExpectedEnd(plan, recipe_name)
        self.epochs: list[EpochRecord] = []
        self.best: EpochRecord | None = None
        self.epoch, self.rate, self.used = 0, 0.0, memory()
        self._lr, self._started, self._first_step, self._evaluated = 0.0, 0.0, 0, 0
        self._has_begun, self._loss = False, ""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
            MofNCompleteColumn(),
            _WhereWide(console),
            TimeRemainingColumn(compact=True),
        )
        self.progress = Progress(*columns, console=console, expand=True)
        self.run = self.progress.add_task("run", total=plan.total_steps, shown="steps")
        self.steps = self.progress.add_task("epoch", total=None, shown="the first step is on its way")
        self.evaluation = self.progress.add_task("evaluation", total=1, shown="images", visible=False)
        # Redrawn once a second: drawing takes some milliseconds of Python's time.
        self.live = Live(self, console=console, refresh_per_second=1, transient=True)
        self._redirected = ExitStack()

    def __enter__(self) -> Self:
        streams = sys.stdout, sys.stderr
        self.live.start()  # from now on what is printed goes above the view
        self._redirected.enter_context(_logs_of(streams, sys.stderr))
        return self

    def __exit__(self, *error: object) -> None:
        self._redirected.close()
        self.live.stop()
        if self.epochs:
            self.console.print(self._table(self.console.width, len(self.epochs)))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw what fits: rows and columns of the table go first, and the space around it."""
        height = (options.height or console.height) - 6
        yield from self._space(height)
        yield self._facts(options.max_width)
        if self.epochs:
            yield self._table(options.max_width, max(1, height))
            yield from self._space(height)
        yield self.progress

    def _space(self, height: int) -> list[Text]:
        """Give an empty line, where besides the whole table there is room for two."""
        return [Text()] if height >= _NUM_EPOCHS + 2 else []

    def _facts(self, width: int) -> Text:
        """What changes comes first: a narrow terminal cuts off the end, which the header has said."""
        parts = [self._loss] if width < _WIDE else []  # else it is beside the bar
        parts += [f"end {self.end.text}"] if self.end.text else []
        parts += [f"{self.rate:,.0f} images/s"] if self.rate else []
        parts += [f"{self.used:,} MiB"] if self.used is not None else []
        return Text(" · ".join(filter(None, [*parts, self.facts])), style="dim", overflow="ellipsis", no_wrap=True)

    def _table(self, width: int, rows: int) -> Table:
        """Show the last epochs, and the best one, which may lie further back."""
        shown = self.epochs[-min(rows, _NUM_EPOCHS) :]
        if self.best is not None and self.best not in shown:
            shown = [self.best, *shown[1:]]
        names = [name for name in _COLUMNS if self.plan.num_validation or not name.startswith("val")]
        table, left_out = self._table_of(names, shown), list[str]()
        unlimited = self.console.options.update(max_width=1000)
        for name in ("", *_LEFT_OUT_FIRST):
            if self.console.measure(table, options=unlimited).maximum <= width:
                break
            left_out += [name] if name in names else []
            kept = [each for each in names if each not in left_out]
            table = self._table_of(kept, shown[-max(1, rows - 1 - bool(left_out)) :], tight=True)
        if left_out:
            missing = ", ".join(left_out).replace(" /", "/")
            table.caption = Text(f"too narrow for {missing}", style="dim", no_wrap=True, overflow="ellipsis")
        return table

    def _table_of(self, names: Sequence[str], records: Sequence[EpochRecord], *, tight: bool = False) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold", collapse_padding=tight, caption_justify="left")
        for name in names:
            heading = name.replace(" ", "\n") if tight else name.replace(" /", "/")
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for record in records:
            is_best = record is self.best
            cells = [_COLUMNS[name](record) for name in names]
            table.add_row(*cells, "best" if is_best else "", style="bold green" if is_best else None)
        return table

    def on_earlier_epochs(self, records: Sequence[EpochRecord], best_epoch: int | None) -> None:
        """Begin the table with what was done before."""
        self.epochs = list(records)
        self.best = next((record for record in records if record.epoch == best_epoch), None)

    def on_epoch_start(self, epoch: int, lr: float) -> None:
        """Begin a new bar."""
        self.epoch, self._lr, self._started, self._first_step = epoch, lr, time.monotonic(), 0
        self.end.on_epoch_start()
        total = self.plan.steps_per_epoch if self._has_begun else None  # None: a bar that only says that it is alive
        self.progress.reset(self.steps, total=total, description=f"epoch {epoch}/{self.plan.epochs}")
        self.progress.update(self.run, completed=(epoch - 1) * self.plan.steps_per_epoch)

    def on_step(self, step_in_epoch: int, loss: float | None) -> None:
        """Move the bars; the numbers change when a loss came."""
        done = (self.epoch - 1) * self.plan.steps_per_epoch + step_in_epoch
        if not self._first_step:  # not the first of the epoch where a run goes on in it, which is no sign of speed
            self._first_step = step_in_epoch
            self.progress.reset(self.steps, total=self.plan.steps_per_epoch, completed=step_in_epoch)
        if not self._has_begun:
            self._has_begun = True
            self.progress.reset(self.run, completed=done)
        self.progress.update(self.steps, completed=step_in_epoch)
        self.progress.update(self.run, completed=done)
        if (found := self.end.after_step(done)) and found[1]:
            self.on_note(f"in a hurry: {found[1]}")
        if loss is not None:
            steps, seconds = step_in_epoch - self._first_step + 1, max(time.monotonic() - self._started, 1e-9)
            if steps > 1:  # the first one is slow
                self.rate = steps * self.plan.global_batch_size / seconds
            self.used = self.memory()
            self._loss = f"loss {loss:.3f}  lr {self._lr:.4g}"
            self.progress.update(self.steps, shown=self._loss)

    def on_evaluation(self, done: int, total: int) -> None:
        """Show a bar while an evaluation runs."""
        if done <= self._evaluated:  # another one
            self.progress.reset(self.evaluation, total=total)
        self._evaluated = done
        self.progress.update(self.evaluation, completed=done, total=total, visible=done < total)

    def on_epoch_end(self, record: EpochRecord, is_best: bool) -> None:
        """Add a line to the table."""
        self.epochs.append(record)
        self.end.on_epoch_end(record.step)
        if is_best:
            self.best = record
        self.rate = record.images_per_second


@contextmanager
def _logs_of(streams: Sequence[TextIO], stream: TextIO) -> Iterator[None]:
    """Give another stream to the handlers of Python's logging that write to one of these: they keep what they had."""
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    handlers = {handler for logger in loggers for handler in logger.handlers}
    moved = [each for each in handlers if isinstance(each, logging.StreamHandler)]
    moved = [each for each in moved if each.stream in streams and each.stream is not stream]
    before = [handler.setStream(stream) for handler in moved]
    try:
        yield
    finally:
        for handler, own in zip(moved, before, strict=True):
            handler.setStream(own)


def training_display(
    console: Console,
    plan: RunPlan,
    recipe_name: str,
    *,
    quiet: bool,
    facts: str = "",
    memory: Callable[[], int | None] = lambda: None,
) -> Display:
    """Choose the view: none, a live one on a terminal that can move its cursor, plain lines elsewhere.

    `facts` says on what it runs; `memory` gives the MiB used so far, None where unknown.
    """
    if quiet:
        return Display(console)
    return (
        LiveTraining(console, plan, recipe_name, facts, memory)
        if can_draw(console)
        else PlainTraining(console, plan, recipe_name)
    )
