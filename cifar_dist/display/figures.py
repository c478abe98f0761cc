"""Pictures of a run. They need no display, and are readable in print and by colour-blind people."""

from collections.abc import Mapping, Sequence
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
_COLORS = (_BLUE, _ORANGE, _GREEN, _RED, "#CC79A7", "#56B4E9", "#000000")
_LINES = ("-", "--", ":", "-.")


def draw_curves(
    records: Sequence[EpochRecord], path: Path, *, title: str, best_epoch: int | None, stopped_early: bool = False
) -> None:
    """Draw loss, accuracy and learning rate by epoch; the best epoch and an early stop are marked."""
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
        if stopped_early:
            axes.axvline(epochs[-1], color=_RED, linestyle="-.", label=f"early stop ({epochs[-1]})")
        axes.legend(frameon=False)
    _save(figure, path)


def draw_confusion(evaluation: Evaluation, path: Path, *, title: str) -> None:
    """Draw the confusion matrix, each row in percent of its true class."""
    names = list(evaluation.per_class_accuracy)
    counts = np.asarray(evaluation.confusion_matrix, dtype=np.float64)
    percent = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    many = len(names) > 20
    figure = Figure(figsize=(15, 13.6) if many else (7.5, 6.8), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(labelsize=6 if many else None)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title)
    for (row, column), value in np.ndenumerate(percent):
        if value >= 0.05 and not many:
            text = f"{value:.1f}" if value < 99.95 else "100"
            color = "white" if value > 55 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(shown, ax=axes, label="percent of the true class", shrink=0.85)
    _save(figure, path)


def draw_per_class(evaluation: Evaluation, path: Path, *, title: str) -> None:
    """Draw each class's accuracy as a bar, the worst at the top; a line shows that of all images."""
    known = {name: value for name, value in evaluation.per_class_accuracy.items() if value is not None}
    names = sorted(known, key=known.__getitem__, reverse=True)
    figure = Figure(figsize=(7.5, 1.6 + 0.28 * len(names)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(names, [100 * known[name] for name in names], color=_BLUE, height=0.7)
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.axvline(100 * evaluation.top1, color=_RED, linestyle="--", label=f"all images: {evaluation.top1:.2%}")
    axes.set_xlim(0, 108)
    axes.set_xlabel("percent of the class's images that are right")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.02)
    figure.legend(loc="outside lower right", frameon=False)
    _save(figure, path)


def draw_overlay(runs: Mapping[str, Sequence[EpochRecord]], path: Path, *, title: str) -> None:
    """Draw several runs' losses and accuracies over each other: on the validation split where they have one."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    panels = figure.subplots(1, 2)
    figure.suptitle(title)
    held_out = all(records[0].val_loss is not None for records in runs.values())
    part = "val" if held_out else "train"
    for axes, field, name in zip(panels, ("loss", "acc"), ("loss", "accuracy"), strict=True):
        for place, (run, records) in enumerate(runs.items()):
            color, line = _COLORS[place % len(_COLORS)], _LINES[place % len(_LINES)]
            values = [getattr(record, f"{part}_{field}") for record in records]
            _plot(axes, [record.epoch for record in records], values, run, color, line, "o")
        axes.set_title(f"{'validation' if held_out else 'training'} {name}")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
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
    mistakes: tuple[NDArray[np.intp], NDArray[np.uint8]] | None,
) -> None:
    """Draw what an evaluation gave into a folder; arguments as above.

    `mistakes` are the places of the most confident ones among `labels`, and their images.
    """
    heading = f"{title}: {evaluation.top1:.2%} of {evaluation.num_samples:,} images right"
    draw_confusion(evaluation, folder / "confusion.png", title=heading)
    draw_per_class(evaluation, folder / "per_class.png", title=heading)
    draw_predictions(images, labels, logits, class_names, folder / "predictions.png", title=heading)
    if mistakes is not None and len(mistakes[0]):
        places, shown = mistakes
        what = f"{title}: the surest mistakes"
        draw_predictions(shown, labels[places], logits[places], class_names, folder / "mistakes.png", title=what)


def _plot(axes: Axes, x: Sequence[int], y: Sequence[float], label: str, color: str, line: str, marker: str) -> None:
    shown = marker if len(x) <= 30 else None
    axes.plot(x, y, label=label, color=color, linestyle=line, marker=shown, markersize=4)


def _save(figure: Figure, path: Path) -> None:
    """Write a PNG, in place in one step."""
    FigureCanvasAgg(figure)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=110, format="png")
    temporary.replace(path)
