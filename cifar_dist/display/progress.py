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
from cifar_dist.records import EpochRecord, Observer

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
        self.sign_of_life(f"evaluating {done:,}/{total:,} images")

    def sign_of_life(self, text: str) -> None:
        """Print a line if none came for long."""
        if self.clock() - self._last_line >= _SIGN_OF_LIFE_SECONDS:
            self.on_note(text)


class ExpectedEnd:
    """Says once, after twenty steps, when training will end; the first five, which are slow, do not count."""

    def __init__(self, plan: RunPlan, recipe_name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.plan = plan
        self.recipe_name = recipe_name
        self.clock = clock
        self._steps = 0
        self._warm_at = 0.0

    def after_step(self, epoch: int, step_in_epoch: int) -> str | None:
        """Give the line to show, at the one step where there is one."""
        self._steps += 1
        if self._steps == 5:
            self._warm_at = self.clock()
        if self._steps != 20:
            return None
        done = (epoch - 1) * self.plan.steps_per_epoch + step_in_epoch
        step_seconds = (self.clock() - self._warm_at) / 15
        steps_left = self.plan.total_steps - done
        return format_expected_end(self.plan, self.recipe_name, steps_left, step_seconds, datetime.now())


def format_expected_end(plan: RunPlan, recipe_name: str, steps_left: int, step_seconds: float, now: datetime) -> str:
    """Say when training will end; where that is over half an hour away, say what would end sooner."""
    seconds = steps_left * step_seconds
    end = now + timedelta(seconds=min(seconds, 1e11))  # 3,000 years: no calendar has all that can be typed
    day = "" if end.date() == now.date() else f" {end:%Y-%m-%d}"
    text = f"expected end{day} {end:%H:%M}, in {format_duration(seconds)}, evaluation not counted"
    epochs = int(_HALF_AN_HOUR / (step_seconds * plan.steps_per_epoch)) if step_seconds > 0 else 0
    quicker = ["--recipe quick is made to be short"] if recipe_name != "quick" else []
    if 0 < epochs < plan.epochs:
        quicker.append(f"--epochs {epochs} would take half an hour")
    return f"{text} ({'; '.join(quicker)})" if seconds > _HALF_AN_HOUR and quicker else text


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

    def on_step(self, step_in_epoch: int, loss: float | None) -> None:
        """Show that training goes on, and once when it will end."""
        if loss is not None:
            self._loss = f"  loss {loss:.3f}"
        if line := self.end.after_step(self.epoch, step_in_epoch):
            self.on_note(line)
        place = f"epoch {self.epoch}/{self.plan.epochs}  step {step_in_epoch}/{self.plan.steps_per_epoch}"
        self.sign_of_life(place + self._loss)

    def on_epoch_end(self, record: EpochRecord, is_best: bool) -> None:
        """Print the epoch."""
        self.on_note(format_epoch(record, self.plan.epochs, is_best=is_best))


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
