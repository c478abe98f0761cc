"""The training loop: the epochs in `Trainer.fit`, the steps in `Trainer.steps`. It uses neither console nor files."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

import torch

from cifar_dist.config.plan import RunPlan
from cifar_dist.config.recipe import Recipe
from cifar_dist.data.loader import TrainingBatches
from cifar_dist.model.optimizer import learning_rate
from cifar_dist.run.results import EpochRecord, Evaluation, Observer
from cifar_dist.runtime.distributed import Runtime
from cifar_dist.runtime.signals import Interrupt
from cifar_dist.training.evaluation import EvaluationSet
from cifar_dist.training.state import Best, TrainState, copy_weights, monitored_value
from cifar_dist.training.step import TrainingStep

_SLOWDOWN, _SLOW_SECONDS = 3, 20.0
_AGREE_SECONDS = 1.0
"""The time between two agreements of the ranks on steps so slow that `RunPlan.agree_every_steps` would take longer."""
RankRows = Sequence[Sequence[float]]
"""A row of numbers for each rank."""


class DivergedError(Exception):
    """The loss or a weight is not a finite number; the last checkpoint is still good."""

    def __init__(self, place: str, rate: float) -> None:
        super().__init__(f"the loss is not finite in {place}, at learning rate {rate:g}")


class InterruptedRun(Exception):
    """One rank got a signal, so all ranks stopped after the same step, and the run is saved."""


class Recorder:
    """Callbacks that save a run. All ranks call them at the same steps. This one saves nothing."""

    def on_epoch_end(self, record: EpochRecord, state: TrainState) -> None:
        """Store the record of an epoch, and a checkpoint if one is due."""

    def should_save(self, step: int) -> bool:
        """Return whether a checkpoint is due after this step of the run."""
        return False

    def should_save_now(self) -> bool:
        """Return whether a checkpoint is due by time. Asked about once a second; the answer of rank 0 counts."""
        return False

    def save(self, state: TrainState, epoch_sums: RankRows = (), statistics: RankRows = ()) -> None:
        """Write a checkpoint. Within an epoch, with the sums and BatchNorm statistics of each rank."""


@dataclass(kw_only=True, eq=False, repr=False)
class Trainer:
    """Trains by a plan. Every decision is made by all ranks together."""

    recipe: Recipe
    plan: RunPlan
    runtime: Runtime
    step: TrainingStep
    batches: TrainingBatches
    validation: EvaluationSet | None
    observer: Observer
    interrupt: Interrupt
    recorder: Recorder = field(default_factory=Recorder)

    def __post_init__(self) -> None:
        self.state = self.step.state
        self._save_is_due = False
        self._clock = time.perf_counter()
        self._shown = (0.0, 0.0)  # loss and images when the loss was last shown
        self._agree_every, self._steps_since = 1, 0  # steps between agreements, and since the last one
        self._is_watched = self.runtime.is_main and self.runtime.device.type == "cpu"
        self._image_size, self._fastest_seconds, self._slow_seconds = 0, math.inf, 0.0

    def fit(self) -> list[EpochRecord]:
        """Train the rest of the plan. Return the records of these epochs.

        Raises DivergedError or InterruptedRun on all ranks.
        """
        state, records = self.state, list[EpochRecord]()
        for epoch in range(state.epoch + 1, self.plan.epochs + 1):
            if state.early_stopping.stopped:
                break
            for _ in self.steps(epoch):
                pass
            records.append(self._end_epoch(epoch))
        return records

    def steps(self, epoch: int) -> Iterator[int]:
        """Train the rest of an epoch. Yield the number of each optimizer step, from 1, once it is done."""
        self._clock = time.perf_counter()
        self.observer.on_epoch_start(epoch)
        self.step.begin_epoch(epoch)
        loss, _, images = self._agree() if self._step_of(epoch) else (0.0, 0.0, 0.0)
        self._shown = (loss, images)  # a resumed epoch has sums of its steps so far
        begun = time.perf_counter()
        for batch in self.batches.epoch(epoch, steps_done=self._step_of(epoch)):
            self.step.train_on(batch)
            if batch.ends_step:
                if self._is_watched and batch.images_in_step == self.plan.global_batch_size:
                    self._note_slowdown(time.perf_counter() - begun, batch.images.shape[-1])
                self._end_step(epoch)
                yield self._step_of(epoch)
                begun = time.perf_counter()

    @property
    def stopped_early(self) -> bool:
        """Whether early stopping ended the run before its last epoch."""
        return self.state.early_stopping.stopped and self.state.epoch < self.plan.epochs

    def _step_of(self, epoch: int) -> int:
        """Return how many steps of the epoch are done."""
        return self.state.step - (epoch - 1) * self.plan.steps_per_epoch

    def _note_slowdown(self, seconds: float, image_size: int) -> None:
        """Print one note for the run once slow steps of an image size have taken 20 s more than others."""
        if image_size != self._image_size:
            self._image_size, self._fastest_seconds, self._slow_seconds = image_size, math.inf, 0.0
        self._fastest_seconds = min(self._fastest_seconds, seconds)
        counted = min(seconds, _SLOW_SECONDS / 4)  # a suspended process has one long step
        self._slow_seconds += counted if seconds > _SLOWDOWN * self._fastest_seconds else -counted
        self._slow_seconds = max(self._slow_seconds, 0.0)
        if self._slow_seconds >= _SLOW_SECONDS:
            self._is_watched = False
            advice = ", or begin a new run with OMP_NUM_THREADS=1" if self.runtime.num_threads > 1 else ""
            what = f"steps take more than {_SLOWDOWN} times as long as the fastest"
            self.observer.on_note(f"{what}: other programs seem to use the CPUs; end them{advice}")

    def _end_step(self, epoch: int) -> None:
        """Count a step. From time to time, agree with the other ranks, show the loss, and save."""
        state = self.state
        state.step += 1
        if state.ema is not None:
            state.ema.update(state.model, state.step)
        number, mean_loss = self._step_of(epoch), None
        self._steps_since += 1
        if number % self._agree_every == 0:
            loss, _, images = self._agree()
            mean_loss = (loss - self._shown[0]) / max(images - self._shown[1], 1)
            self._shown = (loss, images)
        self.observer.on_step(number, mean_loss)
        is_due = self._save_is_due or self.recorder.should_save(state.step)
        if is_due and number < self.plan.steps_per_epoch:  # the end of an epoch saves by itself
            if mean_loss is None:
                self._agree()
            self._check_weights()
            self._save()

    def _end_epoch(self, epoch: int) -> EpochRecord:
        """Validate, keep the best weights, vote on early stopping, and save if it is due."""
        state = self.state
        loss, correct, images = self._agree()
        self._check_weights()
        self.runtime.average_over_ranks(state.own_statistics)
        validation = self._validate()
        if validation is not None:
            self.check_finite(validation.loss)
        record = self._record(epoch, loss / images, correct / images, images, validation)
        state.epoch = epoch
        state.train_seconds, state.epoch_seconds = state.train_seconds + state.epoch_seconds, 0.0
        state.sums.set(0, 0, 0)
        is_best = self.validation is not None and self._keep_best(record)
        vote = state.early_stopping.update(record)
        state.early_stopping.stopped = any(stop for (stop,) in self.runtime.ranks.all_gather([vote]))
        self.observer.on_epoch_end(record, is_best)
        begun = time.perf_counter()
        self.recorder.on_epoch_end(record, state)
        self._save_is_due = False
        state.train_seconds += time.perf_counter() - begun
        return record

    def _agree(self) -> tuple[float, float, float]:
        """Return the loss, correct predictions and images of the epoch so far, summed over the ranks. Count the time.

        Raises DivergedError or InterruptedRun on all ranks if one of them has a reason.
        """
        own = (*self.state.sums.read(), self.interrupt.wanted, self.recorder.should_save_now())
        seconds = time.perf_counter() - self._clock
        rows = self.runtime.ranks.all_gather((*own, seconds))
        losses, correct, images, bad_steps, stops, saves, all_seconds = zip(*rows, strict=True)
        now = time.perf_counter()
        self.state.epoch_seconds, self._clock = self.state.epoch_seconds + now - self._clock, now
        if self._steps_since > 0:  # slow steps are few between two agreements
            fitting = int(_AGREE_SECONDS * self._steps_since / max(*all_seconds, 1e-6))
            self._agree_every, self._steps_since = min(max(fitting, 1), self.plan.agree_every_steps), 0
        if math.isfinite(first := min(bad_steps)):
            raise self._divergence(int(first))
        if any(stops):
            self._check_weights()
            self._save()
            raise InterruptedRun
        self._save_is_due = bool(saves[0])
        return sum(losses), sum(correct), sum(images)

    def _save(self) -> None:
        """Save within an epoch, with the sums and statistics of each rank. A collective."""
        ranks, state = self.runtime.ranks, self.state
        self._save_is_due = False
        sums = ranks.all_gather(state.sums.read()[:3])
        own = [value for tensor in state.own_statistics for value in tensor.tolist()]
        statistics = ranks.all_gather(own)
        self.runtime.average_over_ranks(state.own_statistics)
        self.recorder.save(state, sums, statistics)
        state.set_own_statistics(own)  # as if nothing had been saved

    def _check_weights(self) -> None:
        """Raise DivergedError if a weight is not finite. The loss shows it only in the next step, after a save."""
        norms = torch._foreach_norm([each.detach() for each in self.state.model.parameters()])
        if not bool(torch.stack(tuple(norms)).isfinite().all()):
            raise self._divergence(self.state.step)

    def check_finite(self, loss: float) -> None:
        """Raise DivergedError if the loss of an evaluation is not finite."""
        if not math.isfinite(loss):
            raise self._divergence(self.state.step)

    def _divergence(self, step: int) -> DivergedError:
        return DivergedError(self.plan.place_of(step), learning_rate(self.recipe, self.plan, max(step - 1, 0)))

    def _validate(self) -> Evaluation | None:
        if self.validation is None:
            return None
        return self.validation.summarize(self.validation.predict(self.state.evaluated_model, self.observer))

    def _record(
        self, epoch: int, loss: float, accuracy: float, images: float, validation: Evaluation | None
    ) -> EpochRecord:
        """Return the epoch's record of rank 0, so that all ranks decide by the same numbers."""
        record = EpochRecord(
            epoch=epoch,
            step=self.state.step,
            lr=learning_rate(self.recipe, self.plan, self.state.step - 1),
            train_loss=loss,
            train_acc=accuracy,
            val_loss=None if validation is None else validation.loss,
            val_acc=None if validation is None else validation.top1,
            images_per_second=images / self.state.epoch_seconds,
            epoch_seconds=self.state.epoch_seconds,
            world_size=self.plan.world_size,
        )
        return self.runtime.ranks.broadcast_from_main(lambda: record)

    def _keep_best(self, record: EpochRecord) -> bool:
        """Copy the weights if this epoch is the best so far."""
        value = monitored_value(self.recipe.early_stopping, record)
        if self.state.best is not None and value >= self.state.best.value:
            return False
        weights = copy_weights(self.state.evaluated_model)
        self.state.best = Best(epoch=record.epoch, value=value, weights=weights, record=asdict(record))
        return True
