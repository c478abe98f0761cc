"""What was typed, as typed data: one frozen dataclass a command."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cifar_dist.config.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """`launch.py [train]`. None stands for what was not typed."""

    config: str | None = None
    num_processes: int | None = None
    recipe: str | Recipe | None = None
    """A name or a file; a whole recipe where Python asks."""
    dataset: str | None = None
    data_dir: Path | None = None
    run_dir: Path | None = None
    resume: bool = False
    resume_dir: Path | None = None
    """The folder typed after `--resume`, which must exist."""
    assignments: Mapping[str, Any] = field(default_factory=dict)
    """`--set`, as a nested mapping."""
    epochs: int | None = None
    seed: int | None = None
    precision: str | None = None
    dry_run: bool = False
    quiet: bool = False
    trackers: Sequence[str] = ()
    checkpoint_every_steps: int | None = None
    checkpoint_every_minutes: float | None = None
    max_minutes: float | None = None
    """After which this start of the run is interrupted and saved."""

    @property
    def recipe_flags(self) -> dict[str, Any]:
        """The typed flags that are fields of the recipe."""
        flags = {"epochs": self.epochs, "seed": self.seed}
        return {name: value for name, value in flags.items() if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalOptions:
    """`launch.py eval`."""

    checkpoint: Path
    config: str | None = None
    dataset: str | None = None
    data_dir: Path | None = None
    split: str = "test"
    recipe: str | None = None
    precision: str | None = None
    tta: str = "none"
    json: Path | None = None
    figures: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorOptions:
    """`launch.py doctor`."""

    config: str | None = None
    precision: str | None = None
    recipe: str | None = None
    data_dir: Path | None = None
    download: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportOptions:
    """`launch.py report`."""

    run_dirs: Sequence[Path]
    out: Path | None = None
    config: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictOptions:
    """`launch.py predict`."""

    checkpoint: Path
    images: Sequence[Path]
    """Files and folders."""
    config: str | None = None
    precision: str | None = None
    recipe: str | None = None
    top: int = 5
    json: Path | None = None
    """`-` for the standard output."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """`launch.py export`."""

    checkpoint: Path
    out: Path
    recipe: str | None = None
    config: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchOptions:
    """`launch.py bench`."""

    recipe: str = "standard"
    config: str | None = None
    precision: str | None = None
    assignments: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 10.0
    sweep: bool = False
    json: Path | None = None
