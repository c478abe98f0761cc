"""The files of a run: their names, and what can be said of them without torch."""

import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import count, takewhile
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

from cifar_dist.config.errors import UserError
from cifar_dist.config.files import STANDARD_OUTPUT
from cifar_dist.config.schema import convert, read_yaml

T = TypeVar("T")


class RunFiles:
    """Where the files of a run are, in the one folder that it is given."""

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

    def owns(self, file: Path) -> bool:
        """Whether a file that is there is one that a run here wrote, and that cannot be made again from the others."""
        names = (self.config, self.metrics, self.summary, self.predictions, self.last, self.previous, self.best)
        return file in names and (self.metrics if file == self.config else self.config).exists()

    @property
    def holds_run(self) -> bool:
        """Whether a run has left something here."""
        return any(file.exists() for file in (self.config, self.metrics, self.summary, self.last))

    def find_in_the_way(self) -> Path | None:
        """Give a file that a new run would overwrite, where there is one."""
        named = (self.predictions, self.previous, self.best, self.path / "report.html")
        return next((file for file in (*named, *self.figures.glob("*.png")) if file.exists()), None)

    def read_config(self) -> dict[str, Any]:
        """Read config.yaml. Raises UserError where it is missing or damaged."""
        config = read_yaml(self.config, "run configuration")
        if not isinstance(config.get("recipe"), dict) or not isinstance(config.get("dataset"), dict):
            raise UserError(f"run configuration {self.config} lacks its recipe or dataset")
        check_stored(config, f"run configuration {self.config}")
        return config


_FORMS: dict[str, Any] = {
    "recipe_name": str,
    "recipe": dict,
    "dataset": dict,
    "dataset.name": str,
    "dataset.data_dir": str,
    "dataset.fingerprint": str,
    "class_names": tuple[str, ...],
    "epoch": int,
    "step": int,
    "world_size": int,
    "num_threads": int,
    "precision": Literal["no", "fp16", "bf16"],
    "checkpoint_every_minutes": float | None,
    "checkpoint_every_steps": int | None,
    "trackers": tuple[str, ...] | None,
    "plan": dict,
    "versions": dict,
}
"""What a run writes of itself, in config.yaml and in its checkpoints, and uses again."""
_FROM_0 = ("epoch", "step")
"""The other numbers are above 0."""


def check_stored(about: Mapping[str, Any], where: str) -> None:
    """Raise UserError, which names the field and `where` it is, where a run's own words have a form that none writes.

    That is so where somebody has edited them. A field may be missing, but for the name of a dataset.
    """
    for field, hint in _FORMS.items():
        outer, _, inner = field.partition(".")
        values = about.get(outer, {}) if inner else about
        name = inner or outer
        if name not in values:
            if field == "dataset.name" and outer in about:
                raise UserError(f"{where} is damaged: dataset lacks its name")
            continue
        value = convert(hint, values[name], f"{where} is damaged: {field}")
        if isinstance(value, int | float):
            is_text = isinstance(values[name], str)  # which `convert` takes for a number, as YAML's 5e-4 needs it
            if is_text or value < 0 or (value == 0 and field not in _FROM_0):
                allowed = "a number, 0 or more" if field in _FROM_0 else "a number above 0"
                raise UserError(f"{where} is damaged: {field} must be {allowed}, not {values[name]!r}")


def find_run(*, run_dir: Path | None, resume: bool, resume_dir: Path | None) -> RunFiles | None:
    """Give the run that is to go on, None for a new one.

    Raises UserError where there is none to resume, or where a run is in the way of a new one.
    """
    if resume and resume_dir is None and run_dir is None:
        raise UserError("--resume needs to know the run: type --resume DIR, or --run-dir DIR --resume")
    path = resume_dir or run_dir
    if path is None:
        return None
    run = RunFiles(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"the run directory {path} is a file: name a folder")
    if resume_dir is not None and not run.holds_run:
        raise UserError(f"there is no run in {path} to resume")
    if run.holds_run and not resume:
        raise UserError(f"{path} holds a run already: add --resume to go on with it, or name another --run-dir")
    if not run.holds_run and (file := run.find_in_the_way()) is not None:
        raise UserError(f"{path} is no run, and a run would overwrite {file}: name another --run-dir")
    return run if run.holds_run else None


def names_in_turn(path: Path) -> Iterator[Path]:
    """Give path, path-2, path-3 and so on."""
    yield path
    for number in count(2):
        yield path.with_name(f"{path.name}-{number}")


def find_run_of_job(path: Path, job: str) -> RunFiles | None:
    """Give the run that a Slurm job began under this name, or under the name with a number, before it was requeued."""
    for candidate in takewhile(Path.exists, names_in_turn(path)):
        with suppress(UserError):  # somebody else's, and damaged
            run = RunFiles(candidate)
            if read_yaml(run.config, "run configuration").get("slurm_job") == job:
                return run
    return None


def verify_checksums(path: Path, file: BinaryIO) -> None:
    """Check that every part of a checkpoint's zip has the CRC-32 that it was written with: torch.load does not.

    `file` has the bytes of `path`. Another kind of file is not judged here. Raises UserError that says what is wrong.
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
    """Return `path`, or the last checkpoint of a run directory. Raises UserError if there is none, or it is damaged."""
    if not path.exists():
        raise UserError(f"there is no checkpoint {path}")
    if not path.is_dir():
        verify(path)
        return path
    run = RunFiles(path)
    if not run.last.exists():
        raise UserError(f"there is no checkpoint in {path}: {run.last} does not exist")
    run.read_config()
    return run.last


def first_good(run: RunFiles, load: Callable[[Path], T]) -> tuple[T | None, str | None]:
    """Load a run's last checkpoint, or where that is damaged the previous one, and what to say of that.

    None where there is none yet. Raises UserError where none is good.
    """
    if not run.last.exists():
        if not run.previous.exists():
            return None, None
        return load(run.previous), f"{run.last} is missing: going on from {run.previous.name}"
    try:
        return load(run.last), None
    except UserError as error:
        if not run.previous.exists():
            raise
        try:
            return load(run.previous), f"{error}: going on from {run.previous.name}"
        except UserError as second:
            raise UserError(f"{error}; and {second}") from None


def check_output(option: str, path: Path, read: Sequence[Path] = ()) -> None:
    """Refuse a place that cannot be written to before time is spent on what goes there. Raises UserError.

    Nor are the files overwritten that the command reads, nor those of a run.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"{option} {path} cannot be written: name a file in a folder that exists")
    if not path.exists():
        return
    if any(os.path.exists(each) and path.samefile(each) for each in read):  # noqa: PTH110 - a Path raises where nobody may look
        raise UserError(f"{option} {path} would overwrite what is read: name another file")
    if any(RunFiles(folder).owns(one) for one in (path.absolute(), path.resolve()) for folder in list(one.parents)[:2]):
        raise UserError(f"{option} {path} would overwrite a run's own file: name another file")


def check_json(path: Path | None, *read: str | Path | None) -> None:
    """Refuse a `--json` that was typed where it cannot be written, as `check_output` does. Raises UserError.

    `read` are the files that are read, or what was typed where a name would do too.
    """
    if path is not None and path != STANDARD_OUTPUT:
        check_output("--json", path, [Path(each) for each in read if each is not None])
