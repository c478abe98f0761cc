"""The options of each command: a frozen dataclass, whose fields are its flags in the order of --help.

The docstring of a class is the description of its command. A flag's type and choices are those of its field.
"""
# ruff: noqa: RUF009  (flag returns a dataclasses.field)

import contextlib
import importlib.util
import math
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from cifar_dist.config.errors import UserError
from cifar_dist.config.recipe import DEFAULT_RECIPE, Count, Positive, Recipe, recipe_names
from cifar_dist.config.schema import convert, nearest

TRACKERS = ("tensorboard", "wandb", "mlflow", "aim", "clearml", "comet_ml", "dvclive", "swanlab", "trackio")
"""Accelerate's names, each also that of the package that it needs."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError for an unknown tracker, or one whose package is missing."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"unknown tracker '{name}'{nearest(name, TRACKERS)} (trackers: {', '.join(TRACKERS)})")
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # any folder of that name in the current one is found, without origin
            raise UserError(f"--tracker {name} needs the package {name}: pip install {name}")


def flag(name: str | None, help: str, metavar: str | None = None, *, default: Any = None, **arguments: Any) -> Any:
    """Return a field for the flag `name`, or for a positional argument; `arguments` are argparse's."""
    arguments |= {"help": help} | ({"metavar": metavar} if metavar else {})
    metadata = {"names": [name] if name else [], "arguments": arguments}
    return field(metadata=metadata, **({"default_factory": dict} if default is dict else {"default": default}))


# Flags that several commands share: help and metavar.
_DATASET = (
    "cifar10, cifar100, shapes (needs no files) or a folder of images (default: the run's, the recipe's, or cifar10)",
    "NAME|DIR",
)
_DATA_DIR = ("holds the CIFAR files (default: data)", "DIR")
_RECIPE = (f"{', '.join(recipe_names())} (default {DEFAULT_RECIPE}), or YAML", "NAME|FILE")
_RECIPE_OF_WEIGHTS = ("for bare weights: whose stem and normalization they have", "NAME|FILE")
_TRACKER = ("log to tensorboard, wandb, mlflow or another of Accelerate's trackers; may be repeated", "NAME")
_JSON = ("write the result there; - for the standard output", "FILE")
_SET = ("set fields of the recipe, e.g. optimizer.learning_rate=0.1; overrides flags and files", "KEY=VALUE")
_SET_OF_WEIGHTS = (
    "model=NAME, for bare weights or a network of your own; also stem, image_size, normalization",
    "KEY=VALUE",
)
FIELDS_OF_WEIGHTS = ("model", "stem", "image_size", "normalization")
"""Fields of the recipe that weights are used by: what `--set` takes beside `--ckpt`."""
_SEVERAL: dict[str, Any] = {"default": dict, "nargs": "+", "action": "extend"}
_CHECKPOINT = "FILE|RUN_DIR"
_MOST_SEEDS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What every command has. None stands for what was not typed."""

    config: str | None = None

    def __post_init__(self) -> None:
        """Raise UserError for a value that a field's type does not allow, from Python too."""
        for name, hint in typing.get_type_hints(type(self), include_extras=True).items():
            kind, value = without_none(hint), getattr(self, name)
            if typing.get_origin(kind) in (Annotated, Literal) and value is not None:
                convert(kind, value, f"--{name.replace('_', '-')}")


def without_none(hint: Any) -> Any:
    """Return the first type of a union with None, else the type itself."""
    return typing.get_args(hint)[0] if type(None) in typing.get_args(hint) else hint


def parse_duration(text: str) -> float:
    """Return the seconds of `90s`, `10m`, `2h` or `1h30m`. Raises UserError."""
    parts = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s)?", text.strip())
    with contextlib.suppress(ValueError):
        hours, minutes, seconds = (float(part or 0) for part in (parts.groups() if parts else (0, 0, 0)))
        if 0 < (total := 3600 * hours + 60 * minutes + seconds) < math.inf:
            return total
    raise UserError(f"--budget must be a time such as 90s, 10m, 2h or 1h30m, not '{text}'")


def parse_seeds(text: str) -> list[int]:
    """Parse `10` (0 to 9), `0-4` or `3,7`. Raises UserError."""
    parts = [re.fullmatch(r"(\d{1,10})(?:-(\d{1,10}))?", part.strip()) for part in text.split(",")]
    ends = [(int(part[1]), int(part[2] or part[1])) for part in parts if part]
    if len(ends) == 1 and "-" not in text:
        ends = [(0, ends[0][0] - 1)]
    count = sum(last - first + 1 for first, last in ends)
    if len(ends) < len(parts) or any(last < first for first, last in ends) or count > _MOST_SEEDS:
        raise UserError(f"--seeds must be a number up to {_MOST_SEEDS:,}, a range 0-4, or a list 3,7, not '{text}'")
    return list(dict.fromkeys(seed for first, last in ends for seed in range(first, last + 1)))


Precision = Literal["auto", "no", "fp16", "bf16"]
Tta = Literal["none", "mirror", "six"]
FULL_NAMES = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceOptions(Options):
    """What every command has that computes."""

    config: str | None = flag("--config", "an Accelerate config: device, processes, mixed precision", "YAML")
    precision: Precision | None = flag("--precision", "auto: what the device does best (the default); no: float32")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions(DeviceOptions):
    """Train a recipe, then evaluate it once on the test images."""

    recipe: str | Recipe | None = flag("--recipe", *_RECIPE)
    """A name or a file; the API may pass a whole recipe."""
    dataset: str | None = flag("--dataset", *_DATASET)
    data_dir: Path | None = flag("--data-dir", *_DATA_DIR)
    run_dir: Path | None = flag("--run-dir", "default: runs/<recipe>[-<model, if typed>]-<dataset>-seed<seed>", "DIR")
    resume: bool = flag("--resume", "resume the run in DIR, or in --run-dir", "DIR", default=False, nargs="?")
    resume_dir: Path | None = None
    """The folder typed after `--resume`, which must exist."""
    assignments: Mapping[str, Any] = flag("--set", *_SET, **_SEVERAL)
    """As a nested mapping."""
    num_processes: Count | None = flag("--num-processes", "start N processes (default: as --config)", "N")
    epochs: int | None = flag("--epochs", "the recipe's, unless typed", "N")
    budget: str | None = flag("--budget", "as many epochs as fit into 90s, 10m or 2h on this machine", "TIME")
    seed: int | None = flag("--seed", "the recipe's, unless typed", "N")
    seeds: str | None = flag("--seeds", "train several, one after the other: 10 (0 to 9), 0-4, or 3,7", "N|LIST")
    dry_run: bool = flag("--dry-run", "print the plan; start nothing and write nothing", default=False)
    measure: bool = flag("--measure", "with --dry-run: time some steps, and print how long it takes", default=False)
    checkpoint_every_steps: Count | None = flag("--checkpoint-every-steps", "save also within an epoch", "N")
    checkpoint_every_minutes: Positive | None = flag(
        "--checkpoint-every-minutes", "default: 1, at the ends of epochs", "M"
    )
    max_minutes: Positive | None = flag("--max-minutes", "stop and save after so long (exit code 75)", "M")
    trackers: Sequence[str] = flag("--tracker", *_TRACKER, default=(), action="append")
    quiet: bool = flag("--quiet", "no progress, only the result", default=False)
    skip_test: bool = flag("--skip-test", "leave out the test at the end", default=False)

    def __post_init__(self) -> None:
        Options.__post_init__(self)
        if self.resume_dir and self.run_dir and self.resume_dir != self.run_dir:
            raise UserError(f"--resume {self.resume_dir} and --run-dir {self.run_dir} name two runs: type one of them")
        if self.budget is not None:
            parse_duration(self.budget)
            if self.epochs is not None or "epochs" in self.assignments or self.seeds is not None:
                raise UserError("--budget plans the epochs of one run: leave it out, or the epochs and --seeds")
            if self.dry_run and not self.measure:
                raise UserError("--dry-run does not measure how many epochs fit into --budget: add --measure")
        if self.measure and not self.dry_run:
            raise UserError("--measure goes with --dry-run: type both")
        if self.seeds is not None:
            parse_seeds(self.seeds)
            if self.resume:
                raise UserError("--seeds resumes by itself: leave out --resume; in Slurm use slurm/array.sh")
            if self.seed is not None or "seed" in self.assignments:
                raise UserError("--seeds and a seed contradict each other: type one of them")

    @property
    def recipe_flags(self) -> dict[str, Any]:
        """The typed flags that are fields of the recipe."""
        flags = {"epochs": self.epochs, "seed": self.seed}
        return {name: value for name, value in flags.items() if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalOptions(DeviceOptions):
    """Evaluate a checkpoint or a bare state dict; each image is counted once."""

    checkpoint: Path = flag("--ckpt", "what to evaluate", _CHECKPOINT, default=MISSING)
    dataset: str | None = flag("--dataset", *_DATASET)
    data_dir: Path | None = flag("--data-dir", *_DATA_DIR)
    split: Literal["test", "validation"] = flag("--split", "default: test", default="test")
    recipe: str | None = flag("--recipe", *_RECIPE_OF_WEIGHTS)
    assignments: Mapping[str, Any] = flag("--set", *_SET_OF_WEIGHTS, **_SEVERAL)
    tta: Tta = flag("--tta", "average over the mirror image too, or over that and shifts (six views)", default="none")
    json: Path | None = flag("--json", *_JSON)
    figures: Path | None = flag("--figures", "draw confusion matrix, accuracy by class, predictions there", "DIR")


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictOptions(DeviceOptions):
    """Predict the classes of images of your own."""

    checkpoint: Path = flag("--ckpt", "with which weights", _CHECKPOINT, default=MISSING)
    images: Sequence[Path] = flag(None, "files, or folders of files", "IMAGE|DIR", default=MISSING)
    recipe: str | None = flag("--recipe", *_RECIPE_OF_WEIGHTS)
    assignments: Mapping[str, Any] = flag("--set", *_SET_OF_WEIGHTS, **_SEVERAL)
    top: Count = flag("--top", "so many classes an image (default: 5)", "K", default=5)
    json: Path | None = flag("--json", *_JSON)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportOptions(Options):
    """Draw a run's figures and page; compare several runs; show a study of `tune`."""

    run_dirs: Sequence[Path] = flag(None, "folders that runs have left, or one study", "DIR", default=MISSING)
    out: Path | None = flag("--out", "where the files go (default: DIR/figures of one run)", "DIR")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions(Options):
    """Write weights for other programs, in the format that the suffix of --out names."""

    checkpoint: Path = flag("--ckpt", "which weights", _CHECKPOINT, default=MISSING)
    out: Path = flag("--out", "FILE.pth, FILE.safetensors or FILE.onnx", "FILE", default=MISSING)
    recipe: str | None = flag("--recipe", *_RECIPE_OF_WEIGHTS)
    assignments: Mapping[str, Any] = flag("--set", *_SET_OF_WEIGHTS, **_SEVERAL)


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchOptions(DeviceOptions):
    """Measure the training loop against the bare training step, in alternation."""

    recipe: str = flag("--recipe", *_RECIPE, default=DEFAULT_RECIPE)
    assignments: Mapping[str, Any] = flag("--set", *_SET, **_SEVERAL)
    seconds: Positive = flag("--seconds", "for each loop measured (default 10)", "S", default=10.0)
    json: Path | None = flag("--json", *_JSON)


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorOptions(Options):
    """Show what this machine has, which data is here, and what is missing."""

    data_dir: Path | None = flag("--data-dir", *_DATA_DIR)
    download: bool = flag("--download", "fetch CIFAR-10 and the ImageNet weights where missing", default=False)


Sampler = Literal["tpe", "random", "gp"]
Pruner = Literal["median", "hyperband", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneOptions(DeviceOptions):
    """Search for a better recipe by trainings that the validation images judge."""

    recipe: str | None = flag("--recipe", *_RECIPE)
    dataset: str | None = flag("--dataset", *_DATASET)
    data_dir: Path | None = flag("--data-dir", *_DATA_DIR)
    study: Path | None = flag("--study", "default: studies/<recipe>-<dataset>; an existing study is resumed", "DIR")
    space: Path | None = flag("--space", "fields and their ranges (default: around the recipe's values)", "YAML")
    trials: Count | None = flag("--trials", "of the study in all (default 20; with --minutes: no limit)", "N")
    minutes: Positive | None = flag("--minutes", "stop after so long; the trial in progress is saved", "M")
    sampler: Sampler | None = flag("--sampler", "default tpe; gp: a Gaussian process")
    pruner: Pruner | None = flag("--pruner", "which ends poor trials early (default median)")
    assignments: Mapping[str, Any] = flag("--set", *_SET, **_SEVERAL)
    num_processes: Count | None = flag("--num-processes", "of each trial (default: as --config)", "N")
    epochs: int | None = flag("--epochs", "of each trial (default: the recipe's)", "N")
    seed: int | None = flag("--seed", "of the trials and of the sampler (default: the recipe's)", "N")
    lr_range: bool = flag(
        "--lr-range", "no study: train 100 steps at rising rates and draw their losses", default=False
    )

    def as_training(self, **changes: Any) -> TrainOptions:
        """Return the training that a trial varies."""
        names = {each.name for each in fields(TrainOptions)} & {each.name for each in fields(self)}
        return TrainOptions(**{name: getattr(self, name) for name in names} | changes)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipesOptions(Options):
    """List the recipes with their accuracy and time, or print one as YAML."""

    recipe: str | None = flag(None, "print this recipe; without it, list all", "NAME", nargs="?")


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigOptions(Options):
    """List the example Accelerate configs, or print one."""

    example: str | None = flag(None, "print this config; without it, list all", "NAME", nargs="?")


COMMANDS: dict[str, type[Options]] = {
    "train": TrainOptions,
    "eval": EvalOptions,
    "predict": PredictOptions,
    "report": ReportOptions,
    "export": ExportOptions,
    "tune": TuneOptions,
    "bench": BenchOptions,
    "doctor": DoctorOptions,
    "recipes": RecipesOptions,
    "config": ConfigOptions,
}
