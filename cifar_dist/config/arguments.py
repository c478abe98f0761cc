"""The command line: words -> one command with typed options."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from cifar_dist import __version__
from cifar_dist.config.completion import completion_script
from cifar_dist.config.errors import UserError
from cifar_dist.config.loading import parse_assignments, recipe_names
from cifar_dist.config.options import (
    BenchOptions,
    DoctorOptions,
    EvalOptions,
    ExportOptions,
    PredictOptions,
    ReportOptions,
    TrainOptions,
)
from cifar_dist.config.parsing import nearest

Options = TrainOptions | EvalOptions | PredictOptions | ReportOptions | ExportOptions | BenchOptions | DoctorOptions
_PRECISIONS = ("auto", "no", "fp16", "bf16")


class _Parser(argparse.ArgumentParser):
    """An argument parser whose refusals are UserErrors: one line, like every other."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError with what argparse has to say."""
        raise UserError(f"{message} (see {self.prog} --help)")


def parse_arguments(argv: list[str]) -> tuple[str, Options]:
    """Give the command (`train` where none is typed) and its options. Raises UserError."""
    top = _top_parser()
    if argv[:1] in (["-h"], ["--help"], ["--version"]):
        top.parse_args(argv[:1])
    if argv[:1] == ["--completion"]:
        print(completion_script({name: make_parser() for name, (make_parser, _) in _COMMANDS.items()}))
        raise SystemExit(0)
    named = bool(argv) and not argv[0].startswith("-")
    command = argv[0] if named else "train"
    if command not in _COMMANDS:
        raise UserError(f"unknown command '{command}'{nearest(command, _COMMANDS)} (commands: {', '.join(_COMMANDS)})")
    make_parser, make_options = _COMMANDS[command]
    parser = make_parser()
    namespace, unknown = parser.parse_known_args(argv[named:])
    if unknown:
        name = unknown[0].split("=")[0]
        raise UserError(f"unknown argument '{name}'{nearest(name, parser._option_string_actions)}")
    typed = vars(namespace)
    if "assignments" in typed:
        typed["assignments"] = parse_assignments(typed["assignments"])
    return command, make_options(typed)


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


def _command_parser(command: str, description: str) -> _Parser:
    parser = _Parser(prog=f"launch.py {command}", description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="YAML", help="an Accelerate config: device, processes, mixed precision")
    parser.add_argument("--precision", choices=_PRECISIONS, help="default: what the device does best (auto)")
    return parser


def _add_recipe(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    names = ", ".join(recipe_names())
    parser.add_argument("--recipe", default=default, metavar="NAME|FILE", help=f"{names} (default standard), or YAML")


def _add_checkpoint(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--ckpt", dest="checkpoint", type=Path, required=True, metavar="FILE|RUN_DIR", help=text)


def _add_recipe_of_weights(parser: argparse.ArgumentParser) -> None:
    text = "for bare weights: whose stem and normalisation they have"
    parser.add_argument("--recipe", metavar="NAME|FILE", help=text)


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        dest="assignments",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="set fields of the recipe, e.g. optimizer.learning_rate=0.1; wins over flags and files",
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dataset",
        metavar="NAME|DIR",
        help="cifar10 (default), cifar100, shapes (needs no files), or a folder of images",
    )
    _add_data_dir(parser)


def _add_data_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="holds the CIFAR files (default: data)")


def _train_parser() -> _Parser:
    parser = _command_parser("train", "Train a recipe, then evaluate it once on the test images.")
    _add_recipe(parser)
    _add_data(parser)
    parser.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/<recipe>-<dataset>-seed<seed>")
    parser.add_argument("--resume", nargs="?", const="", metavar="DIR", help="go on with the run in DIR (or --run-dir)")
    _add_set(parser)
    parser.add_argument("--num-processes", type=int, metavar="N", help="start N processes (default: as --config)")
    parser.add_argument("--epochs", type=int, metavar="N", help="the recipe's, unless typed")
    parser.add_argument("--seed", type=int, metavar="N", help="the recipe's, unless typed")
    parser.add_argument("--dry-run", action="store_true", help="print the plan; start nothing and write nothing")
    parser.add_argument("--checkpoint-every-steps", type=int, metavar="N", help="save also within an epoch")
    parser.add_argument("--checkpoint-every-minutes", type=float, metavar="M", help="default: 1, at the ends of epochs")
    parser.add_argument("--max-minutes", type=float, metavar="M", help="stop and save after so long (exit code 75)")
    parser.add_argument(
        "--tracker",
        dest="trackers",
        action="append",
        default=[],
        metavar="NAME",
        help="log to tensorboard, wandb, mlflow or another of Accelerate's trackers; may be repeated",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")
    return parser


def _train_options(typed: dict[str, Any]) -> TrainOptions:
    if typed["num_processes"] is not None and typed["num_processes"] < 1:
        raise UserError(f"--num-processes must be 1 or more, not {typed['num_processes']}")
    for name in ("checkpoint_every_steps", "checkpoint_every_minutes", "max_minutes"):
        if typed[name] is not None and not 0 < typed[name] < 1e6:
            raise UserError(f"--{name.replace('_', '-')} must be above 0 and below a million, not {typed[name]}")
    resume, run_dir = typed.pop("resume"), typed["run_dir"]
    resume_dir = Path(resume) if resume else None
    if resume_dir and run_dir and resume_dir != run_dir:
        raise UserError(f"--resume {resume_dir} and --run-dir {run_dir} name two runs: type one of them")
    typed["trackers"] = tuple(typed["trackers"])
    return TrainOptions(**typed, resume=resume is not None, resume_dir=resume_dir)


def _eval_parser() -> _Parser:
    parser = _command_parser("eval", "Evaluate a checkpoint or a bare state dict; each image is counted once.")
    _add_checkpoint(parser, "what to evaluate")
    _add_data(parser)
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="default: test")
    _add_recipe_of_weights(parser)
    parser.add_argument("--tta", choices=("none", "mirror"), default="none", help="average over the mirror image too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument(
        "--figures", type=Path, metavar="DIR", help="draw the confusion matrix, accuracy by class, predictions there"
    )
    return parser


def _report_parser() -> _Parser:
    description = "Draw a run's figures and write its page; put several side by side, with mean and standard deviation."
    parser = _Parser(prog="launch.py report", description=description, allow_abbrev=False)
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="folders that runs have left")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the files go (default: DIR/figures of one run)")
    return parser


def _predict_parser() -> _Parser:
    parser = _command_parser("predict", "Name the classes of images; each is predicted once.")
    _add_checkpoint(parser, "with which weights")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE|DIR", help="files, or folders of files")
    _add_recipe_of_weights(parser)
    parser.add_argument("--top", type=int, default=5, metavar="K", help="so many classes an image (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there; - for the standard output")
    return parser


def _predict_options(typed: dict[str, Any]) -> PredictOptions:
    if typed["top"] < 1:
        raise UserError(f"--top must be 1 or more, not {typed['top']}")
    return PredictOptions(**typed)


def _export_parser() -> _Parser:
    description = "Write weights for other programs, in the format that the suffix of --out names."
    parser = _Parser(prog="launch.py export", description=description, allow_abbrev=False)
    _add_checkpoint(parser, "which weights")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="FILE.pth, FILE.safetensors or FILE.onnx"
    )
    _add_recipe_of_weights(parser)
    return parser


def _bench_parser() -> _Parser:
    parser = _command_parser("bench", "Measure the training loop against the bare training step, in alternation.")
    _add_recipe(parser, default="standard")
    _add_set(parser)
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="for each loop measured (default 10)")
    parser.add_argument("--sweep", action="store_true", help="measure precisions, layouts, compilers; which is fastest")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser


def _doctor_parser() -> _Parser:
    parser = _command_parser("doctor", "Say what this machine offers, which data is here, and what would run.")
    _add_recipe(parser)
    _add_data_dir(parser)
    parser.add_argument("--download", action="store_true", help="fetch CIFAR-10 and the ImageNet weights where missing")
    return parser


def _bench_options(typed: dict[str, Any]) -> BenchOptions:
    if not 0 < typed["seconds"] < 86_400:
        raise UserError(f"--seconds must be above 0 and below a day, not {typed['seconds']:g}")
    return BenchOptions(**typed)


_COMMANDS: dict[str, tuple[Callable[[], _Parser], Callable[[dict[str, Any]], Options]]] = {
    "train": (_train_parser, _train_options),
    "eval": (_eval_parser, lambda typed: EvalOptions(**typed)),
    "predict": (_predict_parser, _predict_options),
    "report": (_report_parser, lambda typed: ReportOptions(**typed)),
    "export": (_export_parser, lambda typed: ExportOptions(**typed)),
    "bench": (_bench_parser, _bench_options),
    "doctor": (_doctor_parser, lambda typed: DoctorOptions(**typed)),
}
