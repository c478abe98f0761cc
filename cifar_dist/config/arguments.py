"""The command line: words -> one command with typed options."""

import argparse
from dataclasses import fields
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

from cifar_dist import __version__
from cifar_dist.config.completion import completion_script
from cifar_dist.config.errors import UserError
from cifar_dist.config.loading import parse_assignments, read_recipe
from cifar_dist.config.options import (
    BenchOptions,
    DoctorOptions,
    EvalOptions,
    ExportOptions,
    Options,
    PredictOptions,
    ReportOptions,
    TrainOptions,
)
from cifar_dist.config.parsing import field_called, flatten, nearest
from cifar_dist.config.trackers import TRACKERS

_COMMANDS: dict[str, type[Options]] = {
    "train": TrainOptions,
    "eval": EvalOptions,
    "predict": PredictOptions,
    "report": ReportOptions,
    "export": ExportOptions,
    "bench": BenchOptions,
    "doctor": DoctorOptions,
}

_OTHER_NAMES = {
    "--ckpt FILE": "checkpoint weights model model_path load",
    "--precision": "amp fp16 bf16 half dtype mixed_precision",
    "--num-processes": "gpus ngpus num_gpus n_gpus devices nproc nprocs nproc_per_node world_size",
    "--max-minutes": "time time_limit max_time max_hours timeout",
    "--run-dir": "output output_dir out out_dir save_dir log_dir logdir work_dir exp_dir name",
    "--out": "output output_dir out_dir",
    "--json": "output output_dir out",
    "--dataset DIR": "data data_path train_dir",
    "--resume DIR": "checkpoint resume_from resume_from_checkpoint load",
    "--config accelerate_configs/cpu.yaml": "cpu use_cpu no_cuda device",
    "--config": "gpu cuda gpu_ids num_machines nnodes",
}
"""What other programs call a flag; the first that a command has is meant."""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose refusals are UserErrors: one line, like every other."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError with what argparse has to say."""
        raise UserError(f"{message} (see {self.prog} --help)")


def parse_arguments(argv: list[str]) -> tuple[str, Options]:
    """Give the command (`train` where none is typed) and its options. Raises UserError."""
    if any(word == "" or (word.startswith("--") and word.endswith("=")) for word in argv):
        raise UserError("an argument is empty: is a variable of your script not set?")
    if argv[:1] in (["-h"], ["--help"], ["--version"]):
        _top_parser().parse_args(argv[:1])
    if argv[:1] == ["--completion"]:
        print(completion_script({name: _command_parser(name) for name in _COMMANDS}))
        raise SystemExit(0)
    named = bool(argv) and not argv[0].startswith("-")
    command = argv[0] if named else "train"
    if command not in _COMMANDS:
        raise UserError(f"unknown command '{command}'{nearest(command, _COMMANDS)} (commands: {', '.join(_COMMANDS)})")
    parser = _command_parser(command)
    flags = [word.split("=")[0] for word in takewhile(lambda word: word != "--", argv) if word.startswith("--")]
    if unknown := [flag for flag in flags if flag not in parser._option_string_actions]:  # before one is missed
        raise UserError(f"unknown argument '{unknown[0]}'{_meant(unknown[0], parser)}")
    namespace = parser.parse_args(argv[named:])
    return command, _make_options(command, vars(namespace))


def _meant(unknown: str, parser: argparse.ArgumentParser) -> str:
    """Name the flag or the field of the recipe that an unknown flag is for."""
    name, actions = unknown[2:].replace("-", "_").lower(), parser._option_string_actions
    if (flag := f"--{name.replace('_', '-')}") in actions:
        return f", did you mean '{flag}'?"
    if name in ("workers", "num_workers", "data_workers"):
        return ": images are in memory, and no worker processes load them; leave it out"
    for meant, names in _OTHER_NAMES.items():
        if name in names.split() and (action := actions.get(meant.split()[0])):
            return f", did you mean '{meant}'? ({action.help})"
    if name in TRACKERS and "--tracker" in actions:
        return f", did you mean '--tracker {name}'?"
    if "--set" in actions and (field := field_called(name, flatten(read_recipe("standard")))):
        return f", did you mean '--set {field}=VALUE'?"
    return nearest(unknown, actions) or f" (see {parser.prog} --help)"


def _top_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="launch.py",
        usage="launch.py [train|eval|predict|report|export|bench|doctor] [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train one ResNet-18 recipe for CIFAR on the device that is there.",
        epilog="""commands (each has its own --help):
  train    train a recipe; what runs when no command is named
  eval     evaluate a checkpoint, or a bare state dict
  predict  the classes of images of your own
  report   figures and a page of a run; several runs side by side
  export   weights for other programs: .pth, .safetensors, .onnx
  bench    measure the training loop against the bare training step
  doctor   what this machine offers, and what would run here

first steps:
  launch.py --dataset shapes --recipe original --epochs 3    a first try: no files, no network
  launch.py --recipe original --epochs 20                    CIFAR-10, downloaded when missing
  launch.py eval --ckpt runs/original-cifar10-seed0          the test accuracy of that run
""",
    )
    parser.add_argument("--version", action="version", version=f"cifar-dist {__version__}")
    parser.add_argument("--completion", action="store_true", help="print a script that completes words in bash and zsh")
    return parser


def _command_parser(command: str) -> argparse.ArgumentParser:
    """Make a command's parser from the fields of its options; what is not typed is left to their defaults."""
    options = _COMMANDS[command]
    parser = _Parser(
        prog=f"launch.py {command}", description=options.__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    for field in fields(options):
        if field.metadata:
            parser.add_argument(*field.metadata["names"], dest=field.name, **field.metadata["arguments"])
    return parser


def _make_options(command: str, typed: dict[str, Any]) -> Options:
    """Give a command's options. Raises UserError for a value that they refuse."""
    if "assignments" in typed:
        typed["assignments"] = parse_assignments(typed["assignments"])
    if "resume" in typed:  # the folder after it, or nothing
        folder = typed["resume"]
        typed |= {"resume": True, "resume_dir": Path(folder) if folder else None}
    return _COMMANDS[command](**typed)
