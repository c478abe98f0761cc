"""Read the command line: a parser for each command of `options`, its help with examples, and completion."""

import argparse
import os
import shutil
import textwrap
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, NoReturn

from cifar_dist import __version__
from cifar_dist.config.accelerate_config import config_names
from cifar_dist.config.errors import UserError
from cifar_dist.config.options import COMMANDS, FIELDS_OF_WEIGHTS, TRACKERS, Options, without_none
from cifar_dist.config.plan import KNOWN_SIZES
from cifar_dist.config.provenance import PROGRAM
from cifar_dist.config.recipe import RECIPE_FIELDS, find_field, parse_assignments, recipe_names
from cifar_dist.config.schema import nearest

_FIRST_RUN, _SMALL_BATCHES = "runs/first-shapes-seed0", "--set image_size=64 global_batch_size=32"
EXAMPLES: dict[str, Mapping[str, str]] = {
    "": {"--recipe first": "train in under a minute, without a download", f"eval --ckpt {_FIRST_RUN}": "evaluate it"},
    "train": {
        "--recipe quick": "CIFAR-10, which is downloaded if it is missing",
        f"--recipe quick --dataset photos --epochs 30 {_SMALL_BATCHES}": "your own images: photos/CLASS/*.jpg",
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
        fields = [word for word in message.removeprefix("unrecognized arguments: ").split() if "=" in word]
        hint = f"type --set {fields[0]}, or " if fields and message.startswith("unrecognized") else ""
        raise UserError(f"{message} ({hint}see {self.prog} --help)")


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
        kind, names = without_none(hints[each.name]), each.metadata["names"]
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
