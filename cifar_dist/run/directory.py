"""What a run leaves on disk, in the one folder that it is given."""

import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import yaml
from numpy.typing import NDArray

from cifar_dist.config.errors import UserError
from cifar_dist.config.files import write_atomically, writing
from cifar_dist.run.lock import LockLostError, RunLock
from cifar_dist.run.results import EpochRecord, Summary
from cifar_dist.run.run_files import RunFiles


class RunDirectory(RunFiles):
    """The files of one run, written and read. Nothing is made before `create`."""

    def __init__(self, path: Path, lock: RunLock | None = None) -> None:
        """`lock` is taken by `create`, or was taken before; without one it is a lock of its own."""
        super().__init__(path)
        self._lock = lock or RunLock()

    def create(self, *, is_new: bool = False) -> None:
        """Make the folders, take the lock, and remove what a killed process left half-written.

        Raises UserError where that cannot be, where a live run is in the folder, or where one came to be in what
        `is_new`.
        """
        other = ", or name another --run-dir" if is_new else ""
        with writing(self.path, f"free space or mend the rights there{other}"):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.take(self.path)
            if is_new and self.holds_run:
                raise UserError(f"{self.path} holds a run by now: name another --run-dir")
            self.last.parent.mkdir(exist_ok=True)
            self.figures.mkdir(exist_ok=True)
            for folder in (self.path, self.last.parent, self.figures):
                for leftover in folder.glob(".*.*.tmp"):
                    if leftover.suffixes[-2][1:].isdecimal():  # the number of a process, as write_atomically names them
                        leftover.unlink()

    def write_config(self, content: Mapping[str, Any]) -> None:
        """Write config.yaml: all that is needed to run it again."""
        text = yaml.safe_dump(dict(content), sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
        self.write(self.config, lambda file: file.write(text.encode()))

    def append_record(self, record: EpochRecord) -> None:
        """Add a line to metrics.jsonl, whole and on disk."""
        self._lock.check()
        with self.metrics.open("ab") as file:
            file.write(record.to_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def read_records(self) -> list[EpochRecord]:
        """Read metrics.jsonl; a line that was cut off or is damaged is left out."""
        return [record for record, _ in self._read_lines()]

    def _read_lines(self) -> Iterator[tuple[EpochRecord, bytes]]:
        lines = self.metrics.read_bytes().splitlines() if self.metrics.exists() else []
        for line in lines:
            with suppress(ValueError, TypeError):
                yield EpochRecord.from_json(line.decode()), line

    def cut_records(self, epochs: int) -> list[EpochRecord]:
        """Cut metrics.jsonl back to so many epochs, which is what a checkpoint knows; give what is left."""
        kept = [(record, line) for record, line in self._read_lines() if record.epoch <= epochs]
        self.write(self.metrics, lambda file: file.writelines(line + b"\n" for _, line in kept))
        return [record for record, _ in kept]

    def write_summary(self, summary: Summary) -> None:
        """Write summary.json."""
        self.write(self.summary, lambda file: file.write(summary.to_json().encode()))

    def read_summary(self) -> Summary | None:
        """Read summary.json; None where there is none. Raises UserError where it is damaged."""
        if not self.summary.exists():
            return None
        try:
            return Summary.from_json(self.summary.read_text(encoding="utf-8"))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"{self.summary} is damaged: remove it to go on without it") from None

    def nothing_left(self, epochs: int) -> str | None:
        """Say that a run which is to have so many epochs is over already, where it is. Raises UserError at fewer."""
        summary = self.read_summary()
        if summary is None or summary.test is None:
            return None
        if summary.status == "early_stopped":
            return f"{self.path} was stopped early after {summary.epochs} epochs: nothing left to do"
        if epochs > summary.epochs:
            return None
        if epochs < summary.epochs:
            raise UserError(f"epochs={epochs} is below the {summary.epochs} that are done in {self.path}")
        accuracy = f"{summary.test.top1:.2%}"
        return f"{self.path} is completed ({summary.epochs} epochs, accuracy {accuracy}): nothing left to do"

    def what_is_lost(self, error: OSError, how_to_go_on: str) -> str:
        """Say in one line why nothing can be written any more, and what is left."""
        if isinstance(error, LockLostError):
            return f"{error.strerror}: {self.path} is left to it"
        if not self.last.parent.is_dir():
            return f"the run directory {self.path} is gone, and nothing can be saved"
        what = f"cannot write {error.filename or self.path}: {error.strerror or error}"
        kept = self.last if self.last.exists() else self.previous
        left = f"the last good checkpoint stays: {kept}" if kept.exists() else "there was no checkpoint yet"
        return f"{what}; {left}; go on with: {how_to_go_on}"

    def write_predictions(self, **arrays: NDArray[Any]) -> None:
        """Write test_predictions.npz: what the figures need, without the data."""
        self.write(self.predictions, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]

    def read_predictions(self) -> dict[str, NDArray[Any]] | None:
        """Read test_predictions.npz; None where there is none. Raises UserError where it is damaged."""
        if not self.predictions.exists():
            return None
        try:
            with np.load(self.predictions) as saved:
                return dict(saved)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            raise UserError(f"{self.predictions} is damaged: remove it to go on without it") from None

    def set_aside(self, damaged: Path) -> None:
        """Give a damaged checkpoint another name, so that it does not become the previous one."""
        number = 1
        while (kept := damaged.with_name(f"damaged-{number}.pt")).exists():
            number += 1
        damaged.replace(kept)

    def write_checkpoint(self, path: Path, content: dict[str, Any], *, previous: Path | None = None) -> None:
        """Write a checkpoint; what was at `path` becomes `previous`."""
        from cifar_dist.run.checkpoint import save_checkpoint  # torch: who only reads a run does without

        self._lock.check()
        save_checkpoint(path, content, previous=previous)

    def write(self, path: Path, write: Callable[[BinaryIO], Any]) -> None:
        """Write a file so that it is there whole or not at all."""
        self._lock.check()
        write_atomically(path, write)


class UnwrittenRun(RunDirectory):
    """The run as the other ranks have it: they do all that rank 0 does, and write nothing."""

    def create(self, *, is_new: bool = False) -> None:
        """Make nothing."""

    def set_aside(self, damaged: Path) -> None:
        """Rename nothing."""

    def write_checkpoint(self, path: Path, content: dict[str, Any], *, previous: Path | None = None) -> None:
        """Write nothing."""

    def write(self, path: Path, write: Callable[[BinaryIO], Any]) -> None:
        """Write nothing."""

    def append_record(self, record: EpochRecord) -> None:
        """Write nothing."""
