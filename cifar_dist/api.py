"""The commands as Python functions. See docs/python-api.md."""

import os
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read by torch when it is imported

import torch
from torch import nn

from cifar_dist.commands import evaluate as evaluate_command
from cifar_dist.commands import predict as predict_command
from cifar_dist.commands import train as train_command
from cifar_dist.config.accelerate_config import AccelerateConfig, load_accelerate_config, processes_to_start
from cifar_dist.config.errors import EXIT_DONE, UserError
from cifar_dist.config.options import EvalOptions, Precision, PredictOptions, TrainOptions, Tta
from cifar_dist.config.own_code import register
from cifar_dist.config.recipe import Recipe
from cifar_dist.config.world import World
from cifar_dist.display.terminal import make_console, print_error
from cifar_dist.run.results import Evaluation, Prediction, Summary
from cifar_dist.run.weights import read_weights

PathLike = str | os.PathLike[str]
Model = str | Callable[..., nn.Module]
"""A model of torchvision, `fastnet`, `file.py:function`, or a function that gets `num_classes`."""
T = TypeVar("T")
_SEVERAL = ("images", "trackers")
_NAMES = {"ckpt": "checkpoint", "resume": "resume=True", "tracker": "trackers"}


@contextmanager
def _arguments_by_name() -> Iterator[None]:
    """Name arguments in errors as Python does: `run_dir`, not `--run-dir`."""
    try:
        yield
    except UserError as error:
        text = re.sub(r"(?<!\S)--(precision|split) (no|test)\b", r'\1="\2"', str(error))
        text = re.sub(r"(?<!\S)--set ('?)(model=[^']*)\1", r"\2", text)
        text = re.sub(r"(?<!\S)--([a-z][a-z-]+)", lambda flag: _NAMES.get(flag[1], flag[1].replace("-", "_")), text)
        raise type(error)(text) from None


@_arguments_by_name()
def train(
    recipe: PathLike | Recipe | None = None,
    *,
    model: Model | None = None,
    dataset: PathLike | None = None,
    data_dir: PathLike | None = None,
    run_dir: PathLike | None = None,
    resume: bool = False,
    precision: Precision | None = None,
    config: PathLike | None = None,
    trackers: str | Sequence[str] = (),
    quiet: bool = False,
) -> Summary:
    """Train a recipe, evaluate it once on the test images, and write the run directory.

    In a process of a process group (under `accelerate.notebook_launcher` or torchrun) this is one rank of the training.

    Args:
        recipe: A name, a YAML file or a `Recipe`. Default: `standard`, or the recipe of the resumed run.
        model: Overrides the recipe's `model`: a name, or a function that is called with `num_classes` and returns an
            `nn.Module`.
        dataset: `cifar10`, `cifar100`, `shapes`, or a folder of images. Default: the resumed run's, the
            recipe's, or `cifar10`.
        data_dir: The folder of the CIFAR files, which are downloaded if they are missing. Default: `data`.
        run_dir: The folder that the run is written to. Default: a new folder in `runs/`.
        resume: Continue the run in `run_dir`.
        precision: `auto` (the default) is the best of the device, `no` is float32.
        config: An Accelerate config: device and mixed precision.
        trackers: Names of Accelerate's trackers, such as `tensorboard`.
        quiet: Print nothing.

    Returns:
        The content of the run's `summary.json`.

    Raises:
        UserError: A mistake in an argument, a file or the dataset.
        RuntimeError: Training was interrupted or diverged; the text says why.
    """
    if resume and run_dir is None:
        raise UserError("resume=True needs run_dir: the run's folder")
    places = {"dataset": dataset, "data_dir": data_dir, "run_dir": run_dir, "config": config}
    options = _options(
        TrainOptions,
        recipe=recipe,
        assignments=_assign(model),
        **places,
        resume=resume,
        precision=precision,
        trackers=trackers,
        quiet=quiet,
    )
    world, accelerate_config = World.from_environment(os.environ), _load_config(options.config)
    if (count := processes_to_start(world, accelerate_config)) > 1:
        raise UserError(f"{config} asks for {count} processes, and this is one: start them by notebook_launcher")
    reasons: list[str] = []
    console = make_console(quiet=quiet or world.rank > 0)
    code, summary = train_command.train(options, world, accelerate_config, console, reasons.append)
    if code != EXIT_DONE or summary is None:
        raise RuntimeError(": ".join([f"training did not come to its end (exit code {code})", *reasons]))
    return summary


@_arguments_by_name()
def evaluate(
    checkpoint: PathLike,
    *,
    model: Model | None = None,
    dataset: PathLike | None = None,
    data_dir: PathLike | None = None,
    split: Literal["test", "validation"] = "test",
    recipe: PathLike | None = None,
    tta: Tta = "none",
    precision: Precision | None = None,
    config: PathLike | None = None,
    quiet: bool = False,
) -> Evaluation:
    """Evaluate weights on a dataset; each image is counted once.

    Args:
        checkpoint: A run directory, a checkpoint, or a bare state dict.
        model: Needed for a network of your own, and for a bare state dict that is no ResNet-18's.
        dataset: Default: the dataset that the weights were trained on.
        data_dir: The folder of the CIFAR files. Default: that of the training, or `data`.
        split: `validation` is the images that the training held out.
        recipe: For a bare state dict: the recipe whose stem and normalization it has.
        tta: `mirror` averages the predictions of each image and its mirror image, `six` also of shifts by a pixel
                (arXiv 2404.00498).
        precision: Default: that of the training; of bare weights float32. `auto` is the best of the device.
        config: An Accelerate config: device and mixed precision.
        quiet: Print nothing.

    Returns:
        Accuracy, loss, and the accuracy of each class.

    Raises:
        UserError: A mistake in an argument, a file or the dataset.
    """
    places = {"checkpoint": checkpoint, "dataset": dataset, "data_dir": data_dir, "config": config}
    how = {"split": split, "tta": tta, "precision": precision}
    options = _options(EvalOptions, **places, assignments=_assign(model), recipe=recipe, **how)
    world = World.from_environment(os.environ)
    console = make_console(quiet=quiet or world.rank > 0)
    return evaluate_command.evaluate(options, world, _load_config(options.config), console)


@_arguments_by_name()
def predict(
    checkpoint: PathLike,
    images: PathLike | Sequence[PathLike],
    *,
    model: Model | None = None,
    recipe: PathLike | None = None,
    top: int = 5,
    precision: Precision | None = None,
    config: PathLike | None = None,
    quiet: bool = False,
) -> list[Prediction]:
    """Predict the most likely classes of image files.

    Args:
        checkpoint: As for `evaluate`. The classes of a bare state dict are numbered.
        images: Files, or folders of files, of any size and mode.
        model: As for `evaluate`.
        recipe: As for `evaluate`.
        top: The number of classes of each image.
        precision: As for `evaluate`.
        config: As for `evaluate`.
        quiet: Print nothing.

    Returns:
        A prediction of each file. Files that could not be read come last, with the reason.

    Raises:
        UserError: A mistake in an argument or a file, or no image could be read.
    """
    how = {"top": top, "precision": precision, "config": config}
    options = _options(
        PredictOptions, checkpoint=checkpoint, images=images, assignments=_assign(model), recipe=recipe, **how
    )
    if not options.images:
        raise UserError("images is empty: it must be paths of files or folders")
    world = World.from_environment(os.environ)
    console = make_console(quiet=quiet or world.rank > 0)
    on_failure = (lambda text: None) if quiet else print_error
    return predict_command.predict(options, world, _load_config(options.config), console, on_failure)


@_arguments_by_name()
def load_model(checkpoint: PathLike, *, model: Model | None = None, recipe: PathLike | None = None) -> nn.Module:
    """Load a trained network on the CPU, in evaluation mode.

    Args:
        checkpoint: A run directory, a checkpoint, or a bare state dict.
        model: As for `evaluate`.
        recipe: As for `evaluate`.

    Returns:
        A network from images (N, 3, S, S) float32 to logits (N, classes). S is `network.recipe.image_size`. The images
            are normalized by `network.recipe.normalization`. The logits are in the order of `network.class_names`,
            which is None for a bare state dict.

    Raises:
        UserError: A mistake in an argument or a file.
    """
    options = _options(EvalOptions, checkpoint=checkpoint, assignments=_assign(model), recipe=recipe)
    weights = read_weights(options.checkpoint, options.recipe, options.assignments)
    network = weights.build(torch.device("cpu"), torch.contiguous_format)
    vars(network).update(class_names=weights.class_names, recipe=weights.recipe)
    return network


def _assign(model: Model | None) -> dict[str, str]:
    """Return the recipe field of a model. A function becomes known to this process by its name."""
    if model is None:
        return {}
    return {"model": model if isinstance(model, str) else register(model)}


def _options(cls: type[T], **values: Any) -> T:
    """Build a command's options from a function's arguments. Raises UserError for a value of another type."""
    hints = typing.get_type_hints(cls)
    for name, value in values.items():
        hint, kinds = hints[name], {hints[name], *typing.get_args(hints[name])}
        if isinstance(value, Recipe | Mapping) or not {str, Path} & kinds or (value is None and type(None) in kinds):
            continue
        is_several = typing.get_origin(hint) is Sequence
        given = value if is_several and isinstance(value, Iterable) and not isinstance(value, str) else [value]
        texts = [_text(name, each) for each in given]
        if name == "dataset" and not isinstance(value, str):  # `Path("shapes")` is a folder, "shapes" a dataset
            texts = [str(Path(texts[0]).absolute())]
        converted = [Path(text) if Path in kinds else text for text in texts]
        values[name] = tuple(converted) if is_several else converted[0]
    return cls(**values)


def _text(name: str, value: Any) -> str:
    if isinstance(value, str | os.PathLike) and str(value):
        return os.fspath(value)
    given = "empty" if value in ("", None) else f"of type {type(value).__name__}"
    raise UserError(f"{name} is {given}: it must be a path or a name{', or several' if name in _SEVERAL else ''}")


def _load_config(path: str | None) -> AccelerateConfig:
    """Load an Accelerate config, and choose its GPUs. Raises UserError where that is too late."""
    config = load_accelerate_config(path)
    if config.gpu_ids is not None and os.environ.get("CUDA_VISIBLE_DEVICES") != config.gpu_ids:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            raise UserError(f"{path} chooses GPUs {config.gpu_ids}, and this process has begun on others: restart it")
        os.environ["CUDA_VISIBLE_DEVICES"] = config.gpu_ids
    return config
