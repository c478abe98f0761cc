"""`eval`: evaluate saved weights on a dataset, each image counted once."""

from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from cifar_dist.config.accelerate_config import AccelerateConfig
from cifar_dist.config.errors import EXIT_DONE, UserError
from cifar_dist.config.files import STANDARD_OUTPUT, write_json, writing
from cifar_dist.config.options import FULL_NAMES, EvalOptions
from cifar_dist.config.plan import num_held_out
from cifar_dist.config.world import World
from cifar_dist.data.dataset import Dataset, LabelledImages, load_dataset, stratified_split
from cifar_dist.display.progress import CountProgress, loading_progress
from cifar_dist.display.terminal import can_draw, format_evaluation, make_console, print_lines, print_notes
from cifar_dist.run.checks import check_evaluation
from cifar_dist.run.resolve import DEFAULT_DATA_DIR, DEFAULT_DATASET, check_dataset_name
from cifar_dist.run.results import Evaluation
from cifar_dist.run.weights import SavedWeights, read_weights
from cifar_dist.runtime.distributed import connect, start
from cifar_dist.training.evaluation import EvaluationSet


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
        with ranks.together():
            data, indices, note = _choose_images(options, weights, dataset)
        print_notes(console, (*weights.notes, *runtime.compute.notes, note))
        names, model = dataset.class_names, weights.build(runtime.device, runtime.memory_format)
        split = EvaluationSet(data=data, indices=indices, class_names=names, recipe=weights.recipe, runtime=runtime)
        with CountProgress(console, "evaluating", unit="images") as observer:
            logits = split.predict(model, observer, tta=options.tta)
        evaluation = split.summarize(logits)
        with ranks.together():
            weights.check_finite(torch.tensor(evaluation.loss), runtime.precision)
        how = f"{dataset.name} {options.split}, tta {options.tta}, {FULL_NAMES[runtime.precision]}"
        title, lines = f"{weights.path}, {how}", format_evaluation(evaluation)
        print_lines(console, lines if can_draw(console) else [title, *lines], title=title)
        if ranks.is_main:
            described = {
                "checkpoint": str(weights.path),
                "dataset": dataset.name,
                "split": options.split,
                "tta": options.tta,
                "precision": runtime.precision,
                "world_size": world.size,
            }
            write_json(options.json, asdict(evaluation) | described)
            if options.figures is not None:
                from cifar_dist.display.figures import draw_evaluation, font_note  # imports matplotlib

                typed = options.checkpoint.absolute()
                name = f"{typed.parents[1].name} {typed.name}" if typed.parent.name == "checkpoints" else typed.name
                with writing(options.figures, "name another folder"):
                    options.figures.mkdir(parents=True, exist_ok=True)
                    draw_evaluation(options.figures, evaluation, split.figure_arrays(logits), title=f"{name}, {how}")
                note = font_note([*names, dataset.name], "repeat this command")
                print_notes(console, [f"pictures: {options.figures}", note])
    return evaluation


def _read(options: EvalOptions) -> SavedWeights:
    check_evaluation(options)
    weights = read_weights(options.checkpoint, options.recipe, options.assignments)
    if weights.class_names is None and options.split == "validation":
        raise UserError("bare weights do not name the images that were held out: use --split test, or a checkpoint")
    return weights


def _load_data(console: Console, options: EvalOptions, weights: SavedWeights) -> Dataset:
    """Load the dataset of the command line, else the one that the weights were trained on."""
    trained_on = weights.trained_on
    name = options.dataset or (weights.recipe.dataset or DEFAULT_DATASET if trained_on is None else trained_on.name)
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
        counts = f"{weights.path} has {weights.num_classes} classes, and {name} has {dataset.num_classes}"
        raise UserError(f"{counts}: name its --dataset")
    return dataset


def _choose_images(
    options: EvalOptions, weights: SavedWeights, dataset: Dataset
) -> tuple[LabelledImages, Tensor, str | None]:
    """Return images, the indices (N,) to evaluate, and a note. Raises UserError if the training may have seen them."""
    trained_on = weights.trained_on
    is_other = trained_on is None or trained_on.fingerprint != dataset.fingerprint()
    if options.split == "test":
        stored = "" if trained_on is None else trained_on.name
        own_folder = dataset.origin is not None and str(Path(options.dataset or stored).absolute()) == stored
        data, note = dataset.test, None
        if is_other and own_folder:
            note = f"{dataset.name} has changed since the training, which may have seen these images"
        elif is_other and dataset.whole is not None:
            data, note = dataset.whole, f"{dataset.name} has no test/ of its own: all its images are evaluated"
        return data, torch.arange(len(data)), note
    if is_other:  # even with the same images: in another order others are held out
        raise UserError(
            f"{dataset.name} is not what {weights.path} was trained on, or has changed: which images were held out is"
            " not known, use --split test"
        )
    if dataset.validation is not None:
        return dataset.validation, torch.arange(len(dataset.validation)), None
    num_validation = num_held_out(weights.recipe, dataset.sizes)
    _, held_out = stratified_split(dataset.train.labels, num_validation, seed=weights.recipe.seed)
    if not len(held_out):
        raise UserError(f"{weights.path} was trained without a validation split: evaluate it with --split test")
    return dataset.train, held_out, None
