"""What can be typed: one frozen dataclass a command, whose fields are its flags in the order of --help.

The docstring of a class is what --help says of its command; `config/arguments.py` makes the parsers.
"""
# ruff: noqa: RUF009  (flag gives a dataclasses.field)

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from cifar_dist.config.errors import UserError
from cifar_dist.config.loading import recipe_names
from cifar_dist.config.recipe import Recipe


def flag(name: str | None, help: str, *, default: Any = None, **arguments: Any) -> Any:
    """Give a field that is typed as `name`, or by its place where that is None; `arguments` are argparse's."""
    metadata = {"names": [name] if name else [], "arguments": {"help": help, **arguments}}
    if default is dict:  # one for each, since it can be changed
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


def switch(name: str, help: str) -> Any:
    """Give a field that is True where `name` is typed."""
    return flag(name, help, default=False, action="store_true")


# What several flags take.
_NUMBER: dict[str, Any] = {"type": int, "metavar": "N"}
_MINUTES: dict[str, Any] = {"type": float, "metavar": "M"}
_FILE: dict[str, Any] = {"type": Path, "metavar": "FILE"}
_FOLDER: dict[str, Any] = {"type": Path, "metavar": "DIR"}
_PATHS: dict[str, Any] = {"type": Path, "nargs": "+", "default": MISSING}
# What several commands have.
_CHECKPOINT: dict[str, Any] = {"type": Path, "metavar": "FILE|RUN_DIR", "default": MISSING, "required": True}
_DATASET = {
    "metavar": "NAME|DIR",
    "help": "cifar10 (default), cifar100, shapes (needs no files), or a folder of images",
}
_DATA_DIR = {**_FOLDER, "help": "holds the CIFAR files (default: data)"}
_RECIPE = {"metavar": "NAME|FILE", "help": f"{', '.join(recipe_names())} (default standard), or YAML"}
_RECIPE_OF_WEIGHTS = {"metavar": "NAME|FILE", "help": "for bare weights: whose stem and normalisation they have"}
_SET: dict[str, Any] = {
    "metavar": "KEY=VALUE",
    "help": "set fields of the recipe, e.g. optimizer.learning_rate=0.1; wins over flags and files",
    "default": dict,
    "nargs": "+",
    "action": "extend",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What every command has, typed or not. None stands for what was not typed."""

    config: str | None = None

    def __post_init__(self) -> None:
        """Refuse what is not among a flag's choices, from Python too. Raises UserError."""
        for each in fields(self):
            choices, value = each.metadata.get("arguments", {}).get("choices"), getattr(self, each.name)
            if choices and value is not None and value not in choices:
                raise UserError(f"{each.name} must be one of {', '.join(choices)}, not {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceOptions(Options):
    """What every command takes that computes."""

    config: str | None = flag("--config", "an Accelerate config: device, processes, mixed precision", metavar="YAML")
    precision: str | None = flag(
        "--precision",
        "auto: what the device does best (the default); no: float32",
        choices=("auto", "no", "fp16", "bf16"),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions(DeviceOptions):
    """Train a recipe, then evaluate it once on the test images."""

    recipe: str | Recipe | None = flag("--recipe", **_RECIPE)
    """A name or a file; a whole recipe where Python asks."""
    dataset: str | None = flag("--dataset", **_DATASET)
    data_dir: Path | None = flag("--data-dir", **_DATA_DIR)
    run_dir: Path | None = flag("--run-dir", "default: runs/<recipe>-<dataset>-seed<seed>", **_FOLDER)
    resume: bool = flag(
        "--resume", "go on with the run in DIR (or --run-dir)", default=False, nargs="?", const="", metavar="DIR"
    )
    resume_dir: Path | None = None
    """The folder typed after `--resume`, which must exist."""
    assignments: Mapping[str, Any] = flag("--set", **_SET)
    """As a nested mapping."""
    num_processes: int | None = flag("--num-processes", "start N processes (default: as --config)", **_NUMBER)
    epochs: int | None = flag("--epochs", "the recipe's, unless typed", **_NUMBER)
    seed: int | None = flag("--seed", "the recipe's, unless typed", **_NUMBER)
    dry_run: bool = switch("--dry-run", "print the plan; start nothing and write nothing")
    checkpoint_every_steps: int | None = flag("--checkpoint-every-steps", "save also within an epoch", **_NUMBER)
    checkpoint_every_minutes: float | None = flag(
        "--checkpoint-every-minutes", "default: 1, at the ends of epochs", **_MINUTES
    )
    max_minutes: float | None = flag("--max-minutes", "stop and save after so long (exit code 75)", **_MINUTES)
    trackers: Sequence[str] = flag(
        "--tracker",
        "log to tensorboard, wandb, mlflow or another of Accelerate's trackers; may be repeated",
        default=(),
        action="append",
        metavar="NAME",
    )
    quiet: bool = switch("--quiet", "no progress, only the result")

    def __post_init__(self) -> None:
        Options.__post_init__(self)
        if self.num_processes is not None and self.num_processes < 1:
            raise UserError(f"--num-processes must be 1 or more, not {self.num_processes}")
        for name in ("checkpoint_every_steps", "checkpoint_every_minutes", "max_minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1e6:
                raise UserError(f"--{name.replace('_', '-')} must be above 0 and below a million, not {value}")
        if self.resume_dir and self.run_dir and self.resume_dir != self.run_dir:
            raise UserError(f"--resume {self.resume_dir} and --run-dir {self.run_dir} name two runs: type one of them")

    @property
    def recipe_flags(self) -> dict[str, Any]:
        """The typed flags that are fields of the recipe."""
        flags = {"epochs": self.epochs, "seed": self.seed}
        return {name: value for name, value in flags.items() if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalOptions(DeviceOptions):
    """Evaluate a checkpoint or a bare state dict; each image is counted once."""

    checkpoint: Path = flag("--ckpt", "what to evaluate", **_CHECKPOINT)
    dataset: str | None = flag("--dataset", **_DATASET)
    data_dir: Path | None = flag("--data-dir", **_DATA_DIR)
    split: str = flag("--split", "default: test", default="test", choices=("test", "validation"))
    recipe: str | None = flag("--recipe", **_RECIPE_OF_WEIGHTS)
    tta: str = flag("--tta", "average over the mirror image too", default="none", choices=("none", "mirror"))
    json: Path | None = flag("--json", "write the result there; - for the standard output", **_FILE)
    figures: Path | None = flag(
        "--figures", "draw the confusion matrix, accuracy by class, predictions there", **_FOLDER
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictOptions(DeviceOptions):
    """Name the classes of images; each is predicted once."""

    checkpoint: Path = flag("--ckpt", "with which weights", **_CHECKPOINT)
    images: Sequence[Path] = flag(None, "files, or folders of files", metavar="IMAGE|DIR", **_PATHS)
    recipe: str | None = flag("--recipe", **_RECIPE_OF_WEIGHTS)
    top: int = flag("--top", "so many classes an image (default: 5)", default=5, type=int, metavar="K")
    json: Path | None = flag("--json", "write the result there; - for the standard output", **_FILE)

    def __post_init__(self) -> None:
        Options.__post_init__(self)
        if self.top < 1:
            raise UserError(f"--top must be 1 or more, not {self.top}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportOptions(Options):
    """Draw a run's figures and write its page; put several side by side, with mean and standard deviation."""

    run_dirs: Sequence[Path] = flag(None, "folders that runs have left", metavar="RUN_DIR", **_PATHS)
    out: Path | None = flag("--out", "where the files go (default: DIR/figures of one run)", **_FOLDER)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions(Options):
    """Write weights for other programs, in the format that the suffix of --out names."""

    checkpoint: Path = flag("--ckpt", "which weights", **_CHECKPOINT)
    out: Path = flag("--out", "FILE.pth, FILE.safetensors or FILE.onnx", default=MISSING, required=True, **_FILE)
    recipe: str | None = flag("--recipe", **_RECIPE_OF_WEIGHTS)


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchOptions(DeviceOptions):
    """Measure the training loop against the bare training step, in alternation."""

    recipe: str = flag("--recipe", default="standard", **_RECIPE)
    assignments: Mapping[str, Any] = flag("--set", **_SET)
    seconds: float = flag("--seconds", "for each loop measured (default 10)", default=10.0, type=float, metavar="S")
    sweep: bool = switch("--sweep", "measure precisions, layouts, compilers; which is fastest")
    json: Path | None = flag("--json", "write the figures there; - for the standard output", **_FILE)

    def __post_init__(self) -> None:
        Options.__post_init__(self)
        if not 0 < self.seconds < 86_400:
            raise UserError(f"--seconds must be above 0 and below a day, not {self.seconds:g}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorOptions(DeviceOptions):
    """Say what this machine offers, which data is here, and what would run."""

    recipe: str | None = flag("--recipe", **_RECIPE)
    data_dir: Path | None = flag("--data-dir", **_DATA_DIR)
    download: bool = switch("--download", "fetch CIFAR-10 and the ImageNet weights where missing")
