"""Figures of a run as PNG files. They need no display, and are readable in print and with any colour vision."""

import functools
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findSystemFonts, fontManager, get_font
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray
from rich.cells import cell_len, set_cell_size

from cifar_dist.config.files import write_atomically
from cifar_dist.run.results import EpochRecord, Evaluation

# Okabe and Ito's palette for any colour vision (https://jfly.uni-koeln.de/color/), without its black and yellow.
_COLORS = _BLUE, _RED, *_ = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
_MARKERS = "os^vD"  # for prints without colour; beside six colours, thirty runs look different
_STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.markersize": 4,
    "text.parse_math": False,
}
# Fonts of Linux, Windows and macOS that have Chinese, Japanese or Korean characters.
_CJK_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN",
    "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback", "Microsoft YaHei", "SimHei", "SimSun",
    "PingFang SC", "Hiragino Sans GB", "Heiti TC", "Arial Unicode MS", "Yu Gothic", "Malgun Gothic", "AppleGothic",
)  # fmt: skip
_LETTERS = {"Chinese": "中", "Japanese": "あ", "Korean": "한"}
_FONT_PACKAGE = "apt install fonts-noto-cjk"
_PANELS = {
    "Cross-entropy loss": {"training": "train_loss", "validation": "val_loss"},
    "Accuracy": {"training": "train_acc", "validation": "val_acc"},
    "Learning rate": {"end of the epoch": "lr"},
}
_NUMBERED_CLASSES, _NUM_BARS, _NUM_IMAGES = 20, 40, 24  # the most that have room
_FLAT_COLUMNS = 60
"""Class names of so many columns together stand side by side; others are turned."""
_LOG_SPAN = 10
"""Largest loss over smallest from which the axis is logarithmic: a high first one leaves room for the others."""


@contextmanager
def _own_style() -> Iterator[None]:
    """Use our style with the user's fonts, and installed CJK fonts for the characters that those lack."""
    fonts = {
        name: value for name, value in matplotlib.rcParams.items() if name.startswith("font.") and name != "font.size"
    }
    fonts["font.family"] = _font_families()
    with matplotlib.style.context(["default", _STYLE | fonts]):
        yield


def _font_families() -> list[str]:
    if not (cjk_fonts := _installed_cjk_fonts()):
        _add_new_fonts()
        cjk_fonts = _installed_cjk_fonts()
    return [*matplotlib.rcParams["font.family"], *cjk_fonts, "DejaVu Sans"]


def _installed_cjk_fonts() -> list[str]:
    installed = {font.name for font in fontManager.ttflist}
    return [name for name in _CJK_FONTS if name in installed]


@functools.cache
def _add_new_fonts() -> None:
    """Add the fonts that were installed after matplotlib wrote its list of fonts, which it keeps."""
    for path in set(findSystemFonts()) - {font.fname for font in fontManager.ttflist}:
        with suppress(Exception):  # a damaged font
            fontManager.addfont(path)


def _find_font(character: str) -> str | None:
    """Return the name of the font that draws a character; None if no font of the figures has it."""
    for family in _font_families():
        with suppress(ValueError):  # not installed
            font = get_font(fontManager.findfont(FontProperties(family=[family]), fallback_to_default=False))
            if font.get_char_index(ord(character)):
                return font.family_name
    return None


def describe_fonts() -> str:
    """Return the fonts that draw Chinese, Japanese and Korean, and how to install one where there is none."""
    languages: dict[str, list[str]] = {}
    for language, letter in _LETTERS.items():
        languages.setdefault(_find_font(letter) or "none", []).append(language)
    text = "; ".join(f"{font} for {', '.join(names)}" for font, names in languages.items())
    return f"{text}: {_FONT_PACKAGE}" if "none" in languages else text


def font_note(names: Iterable[str], then: str) -> str | None:
    """Return a note on names in Chinese, Japanese or Korean that no font draws, else None; `then` draws them later."""
    boxes = [name for name in names if any(_find_font(letter) is None for letter in name if _is_cjk(letter))]
    more = ", ..." if len(boxes) > 3 else ""
    text = f"note: no font here draws {', '.join(boxes[:3])}{more}; install one ({_FONT_PACKAGE}), then: {then}"
    return text if boxes else None


def _is_cjk(letter: str) -> bool:
    return letter.isalpha() and unicodedata.east_asian_width(letter) in "WF"


@_own_style()
def draw_curves(
    runs: Mapping[str, Sequence[EpochRecord]], path: Path, *, title: str, marks: Mapping[str, int | None]
) -> None:
    """Draw loss, accuracy and learning rate of runs (by name) by epoch; `marks` are epochs to mark, by label."""
    figure = _figure(12, 3.8 + 0.1 * len(runs), title)
    looks: list[dict[str, Any]] = [{"color": _COLORS[i % 6], "marker": _MARKERS[i % 5]} for i in range(len(runs))]
    for axes, (heading, fields) in zip(figure.subplots(1, 3), _PANELS.items(), strict=True):
        for look, records in zip(looks, runs.values(), strict=True):
            for (part, field), dash in zip(fields.items(), ("-", "--"), strict=False):
                _plot(axes, records, field, part, **look, linestyle=dash, fillstyle="full" if dash == "-" else "none")
        for (label, epoch), dash in zip(marks.items(), (":", "-."), strict=False):
            if epoch is not None:
                axes.axvline(epoch, color="0.45", linestyle=dash, label=f"{label} ({epoch})")
        axes.set_title(heading)
        axes.set_xlabel("epoch")
        axes.set_xlim(left=0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if len(runs) == 1:
            axes.legend()
    losses = [each for records in runs.values() for record in records for each in (record.train_loss, record.val_loss)]
    known = [each for each in losses if each]
    if known and max(known) > _LOG_SPAN * min(known):
        figure.axes[0].set_yscale("log")
        axis = figure.axes[0].yaxis
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())  # its labels are TeX, which the style shows as it is
    figure.axes[1].yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
    figure.axes[2].set_ylim(bottom=0)
    if len(runs) > 1:
        # Explicit handles: labels with a leading underscore would be left out.
        lines, names = [Line2D([], [], **look) for look in looks], [*map(_shorten, runs)]
        columns = max(1, min(3, 150 // max(map(cell_len, names))))
        figure.legend(lines, names, loc="outside lower center", ncols=columns, title="dashed: validation")
    _save(figure, path)


def _plot(axes: Axes, records: Sequence[EpochRecord], field: str, part: str, **line: Any) -> None:
    """Plot a field by epoch, if there is one; the label shows its last value."""
    points = [(record.epoch, getattr(record, field)) for record in records if getattr(record, field) is not None]
    if points:
        epochs, values = zip(*points, strict=True)
        last = f"{values[-1]:.1%}" if field.endswith("acc") else f"{values[-1]:.3g}"
        axes.plot(epochs, values, label=f"{part} ({last})", markevery=max(1, len(points) // 30), **line)


@_own_style()
def draw_confusion(evaluation: Evaluation, path: Path, *, title: str) -> None:
    """Draw the confusion matrix, each row in percent of its true class.

    The numbers are whole percent; where a class has fewer than 100 images, all are numbers of images.
    """
    names = [_shorten(name, 18) for name in evaluation.per_class_accuracy]
    counts = np.asarray(evaluation.confusion_matrix, dtype=np.float64)
    totals = counts.sum(1)
    percent = 100 * counts / np.maximum(totals, 1)[:, None]
    has_few = bool(((totals > 0) & (totals < 100)).any())
    has_numbers = len(names) <= _NUMBERED_CLASSES
    size, fontsize = 7.5 if has_numbers else 14, min(8, max(3, 600 / len(names)))
    figure = _figure(size, 0.9 * size, title)
    axes = figure.subplots()
    axes.grid(visible=False)
    image = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    rotation = 90 if max(map(cell_len, names)) * len(names) > _FLAT_COLUMNS else 0
    axes.set_xticks(range(len(names)), names, rotation=rotation, fontsize=fontsize)
    axes.set_yticks(range(len(names)), names, fontsize=fontsize)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if has_numbers:
        for (row, column), value in np.ndenumerate(counts if has_few else percent):
            if (text := f"{value:.0f}") != "0":
                color = "white" if percent[row, column] > 60 else "black"
                axes.text(column, row, text, ha="center", va="center", fontsize=fontsize, color=color)
    label = "percent of the true class" + ("; the numbers are images" if has_numbers and has_few else "")
    figure.colorbar(image, label=label, shrink=0.85)
    _save(figure, path)


@_own_style()
def draw_per_class(evaluation: Evaluation, path: Path, *, title: str) -> None:
    """Draw the accuracy of each class as a bar, the worst first; a line marks that of all images."""
    known = {name: 100 * value for name, value in evaluation.per_class_accuracy.items() if value is not None}
    names = sorted(known, key=known.__getitem__)[:_NUM_BARS]
    if len(names) < len(known):
        title += f" (the {len(names)} worst of {len(known)} classes)"
    figure = _figure(7.5, max(2.8, 1.6 + 0.28 * len(names)), title)
    axes = figure.subplots()
    axes.barh(range(len(names)), [known[name] for name in names], color=_BLUE)
    axes.set_yticks(range(len(names)), [f"{_shorten(name, 24)}  {known[name]:.1f}" for name in names])
    axes.axvline(100 * evaluation.top1, color=_RED, linestyle="--", label="accuracy over all images")
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy in percent")
    figure.legend(loc="outside lower center")
    _save(figure, path)


@_own_style()
def draw_images(images: NDArray[np.uint8], captions: Sequence[str], path: Path, *, title: str) -> None:
    """Draw up to 24 images (N, 3, H, W) with captions; one that starts with ✗ is red."""
    images = images[:_NUM_IMAGES]
    rows = -(-len(images) // 8)
    columns = -(-len(images) // rows)
    width = max(8.0, 1.5 * columns)
    figure = _figure(width, 1 + rows * min(3.5, 0.25 + width / columns), title)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, image, caption in zip(grid, images, captions, strict=False):
        axes.imshow(image.transpose(1, 2, 0), interpolation="nearest")
        axes.set_title(caption, fontsize=8.5, color=_RED if caption.startswith("✗") else "black")
    _save(figure, path)


@_own_style()
def draw_lr_range(
    rates: Sequence[float],
    losses: Sequence[float],
    smoothed: NDArray[np.float64],
    suggested: float | None,
    path: Path,
    *,
    title: str,
) -> None:
    """Draw the loss of each step by its learning rate, and mark the suggested one."""
    figure = _figure(7.5, 4.5, f"{title}: learning rate range test")
    axes = figure.subplots()
    axes.plot(rates, losses, color=_BLUE, alpha=0.35, label="loss of each step")
    axes.plot(rates, smoothed, color=_BLUE, label="smoothed")
    if suggested is not None:
        axes.axvline(suggested, color=_RED, linestyle="--", label=f"steepest descent ({suggested:.2g})")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    low, high = min(smoothed), max(losses[0], smoothed[0])
    axes.set_ylim(low - 0.5 * (high - low), high + (high - low))  # not up to the losses of a network that diverges
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    axes.legend()
    _save(figure, path)


def draw_evaluation(
    folder: Path, evaluation: Evaluation, saved: Mapping[str, NDArray[Any]], *, title: str
) -> list[Path]:
    """Draw all figures of an evaluation, and return their paths; `saved` is test_predictions.npz."""
    heading = f"{evaluation.top1:.2%} of {evaluation.num_samples:,} images right: {title}"
    legend = "true class → predicted class with its probability"
    files = [folder / f"{name}.png" for name in ("confusion", "per_class", "predictions")]
    draw_confusion(evaluation, files[0], title=heading)
    draw_per_class(evaluation, files[1], title=heading)
    shown = saved.get("shown", np.arange(len(saved["images"])))
    count = min(_NUM_IMAGES, len(shown))
    spread = np.arange(count) * len(shown) // count
    captions = _captions(saved, shown[spread])
    has_mistakes = "✗" in "".join(captions)
    heading += "\ntrue class; " + (f"✗ marks a mistake: {legend}" if has_mistakes else "all of these are right")
    draw_images(saved["images"][spread], captions, files[2], title=heading)
    if len(rows := saved["mistakes"]):
        files.append(folder / "mistakes.png")
        captions = [caption.removeprefix("✗ ") for caption in _captions(saved, rows)]
        heading = f"{title}\nthe most confident mistakes: {legend}"
        draw_images(saved["mistaken_images"], captions, files[3], title=heading)
    return files


def _captions(saved: Mapping[str, NDArray[Any]], rows: Iterable[int]) -> list[str]:
    """Return the true class of test images, and the predicted one with its probability if it differs."""
    names, captions = [_shorten(name, 13) for name in saved["class_names"].tolist()], []
    for row in rows:
        label, logits = saved["labels"][row], saved["logits"][row].astype(np.float64)
        predicted, probability = logits.argmax(), 1 / np.exp(logits - logits.max()).sum()
        is_right = label == predicted
        captions.append(names[label] if is_right else f"✗ {names[label]}\n→ {names[predicted]} {probability:.0%}")
    return captions


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height))
    figure.suptitle("\n".join(map(_shorten, title.split("\n"))), fontsize="large", wrap=True)
    return figure


def _shorten(text: str, width: int = 200) -> str:
    """Cut a text to a width in columns, two for a Chinese character; a path may have bytes that are no text."""
    text = text.encode(errors="backslashreplace").decode()
    return text if cell_len(text) <= width else f"{set_cell_size(text, width - 1).rstrip()}…"


def _save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    with warnings.catch_warnings():
        # Characters that no font has become boxes: see `font_note`.
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        write_atomically(path, lambda file: figure.savefig(file, dpi=110, format="png"))
