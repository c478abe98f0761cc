"""Prepare a run: lock its directory, load its checkpoint, restore the state. A recorder saves its progress."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cifar_dist.config.errors import UserError
from cifar_dist.config.files import writing
from cifar_dist.config.options import TrainOptions
from cifar_dist.config.plan import RunPlan
from cifar_dist.config.world import SlurmJob
from cifar_dist.run.checkpoint import load_checkpoint, refusing_foreign_content, save_checkpoint
from cifar_dist.run.directory import RunDirectory, load_newest, numbered_names
from cifar_dist.run.lock import RunLock
from cifar_dist.run.resolve import RunSpec, check_plan, resolve
from cifar_dist.run.results import EpochRecord, Evaluation, RunMetadata, Status, Summary
from cifar_dist.run.tracking import Trackers
from cifar_dist.run.weights import pretrained_weights
from cifar_dist.runtime.distributed import Runtime
from cifar_dist.training.state import TrainState
from cifar_dist.training.trainer import RankRows, Recorder, Trainer

_DISK_ADVICE = "free space or mend the rights there"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PreparedRun:
    """A resolved run with its locked directory and its checkpoint: made by rank 0, equal on all ranks."""

    spec: RunSpec
    directory: Path
    checkpoint: Mapping[str, Any] | None = None
    damage: str | None = None
    """What is wrong with the last checkpoint, if the previous one is used."""
    pretrained: dict[str, Tensor] | None = None
    finished: str | None = None
    """Why there is nothing left to do."""

    @property
    def checkpoint_file(self) -> Path:
        """The file that `checkpoint` was read from."""
        run = RunDirectory(self.directory)
        return run.last if self.damage is None else run.previous


def prepare_run(
    options: TrainOptions, world_size: int, job: SlurmJob | None, lock: RunLock, note: Callable[[str], None]
) -> PreparedRun:
    """Resolve the run, lock its directory, and load its checkpoint or the pretrained weights.

    `note` is called with one line on a download or a numbered folder. Raises UserError; nothing is left on disk then.
    """
    spec = resolve(options, job)
    check_plan(spec, world_size=world_size)
    if spec.stored is None:
        pretrained = pretrained_weights(spec.recipe, note)
        directory = _new_directory(spec, lock)
        if spec.directory is None and directory != spec.default_directory:
            note(f"{spec.default_directory} exists: this run is {directory}")
        return PreparedRun(spec=spec, directory=directory, pretrained=pretrained)
    assert spec.directory is not None
    run = RunDirectory(spec.directory)
    if (finished := run.finished(spec.recipe.epochs)) is not None:
        return PreparedRun(spec=spec, directory=run.path, finished=finished)
    with writing(run.path, _DISK_ADVICE):
        lock.acquire(run.path)
    checkpoint, damage = load_newest(run, load_checkpoint)
    if checkpoint is None:
        summary = run.read_summary()
        if summary is not None and summary.is_complete:
            raise UserError(f"the checkpoints of {run.path} are gone, and it cannot go on: type a new --run-dir")
        return PreparedRun(spec=spec, directory=run.path, pretrained=pretrained_weights(spec.recipe, note))
    prepared = PreparedRun(spec=spec, directory=run.path, checkpoint=checkpoint, damage=damage)
    metadata = RunMetadata.from_mapping(checkpoint, f"checkpoint {prepared.checkpoint_file}")
    metadata.refuse_other_recipe(spec.recipe, spec.dataset)
    return prepared


def _new_directory(spec: RunSpec, lock: RunLock) -> Path:
    """Create and lock the directory of a new run. Raises UserError."""
    with writing(spec.directory or spec.default_directory.parent, f"{_DISK_ADVICE}, or name another --run-dir"):
        if spec.directory is None:
            return lock.acquire_first_free(numbered_names(spec.default_directory))
        lock.acquire(spec.directory)
    if RunDirectory(spec.directory).holds_run:
        raise UserError(f"{spec.directory} holds a run by now: name another --run-dir")
    return spec.directory


def check_epochs(prepared: PreparedRun, plan: RunPlan) -> None:
    """Raise UserError if a resumed run has begun more epochs than are planned now."""
    checkpoint, stored = prepared.checkpoint, prepared.spec.stored
    if checkpoint is None or stored is None:
        return
    with refusing_foreign_content(prepared.checkpoint_file):
        begun = max(checkpoint["epoch"], math.ceil(checkpoint["step"] / plan.steps_per_epoch))
    if plan.epochs < begun:
        raise UserError(
            f"epochs={plan.epochs} is below the {begun} that have begun: set it to {begun} or more, or type --resume"
            f" {prepared.directory} alone (epochs={stored.recipe.epochs})"
        )


def restore(prepared: PreparedRun, trainer: Trainer, metadata: RunMetadata) -> None:
    """Restore the trainer from the checkpoint, if there is one.

    `metadata` describes the data that was loaded now. Raises UserError if the run would become another one.
    """
    checkpoint, file = prepared.checkpoint, prepared.checkpoint_file
    stored = prepared.spec.stored
    if checkpoint is not None:
        stored = RunMetadata.from_mapping(checkpoint, f"checkpoint {file}")
    if stored is not None:
        stored.refuse_other_data(metadata)
    if checkpoint is None:
        return
    state, world = trainer.state, trainer.runtime.world
    with refusing_foreign_content(file):
        state.restore(checkpoint)
        _restore_sums(state, checkpoint["epoch_sums"], world.rank, world.size)
        if len(checkpoint["statistics"]) == world.size:
            state.set_own_statistics(checkpoint["statistics"][world.rank])
        trainer.runtime.load_state(checkpoint)


def _restore_sums(state: TrainState, rows: RankRows, rank: int, world_size: int) -> None:
    """Restore this rank's sums of the epoch in progress. In another world size rank 0 restores all of them."""
    if len(rows) == world_size:
        state.sums.set(*rows[rank])
    elif rows and rank == 0:
        loss, correct, images = (sum(column) for column in zip(*rows, strict=True))
        state.sums.set(loss, correct, images)


class RunRecorder(Recorder):
    """Save a run: records, checkpoints, summary and trackers. All ranks call it, and rank 0 alone writes.

    Without `checkpoint_every_minutes` a checkpoint is due at the end of an epoch, at most once a minute, and so rarely
    that saving takes at most 1 % of the time.
    """

    def __init__(self, directory: RunDirectory, metadata: RunMetadata, runtime: Runtime, trackers: Trackers) -> None:
        self.directory = directory
        self.trackers = trackers
        self._metadata = metadata
        self._runtime = runtime
        self._saved_at = time.monotonic()
        self._save_seconds = 0.0
        self._saved_step: int | None = None
        self._best_epoch: int | None = None

    def begin(self, state: TrainState, damage: str | None) -> list[EpochRecord]:
        """Create the files before the first step. Return the records of earlier epochs on rank 0. Raises UserError.

        If the last checkpoint is damaged (`damage`), it becomes damaged.pt, and not the previous one.
        """
        directory = self.directory
        if not self._runtime.is_main:
            return []
        with writing(directory.path, _DISK_ADVICE):
            directory.create()
            if damage is not None and directory.last.exists():
                directory.last.replace(directory.last.with_name("damaged.pt"))
            directory.write_metadata(self._metadata)
            records = directory.truncate_records(state.epoch)
            self.write_summary("running", state)
        return records

    def on_epoch_end(self, record: EpochRecord, state: TrainState) -> None:
        """Append the record, log it, and save if a checkpoint is due."""
        if self._runtime.is_main:
            self.directory.append_record(record)
        self.trackers.log(record)
        if self._is_due_by_time() or self.should_save(state.step):
            self.save(state)

    def should_save(self, step: int) -> bool:
        """Return whether `--checkpoint-every-steps` asks for a checkpoint after this step."""
        every = self._metadata.checkpoint_every_steps
        return every is not None and step % every == 0

    def should_save_now(self) -> bool:
        """Return whether `--checkpoint-every-minutes` asks for a checkpoint now."""
        return self._metadata.checkpoint_every_minutes is not None and self._is_due_by_time()

    def save(self, state: TrainState, epoch_sums: RankRows = (), statistics: RankRows = ()) -> None:
        """Write last.pt, unless it has this step, and best.pt if the best epoch has changed."""
        if self._saved_step == state.step or not self._runtime.is_main:
            return
        begun, directory, best = time.monotonic(), self.directory, state.best
        metadata = self._metadata.to_mapping()
        rows = {"epoch_sums": [list(row) for row in epoch_sums], "statistics": [list(row) for row in statistics]}
        content = {**metadata, **self._runtime.state(), **rows, **state.to_mapping()}
        save_checkpoint(directory.last, content, previous=directory.previous)
        if best is not None and best.epoch != self._best_epoch:
            content = {**metadata, "epoch": best.epoch, "record": best.record, "model": best.weights}
            save_checkpoint(directory.best, content)
            self._best_epoch = best.epoch
        self._saved_at, self._saved_step = time.monotonic(), state.step
        self._save_seconds = self._saved_at - begun

    def _is_due_by_time(self) -> bool:
        minutes = self._metadata.checkpoint_every_minutes
        interval_seconds = max(60.0, 100 * self._save_seconds) if minutes is None else 60 * minutes
        return time.monotonic() - self._saved_at >= interval_seconds

    def write_summary(
        self, status: Status, state: TrainState, test: Evaluation | None = None, peak_memory_mib: int | None = None
    ) -> Summary:
        """Write summary.json and return it. `peak_memory_mib` is that of the largest rank, if it is known."""
        runtime, best = self._runtime, state.best
        summary = Summary(
            status=status,
            epochs=state.epoch,
            best_epoch=None if best is None else best.epoch,
            best_val_acc=None if best is None else best.record["val_acc"],
            train_seconds=state.train_seconds + state.epoch_seconds,
            world_size=runtime.world.size,
            device=runtime.device.type,
            precision=runtime.precision,
            num_threads=runtime.num_threads,
            peak_memory_mib=peak_memory_mib or runtime.peak_memory_mib(),
            test=test,
        )
        if runtime.is_main:
            self.directory.write_summary(summary)
        return summary
