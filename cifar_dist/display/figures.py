"""Pictures of a run. They need no display, and are readable in print and by colour-blind people."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from cifar_dist.display.canvas import plain, save_figure, to_svg
from cifar_dist.display.curves import BLUE, RED, Panel, draw_panel, overlaid_panels, run_panels
from cifar_dist.run.results import EpochRecord, Evaluation

# From nothing to blue, so that what is under it shows: white paper or a dark page.
_BLUES = LinearSegmentedColormap.from_list("blues", [f"{BLUE}00", BLUE])
MANY_CLASSES = 20  # up to which there is room for a number in each cell
SCALE_OF_MANY = "the colour grows with its square root, so that rare confusions can be seen"
_BARS, _COLUMNS = 34, 3  # of classes: in a column, and columns
# Fonts of Linux, Windows and macOS that have Chinese, Japanese or Korean characters.
_CJK_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN",
    "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback", "Microsoft YaHei", "SimHei", "SimSun",
    "PingFang SC", "Hiragino Sans GB", "Heiti TC", "STHeiti", "Arial Unicode MS", "Noto Sans JP", "Yu Gothic",
    "Hiragino Sans", "Noto Sans KR", "NanumGothic", "Malgun Gothic", "AppleGothic",
)  # fmt: skip


@contextmanager
def _own_style() -> Iterator[None]:
    """Draw in matplotlib's default style but in the user's fonts; installed CJK fonts have what these lack."""
    names = ("font.family", "font.sans-serif", "font.serif", "font.monospace", "font.cursive", "font.fantasy")
    fonts: dict[str, Any] = {name: matplotlib.rcParams[name] for name in names}  # type: ignore[index]
    installed = {font.name for font in fontManager.ttflist}
    cjk = [name for name in _CJK_FONTS if name in installed]
    fonts["font.family"] = [*fonts["font.family"], *cjk, "DejaVu Sans"]
    with matplotlib.style.context(["default", fonts]):
        yield


@_own_style()
def draw_curves(
    records: Sequence[EpochRecord], path: Path, *, title: str, best_epoch: int | None, stopped_early: bool = False
) -> None:
    """Draw loss, accuracy and learning rate by epoch; the best epoch and an early stop are marked."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    figure.suptitle(plain(title))
    panels = run_panels(records, best_epoch=best_epoch, stopped_early=stopped_early)
    for axes, panel in zip(figure.subplots(1, 3), panels, strict=True):
        draw_panel(axes, panel, legend=True)
    save_figure(figure, path)


@_own_style()
def draw_overlay(runs: Mapping[str, Sequence[EpochRecord]], path: Path, *, title: str) -> None:
    """Draw the curves of runs, by their names, over each other."""
    panels = overlaid_panels({plain(name): records for name, records in runs.items()})
    figure = Figure(figsize=(12, 7.2 + 0.2 * (len(runs) // 3)), layout="constrained")
    figure.suptitle(plain(title))
    for axes, panel in zip(figure.subplots(2, len(panels) // 2).flat, panels, strict=True):
        draw_panel(axes, panel, legend=False)
    # Handed over one by one: a name that begins with an underscore would be left out.
    columns = max(1, min(3, 150 // max(map(len, runs))))
    figure.legend(
        figure.axes[0].get_lines(),
        list(map(plain, runs)),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        handlelength=3.5,
    )
    save_figure(figure, path)


@_own_style()
def draw_confusion(evaluation: Evaluation, path: Path, *, title: str) -> None:
    """Draw the confusion matrix, each row in percent of its true class."""
    many = len(evaluation.confusion_matrix) > MANY_CLASSES
    figure = Figure(figsize=(15, 13.6) if many else (7.5, 6.8), layout="constrained")
    axes = figure.subplots()
    shown = _confusion(axes, evaluation, digits=1, size=7 if many else 8)
    axes.set_title(plain(title))
    label = "percent of the true class" + (f" ({SCALE_OF_MANY})" if many else "")
    figure.colorbar(shown, ax=axes, label=label, shrink=0.85, ticks=[0, 1, 5, 10, 25, 50, 100] if many else None)
    save_figure(figure, path)


@_own_style()
def confusion_svg(evaluation: Evaluation) -> str:
    """Give the confusion matrix as a part of a page."""
    many = len(evaluation.confusion_matrix) > MANY_CLASSES
    figure = Figure(figsize=(12, 11.6) if many else (4.8, 4.6), layout="constrained")
    _confusion(figure.subplots(), evaluation, digits=0, size=7 if many else 9)
    return to_svg(figure)


@_own_style()
def panel_svg(panel: Panel, *, legend: bool) -> str:
    """Give curves as a part of a page, wide enough for a phone."""
    figure = Figure(figsize=(4.2, 3), layout="constrained")
    draw_panel(figure.subplots(), panel, legend=legend)
    return to_svg(figure)


@_own_style()
def draw_per_class(evaluation: Evaluation, path: Path, *, title: str) -> None:
    """Draw each class's accuracy as a bar, the worst first; a line shows that of all images.

    Of more classes than there is room for, the worst are shown.
    """
    known = {name: value for name, value in evaluation.per_class_accuracy.items() if value is not None}
    names = sorted(known, key=known.__getitem__)[: _BARS * _COLUMNS]
    columns = -(-len(names) // _BARS)
    rows = -(-len(names) // columns)
    size = (7.5 if columns == 1 else 4.4 * columns, max(2.8, 1.6 + (0.32 if columns == 1 else 0.24) * rows))
    figure = Figure(figsize=size, layout="constrained")
    if len(names) < len(known):
        title += f" (the {len(names)} worst of {len(known)} classes)"
    figure.suptitle(plain(title), fontsize="medium")
    for axes, start in zip(figure.subplots(1, columns, squeeze=False)[0], range(0, len(names), rows), strict=True):
        part = names[start : start + rows]
        bars = axes.barh(range(len(part)), [100 * known[name] for name in part], color=BLUE, height=0.7)
        labels = axes.bar_label(bars, fmt=_short, padding=3, fontsize=8)
        for label in labels:  # above the line
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.8})
        axes.set_yticks(range(len(part)), [plain(name, 24) for name in part])
        axes.set_ylim(rows - 0.4, -0.6)
        axes.axvline(100 * evaluation.top1, color=RED, linestyle="--")
        axes.set_xlim(0, 112)
        axes.set_xticks(range(0, 101, 20))
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("percent of the class's images that are right; dashed: of all images", fontsize="medium")
    save_figure(figure, path)


@_own_style()
def draw_predictions(
    images: NDArray[np.uint8],
    labels: NDArray[Any],
    logits: NDArray[Any],
    class_names: Sequence[str],
    path: Path,
    *,
    title: str,
) -> None:
    """Draw up to 24 images (N, 3, H, W) in rows of 8 with their true class, and the predicted one where it differs.

    `labels` is (N,), `logits` (N, num_classes).
    """
    images = images[:24]
    # One pair of axes for all images: a pair for each takes matplotlib seconds to lay out.
    bottom = 1.36 * -(-len(images) // 8) - 0.33
    height = 0.85 + 1.3364 * (bottom + 0.32)
    figure = Figure(figsize=(12, height))
    axes = figure.add_axes((0.01, 0.0, 0.98, 1 - 0.85 / height))
    axes.set_axis_off()
    figure.suptitle(plain(title), y=1 - 0.2 / height)
    legend = "the true class; ✗ marks a mistake: the true class → the predicted one, with its probability"
    figure.text(0.5, 1 - 0.6 / height, legend, ha="center", fontsize=9, color="0.35")
    names = [plain(name, 13) for name in class_names]
    for place, (image, label, guess) in enumerate(zip(images, labels, logits.argmax(1), strict=False)):
        row, column = divmod(place, 8)
        left, top = column * 1.1, row * 1.36
        axes.imshow(image.transpose(1, 2, 0), extent=(left, left + 1, top + 1, top), interpolation="nearest")
        right = label == guess
        text = names[label] if right else f"✗ {names[label]}\n→ {names[guess]} {softmax_top(logits[place]):.0%}"
        color = "black" if right else RED
        axes.text(left + 0.5, top - 0.02, text, fontsize=9, ha="center", va="bottom", color=color)
        if not right:
            axes.add_patch(Rectangle((left, top), 1, 1, fill=False, edgecolor=RED, linewidth=2.5))
    axes.set_xlim(-0.05, 8.75)
    axes.set_ylim(bottom, -0.32)
    axes.set_aspect("equal")
    save_figure(figure, path)


def draw_evaluation(
    folder: Path, evaluation: Evaluation, saved: Mapping[str, NDArray[Any]], *, title: str
) -> list[Path]:
    """Draw what an evaluation gave into a folder, and give the files; `saved` is what test_predictions.npz holds."""
    labels, logits, class_names = saved["labels"], saved["logits"], saved["class_names"].tolist()
    heading = f"{title}: {evaluation.top1:.2%} of {evaluation.num_samples:,} images right"
    files = [folder / f"{name}.png" for name in ("confusion", "per_class", "predictions")]
    draw_confusion(evaluation, files[0], title=heading)
    draw_per_class(evaluation, files[1], title=heading)
    draw_predictions(saved["images"], labels, logits, class_names, files[2], title=heading)
    if len(places := saved.get("mistakes", ())):  # an older run has none
        what = f"{title}: the most confident mistakes"
        files.append(folder / "mistakes.png")
        draw_predictions(saved["mistaken_images"], labels[places], logits[places], class_names, files[3], title=what)
    return files


def _confusion(axes: Axes, evaluation: Evaluation, *, digits: int, size: float) -> ScalarMappable:
    """Draw the matrix, with a number in each cell where there is room; else rare confusions are made visible."""
    names = [plain(name, 18) for name in evaluation.per_class_accuracy]
    counts = np.asarray(evaluation.confusion_matrix, dtype=np.float64)
    percent = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    scale = Normalize(0, 100) if len(names) <= MANY_CLASSES else PowerNorm(0.5, 0, 100)
    shown = axes.imshow(percent, cmap=_BLUES, norm=scale, interpolation="none")
    if len(names) <= 150:
        axes.set_xticks(
            range(len(names)),
            names,
            rotation=45 if len(names) <= MANY_CLASSES else 90,
            ha="right",
            rotation_mode="anchor",
        )
        axes.set_yticks(range(len(names)), names)
    axes.tick_params(labelsize=size)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if len(names) <= MANY_CLASSES:
        for (row, column), value in np.ndenumerate(percent):
            if (text := _short(value, digits)) != "0":
                color = "white" if value > 60 else "black"
                axes.text(column, row, text, ha="center", va="center", fontsize=size, color=color)
    return shown


def _short(value: float, digits: int = 1) -> str:
    """Return a number with at most so many digits after the point, and no zero there."""
    return f"{round(float(value), digits):g}"


def softmax_top(logits: NDArray[Any]) -> float:
    """Give the share that the predicted class has."""
    powers = np.exp(logits.astype(np.float64) - logits.max())
    return float(powers.max() / powers.sum())
