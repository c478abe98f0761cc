"""What a person sees while a run is going: bars on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable
from datetime import datetime, timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cifar_dist.config.plan import RunPlan
from cifar_dist.display.tables import format_duration, format_epoch
from cifar_dist.records import EpochRecord, Observer

_SIGN_OF_LIFE_SECONDS = 30.0
_WARMUP_STEPS, _TIMED_STEPS = 5, 20


class Display(Observer):
    """Shows notes, and is the context in which a run is shown. By itself it shows no progress (`--quiet`)."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def on_note(self, text: str) -> None:
        """Print a line, whole, whatever the width of the terminal."""
        self.console.print(escape(text), highlight=False, soft_wrap=True)


class _Training(Display):
    """What both views need to know: where the run is, and when it will end."""

    def __init__(self, console: Console, plan: RunPlan, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(console)
        self.plan = plan
        self.clock = clock
        self.epoch = 0
        self.loss: float | None = None
        self._steps_seen = 0
        self._warm_at = 0.0

    def on_epoch_start(self, epoch: int, lr: float) -> None:
        """Remember the epoch."""
        del lr
        self.epoch = epoch

    def on_step(self, step_in_epoch: int, loss: float | None) -> None:
        """Remember the loss; say once when the end is to be expected."""
        self.loss = loss if loss is not None else self.loss
        self._steps_seen += 1
        if self._steps_seen == _WARMUP_STEPS:
            self._warm_at = self.clock()
        elif self._steps_seen == _TIMED_STEPS:
            done = (self.epoch - 1) * self.plan.steps_per_epoch + step_in_epoch
            step_seconds = (self.clock() - self._warm_at) / (_TIMED_STEPS - _WARMUP_STEPS)
            self.on_note(format_expected_end(self.plan, self.plan.total_steps - done, step_seconds, datetime.now()))


def format_expected_end(plan: RunPlan, steps_left: int, step_seconds: float, now: datetime) -> str:
    """Say when training will end; where that is over half an hour away, say what would end sooner."""
    seconds = steps_left * step_seconds
    end = now + timedelta(seconds=seconds)
    day = "" if end.date() == now.date() else f" {end:%Y-%m-%d}"
    text = f"expected end{day} {end:%H:%M}, in {format_duration(seconds)} without evaluation and early stopping"
    epochs = int(1800 / (step_seconds * plan.steps_per_epoch)) if step_seconds > 0 else 0
    if seconds > 1800 and 0 < epochs < plan.epochs:
        text += f" (--epochs {epochs} would take half an hour)"
    return text


class PlainTraining(_Training):
    """A line an epoch, and a sign of life between them."""

    def __init__(self, console: Console, plan: RunPlan, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(console, plan, clock)
        self._last_line = clock()

    def on_note(self, text: str) -> None:
        """Print a line, and remember when."""
        super().on_note(text)
        self._last_line = self.clock()

    def on_step(self, step_in_epoch: int, loss: float | None) -> None:
        """Show that training goes on."""
        super().on_step(step_in_epoch, loss)
        if self.clock() - self._last_line >= _SIGN_OF_LIFE_SECONDS:
            shown = "" if self.loss is None else f"  loss {self.loss:.3f}"
            self.on_note(
                f"epoch {self.epoch}/{self.plan.epochs}  step {step_in_epoch}/{self.plan.steps_per_epoch}{shown}"
            )

    def on_evaluation(self, done: int, total: int) -> None:
        """Show that evaluation goes on."""
        if self.clock() - self._last_line >= _SIGN_OF_LIFE_SECONDS:
            self.on_note(f"evaluating {done:,}/{total:,} images")

    def on_epoch_end(self, record: EpochRecord, is_best: bool) -> None:
        """Print the epoch."""
        self.on_note(format_epoch(record, self.plan.epochs, is_best=is_best))


class RichTraining(_Training):
    """Bars for the run, the epoch and evaluations below the lines of the epochs."""

    def __init__(self, console: Console, plan: RunPlan) -> None:
        super().__init__(console, plan)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            expand=True,
        )
        self.run = self.progress.add_task("run", total=plan.total_steps, shown="")
        self.steps = self.progress.add_task("epoch", total=plan.steps_per_epoch, shown="")
        self.evaluation = self.progress.add_task("evaluation", total=None, visible=False, shown="images")
        self._lr = 0.0
        self._epoch_started = 0.0

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def on_epoch_start(self, epoch: int, lr: float) -> None:
        """Begin a new bar."""
        super().on_epoch_start(epoch, lr)
        self._lr, self._epoch_started = lr, self.clock()
        self.progress.reset(self.steps, description=f"epoch {epoch}/{self.plan.epochs}", shown="")
        self.progress.update(self.run, completed=(epoch - 1) * self.plan.steps_per_epoch)

    def on_step(self, step_in_epoch: int, loss: float | None) -> None:
        """Move the bars; the numbers change when a loss came."""
        super().on_step(step_in_epoch, loss)
        self.progress.advance(self.steps)
        self.progress.advance(self.run)
        if loss is not None:
            rate = step_in_epoch * self.plan.global_batch_size / max(self.clock() - self._epoch_started, 1e-9)
            self.progress.update(self.steps, shown=f"loss {loss:.3f}  lr {self._lr:.4g}  {rate:,.0f} images/s")

    def on_evaluation(self, done: int, total: int) -> None:
        """Show a bar while an evaluation runs."""
        self.progress.update(self.evaluation, completed=done, total=total, visible=done < total)

    def on_epoch_end(self, record: EpochRecord, is_best: bool) -> None:
        """Print the epoch above the bars."""
        line = escape(format_epoch(record, self.plan.epochs, is_best=is_best))
        self.console.print(f"[bold green]{line}[/]" if is_best else line, highlight=not is_best, soft_wrap=True)


class ByteProgress:
    """A bar, or plain lines, for something counted in bytes or files; it is a callback taking (done, total)."""

    def __init__(self, console: Console, what: str) -> None:
        self.console = console
        self.what = what
        self._progress: Progress | None = None
        self._last_line = 0.0

    def __call__(self, done: int, total: int | None) -> None:
        """Show how far it is, in MiB."""
        done_mib, total_mib = done / 2**20, None if total is None else total / 2**20
        if not self.console.is_terminal:
            if time.monotonic() - self._last_line >= _SIGN_OF_LIFE_SECONDS:
                self._last_line = time.monotonic()
                of = "" if total_mib is None else f" of {total_mib:,.0f}"
                self.console.print(f"{self.what}: {done_mib:,.0f}{of} MiB", highlight=False)
            return
        if self._progress is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.completed:,.0f} MiB"),
            )
            self._progress = Progress(
                *columns, TimeRemainingColumn(), console=self.console, transient=True, expand=True
            )
            self._progress.add_task(self.what, total=total_mib)
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=done_mib, total=total_mib)

    def close(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()


class PlainEvaluation(Display):
    """A sign of life while an evaluation runs."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(console)
        self.clock = clock
        self._last_line = clock()

    def on_evaluation(self, done: int, total: int) -> None:
        """Show how far it is."""
        if self.clock() - self._last_line >= _SIGN_OF_LIFE_SECONDS:
            self.on_note(f"evaluating {done:,}/{total:,} images")
            self._last_line = self.clock()


class RichEvaluation(Display):
    """A bar while an evaluation runs."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn())
        self.progress = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, expand=True)
        self.task = self.progress.add_task("evaluating", total=None)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def on_evaluation(self, done: int, total: int) -> None:
        """Move the bar."""
        self.progress.update(self.task, completed=done, total=total)


def evaluation_display(console: Console) -> Display:
    """Choose the view of an evaluation: a bar on a terminal that can move its cursor, plain lines elsewhere."""
    return RichEvaluation(console) if _can_draw(console) else PlainEvaluation(console)


def _can_draw(console: Console) -> bool:
    return console.is_terminal and not console.is_dumb_terminal


def training_display(console: Console, plan: RunPlan, *, quiet: bool) -> Display:
    """Choose the view: none, bars on a terminal that can move its cursor, plain lines elsewhere."""
    if quiet:
        return Display(console)
    if _can_draw(console):
        return RichTraining(console, plan)
    return PlainTraining(console, plan)
