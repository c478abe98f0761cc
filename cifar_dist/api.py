"""The launcher from Python: what the commands do, as functions. See docs/api.md."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read by torch when it is imported

import torch
from torch import nn

from cifar_dist.commands import evaluate as evaluate_command
from cifar_dist.commands import train as train_command
from cifar_dist.config.accelerate_config import AccelerateConfig, load_accelerate_config, processes_to_start
from cifar_dist.config.errors import EXIT_DONE, UserError
from cifar_dist.config.options import EvalOptions, TrainOptions
from cifar_dist.config.recipe import Recipe
from cifar_dist.config.world import World
from cifar_dist.display.console import make_console
from cifar_dist.records import Evaluation, Summary
from cifar_dist.training.weights import read_weights

PathLike = str | os.PathLike[str]


def train(
    recipe: str | Recipe | None = None,
    *,
    dataset: PathLike | None = None,
    data_dir: PathLike | None = None,
    run_dir: PathLike | None = None,
    resume: bool = False,
    precision: Literal["auto", "no", "fp16", "bf16"] | None = None,
    config: str | None = None,
    trackers: str | Sequence[str] = (),
    quiet: bool = False,
) -> Summary:
    """Train a recipe (a name, a file, or a `Recipe`), test it once, and give what became of it.

    `run_dir` is where the run is written (default: a new folder in `runs/`); with `resume` it goes on where it was.
    What is not given is `standard` on CIFAR-10 in `data`, or comes from the run that goes on.
    In a process group's process (under `accelerate.notebook_launcher` or torchrun) it is one of the ranks.
    Raises UserError for a mistake, and RuntimeError where training was interrupted or failed: stderr and `summary.json`
    say how.
    """
    if run_dir is not None and not str(run_dir):
        raise UserError("run_dir is empty: name a folder")
    options = TrainOptions(
        recipe=recipe,
        dataset=_name_or_folder(dataset),
        data_dir=None if data_dir is None else Path(data_dir),
        run_dir=None if run_dir is None else Path(run_dir),
        resume=resume,
        precision=precision,
        config=config,
        trackers=(trackers,) if isinstance(trackers, str) else tuple(trackers),
        quiet=quiet,
    )
    world, asked = World.from_environment(os.environ), _read_config(config)
    if (count := processes_to_start(world, asked)) > 1:
        raise UserError(f"{config} asks for {count} processes, and this is one: start them by notebook_launcher")
    code, summary = train_command.train(options, world, asked)
    if code != EXIT_DONE or summary is None:
        raise RuntimeError(f"training did not come to its end (exit code {code})")
    return summary


def evaluate(
    checkpoint: PathLike,
    *,
    dataset: PathLike | None = None,
    data_dir: PathLike | None = None,
    split: Literal["test", "validation"] = "test",
    recipe: str | None = None,
    tta: Literal["none", "mirror"] = "none",
    precision: Literal["auto", "no", "fp16", "bf16"] | None = None,
    config: str | None = None,
    quiet: bool = False,
) -> Evaluation:
    """Evaluate a run directory, a checkpoint or a bare state dict; each image is counted once.

    What is not given comes from the checkpoint. Raises UserError.
    """
    options = EvalOptions(
        checkpoint=Path(checkpoint),
        dataset=_name_or_folder(dataset),
        data_dir=None if data_dir is None else Path(data_dir),
        split=split,
        recipe=recipe,
        tta=tta,
        precision=precision,
        config=config,
    )
    world = World.from_environment(os.environ)
    console = make_console(quiet=quiet or world.rank > 0)
    return evaluate_command.evaluate(options, world, _read_config(config), console)


def _name_or_folder(dataset: PathLike | None) -> str | None:
    """Give a dataset as it is typed; `Path("./shapes")` is a folder, and as text it would be a dataset's name."""
    return dataset if dataset is None or isinstance(dataset, str) else str(Path(dataset).absolute())


def _read_config(path: str | None) -> AccelerateConfig:
    """Read an Accelerate config, and choose its GPUs. Raises UserError where that is too late."""
    config = load_accelerate_config(path)
    if config.gpu_ids is not None and os.environ.get("CUDA_VISIBLE_DEVICES") != config.gpu_ids:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            raise UserError(f"{path} chooses GPUs {config.gpu_ids}, and this process has begun on others: restart it")
        os.environ["CUDA_VISIBLE_DEVICES"] = config.gpu_ids
    return config


def load_model(checkpoint: PathLike, *, recipe: str | None = None) -> nn.Module:
    """Give the network of a run directory, a checkpoint or a bare state dict: torchvision's ResNet-18, on the CPU.

    It is in evaluation mode and takes normalised images (N, 3, S, S) (`Recipe.normalization`). Raises UserError.
    """
    return read_weights(Path(checkpoint), recipe).build(torch.device("cpu"), torch.contiguous_format)
