"""Pictures of a run. They need no display, and are readable in print and by colour-blind people."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from cifar_dist.records import EpochRecord, Evaluation

# Okabe and Ito's palette, told apart with any colour vision (https://jfly.uni-koeln.de/color/).
_BLUE, _ORANGE, _GREEN, _RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"


def draw_curves(records: Sequence[EpochRecord], path: Path, *, title: str, best_epoch: int | None) -> None:
    """Draw loss, accuracy and learning rate by epoch; the best epoch, where there is one, is marked."""
    epochs = [record.epoch for record in records]
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    figure.suptitle(title)
    for axes, field, name in ((loss, "loss", "Cross-entropy loss"), (accuracy, "acc", "Accuracy")):
        _plot(axes, epochs, [getattr(record, f"train_{field}") for record in records], "training", _BLUE, "-", "o")
        if records[0].val_loss is not None:
            values = [getattr(record, f"val_{field}") for record in records]
            _plot(axes, epochs, values, "validation", _ORANGE, "--", "s")
        axes.set_title(name)
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _plot(rate, epochs, [record.lr for record in records], "learning rate", _GREEN, "-", "o")
    rate.set_title("Learning rate")
    rate.set_ylim(bottom=0)
    for axes in (loss, accuracy, rate):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (loss, accuracy):
        if best_epoch is not None:
            axes.axvline(best_epoch, color="0.4", linestyle=":", label=f"best epoch ({best_epoch})")
        axes.legend(frameon=False)
    _save(figure, path)


def draw_confusion(evaluation: Evaluation, path: Path, *, title: str) -> None:
    """Draw the confusion matrix, each row in percent of its true class."""
    names = list(evaluation.per_class_accuracy)
    counts = np.asarray(evaluation.confusion_matrix, dtype=np.float64)
    percent = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = Figure(figsize=(7.5, 6.8), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title)
    for (row, column), value in np.ndenumerate(percent):
        if value >= 0.05:
            text = f"{value:.1f}" if value < 99.95 else "100"
            color = "white" if value > 55 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(shown, ax=axes, label="percent of the true class", shrink=0.85)
    _save(figure, path)


def draw_predictions(
    images: NDArray[np.uint8],
    labels: NDArray[Any],
    logits: NDArray[Any],
    class_names: Sequence[str],
    path: Path,
    *,
    title: str,
) -> None:
    """Draw up to 64 images (N, 3, H, W) in an 8 x 8 grid with their true class, and the predicted one where it differs.

    `labels` is (N,), `logits` (N, num_classes).
    """
    # One pair of axes for all images: sixty-four pairs take matplotlib seconds to lay out.
    figure = Figure(figsize=(12, 14.4))
    axes = figure.add_axes((0.01, 0.0, 0.98, 0.955))
    axes.set_axis_off()
    figure.suptitle(title, y=0.985)
    predicted = logits.argmax(1)
    for place, (image, label, guess) in enumerate(zip(images[:64], labels, predicted, strict=False)):
        row, column = divmod(place, 8)
        left, top = column * 1.1, row * 1.36
        axes.imshow(image.transpose(1, 2, 0), extent=(left, left + 1, top + 1, top), interpolation="nearest")
        right = label == guess
        text = class_names[label] if right else f"{class_names[label]}\n→ {class_names[guess]} ✗"
        weight, color = ("normal", "black") if right else ("bold", _RED)
        axes.text(left + 0.5, top - 0.02, text, fontsize=9, ha="center", va="bottom", color=color, fontweight=weight)
        if not right:
            axes.add_patch(Rectangle((left, top), 1, 1, fill=False, edgecolor=_RED, linewidth=2.5))
    axes.set_xlim(-0.05, 8.75)
    axes.set_ylim(10.55, -0.32)
    axes.set_aspect("equal")
    _save(figure, path)


def draw_evaluation(
    folder: Path,
    evaluation: Evaluation,
    images: NDArray[np.uint8],
    labels: NDArray[Any],
    logits: NDArray[Any],
    class_names: Sequence[str],
    *,
    title: str,
) -> None:
    """Draw confusion.png and predictions.png into a folder; arguments as for the two."""
    heading = f"{title}: {evaluation.top1:.2%} of {evaluation.num_samples:,} images right"
    draw_confusion(evaluation, folder / "confusion.png", title=heading)
    draw_predictions(images, labels, logits, class_names, folder / "predictions.png", title=heading)


def _plot(axes: Axes, x: Sequence[int], y: Sequence[float], label: str, color: str, line: str, marker: str) -> None:
    shown = marker if len(x) <= 30 else None
    axes.plot(x, y, label=label, color=color, linestyle=line, marker=shown, markersize=4)


def _save(figure: Figure, path: Path) -> None:
    """Write a PNG, in place in one step."""
    FigureCanvasAgg(figure)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=110, format="png")
    temporary.replace(path)
