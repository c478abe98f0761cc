"""The loop: an epoch in, a record out. It knows no console and no file; an observer hears what happens."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from cifar_dist.config.plan import RunPlan
from cifar_dist.config.recipe import Recipe
from cifar_dist.data.batches import Batch, Normalizer, TrainingBatches
from cifar_dist.data.dataset import LabelledImages
from cifar_dist.data.order import derive_seed
from cifar_dist.model.dropout import HeadDropout
from cifar_dist.model.optimizer import set_learning_rate
from cifar_dist.model.schedule import learning_rate
from cifar_dist.records import EpochRecord, Observer
from cifar_dist.runtime.distributed import Runtime
from cifar_dist.training.early_stopping import monitored_value
from cifar_dist.training.evaluation import predict_logits
from cifar_dist.training.metrics import RunningSums, summarize
from cifar_dist.training.state import Best, TrainState, copy_weights


class DivergedError(Exception):
    """The loss is not a finite number any more; the weights are lost, the last checkpoint is not."""

    def __init__(self, epoch: int, step: int, rate: float) -> None:
        super().__init__(f"the loss is not finite in epoch {epoch}, step {step}, at learning rate {rate:g}")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Validation:
    """The images that are held out, and how they are prepared."""

    data: LabelledImages
    indices: Tensor
    class_names: tuple[str, ...]
    normalize: Normalizer


class Trainer:
    """Trains a state by a plan, one epoch at a time."""

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
        frozen: tuple[nn.Parameter, ...] = (),
        dropout: HeadDropout | None = None,
    ) -> None:
        """`frozen` are the parameters that stay as they are in the first `freeze_epochs`."""
        self.recipe = recipe
        self.plan = plan
        self.runtime = runtime
        self.state = state
        self.batches = batches
        self.validation = validation
        self.observer = observer
        self.frozen = frozen
        self.dropout = dropout
        self.model, self.optimizer = runtime.prepare(state.model, state.optimizer)

    def epochs(self) -> Iterator[EpochRecord]:
        """Train what is left of the plan, giving a record after each epoch; the state is then ready to be saved.

        Ends with the plan, or when early stopping says so. Raises DivergedError.
        """
        while self.state.epoch < self.plan.epochs and not self.state.early_stopping.should_stop:
            epoch = self.state.epoch + 1
            self.observer.on_epoch_start(epoch, learning_rate(self.recipe, self.plan, self.state.step))
            sums, seconds = self._train_epoch(epoch)
            record = self._record(epoch, sums, seconds)
            self.state.epoch = epoch
            self.state.train_seconds += seconds
            is_best = self._keep_best(record)
            self.state.early_stopping.update(record)
            self.observer.on_epoch_end(record, is_best)
            yield record

    def _train_epoch(self, epoch: int) -> tuple[Tensor, float]:
        """Give the epoch's (loss, hits, images) sums over all processes, and the seconds it took."""
        started = time.perf_counter()
        sums = RunningSums(self.runtime.device)
        for _ in self.steps(epoch, sums):
            pass
        totals = self.runtime.sum_over_ranks(sums.sums).cpu()
        seconds = time.perf_counter() - started
        self.check_finite(float(totals[0]), epoch)
        return totals, seconds

    def steps(self, epoch: int, sums: RunningSums) -> Iterator[int]:
        """Do an epoch's optimiser steps one by one, adding to the sums; give each step's number in the epoch."""
        self.model.train()
        number = 0
        for batch in self.batches.epoch(epoch):
            loss = self._forward_backward(batch, epoch, sums)
            if not batch.ends_step:
                continue
            self._optimizer_step(epoch)
            number += 1
            if number % self.plan.report_every_steps == 0:
                self.observer.on_step(number, self.check_finite(float(loss) / len(batch.labels), epoch))
            else:
                self.observer.on_step(number, None)
            yield number

    def _forward_backward(self, batch: Batch, epoch: int, sums: RunningSums) -> Tensor:
        """Add a micro-batch's gradient and sums; give its summed loss, on the device."""
        if self.dropout is not None:
            self.dropout.set_samples(batch.samples, derive_seed("dropout", self.recipe.seed, epoch))
        with self.runtime.gradient_sync(self.model, batch.ends_step):
            logits = self.model(batch.images)
            loss = batch_loss(logits, batch, self.recipe.label_smoothing)
            self.runtime.backward(loss * (self.plan.world_size / batch.images_in_step))
        loss = loss.detach()
        sums.add(loss, logits, batch.labels)
        return loss

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
        if self.state.ema is not None:
            self.state.ema.update(self.state.model, self.state.step)

    def check_finite(self, loss: float, epoch: int) -> float:
        """Give the loss back where it is a finite number. Raises DivergedError where it is not."""
        if not math.isfinite(loss):
            step = self.state.step
            raise DivergedError(epoch, step, learning_rate(self.recipe, self.plan, max(step - 1, 0)))
        return loss

    def _record(self, epoch: int, totals: Tensor, seconds: float) -> EpochRecord:
        loss, hits, images = totals.tolist()
        val_loss, val_acc = self._validate()
        if val_loss is not None:
            self.check_finite(val_loss, epoch)
        return EpochRecord(
            epoch=epoch,
            step=self.state.step,
            lr=learning_rate(self.recipe, self.plan, self.state.step - 1),
            train_loss=loss / images,
            train_acc=hits / images,
            val_loss=val_loss,
            val_acc=val_acc,
            images_per_second=images / seconds,
            epoch_seconds=seconds,
            world_size=self.plan.world_size,
        )

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
