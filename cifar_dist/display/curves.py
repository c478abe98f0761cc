"""Curves by epoch, of one run or of several: what is drawn, whether as a file or as a part of a page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from cifar_dist.run.results import EpochRecord

# Okabe and Ito's palette, told apart with any colour vision (https://jfly.uni-koeln.de/color/); without its black and
# its yellow, which a dark and a white page swallow.
BLUE, RED, GREEN, PURPLE, ORANGE, SKY = PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# Strokes and gaps, for a print without colours. Five of them beside six colours: thirty runs look different.
_DASHES: tuple[tuple[float, ...], ...] = ((), (6, 2), (2, 2), (8, 2, 2, 2), (5, 1, 1, 1, 1, 1))
_FEW_POINTS = 3
"""Of so few epochs the last values say more than the lines."""
_FIELDS = {
    "train_loss": "Training loss",
    "val_loss": "Validation loss",
    "lr": "Learning rate",
    "train_acc": "Training accuracy",
    "val_acc": "Validation accuracy",
    "images_per_second": "Images a second",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A line in a panel."""

    label: str
    points: Sequence[tuple[int, float]]
    """Epochs and values."""
    color: str
    dashes: tuple[float, ...] = ()
    """Strokes and gaps in widths of the line; none: it is solid."""
    marker: str = "o"


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """What shares a pair of axes."""

    title: str
    curves: Sequence[Curve]
    marks: Mapping[str, int] = field(default_factory=dict)
    """Epochs that a line across the panel marks, by what they are."""
    is_share: bool = False
    """Whether the values are fractions of 1."""
    from_zero: bool = False


def style_of(place: int) -> tuple[str, tuple[float, ...]]:
    """Give the colour and dashes of the run in this place (from 0)."""
    return PALETTE[place % len(PALETTE)], _DASHES[place % len(_DASHES)]


def run_panels(records: Sequence[EpochRecord], *, best_epoch: int | None, stopped_early: bool) -> list[Panel]:
    """Give loss, accuracy and learning rate of a run; the best epoch and an early stop are marked."""
    marks = {} if best_epoch is None else {"best epoch": best_epoch}
    marks |= {"early stop": records[-1].epoch} if stopped_early else {}
    panels = []
    for name, title in (("loss", "Cross-entropy loss"), ("acc", "Accuracy")):
        curves = [
            Curve(label="training", points=_points(records, f"train_{name}"), color=BLUE),
            Curve(label="validation", points=_points(records, f"val_{name}"), color=RED, dashes=(6, 2), marker="s"),
        ]
        if not curves[1].points:  # a single curve has no legend
            title, curves = f"{title} in training", curves[:1]
        panels.append(Panel(title=title, curves=curves, marks=marks, is_share=name == "acc"))
    rate = Curve(label="learning rate", points=_points(records, "lr"), color=GREEN)
    return [*panels, Panel(title="Learning rate", curves=[rate], marks=marks, from_zero=True)]


def overlaid_panels(runs: Mapping[str, Sequence[EpochRecord]]) -> list[Panel]:
    """Give what runs (by their names) have measured, a panel for each measure that one of them has."""
    panels = []
    for name, title in _FIELDS.items():
        styled = [
            (label, _points(records, name), style_of(place)) for place, (label, records) in enumerate(runs.items())
        ]
        curves = [
            Curve(label=label, points=points, color=color, dashes=dashes) for label, points, (color, dashes) in styled
        ]
        is_share, from_zero = name.endswith("acc"), name in ("lr", "images_per_second")
        if any(curve.points for curve in curves):
            panels.append(Panel(title=title, curves=curves, is_share=is_share, from_zero=from_zero))
    return panels


def draw_panel(axes: Axes, panel: Panel, *, legend: bool) -> None:
    """Draw a panel on a pair of axes."""
    for curve in panel.curves:
        x, y = [epoch for epoch, _ in curve.points], [value for _, value in curve.points]
        marker = curve.marker if len(x) <= 15 else None
        axes.plot(x, y, label=curve.label, color=curve.color, dashes=curve.dashes, marker=marker, markersize=4)
    if len(panel.curves) <= 2 and all(len(curve.points) <= _FEW_POINTS for curve in panel.curves):
        _label_ends(axes, panel)
    for (what, epoch), line in zip(panel.marks.items(), (":", "-."), strict=False):
        axes.axvline(epoch, color="0.45", linestyle=line, label=f"{what} ({epoch})", zorder=1)
    axes.set_title(panel.title)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if panel.is_share:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
    if panel.from_zero:
        axes.set_ylim(0, 1.08 * max(value for curve in panel.curves for _, value in curve.points) or 1)
    if legend and len(panel.curves) + len(panel.marks) > 1:
        axes.legend(frameon=False)


def _label_ends(axes: Axes, panel: Panel) -> None:
    """Write the last value of each curve beside it, the higher one above the lower one."""
    ends = sorted((curve.points[-1][::-1], curve.color) for curve in panel.curves if curve.points)
    for ((value, epoch), color), place in zip(ends, ("top", "bottom") if len(ends) > 1 else ("center",), strict=True):
        text = f"{value:.1%}" if panel.is_share else f"{value:.3g}"
        label = axes.annotate(text, (epoch, value), xytext=(7, 0), textcoords="offset points")
        label.set(va=place, fontsize=9, color=color)
    axes.margins(x=0.15)


def _points(records: Sequence[EpochRecord], name: str) -> list[tuple[int, float]]:
    values = ((record.epoch, getattr(record, name)) for record in records)
    return [(epoch, value) for epoch, value in values if value is not None]
