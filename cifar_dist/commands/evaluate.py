"""`eval`: how well saved weights do on a dataset, each image counted once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from cifar_dist.config.accelerate_config import AccelerateConfig
from cifar_dist.config.errors import EXIT_DONE, UserError
from cifar_dist.config.files import STANDARD_OUTPUT, write_json, writing
from cifar_dist.config.options import EvalOptions
from cifar_dist.config.plan import num_held_out
from cifar_dist.config.world import World
from cifar_dist.data.dataset import Dataset, LabelledImages, load_dataset, stratified_split
from cifar_dist.display.progress import evaluation_display, loading_progress
from cifar_dist.display.tables import format_evaluation
from cifar_dist.display.terminal import make_console, print_lines, print_notes
from cifar_dist.run.checks import check_evaluation
from cifar_dist.run.resolve import DEFAULT_DATA_DIR, DEFAULT_DATASET, check_dataset_name
from cifar_dist.run.results import Evaluation
from cifar_dist.run.weights import SavedWeights, read_weights
from cifar_dist.runtime.device import FULL_NAMES
from cifar_dist.runtime.distributed import Runtime, connect, start
from cifar_dist.training.evaluation import EvaluationSet, figure_arrays
from cifar_dist.training.metrics import summarize


def run(options: EvalOptions, world: World, config: AccelerateConfig) -> int:
    """Evaluate. Return the exit code."""
    console = make_console(quiet=world.rank > 0, stderr=options.json == STANDARD_OUTPUT)
    evaluate(options, world, config, console)
    return EXIT_DONE


def evaluate(options: EvalOptions, world: World, config: AccelerateConfig, console: Console) -> Evaluation:
    """Evaluate, print the result, and return it on all ranks. Raises UserError."""
    with connect(world, config) as ranks:
        weights = ranks.broadcast_from_main(lambda: _read(options))
        dataset = ranks.main_process_first(lambda: _load_data(console, options, weights))
        settings = weights.compute_settings(options.precision, world.size)
        runtime = start(ranks, config, **settings, doing="evaluating")
        print_notes(console, (*weights.notes, *runtime.compute.notes))
        metadata = weights.metadata
        is_other = metadata is None or metadata.dataset.fingerprint != dataset.fingerprint()
        has_changed = is_other and _is_own_folder(options, weights, dataset)
        whole = dataset.whole if is_other and not has_changed else None
        with ranks.together():
            data, indices = _choose_split(options, weights, dataset, whole, is_other=is_other)
        if has_changed:
            print_notes(console, [f"{dataset.name} has changed since the training, which may have seen these images"])
        elif data is whole:
            print_notes(console, [f"{dataset.name} has no test/ of its own: all its images are evaluated"])
        names, model = dataset.class_names, weights.build(runtime.device, runtime.memory_format)
        split = EvaluationSet(data=data, indices=indices, class_names=names, recipe=weights.recipe, runtime=runtime)
        with evaluation_display(console) as observer:
            predictions = split.predict(model, observer, mirror=options.tta == "mirror")
        evaluation = summarize(predictions.logits, predictions.labels, names)
        with ranks.together():
            weights.check_finite(torch.tensor(evaluation.loss), runtime.precision)
        how = f"tta {options.tta}, {FULL_NAMES[runtime.precision]}"
        title = f"{weights.path}, {dataset.name} {options.split}, {how}"
        print_lines(console, format_evaluation(evaluation), title=title)
        if ranks.is_main:
            write_json(options.json, _in_json(evaluation, options, weights, dataset, runtime))
        if ranks.is_main and options.figures is not None:
            _draw(options.figures, title, evaluation, figure_arrays(predictions, data, names))
    return evaluation


def _read(options: EvalOptions) -> SavedWeights:
    check_evaluation(options)
    weights = read_weights(options.checkpoint, options.recipe)
    if weights.class_names is None and options.split == "validation":
        raise UserError("bare weights do not know which images were held out: use --split test, or a checkpoint")
    return weights


def _load_data(console: Console, options: EvalOptions, weights: SavedWeights) -> Dataset:
    """Load the dataset of the command line, else the one that the weights were trained on."""
    trained_on = None if weights.metadata is None else weights.metadata.dataset
    name = options.dataset or (DEFAULT_DATASET if trained_on is None else trained_on.name)
    data_dir = options.data_dir or (DEFAULT_DATA_DIR if trained_on is None else Path(trained_on.data_dir))
    check_dataset_name(name)
    with loading_progress(console, name) as progress:
        dataset = load_dataset(name, data_dir.absolute(), weights.recipe, for_training=False, progress=progress)
    print_notes(console, [dataset.origin])
    if weights.class_names is not None:
        try:
            return dataset.with_classes(weights.class_names)
        except ValueError as error:
            raise UserError(f"{weights.path} was trained on other classes than {name} has: {error}") from None
    if weights.num_classes != dataset.num_classes:
        raise UserError(
            f"{weights.path} knows {weights.num_classes} classes, and {name} has {dataset.num_classes}:"
            " name its --dataset"
        )
    return dataset


def _is_own_folder(options: EvalOptions, weights: SavedWeights, dataset: Dataset) -> bool:
    """Whether the images lie in the folder that the weights were trained on."""
    name = None if weights.metadata is None else weights.metadata.dataset.name
    return dataset.origin is not None and (options.dataset is None or str(Path(options.dataset).absolute()) == name)


def _choose_split(
    options: EvalOptions, weights: SavedWeights, dataset: Dataset, whole: LabelledImages | None, *, is_other: bool
) -> tuple[LabelledImages, Tensor]:
    """Return the images, and which of them to evaluate. Raises UserError where the training may have seen them."""
    if options.split == "test":
        data = whole or dataset.test
        return data, torch.arange(len(data))
    if is_other:  # also if it has the same images: in another order others are held out
        raise UserError(
            f"{dataset.name} is not what {weights.path} was trained on, or has changed: which images were held out is"
            " not known, use --split test"
        )
    if dataset.validation is not None:
        return dataset.validation, torch.arange(len(dataset.validation))
    num_validation = num_held_out(weights.recipe, dataset.sizes)
    _, held_out = stratified_split(dataset.train.labels, num_validation, seed=weights.recipe.seed)
    if not len(held_out):
        raise UserError(f"{weights.path} was trained without a validation split: evaluate it with --split test")
    return dataset.train, held_out


def _in_json(
    evaluation: Evaluation, options: EvalOptions, weights: SavedWeights, dataset: Dataset, runtime: Runtime
) -> dict[str, Any]:
    return {
        **evaluation.to_mapping(),
        "checkpoint": str(weights.path),
        "dataset": dataset.name,
        "split": options.split,
        "tta": options.tta,
        "precision": runtime.precision,
        "world_size": runtime.world.size,
    }


def _draw(folder: Path, title: str, evaluation: Evaluation, saved: Mapping[str, NDArray[Any]]) -> None:
    # matplotlib takes its time to be imported, and most evaluations do not need it.
    from cifar_dist.display.figures import draw_evaluation

    with writing(folder, "name another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        draw_evaluation(folder, evaluation, saved, title=title)
