"""The loop: an epoch in, a record out. It knows no console and no file; an observer hears what happens."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import torch

from cifar_dist.config.plan import RunPlan
from cifar_dist.config.recipe import Recipe
from cifar_dist.data.loader import TrainingBatches
from cifar_dist.model.schedule import learning_rate
from cifar_dist.run.results import EpochRecord, Evaluation, Observer
from cifar_dist.runtime.distributed import Runtime
from cifar_dist.runtime.interrupt import Interrupt
from cifar_dist.training.early_stopping import monitored_value
from cifar_dist.training.evaluation import EvaluationSet
from cifar_dist.training.state import Best, copy_weights
from cifar_dist.training.step import TrainingStep


class DivergedError(Exception):
    """The loss is not a finite number any more; the weights are lost, the last checkpoint is not."""

    def __init__(self, place: str, rate: float) -> None:
        super().__init__(f"the loss is not finite in {place}, at learning rate {rate:g}")


class InterruptedRun(Exception):
    """A process was told to stop, and all stop at the end of the same step, ready to be saved."""


class Checkpointing:
    """When a run is saved in the middle of an epoch, and how. This one never is."""

    def due_by_step(self, step: int) -> bool:
        """Whether it is time to save after this step of the run."""
        return False

    def due_by_time(self) -> bool:
        """Whether so much time has passed; asked about once a second, and rank 0's answer counts."""
        return False

    def save(self) -> None:
        """Save; called by all ranks."""


@dataclass(kw_only=True, eq=False, repr=False)
class Trainer:
    """Trains by a plan, one epoch at a time; what is decided is decided by all ranks together."""

    recipe: Recipe
    plan: RunPlan
    runtime: Runtime
    step: TrainingStep
    batches: TrainingBatches
    validation: EvaluationSet | None
    observer: Observer
    interrupt: Interrupt
    checkpointing: Checkpointing = field(default_factory=Checkpointing)

    def __post_init__(self) -> None:
        self.state = self.step.state
        self._time_to_save = False
        self._clock_started = 0.0
        self._has_begun = False

    def epochs(self) -> Iterator[EpochRecord]:
        """Train what is left of the plan, giving a record after each epoch; the state is then ready to be saved.

        Ends with the plan, or when early stopping says so. Raises DivergedError or InterruptedRun, on all ranks alike.
        """
        state = self.state
        while state.epoch < self.plan.epochs and not state.early_stopping.stopped:
            epoch = state.epoch + 1
            self.observer.on_epoch_start(epoch, learning_rate(self.recipe, self.plan, state.step))
            loss, hits, images = self._train_epoch(epoch)
            self._check_weights()
            self.runtime.average_over_ranks(state.own_statistics)
            record = self._record(epoch, loss, hits, images, self._validate())
            state.epoch = epoch
            state.train_seconds += state.epoch_seconds
            state.epoch_seconds = 0.0
            state.sums.set(0, 0, 0)
            is_best = self._keep_best(record)
            vote = state.early_stopping.update(record)
            state.early_stopping.stopped = any(stop for (stop,) in self.runtime.ranks.all_gather([vote]))
            self.observer.on_epoch_end(record, is_best)
            yield record

    def _train_epoch(self, epoch: int) -> tuple[float, float, float]:
        """Do what is left of an epoch; give its loss, hits and images, summed over all processes."""
        self._clock_started = time.perf_counter()
        try:
            for _ in self.steps(epoch):
                pass
            return self._agree()
        finally:
            self.stop_clock()

    def stop_clock(self) -> None:
        """Add the time since the last stop to that of the epoch in progress."""
        now = time.perf_counter()
        self.state.epoch_seconds += now - self._clock_started
        self._clock_started = now

    def steps(self, epoch: int) -> Iterator[int]:
        """Do what is left of an epoch's optimiser steps, one by one; give each step's number in the epoch."""
        self.step.begin_epoch(epoch)
        number = self.state.step - (epoch - 1) * self.plan.steps_per_epoch
        # A resumed epoch has sums of its steps so far.
        loss_before, _, images_before = self._agree() if number else (0.0, 0.0, 0.0)
        for batch in self.batches.epoch(epoch, steps_done=number):
            self.step.train_on(batch, is_frozen=epoch <= self.recipe.freeze_epochs)
            if not batch.ends_step:
                continue
            self._end_step()
            number += 1
            shown = None
            if number % self.plan.report_every_steps == 0 or not self._has_begun:
                self._has_begun = True
                loss, _, images = self._agree()
                shown = (loss - loss_before) / max(images - images_before, 1)
                loss_before, images_before = loss, images
            self.observer.on_step(number, shown)
            due = self._time_to_save or self.checkpointing.due_by_step(self.state.step)
            if due and number < self.plan.steps_per_epoch:  # the end of an epoch has its own
                if shown is None:  # else all have just heard of each other
                    self._agree()
                self._check_weights()
                self._time_to_save = False
                self.checkpointing.save()
            yield number

    def _end_step(self) -> None:
        """Count a step, and average its weights."""
        self.state.step += 1
        if self.state.ema is not None:
            self.state.ema.update(self.state.model, self.state.step)

    def _agree(self) -> tuple[float, float, float]:
        """Hear from all ranks what happened, and give the epoch's loss, hits and images so far, summed over them.

        Raises DivergedError or InterruptedRun on all of them where one has reason to.
        """
        own = (*self.state.sums.read(), self.interrupt.wanted, self.checkpointing.due_by_time())
        losses, hits, images, bad_steps, told_to_stop, due = zip(*self.runtime.ranks.all_gather(own), strict=True)
        if math.isfinite(first := min(bad_steps)):
            raise self._divergence(int(first))
        if any(told_to_stop):
            self._check_weights()
            raise InterruptedRun
        self._time_to_save = bool(due[0])
        return sum(losses), sum(hits), sum(images)

    def _check_weights(self) -> None:
        """Raise DivergedError where a weight is not a finite number, before such weights are saved.

        The loss says so only in the step after. All ranks have the same weights, and come to the same answer.
        """
        norms = torch._foreach_norm([each.detach() for each in self.state.model.parameters()])
        if not bool(torch.stack(tuple(norms)).isfinite().all()):
            raise self._divergence(self.state.step)

    def _divergence(self, step: int) -> DivergedError:
        return DivergedError(self.plan.place_of(step), learning_rate(self.recipe, self.plan, max(step - 1, 0)))

    def check_finite(self, loss: float) -> None:
        """Raise DivergedError where the loss of an evaluation is not a finite number."""
        if not math.isfinite(loss):
            raise self._divergence(self.state.step)

    def _record(self, epoch: int, loss: float, hits: float, images: float, held_out: Evaluation | None) -> EpochRecord:
        """Give the record of an epoch: rank 0's, so that what is decided by it is decided by the same numbers."""
        if held_out is not None:
            self.check_finite(held_out.loss)
        seconds, step = self.state.epoch_seconds, self.state.step
        record = EpochRecord(
            epoch=epoch,
            step=step,
            lr=learning_rate(self.recipe, self.plan, step - 1),
            train_loss=loss / images,
            train_acc=hits / images,
            val_loss=None if held_out is None else held_out.loss,
            val_acc=None if held_out is None else held_out.top1,
            images_per_second=images / seconds,
            epoch_seconds=seconds,
            world_size=self.plan.world_size,
        )
        return self.runtime.ranks.broadcast_from_main(lambda: record)

    def _validate(self) -> Evaluation | None:
        if self.validation is None:
            return None
        return self.validation.evaluate(self.state.evaluated_model, self.observer)

    def _keep_best(self, record: EpochRecord) -> bool:
        """Keep a copy of the weights where this epoch is the best so far; without a validation split none is."""
        if self.validation is None:
            return False
        value = monitored_value(self.recipe.early_stopping, record)
        if self.state.best is not None and value >= self.state.best.value:
            return False
        weights = copy_weights(self.state.evaluated_model)
        self.state.best = Best(epoch=record.epoch, value=value, weights=weights, record=asdict(record))
        return True
