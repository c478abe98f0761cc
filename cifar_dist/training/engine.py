"""The loop: an epoch in, a record out. It knows no console and no file; an observer hears what happens."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from cifar_dist.config.plan import RunPlan
from cifar_dist.config.recipe import Recipe
from cifar_dist.data.batches import Batch, Normalizer, TrainingBatches
from cifar_dist.data.dataset import LabelledImages
from cifar_dist.data.order import derive_seed
from cifar_dist.model.batch_norm import Groups, running_statistics
from cifar_dist.model.dropout import HeadDropout
from cifar_dist.model.optimizer import set_learning_rate
from cifar_dist.model.schedule import learning_rate
from cifar_dist.records import EpochRecord, Observer
from cifar_dist.runtime.distributed import Runtime
from cifar_dist.runtime.interrupt import Interrupt
from cifar_dist.training.early_stopping import monitored_value
from cifar_dist.training.evaluation import predict_logits
from cifar_dist.training.metrics import summarize
from cifar_dist.training.state import Best, TrainState, copy_weights


class DivergedError(Exception):
    """The loss is not a finite number any more; the weights are lost, the last checkpoint is not."""

    def __init__(self, epoch: int, step: int, rate: float) -> None:
        super().__init__(f"the loss is not finite in epoch {epoch}, step {step}, at learning rate {rate:g}")


class InterruptedRun(Exception):
    """A process was told to stop, and all stop at the end of the same step, ready to be saved."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Validation:
    """The images that are held out, and how they are prepared."""

    data: LabelledImages
    indices: Tensor
    class_names: tuple[str, ...]
    normalize: Normalizer


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


class Trainer:
    """Trains a state by a plan, one epoch at a time; what is decided is decided by all ranks together."""

    def __init__(
        self,
        *,
        recipe: Recipe,
        plan: RunPlan,
        runtime: Runtime,
        state: TrainState,
        batches: TrainingBatches,
        validation: Validation | None,
        observer: Observer,
        interrupt: Interrupt,
        frozen: tuple[nn.Parameter, ...] = (),
        dropout: HeadDropout | None = None,
        groups: Groups | None = None,
    ) -> None:
        """`frozen` are the parameters that stay as they are in the first `freeze_epochs`; `groups` are BatchNorm's."""
        self.recipe = recipe
        self.plan = plan
        self.runtime = runtime
        self.state = state
        self.batches = batches
        self.validation = validation
        self.observer = observer
        self.interrupt = interrupt
        self.frozen = frozen
        self.dropout = dropout
        self.groups = groups
        self.checkpointing = Checkpointing()
        self._time_to_save = False
        self._clock_started = 0.0
        self.model, self.optimizer = runtime.prepare(state.model, state.optimizer)

    def epochs(self) -> Iterator[EpochRecord]:
        """Train what is left of the plan, giving a record after each epoch; the state is then ready to be saved.

        Ends with the plan, or when early stopping says so. Raises DivergedError or InterruptedRun, on all ranks alike.
        """
        state = self.state
        while state.epoch < self.plan.epochs and not state.early_stopping.stopped:
            epoch = state.epoch + 1
            self.observer.on_epoch_start(epoch, learning_rate(self.recipe, self.plan, state.step))
            loss, hits, images = self._train_epoch(epoch)
            self.even_out()
            record = self._record(epoch, loss, hits, images, *self._validate())
            state.epoch = epoch
            state.train_seconds += state.epoch_seconds
            state.epoch_seconds = 0.0
            state.sums.set(0, 0, 0)
            is_best = self._keep_best(record)
            vote = state.early_stopping.update(record)
            state.early_stopping.stopped = any(stop for (stop,) in self.runtime.ranks.exchange([vote]))
            self.observer.on_epoch_end(record, is_best)
            yield record

    def _train_epoch(self, epoch: int) -> tuple[float, float, float]:
        """Do what is left of an epoch; give its loss, hits and images, summed over all processes."""
        self._clock_started = time.perf_counter()
        try:
            for _ in self.steps(epoch):
                pass
            return self._agree(epoch)
        finally:
            self.stop_clock()

    def stop_clock(self) -> None:
        """Add the time since the last stop to that of the epoch in progress."""
        now = time.perf_counter()
        self.state.epoch_seconds += now - self._clock_started
        self._clock_started = now

    def steps(self, epoch: int) -> Iterator[int]:
        """Do what is left of an epoch's optimiser steps, one by one; give each step's number in the epoch."""
        self.model.train()
        number = self.state.step - (epoch - 1) * self.plan.steps_per_epoch
        loss_before, images_before = 0.0, 0.0
        for batch in self.batches.epoch(epoch, steps_done=number):
            self._forward_backward(batch, epoch)
            if not batch.ends_step:
                continue
            self._optimizer_step(epoch)
            number += 1
            shown = None
            if number % self.plan.report_every_steps == 0:
                loss, _, images = self._agree(epoch)
                shown = (loss - loss_before) / max(images - images_before, 1)
                loss_before, images_before = loss, images
            self.observer.on_step(number, shown)
            due = self._time_to_save or self.checkpointing.due_by_step(self.state.step)
            if due and number < self.plan.steps_per_epoch:  # the end of an epoch has its own
                self._time_to_save = False
                self.checkpointing.save()
            yield number

    def _forward_backward(self, batch: Batch, epoch: int) -> None:
        """Add a micro-batch's gradient and sums."""
        if self.dropout is not None:
            self.dropout.set_samples(batch.samples, derive_seed("dropout", self.recipe.seed, epoch))
        if self.groups is not None:
            self.groups.images = batch.images_together
        with self.runtime.gradient_sync(self.model, batch.ends_step):
            logits = self.model(batch.images)
            loss = batch_loss(logits, batch, self.recipe.label_smoothing)
            # DDP averages over the ranks, which may have shares of different sizes.
            self.runtime.backward(loss * (self.plan.world_size / batch.images_in_step))
        self.state.sums.add(loss.detach(), logits, batch.labels, step=self.state.step + 1)

    def _optimizer_step(self, epoch: int) -> None:
        set_learning_rate(self.optimizer, learning_rate(self.recipe, self.plan, self.state.step))
        if epoch <= self.recipe.freeze_epochs:
            for parameter in self.frozen:  # without a gradient it has neither a step, nor momentum, nor weight decay
                parameter.grad = None
        if self.recipe.gradient_clipping is not None:
            self.runtime.clip_gradients(self.model, self.recipe.gradient_clipping)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.step += 1
        self._average()

    def _average(self) -> None:
        state, every = self.state, self.recipe.lookahead_steps
        if state.ema is None or (every and state.step % every):
            return
        state.ema.update(state.model, state.step)
        if every:
            state.ema.give_to(state.model)

    def _agree(self, epoch: int) -> tuple[float, float, float]:
        """Hear from all ranks what happened, and give the epoch's loss, hits and images so far, summed over them.

        Raises DivergedError or InterruptedRun on all of them where one has reason to.
        """
        own = (*self.state.sums.read(), self.interrupt.wanted, self.checkpointing.due_by_time())
        losses, hits, images, bad_steps, told_to_stop, due = zip(*self.runtime.ranks.exchange(own), strict=True)
        if math.isfinite(first := min(bad_steps)):
            raise self._divergence(epoch, int(first))
        if any(told_to_stop):
            raise InterruptedRun
        self._time_to_save = bool(due[0])
        return sum(losses), sum(hits), sum(images)

    def _divergence(self, epoch: int, step: int) -> DivergedError:
        return DivergedError(epoch, step, learning_rate(self.recipe, self.plan, max(step - 1, 0)))

    def check_finite(self, loss: float) -> None:
        """Raise DivergedError where the loss of an evaluation is not a finite number."""
        if not math.isfinite(loss):
            raise self._divergence(self.state.epoch + 1, self.state.step)

    def _group_statistics(self) -> list[Tensor]:
        """Give the running statistics that each rank has of its own: those of ghost groups, else none."""
        if self.groups is None:
            return []
        models = [self.state.model] if self.state.ema is None else [self.state.model, self.state.ema.model]
        return running_statistics(*models)

    def even_out(self) -> None:
        """Make BatchNorm's running statistics equal on all ranks, where each follows groups of its own."""
        self.runtime.average_over_ranks(self._group_statistics())

    def own_statistics(self) -> list[float]:
        """Give this rank's running statistics, for a run that goes on with the same bits."""
        return [value for tensor in self._group_statistics() for value in tensor.tolist()]

    def take_statistics(self, values: Sequence[float]) -> None:
        """Take what `own_statistics` gave."""
        tensors = self._group_statistics()
        if values and tensors:
            parts = torch.split(torch.tensor(values, dtype=torch.float64), [len(tensor) for tensor in tensors])
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.copy_(part)

    def _record(
        self, epoch: int, loss: float, hits: float, images: float, val_loss: float | None, val_acc: float | None
    ) -> EpochRecord:
        """Give the record of an epoch: rank 0's, so that what is decided by it is decided by the same numbers."""
        if val_loss is not None:
            self.check_finite(val_loss)
        seconds, step = self.state.epoch_seconds, self.state.step
        record = EpochRecord(
            epoch=epoch,
            step=step,
            lr=learning_rate(self.recipe, self.plan, step - 1),
            train_loss=loss / images,
            train_acc=hits / images,
            val_loss=val_loss,
            val_acc=val_acc,
            images_per_second=images / seconds,
            epoch_seconds=seconds,
            world_size=self.plan.world_size,
        )
        return self.runtime.ranks.from_main(lambda: record)

    def _validate(self) -> tuple[float | None, float | None]:
        if self.validation is None:
            return None, None
        held_out = self.validation
        predictions = predict_logits(
            self.state.evaluated_model,
            held_out.data,
            held_out.indices,
            num_classes=len(held_out.class_names),
            normalize=held_out.normalize,
            image_size=self.recipe.image_size,
            runtime=self.runtime,
            observer=self.observer,
        )
        result = summarize(predictions.logits, predictions.labels, held_out.class_names)
        return result.loss, result.top1

    def _keep_best(self, record: EpochRecord) -> bool:
        """Keep a copy of the weights where this epoch is the best so far; without a validation split none is."""
        if self.validation is None:
            return False
        value = monitored_value(self.recipe.early_stopping, record)
        if self.state.best is not None and value >= self.state.best.value:
            return False
        self.state.best = Best(epoch=record.epoch, value=value, weights=copy_weights(self.state.evaluated_model))
        return True


def batch_loss(logits: Tensor, batch: Batch, label_smoothing: float) -> Tensor:
    """Give a batch's summed cross entropy; where images are mixed, each class counts by its share of the image."""
    if batch.partner_labels is None or batch.shares is None:
        return functional.cross_entropy(logits, batch.labels, reduction="sum", label_smoothing=label_smoothing)
    own, other = (
        functional.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
        for labels in (batch.labels, batch.partner_labels)
    )
    return (own * batch.shares + other * (1 - batch.shares)).sum()
