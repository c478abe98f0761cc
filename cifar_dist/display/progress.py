"""What a person sees while a run is going: bars on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cifar_dist.config.errors import printable
from cifar_dist.config.plan import KNOWN_SIZES, RunPlan
from cifar_dist.display.console import can_draw
from cifar_dist.display.tables import format_duration, format_epoch
from cifar_dist.run.results import EpochRecord, Observer

_SIGN_OF_LIFE_SECONDS = 30.0
_HALF_AN_HOUR = 1800.0


class Display(Observer):
    """Shows notes, and is the context in which a run is shown. By itself it shows no progress (`--quiet`)."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def on_note(self, text: str) -> None:
        """Print a line: whole in a pipe or a file, and on a terminal that is too narrow broken between words."""
        self.console.print(printable(text), markup=False, highlight=False, soft_wrap=not can_draw(self.console))


class PlainDisplay(Display):
    """Lines, and a sign of life where nothing was printed for a while."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(console)
        self.clock = clock
        self._last_line = clock()

    def on_note(self, text: str) -> None:
        """Print a line, and remember when."""
        super().on_note(text)
        self._last_line = self.clock()

    def on_evaluation(self, done: int, total: int) -> None:
        """Show that an evaluation goes on."""
        if done < total:  # else the result comes
            self.sign_of_life(f"evaluating {done:,}/{total:,} images")

    def sign_of_life(self, text: str) -> None:
        """Print a line if none came for long."""
        if self.clock() - self._last_line >= _SIGN_OF_LIFE_SECONDS:
            self.on_note(text)


class ExpectedEnd:
    """When training will end: known after twenty steps, of which the first five are slow and do not count."""

    def __init__(self, plan: RunPlan, recipe_name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.plan = plan
        self.recipe_name = recipe_name
        self.clock = clock
        self.text = ""
        """The time of day, and the date if it is another day; empty until it is known."""
        self._steps = self._steps_before = 0
        self._warm_at = self._epoch_began = 0.0

    def on_epoch_start(self) -> None:
        """Remember when, and after how many steps, an epoch began."""
        self._steps_before, self._epoch_began = self._steps, self.clock()

    def after_step(self, done: int) -> tuple[str, str] | None:
        """Return, at the one step where there is one, the line to show, and what would end sooner or an empty text.

        The run has `done` steps.
        """
        self._steps += 1
        if self._steps == 5:
            self._warm_at = self.clock()
        if self._steps != 20:
            return None
        step_seconds = (self.clock() - self._warm_at) / 15
        seconds = (self.plan.total_steps - done) * step_seconds
        self.text = format_end(seconds, datetime.now())
        line = f"expected end {self.text}, in {format_duration(seconds)}, evaluation not counted"
        return line, format_quicker(self.plan, self.recipe_name, seconds, step_seconds)

    def on_epoch_end(self, done: int) -> str:
        """Return when training will end, by the pace of the last epoch and its evaluation; empty after the last one."""
        left, steps = self.plan.total_steps - done, self._steps - self._steps_before
        seconds = (self.clock() - self._epoch_began) / max(steps, 1) * left
        self.text = format_end(seconds, datetime.now()) if left and steps else ""
        return self.text


def format_end(seconds: float, now: datetime) -> str:
    """Return the time of day in so many `seconds`, with the date if that is another day."""
    end = now + timedelta(seconds=min(seconds, 1e11))  # 3,000 years: no calendar has all that can be typed
    return f"{end:%H:%M}" if end.date() == now.date() else f"{end:%Y-%m-%d %H:%M}"


def format_quicker(plan: RunPlan, recipe_name: str, seconds: float, step_seconds: float) -> str:
    """Return what would end sooner, if the end is over half an hour away."""
    epochs = int(_HALF_AN_HOUR / (step_seconds * plan.steps_per_epoch)) if step_seconds > 0 else 0
    quicker = ["--recipe quick is made to be short"] if recipe_name != "quick" else []
    if 0 < epochs < plan.epochs:
        quicker.append(f"--epochs {epochs} would take half an hour")
    return "; ".join(quicker) if seconds > _HALF_AN_HOUR else ""


class PlainTraining(PlainDisplay):
    """A line an epoch, and signs of life between them."""

    def __init__(
        self, console: Console, plan: RunPlan, recipe_name: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(console, clock)
        self.plan = plan
        self.end = ExpectedEnd(plan, recipe_name, clock)
        self.epoch = 0
        self._loss = ""

    def on_epoch_start(self, epoch: int, lr: float) -> None:
        """Remember the epoch."""
        self.epoch = epoch
        self.end.on_epoch_start()

    def on_step(self, step_in_epoch: int, loss: float | None) -> None:
        """Show that training goes on, and once when it will end."""
        if loss is not None:
            self._loss = f"  loss {loss:.3f}"
        if found := self.end.after_step((self.epoch - 1) * self.plan.steps_per_epoch + step_in_epoch):
            line, quicker = found
            self.on_note(f"{line} ({quicker})" if quicker else line)
        place = f"epoch {self.epoch}/{self.plan.epochs}  step {step_in_epoch}/{self.plan.steps_per_epoch}"
        self.sign_of_life(place + self._loss)

    def on_epoch_end(self, record: EpochRecord, is_best: bool) -> None:
        """Print the epoch."""
        end = self.end.on_epoch_end(record.step)
        self.on_note(format_epoch(record, self.plan.epochs, is_best=is_best, end=end))


class CountProgress(PlainDisplay):
    """A bar, or plain lines, for what is counted outside of training: told of it as an observer, or by a call."""

    def __init__(self, console: Console, what: str, *, unit: str, scale: int = 1) -> None:
        """Show counts divided by `scale`, in `unit`."""
        super().__init__(console)
        self.what, self.unit, self.scale = what, unit, scale
        columns = (
            TextColumn("{task.description}", markup=False),  # a folder's name
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(compact=True),
        )
        self._bar = Progress(*columns, console=console, transient=True, expand=True) if can_draw(console) else None
        self._task: TaskID | None = None

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int | None) -> None:
        """Show how far it is."""
        done, total = done // self.scale, None if total is None else total // self.scale
        if self._bar is None:
            of = "" if total is None else f" of {total:,}"
            self.sign_of_life(f"{self.what}: {done:,}{of} {self.unit}")
            return
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task(self.what, total=total, shown=self.unit)
        self._bar.update(self._task, completed=done, total=total)

    def on_evaluation(self, done: int, total: int) -> None:
        """Show that an evaluation goes on."""
        self(done, total)


def loading_progress(console: Console, dataset: str) -> CountProgress:
    """Give the view of what may take long before a dataset is there: a download, or the decoding of a folder."""
    if dataset in KNOWN_SIZES:
        return CountProgress(console, f"downloading {dataset}", unit="MiB", scale=2**20)
    return CountProgress(console, printable(f"decoding {dataset}"), unit="files")


def evaluation_display(console: Console) -> CountProgress:
    """Give the view of an evaluation."""
    return CountProgress(console, "evaluating", unit="images")
