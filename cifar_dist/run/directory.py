"""The run directory: names, reading and writing of its files. Imports no torch."""

import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import yaml

from cifar_dist.config.errors import UserError
from cifar_dist.config.files import STANDARD_OUTPUT, write_atomically
from cifar_dist.config.schema import nearest, read_yaml
from cifar_dist.run.results import FORMAT_VERSION, EpochRecord, RunMetadata, Summary, check_format

T = TypeVar("T")


class RunDirectory:
    """The files of one run. Creating this object touches no file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.predictions = path / "test_predictions.npz"
        self.figures = path / "figures"
        self.last = path / "checkpoints" / "last.pt"
        self.previous = path / "checkpoints" / "previous.pt"
        self.best = path / "checkpoints" / "best.pt"

    @property
    def holds_run(self) -> bool:
        """Whether a run has written something here."""
        return any(file.exists() for file in (self.config, self.metrics, self.summary, self.last))

    def find_foreign_file(self) -> Path | None:
        """Return a file that a new run would overwrite; None if there is none."""
        named = (self.predictions, self.previous, self.best, self.path / "report.html")
        return next((file for file in (*named, *self.figures.glob("*.png")) if file.exists()), None)

    def create(self) -> None:
        """Create the folders, and remove temporary files of a killed process. The caller holds the lock."""
        for folder in (self.path, self.last.parent, self.figures):
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".*.*.tmp"):
                if leftover.suffixes[-2][1:].isdecimal():  # a process id, as `write_atomically` names its files
                    leftover.unlink()

    def read_config(self) -> dict[str, Any]:
        """Read config.yaml. Raises UserError if it is missing or damaged."""
        config = read_yaml(self.config, "run configuration")
        if not isinstance(config.get("recipe"), dict) or not isinstance(config.get("dataset"), dict):
            raise UserError(f"run configuration {self.config} lacks its recipe or dataset")
        return config

    def read_metadata(self) -> RunMetadata:
        """Read config.yaml and validate every field. Raises UserError."""
        config, where = self.read_config(), f"run configuration {self.config}"
        check_format(config, where)
        return RunMetadata.from_mapping(config, where)

    def write_metadata(self, metadata: RunMetadata) -> None:
        """Write config.yaml: all that is needed to run it again."""
        content = {"format_version": FORMAT_VERSION, **metadata.to_mapping()}
        text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
        write_atomically(self.config, lambda file: file.write(text.encode()))

    def append_record(self, record: EpochRecord) -> None:
        """Append a line to metrics.jsonl and fsync it."""
        with self.metrics.open("ab") as file:
            file.write(record.to_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def read_records(self) -> list[EpochRecord]:
        """Read metrics.jsonl. Damaged lines are left out."""
        return [record for record, _ in self._read_lines()]

    def truncate_records(self, epochs: int) -> list[EpochRecord]:
        """Cut metrics.jsonl back to the first `epochs` epochs. Return what is left."""
        kept = [(record, line) for record, line in self._read_lines() if record.epoch <= epochs]
        write_atomically(self.metrics, lambda file: file.writelines(line + b"\n" for _, line in kept))
        return [record for record, _ in kept]

    def write_summary(self, summary: Summary) -> None:
        """Write summary.json."""
        write_atomically(self.summary, lambda file: file.write(summary.to_json().encode()))

    def read_summary(self) -> Summary | None:
        """Read summary.json; None if there is none. Raises UserError if it is damaged."""
        if not self.summary.exists():
            return None
        try:
            return Summary.from_json(self.summary.read_text(encoding="utf-8"))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"{self.summary} is damaged: remove it to go on without it") from None

    def write_predictions(self, **arrays: Any) -> None:
        """Write test_predictions.npz: the arrays that the figures need."""
        import numpy as np

        write_atomically(self.predictions, lambda file: np.savez(file, **arrays))

    def read_predictions(self) -> dict[str, Any] | None:
        """Read test_predictions.npz; None if there is none. Raises UserError if it is damaged."""
        import numpy as np

        if not self.predictions.exists():
            return None
        try:
            with np.load(self.predictions) as saved:
                return dict(saved)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            raise UserError(f"{self.predictions} is damaged: remove it to go on without it") from None

    def finished(self, epochs: int) -> str | None:
        """Return why a run of `epochs` epochs has nothing left to do, else None. Raises UserError if more are done."""
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

    def explain_write_error(self, error: OSError, resume_command: str) -> str:
        """Return one line: why writing failed, and which checkpoint is left."""
        if not self.last.parent.is_dir():
            return f"the run directory {self.path} is gone, and nothing can be saved"
        what = f"cannot write {error.filename or self.path}: {error.strerror or error}"
        kept = self.last if self.last.exists() else self.previous
        left = f"the last good checkpoint stays: {kept}" if kept.exists() else "there was no checkpoint yet"
        return f"{what}; {left}; resume with: {resume_command}"

    def _read_lines(self) -> Iterator[tuple[EpochRecord, bytes]]:
        for line in self.metrics.read_bytes().splitlines() if self.metrics.exists() else ():
            with suppress(ValueError, TypeError):
                yield EpochRecord.from_json(line.decode()), line


def numbered_names(path: Path) -> Iterator[Path]:
    """Yield path, path-2, path-3 and so on."""
    yield path
    for number in count(2):
        yield path.with_name(f"{path.name}-{number}")


def verify_checksums(path: Path, file: BinaryIO) -> None:
    """Verify the CRC-32 of every part of a checkpoint's zip, which torch.load does not do. Raises UserError.

    `file` has the bytes of `path`. Other formats are skipped.
    """
    head = file.read(2)
    if not head:
        raise UserError(f"checkpoint {path} is empty")
    if head != b"PK":
        return
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, OSError):
        raise UserError(f"checkpoint {path} is damaged: it ends too early or its index is broken") from None
    if damaged is not None:
        raise UserError(f"checkpoint {path} is damaged: the checksum of {damaged} is wrong")


def verify(path: Path) -> None:
    """Verify a checkpoint's checksums. Raises UserError."""
    try:
        with path.open("rb") as file:
            verify_checksums(path, file)
    except OSError as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror}") from None


def find_checkpoint(path: Path) -> Path:
    """Return `path`, or the last checkpoint of a run directory. Raises UserError if it is missing or damaged."""
    if not path.exists():
        beside = [str(each) for each in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"there is no checkpoint {path}{nearest(str(path), beside)}")
    if not path.is_dir():
        verify(path)
        return path
    run = RunDirectory(path)
    if not run.last.exists():
        raise UserError(f"there is no checkpoint in {path}: name a run directory, or a file")
    run.read_config()
    return run.last


def load_newest(run: RunDirectory, load: Callable[[Path], T]) -> tuple[T | None, str | None]:
    """Load last.pt, or previous.pt if that is missing or damaged. Return it with a note on the damage.

    Return None if there is no checkpoint yet. Raises UserError if none is good.
    """
    if not run.last.exists():
        if not run.previous.exists():
            return None, None
        return load(run.previous), f"{run.last} is missing: resuming from {run.previous.name}"
    try:
        return load(run.last), None
    except UserError as error:
        if not run.previous.exists():
            raise
        try:
            return load(run.previous), f"{error}: resuming from {run.previous.name}"
        except UserError as second:
            raise UserError(f"{error}; and {second}") from None


def check_output(option: str, path: Path | None, *inputs: str | Path | None) -> None:
    """Raise UserError for an output file that cannot be written, is one of the inputs, or belongs to a run."""
    if path is None or path == STANDARD_OUTPUT:
        return
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"{option} {path} cannot be written: name a file in a folder that exists")
    if not path.exists():
        return
    if any(each is not None and os.path.exists(each) and path.samefile(each) for each in inputs):  # noqa: PTH110 - a Path raises EACCES
        raise UserError(f"{option} {path} would overwrite what is read: name another file")
    run = RunDirectory(path.resolve().parent)
    is_run = run.config.exists() and run.metrics.exists()
    if path.suffix == ".pt" or (is_run and path.resolve() in (run.config, run.metrics, run.summary, run.predictions)):
        raise UserError(f"{option} {path} would overwrite a run's own file: name another file")
