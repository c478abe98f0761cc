"""`predict`: print the most likely classes of image files."""

import math
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from torch import Tensor, nn

from cifar_dist.config.accelerate_config import AccelerateConfig
from cifar_dist.config.errors import EXIT_DONE, EXIT_USER_ERROR
from cifar_dist.config.files import STANDARD_OUTPUT, write_json
from cifar_dist.config.options import PredictOptions
from cifar_dist.config.world import World
from cifar_dist.data.folder import UNREADABLE, ImageFile, decode_images, find_images
from cifar_dist.data.loader import Normalizer
from cifar_dist.display.progress import CountProgress
from cifar_dist.display.terminal import format_table, make_console, print_error, print_notes
from cifar_dist.run.directory import check_output
from cifar_dist.run.results import Observer, Prediction
from cifar_dist.run.weights import SavedWeights, read_weights
from cifar_dist.runtime.distributed import Runtime, connect, start
from cifar_dist.training.evaluation import batch_size_for

_DECODED_AT_ONCE = 256
"""Images, or a few more: enough for all the threads that decode, and little memory."""


def run(options: PredictOptions, world: World, config: AccelerateConfig) -> int:
    """Predict. Return the exit code: 2 if an image could not be read."""
    console = make_console(quiet=world.rank > 0, stderr=options.json == STANDARD_OUTPUT)
    predictions = predict(options, world, config, console)
    return EXIT_USER_ERROR if any(each.error for each in predictions) else EXIT_DONE


def predict(
    options: PredictOptions,
    world: World,
    config: AccelerateConfig,
    console: Console,
    on_failure: Callable[[str], None] = print_error,
) -> list[Prediction]:
    """Predict, print the result, and return it on all ranks. Files that could not be read come last.

    Rank 0 calls `on_failure` with a line for each of those. Raises UserError.
    """
    with connect(world, config) as ranks:
        weights, files, unreadable, skipped = ranks.broadcast_from_main(lambda: _read(options))
        settings = weights.compute_settings(options.precision, world.size)
        runtime = start(ranks, config, **settings, doing="predicting")
        unnamed = "the weights do not name their classes: they are numbered" if weights.class_names is None else None
        print_notes(console, (*weights.notes, unnamed, skipped, *runtime.compute.notes))
        model = weights.build(runtime.device, runtime.memory_format)
        with CountProgress(console, "evaluating", unit="images") as observer:
            probabilities, was_read = _predict(model, weights, files, runtime, observer)
        unreadable |= {file.name: UNREADABLE for file, ok in zip(files, was_read.tolist(), strict=True) if not ok}
        names = weights.class_names or tuple(map(str, range(weights.num_classes)))
        with ranks.together():  # the first process that ends may have the others killed
            weights.check_finite(probabilities[was_read], runtime.precision)
            top = _most_likely(files, probabilities, was_read, names, options.top)
            if ranks.is_main:
                if options.json is None:
                    rows = [[each.file, *(f"{name} {p:.1%}" for name, p in each.classes)] for each in top]
                    print_notes(console, format_table(rows) if rows else ())
                content = {
                    "checkpoint": str(weights.path),
                    "precision": runtime.precision,
                    "world_size": world.size,
                    "predictions": [
                        {"file": each.file, "classes": [{"name": name, "probability": p} for name, p in each.classes]}
                        for each in top
                    ],
                    "unreadable": [{"file": name, "reason": reason} for name, reason in unreadable.items()],
                }
                write_json(options.json, content)
                for name, reason in unreadable.items():
                    on_failure(f"error: {name} {reason}")
    return top + [Prediction(file=name, classes=(), error=reason) for name, reason in unreadable.items()]


def _read(options: PredictOptions) -> tuple[SavedWeights, list[ImageFile], dict[str, str], str]:
    """Return the weights, the images, the unreadable files with the reason, and a note on skipped files."""
    check_output("--json", options.json, options.checkpoint, options.recipe, options.config)
    weights = read_weights(options.checkpoint, options.recipe, options.assignments)
    files, unreadable, skipped = find_images(options.images)
    check_output("--json", options.json, *(file.path for file in files))
    return weights, files, unreadable, skipped


def _predict(
    model: nn.Module, weights: SavedWeights, files: Sequence[ImageFile], runtime: Runtime, observer: Observer
) -> tuple[Tensor, Tensor]:
    """Return probabilities (N, classes) and which files were read (N,). Each rank reads its own files."""
    rank, count, size = runtime.world.rank, runtime.world.size, weights.recipe.image_size
    own, batch_size = list(range(len(files)))[rank::count], batch_size_for(size)
    block = batch_size * math.ceil(_DECODED_AT_ONCE / batch_size)
    normalize = Normalizer(weights.recipe.normalization, runtime.device, runtime.memory_format)
    result = torch.zeros(len(files), weights.num_classes + 1, device=runtime.device)
    for start_at in range(0, len(own), block):
        rows = own[start_at : start_at + block]
        pixels, was_read = decode_images([files[row] for row in rows], size)
        batches = torch.split(torch.from_numpy(pixels), batch_size)
        with torch.no_grad(), runtime.accelerator.autocast():
            logits = [model(normalize(batch.to(runtime.device).float() / 255)).float() for batch in batches]
        result[rows, :-1] = torch.cat(logits).softmax(1)
        result[rows, -1] = torch.tensor(was_read, device=runtime.device).float()
        observer.on_evaluation(min(len(files), (start_at + len(rows)) * count), len(files))
    result = runtime.sum_over_ranks(result).cpu()
    return result[:, :-1], result[:, -1] > 0


def _most_likely(
    files: Sequence[ImageFile], probabilities: Tensor, was_read: Tensor, names: Sequence[str], top: int
) -> list[Prediction]:
    values, classes = probabilities.topk(min(top, len(names)), dim=1)
    return [
        Prediction(file=file.name, classes=[(names[index], p) for index, p in zip(indices, row, strict=True)])
        for file, row, indices, ok in zip(files, values.tolist(), classes.tolist(), was_read.tolist(), strict=True)
        if ok
    ]
