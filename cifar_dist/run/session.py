"""A run and its folder: trains, and writes down what happens as it happens."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray

from cifar_dist.config.errors import UserError
from cifar_dist.config.files import writing
from cifar_dist.data.dataset import Dataset
from cifar_dist.run.results import Evaluation, Status, Summary
from cifar_dist.run.saving import CheckpointWriter
from cifar_dist.run.tracking import Trackers
from cifar_dist.training.evaluation import EvaluationSet, what_figures_need
from cifar_dist.training.metrics import summarize
from cifar_dist.training.trainer import Checkpointing, DivergedError, InterruptedRun, Trainer


class Session(Checkpointing):
    """Trains with a trainer, tests what came of it, and keeps the run directory true at every moment."""

    def __init__(self, checkpoints: CheckpointWriter, trainer: Trainer, dataset: Dataset) -> None:
        """Take the run directory from what writes the checkpoints into it."""
        self.checkpoints = checkpoints
        self.directory = checkpoints.run
        self.trainer = trainer
        self.dataset = dataset
        self.runtime = trainer.runtime
        self.state = trainer.state
        self.trackers = Trackers(trainer.observer.on_note)
        trainer.checkpointing = self

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. Raises UserError where it does not fit this model or this plan."""
        self.state.restore(checkpoint)
        self._restore_sums(checkpoint["epoch_sums"])
        if len(checkpoint["statistics"]) == self.runtime.world.size:
            self.state.set_own_statistics(checkpoint["statistics"][self.runtime.world.rank])
        self.runtime.load_state(checkpoint)
        plan = self.trainer.plan
        begun = max(self.state.epoch, math.ceil(self.state.step / plan.steps_per_epoch))
        if plan.epochs < begun:
            raise UserError(f"epochs={plan.epochs} is below the {begun} that have begun: set it to {begun} or more")

    def _restore_sums(self, rows: Sequence[Sequence[float]]) -> None:
        """Take this process's part of the sums of an epoch in progress; in another world rank 0 takes them all."""
        world = self.runtime.world
        if len(rows) == world.size:
            self.state.sums.set(*rows[world.rank])
        elif rows and world.rank == 0:
            loss, hits, images = (sum(column) for column in zip(*rows, strict=True))
            self.state.sums.set(loss, hits, images)

    def begin(self, config: Mapping[str, Any], *, is_new: bool = False) -> None:
        """Make the folder and write what is known before the first step. Raises UserError where that cannot be."""
        self.directory.create(is_new=is_new)
        with writing(self.directory.path, "free space or mend the rights there"):
            self.directory.write_config(config)
            records = self.directory.cut_records(self.state.epoch)
            self._write_summary("running")
        self.trainer.observer.on_earlier_epochs(records, None if self.state.best is None else self.state.best.epoch)

    def train(self) -> Status:
        """Train to the end of the plan, or until it is stopped early; say how it ended.

        Raises DivergedError, InterruptedRun (the run is saved then) or KeyboardInterrupt after the summary says so.
        """
        try:
            self._train_epochs()
        except DivergedError:
            self._write_summary("diverged")
            raise
        except (InterruptedRun, KeyboardInterrupt):
            self._write_summary("interrupted")
            raise
        self._save_epoch()
        stopped = self.state.early_stopping.stopped and self.state.epoch < self.trainer.plan.epochs
        return "early_stopped" if stopped else "completed"

    def _train_epochs(self) -> None:
        try:
            for record in self.trainer.epochs():
                self.directory.append_record(record)
                self.trackers.log(record)
                if self.checkpoints.due(self.state.step):
                    self._save_epoch()
        except InterruptedRun:
            self.save()
            raise

    def _save_epoch(self) -> None:
        """Save at the end of an epoch; the time that it takes is the training's."""
        begun = time.perf_counter()
        self.checkpoints.save(self.state, self.runtime.state())
        self.state.train_seconds += time.perf_counter() - begun

    def leave_together(self) -> None:
        """Wait until all is written and said: the first process that ends may have the others killed, as with Slurm."""
        if self.runtime.world.size > 1:
            self.trainer.interrupt.ignore()
        self.runtime.ranks.all_gather([0])  # gloo does not wait for others if there is nothing to exchange

    def due_by_step(self, step: int) -> bool:
        """Whether a checkpoint is due after this step."""
        return self.checkpoints.due_by_step(step)

    def due_by_time(self) -> bool:
        """Whether one is due now, in the middle of an epoch."""
        return self.checkpoints.within_epochs and self.checkpoints.due_by_time()

    def save(self) -> None:
        """Save the state in the middle of an epoch, with what each rank has of its own; all ranks do it together."""
        ranks, state = self.runtime.ranks, self.state
        self.trainer.stop_clock()
        sums = ranks.all_gather(state.sums.read()[:3])
        own = [value for tensor in state.own_statistics for value in tensor.tolist()]
        statistics = ranks.all_gather(own)
        self.runtime.average_over_ranks(state.own_statistics)
        self.checkpoints.save(state, self.runtime.state(), epoch_sums=sums, statistics=statistics)
        state.set_own_statistics(own)  # as if nothing had been saved

    def test(self, status: Status) -> tuple[Summary, dict[str, NDArray[Any]]]:
        """Evaluate the selected weights once on the test images; give the summary, and what is written for figures."""
        recipe, model = self.trainer.recipe, self.state.evaluated_model
        if recipe.selection == "best" and self.state.best is not None:
            model.load_state_dict(self.state.best.weights)
        data, names = self.dataset.test, self.dataset.class_names
        test = EvaluationSet(
            data=data, indices=torch.arange(len(data)), class_names=names, recipe=recipe, runtime=self.runtime
        )
        predictions = test.predict(model, self.trainer.observer)
        evaluation = summarize(predictions.logits, predictions.labels, names)
        try:
            self.trainer.check_finite(evaluation.loss)
        except DivergedError:
            self._write_summary("diverged")
            raise
        written = what_figures_need(predictions, data, names)
        self.directory.write_predictions(**written)
        own = self.runtime.peak_memory_mib()
        memory = [peak for (peak,) in self.runtime.ranks.all_gather([own or 0])]
        return self._summary(status, evaluation, memory=int(max(memory)) or None), written

    def _write_summary(self, status: Status) -> None:
        self.directory.write_summary(self._summary(status))

    def _summary(self, status: Status, test: Evaluation | None = None, *, memory: int | None = None) -> Summary:
        """Say what is known; `memory` is that of the largest rank, where they were asked."""
        best = self.state.best
        return Summary(
            status=status,
            epochs=self.state.epoch,
            best_epoch=None if best is None else best.epoch,
            best_val_acc=None if best is None else best.record["val_acc"],
            train_seconds=self.state.train_seconds + self.state.epoch_seconds,
            world_size=self.trainer.plan.world_size,
            device=self.runtime.device.type,
            precision=self.runtime.precision,
            num_threads=self.runtime.num_threads,
            peak_memory_mib=memory or self.runtime.peak_memory_mib(),
            test=test,
        )
