"""The command line: one frozen dataclass a command, whose fields are its flags in the order of --help.

The docstring of a class is the description of its command. A flag's type and choices are those of its field.
"""
# ruff: noqa: RUF009  (flag returns a dataclasses.field)

import argparse
import contextlib
import importlib.util
import math
import os
import re
import shutil
import textwrap
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from cifar_dist import __version__
from cifar_dist.config.accelerate_config import config_names
from cifar_dist.config.errors import UserError
from cifar_dist.config.plan import KNOWN_SIZES
from cifar_dist.config.provenance import PROGRAM
from cifar_dist.config.recipe import (
    DEFAULT_RECIPE,
    RECIPE_FIELDS,
    Count,
    Positive,
    Recipe,
    find_field,
    parse_assignments,
    recipe_names,
)
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
            kind, value = _without_none(hint), getattr(self, name)
            if typing.get_origin(kind) in (Annotated, Literal) and value is not None:
                convert(kind, value, f"--{name.replace('_', '-')}")


def _without_none(hint: Any) -> Any:
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
_FIRST_RUN = "runs/first-shapes-seed0"
EXAMPLES: dict[str, Mapping[str, str]] = {
    "": {"--recipe first": "train in under a minute, without a download", f"eval --ckpt {_FIRST_RUN}": "evaluate it"},
    "train": {
        "--recipe quick": "CIFAR-10, which is downloaded if it is missing",
        "--recipe quick --dataset photos --epochs 20": "your own images: photos/<class>/*.jpg",
    },
    "eval": {
        f"eval --ckpt {_FIRST_RUN} --tta mirror": "a run, also over mirror images",
        "eval --ckpt weights.pth --recipe quick --json result.json": "a bare state dict",
    },
    "predict": {
        f"predict --ckpt {_FIRST_RUN} star.png": "one image",
        f"predict --ckpt {_FIRST_RUN} photos --json result.json": "a folder of images",
    },
    "report": {
        f"report {_FIRST_RUN}": "one run: figures and report.html",
        "report runs/quick-cifar10-seed0 runs/quick-cifar10-seed1 --out both": "compare two runs",
    },
    "export": {
        f"export --ckpt {_FIRST_RUN} --out model.safetensors": "weights",
        f"export --ckpt {_FIRST_RUN} --out model.onnx": "a graph for ONNX Runtime",
    },
    "tune": {
        "tune --recipe quick --trials 20": "a study; the same command continues it",
        "tune --recipe quick --lr-range": "only the learning rate",
    },
    "bench": {
        "bench --recipe quick": "the training loop against the bare step",
        "bench --recipe quick --set global_batch_size=128": "another batch size",
    },
    "doctor": {"doctor": "show this machine", "doctor --download": "fetch the data, for a node without network"},
    "recipes": {"recipes": "list them", "recipes quick > mine.yaml": "edit it, then train: --recipe mine.yaml"},
    "config": {"config": "list them", "config multi_gpu > mine.yaml": "edit it, then train: --config mine.yaml"},
}
"""What --help ends with: words that can be typed after the program's name, and what they do."""
_ALIASES = {
    "--ckpt": "checkpoint weights model",
    "--precision": "amp fp16 mixed_precision",
    "--num-processes": "gpus num_gpus nproc_per_node",
    "--max-minutes": "time max_time",
    "--run-dir": "output output_dir save_dir",
    "--out": "output output_dir",
    "--json": "output output_dir",
    "--dataset": "data train_dir",
    "--resume": "checkpoint resume_from",
    "--config": "device cpu gpu cuda",
}
"""Names of flags in other programs; the first flag that a command has is meant."""


def _program() -> str:
    """Return the program as it was typed: `python launch.py` or `cifar-dist`."""
    return os.environ.get(PROGRAM, "python launch.py")


def wrap(text: str, indent: str = "", mark: str = "") -> str:
    """Return text as lines that fit the terminal, 120 columns in a pipe.

    It is broken at spaces alone. `mark` ends each line but the last one, and `indent` begins each but the first.
    """
    width = min(shutil.get_terminal_size((120, 24)).columns, 120) - len(mark)
    lines = textwrap.wrap(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return f"{mark}\n".join(lines)


class _Parser(argparse.ArgumentParser):
    examples: Mapping[str, str] = {}

    def format_help(self) -> str:
        """Return the help, with examples at its end, whose lines end with a backslash where they are broken."""
        program, lines = _program().replace(" ", "\xa0"), []  # not broken
        for words, what in self.examples.items():
            lines += [wrap(f"  # {what}", "  # "), wrap(f"  {program} {words}", "      ", " \\").replace("\xa0", " ")]
        return "\n".join([super().format_help(), "examples:", *lines, ""])

    def error(self, message: str) -> NoReturn:
        """Raise UserError: one line, like every other."""
        raise UserError(f"{message} (see {self.prog} --help)")


def parse_arguments(argv: list[str]) -> tuple[str, Options]:
    """Return the command (`train` if none is typed) and its options. Raises UserError."""
    if any(word == "" or (word.startswith("--") and word.endswith("=")) for word in argv):
        raise UserError("an argument is empty: is a variable of your script not set?")
    if argv[:1] in (["-h"], ["--help"], ["--version"]):
        _top_parser().parse_args(argv[:1])
    if argv[:1] == ["--completion"]:
        print(completion_script())
        raise SystemExit(0)
    named = bool(argv) and not argv[0].startswith("-")
    command = argv[0] if named else "train"
    if command not in COMMANDS:
        raise UserError(f"unknown command '{command}'{nearest(command, COMMANDS)} (commands: {', '.join(COMMANDS)})")
    parser = _Parser(prog=f"{_program()} {command}", description=COMMANDS[command].__doc__, allow_abbrev=False)
    parser.examples, parser.usage = EXAMPLES[command], _usage(parser.prog, _add_arguments(parser, command))
    flags = [word.split("=")[0] for word in takewhile(lambda word: word != "--", argv) if word.startswith("--")]
    if unknown := [each for each in flags if each not in parser._option_string_actions]:  # before one is missed
        raise UserError(f"unknown argument '{unknown[0]}'{_suggest(unknown[0], parser)}")
    typed = vars(parser.parse_args(argv[named:]))
    if "assignments" in typed:
        typed["assignments"] = parse_assignments(typed["assignments"])
    if "resume" in typed:  # the folder after it, or nothing
        typed |= {"resume": True, "resume_dir": Path(typed["resume"]) if typed["resume"] else None}
    return command, COMMANDS[command](**typed)


def _add_arguments(parser: argparse.ArgumentParser, command: str) -> list[argparse.Action]:
    """Add a command's flags. They have no defaults here: those are the dataclass's."""
    hints, actions = typing.get_type_hints(COMMANDS[command]), []
    for each in fields(COMMANDS[command]):
        if not each.metadata:
            continue
        kind, names = _without_none(hints[each.name]), each.metadata["names"]
        arguments: dict[str, Any] = {"default": argparse.SUPPRESS, **each.metadata["arguments"]}
        if names:
            arguments |= {"dest": each.name, "required": each.default is each.default_factory is MISSING}
        if typing.get_origin(kind) is Literal:
            arguments["choices"] = typing.get_args(kind)
        elif kind is bool and "nargs" not in arguments:
            arguments["action"] = "store_true"
        elif kind in (int, float, Path):
            arguments["type"] = kind
        elif kind == Sequence[Path]:
            arguments |= {"type": Path, "nargs": "+"}
        actions.append(parser.add_argument(*(names or [each.name]), **arguments))
    return actions


def _usage(prog: str, actions: Sequence[argparse.Action]) -> str:
    """Return the usage with what must be typed; the other flags are listed below it."""
    words = [prog]
    for each in actions:
        if each.option_strings:
            words += [f"{each.option_strings[0]} {each.metavar}"] if each.required else []
        else:
            words.append(f"[{each.metavar}]" if each.nargs == "?" else f"{each.metavar} ...")
    return wrap(f"usage: {' '.join(words)} [options]", " " * 7).removeprefix("usage: ").replace("%", "%%")


def _suggest(unknown: str, parser: argparse.ArgumentParser) -> str:
    """Return a hint that names the flag or the recipe field that an unknown flag means."""
    name, actions = unknown[2:].replace("-", "_").lower(), parser._option_string_actions
    if (exact := f"--{name.replace('_', '-')}") in actions:
        return f", did you mean '{exact}'?"
    if name.endswith("workers"):
        return ": images are in memory, and no worker processes load them; leave it out"
    for meant, names in _ALIASES.items():
        if name in names.split() and meant in actions:
            return f", did you mean '{meant}'? ({actions[meant].help})"
    if name in TRACKERS and "--tracker" in actions:
        return f", did you mean '--tracker {name}'?"
    recipe_field = find_field(name) if "--set" in actions else None
    if recipe_field and ("--ckpt" not in actions or recipe_field.partition(".")[0] in FIELDS_OF_WEIGHTS):
        return f", did you mean '--set {recipe_field}=VALUE'?"
    return nearest(unknown, actions) or f" (see {parser.prog} --help)"


def _top_parser() -> argparse.ArgumentParser:
    commands = "\n".join(wrap(f"  {name:<8} {each.__doc__}", " " * 11) for name, each in COMMANDS.items())
    parser = _Parser(
        prog=_program(),
        usage="%(prog)s [COMMAND] [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=wrap("Train an image classifier, by default ResNet-18 on CIFAR-10, on the device that is there."),
        epilog=f"commands (each has its own --help; without one, train runs):\n{commands}",
    )
    parser.examples = EXAMPLES[""]
    parser.add_argument("--version", action="version", version=f"cifar-dist {__version__}")
    parser.add_argument("--completion", action="store_true", help="print a script that completes words in bash and zsh")
    return parser


def completion_script() -> str:
    """Return a script that completes `cifar-dist` in the shell of `$SHELL`, bash or zsh. Raises UserError."""
    try:
        import shtab
    except ImportError:
        raise UserError("--completion needs the package shtab: pip install shtab") from None
    parser = _top_parser()
    parser.prog = "cifar-dist"
    words = {"recipe": recipe_names(), "dataset": list(KNOWN_SIZES), "trackers": TRACKERS}
    words["assignments"] = [f"{name}=" for name in RECIPE_FIELDS]
    words["example"] = config_names()
    commands = parser.add_subparsers()
    parsers = [("train", parser), *((name, commands.add_parser(name, help=name)) for name in COMMANDS)]
    for name, each in parsers:
        for action in _add_arguments(each, name):
            action.choices = words.get(action.dest, action.choices)
            if action.type is Path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(parser, "zsh" if os.environ.get("SHELL", "").endswith("zsh") else "bash")
