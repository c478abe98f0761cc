"""Progress of downloads, trainings and evaluations: drawn in place on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text

from cifar_dist.config.errors import printable
from cifar_dist.config.plan import KNOWN_SIZES, RunPlan
from cifar_dist.display.terminal import can_draw, format_duration, format_epoch, format_percent
from cifar_dist.run.results import EpochRecord, Observer

_HEARTBEAT_SECONDS = 30.0
_LIVE_EPOCHS = 30

# Columns of the live view, and their cells.
_COLUMNS: dict[str, Callable[[EpochRecord], str]] = {
    "epoch": lambda record: str(record.epoch),
    "train\nloss": lambda record: f"{record.train_loss:.3f}",
    "train\nacc": lambda record: f"{record.train_acc:.2%}",
    "val\nloss": lambda record: "-" if record.val_loss is None else f"{record.val_loss:.3f}",
    "val\nacc": lambda record: format_percent(record.val_acc),
    "lr": lambda record: f"{record.lr:.4g}",
    "images\n/s": lambda record: f"{record.images_per_second:,.0f}",
    "time": lambda record: format_duration(record.epoch_seconds),
}
_LEAST_NEEDED = ("images\n/s", "lr", "train\nacc", "val\nloss", "time")
"""Columns that a narrow terminal leaves out, the first ones first."""
_WHOLE = Column(no_wrap=True)
"""Of numbers beside a bar: a narrow terminal makes the bar shorter."""


class _TimeLeft(ProgressColumn):
    """The expected time to the end of a bar, once it is known."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        """Return `left 1 min 44 s`, or nothing."""
        left = f"left {format_duration(task.time_remaining)}" if task.time_remaining else ""
        return Text(left, style="progress.remaining")


class Display(Observer):
    """Print notes and no progress (`--quiet`); the base of all views, each a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def on_note(self, text: str) -> None:
        """Print a line; a terminal wraps it between words."""
        self.console.print(Text(printable(text)), soft_wrap=not can_draw(self.console))
        self._last_line = time.monotonic()

    def heartbeat(self, text: Callable[[], str]) -> None:
        """Print a line if none was printed for 30 s. The text is built only then."""
        if time.monotonic() - self._last_line >= _HEARTBEAT_SECONDS:
            self.on_note(text())


class CountProgress(Display):
    """Show a count of files, images or MiB: as a bar on a terminal, else as a line every 30 s."""

    def __init__(self, console: Console, task: str, *, unit: str, scale: int = 1) -> None:
        """Counts are divided by `scale` before they are shown."""
        super().__init__(console)
        self.task, self.unit, self.scale = task, unit, scale
        name, count = TextColumn("{task.description}", markup=False), MofNCompleteColumn(table_column=_WHOLE)
        columns = (name, BarColumn(None), count, TextColumn(unit), _TimeLeft(_WHOLE))
        self._bar = Progress(*columns, console=console, transient=True, expand=True)

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int | None) -> None:
        """Show that `done` of `total` are done; `total` is None if it is unknown."""
        done, total = done // self.scale, None if total is None else total // self.scale
        if not can_draw(self.console):
            self.heartbeat(lambda: f"{self.task}: {done:,}{'' if total is None else f' of {total:,}'} {self.unit}")
            return
        if not self._bar.tasks:
            self._bar.start()
            self._bar.add_task(self.task)
        self._bar.update(self._bar.task_ids[0], completed=done, total=total)

    on_evaluation = __call__


def loading_progress(console: Console, dataset: str) -> CountProgress:
    """Build the view of a dataset's download, or of the decoding of a folder."""
    if dataset in KNOWN_SIZES:
        return CountProgress(console, f"downloading {dataset}", unit="MiB", scale=2**20)
    return CountProgress(console, printable(f"decoding {dataset}"), unit="files")


class PlainTraining(Display):
    """Print a line an epoch, and one every 30 s in between, with the expected end."""

    def __init__(self, console: Console, plan: RunPlan) -> None:
        super().__init__(console)
        self.plan, self.epoch = plan, 0
        self._loss, self._epoch_steps, self._epoch_start = "", 0, 0.0

    def on_epoch_start(self, epoch: int) -> None:
        """Start to measure the pace."""
        self.epoch, self._epoch_steps, self._epoch_start = epoch, 0, time.monotonic()

    def on_step(self, step_in_epoch: int, loss: float | None) -> None:
        """Print that the training goes on."""
        self._epoch_steps += 1
        if loss is not None:
            self._loss = f"  loss {loss:.3f}"
        self.heartbeat(lambda: self._place(step_in_epoch))

    def on_evaluation(self, done: int, total: int) -> None:
        """Print that the evaluation goes on."""
        if done < total:
            self.heartbeat(lambda: f"evaluating {done:,}/{total:,} images")

    def on_epoch_end(self, record: EpochRecord, is_best: bool) -> None:
        """Print the epoch."""
        self.on_note(format_epoch(record, self.plan.epochs, is_best=is_best, end=self._expected_end(record.step)))

    def _place(self, step_in_epoch: int) -> str:
        place = f"epoch {self.epoch}/{self.plan.epochs}  step {step_in_epoch}/{self.plan.steps_per_epoch}"
        end = self._expected_end((self.epoch - 1) * self.plan.steps_per_epoch + step_in_epoch)
        return f"{place}{self._loss}" + (f"  ends about {end}" if end else "")

    def _expected_end(self, steps_done: int) -> str:
        """Return when the run ends at the pace of this epoch; nothing in the last minute.

        The epoch's evaluation counts once it is done.
        """
        seconds_a_step = (time.monotonic() - self._epoch_start) / max(self._epoch_steps, 1)
        seconds = min((self.plan.total_steps - steps_done) * seconds_a_step, 1e11)  # the calendar ends in year 9999
        return f"{datetime.now() + timedelta(seconds=seconds):%b %d %H:%M}" if seconds >= 60 else ""


class LiveTraining(Display):
    """Draw the last epochs and the progress in place, once a second; lines that are printed go above."""

    def __init__(self, console: Console, plan: RunPlan, facts: str, memory: Callable[[], int | None]) -> None:
        """`facts` describes the hardware; `memory` returns the peak in MiB, or None if it is unknown."""
        super().__init__(console)
        self.plan, self.facts, self.memory, self._mib = plan, facts, memory, memory()
        self.epochs: list[EpochRecord] = []
        self.best: EpochRecord | None = None
        self.epoch, self._loss = 0, "waiting for the first step"
        columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(table_column=_WHOLE))
        self.progress = Progress(*columns, _TimeLeft(_WHOLE), console=console, expand=True)
        self.run = self.progress.add_task("run", total=plan.total_steps)
        self.steps = self.progress.add_task("epoch", total=plan.steps_per_epoch)
        self.evaluation = self.progress.add_task("evaluation", total=1, visible=False)
        self.live = Live(self, console=console, refresh_per_second=1, transient=True)

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.stop()
        if self.epochs:
            self.console.print(self._table(len(self.epochs)))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the facts, the epochs that fit, and the bars."""
        speed = self.progress.tasks[self.steps].speed
        rate = "" if speed is None else f"{speed * self.plan.global_batch_size:,.0f} images/s"
        memory = "" if self._mib is None else f"{self._mib:,} MiB"
        facts = " · ".join(filter(None, (self._loss, rate, memory, self.facts)))
        yield Text()
        yield Text(facts, style="dim", overflow="ellipsis", no_wrap=True)
        if self.epochs:
            yield self._table(max(1, min(_LIVE_EPOCHS, (options.height or console.height) - 9)))
            yield Text()
        yield self.progress

    def _table(self, rows: int) -> Table:
        """Build the table of the last epochs, with the columns that fit; the best epoch stays in it."""
        shown = self.epochs[-rows:]
        if self.best is not None and self.best not in shown:
            shown = [self.best, *shown[1:]]
        for count in range(len(_LEAST_NEEDED) + 1):
            table = self._table_without(_LEAST_NEEDED[:count], shown)
            unlimited = self.console.options.update(max_width=1000)
            if self.console.measure(table, options=unlimited).maximum <= self.console.width:
                break
        return table

    def _table_without(self, left_out: Sequence[str], shown: Sequence[EpochRecord]) -> Table:
        names = [name for name in _COLUMNS if self.plan.num_validation or not name.startswith("val")]
        names = [name for name in names if name not in left_out]
        table = Table(box=None, pad_edge=False, header_style="bold", collapse_padding=self.console.width < 80)
        for name in (*names, ""):
            table.add_column(name, justify="right", no_wrap=True)
        for record in shown:
            cells = [_COLUMNS[name](record) for name in names]
            is_best = record is self.best
            table.add_row(*cells, "best" if is_best else "", style="bold green" if is_best else None)
        return table

    def on_earlier_epochs(self, records: Sequence[EpochRecord], best_epoch: int | None) -> None:
        """Start the table with the epochs of a resumed run."""
        self.epochs = list(records)
        self.best = next((record for record in records if record.epoch == best_epoch), None)

    def on_epoch_start(self, epoch: int) -> None:
        """Start a new bar."""
        self.epoch = epoch
        self.progress.reset(self.steps, description=f"epoch {epoch}/{self.plan.epochs}")

    def on_step(self, step_in_epoch: int, loss: float | None) -> None:
        """Move the bars, and update the numbers if there is a loss."""
        step = (self.epoch - 1) * self.plan.steps_per_epoch + step_in_epoch
        if not self.progress.tasks[self.run].completed:  # steps before a resume do not count for the speed
            self.progress.reset(self.run, completed=step)
            self.progress.reset(self.steps, completed=step_in_epoch)
        self.progress.update(self.run, completed=step)
        self.progress.update(self.steps, completed=step_in_epoch)
        if loss is not None:
            self._loss, self._mib = f"loss {loss:.3f}", self.memory()

    def on_evaluation(self, done: int, total: int) -> None:
        """Show a bar while an evaluation runs."""
        self.progress.update(self.evaluation, completed=done, total=total, visible=done < total)
        if done >= total:
            self.progress.reset(self.evaluation)

    def on_epoch_end(self, record: EpochRecord, is_best: bool) -> None:
        """Add a row."""
        self.epochs.append(record)
        if is_best:
            self.best = record


def training_display(
    console: Console, plan: RunPlan, *, quiet: bool, facts: str = "", memory: Callable[[], int | None] = lambda: None
) -> Display:
    """Build the view of a training for this console; `facts` and `memory` are shown on a terminal."""
    if quiet:
        return Display(console)
    return LiveTraining(console, plan, facts, memory) if can_draw(console) else PlainTraining(console, plan)
