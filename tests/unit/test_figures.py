"""Figures: which number belongs to which name, and what of the surroundings counts."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager
from PIL import Image

from cifar_dist.display.figures import (
    _add_new_fonts,
    describe_fonts,
    draw_confusion,
    draw_curves,
    draw_evaluation,
    draw_per_class,
    font_note,
)
from cifar_dist.run.results import Evaluation
from tests.conftest import ROOT
from tests.unit.test_metrics import record
from tests.unit.test_report import EVERY_FIGURE, make_run

TEST = Evaluation(
    num_samples=40, loss=0.5, top1=0.55, top5=None, per_class_accuracy={"cat": 0.6, "dog": 0.25, "ship": 0.9},
    confusion_matrix=[[12, 3, 5], [2, 2, 4], [1, 0, 9]],
)  # fmt: skip
LABELS, LOGITS = np.array([0, 0, 1]), np.log([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.1, 0.0999, 0.8001]])
SAVED = {
    "labels": LABELS, "logits": LOGITS.astype(np.float16), "class_names": np.array(list(TEST.per_class_accuracy)),
    "images": np.full((3, 3, 8, 8), 128, np.uint8), "mistakes": np.array([2, 1]),
    "mistaken_images": np.full((2, 3, 8, 8), 64, np.uint8),
}  # fmt: skip


@pytest.fixture
def drawn(monkeypatch) -> dict:
    """The figures that would be written, by name."""
    figures = {}
    monkeypatch.setattr("cifar_dist.display.figures._save", lambda figure, path: figures.update({path.stem: figure}))
    return figures


def test_a_row_of_the_confusion_matrix_is_a_true_class(drawn):
    draw_confusion(TEST, Path("confusion.png"), title="")
    axes = drawn["confusion"].axes[0]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true class", "predicted class")
    assert axes.images[0].get_array()[0].tolist() == [60, 15, 25]
    assert axes.images[0].norm(50) == 0.5, "the scale is linear"
    numbers = {text.get_position(): text.get_text() for text in axes.texts}
    assert numbers[2, 0] == "5" and numbers[0, 2] == "1" and (1, 2) not in numbers, "(column, row)"
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["cat", "dog", "ship"]


@pytest.mark.parametrize(
    ("second_class", "numbers", "are_images"),
    [
        ([8, 91, 1], ["100", "8", "91", "1", "67", "33"], False),
        ([0, 0, 0], ["100", "67", "33"], False),
        ([8, 90, 1], ["150", "8", "90", "1", "100", "50"], True),
    ],
    ids=["100 of each class", "a class without images", "99 of a class"],
)
def test_the_numbers_of_a_confusion_matrix_are_all_percent_or_all_images(drawn, second_class, numbers, are_images):
    rows = [[150, 0, 0], second_class, [0, 100, 50]]
    draw_confusion(replace(TEST, confusion_matrix=rows), Path("confusion.png"), title="")
    axes, colors = drawn["confusion"].axes
    assert [text.get_text() for text in axes.texts] == numbers
    assert colors.get_ylabel().endswith("; the numbers are images") == are_images


def test_each_bar_stands_beside_its_class_the_worst_on_top(drawn):
    draw_per_class(TEST, Path("per_class.png"), title="")
    axes = drawn["per_class"].axes[0]
    places = {tick: label.get_text() for tick, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)}
    bars = {places[bar.get_y() + bar.get_height() / 2]: bar.get_width() for bar in axes.patches}
    assert bars == {"dog  25.0": 25, "cat  60.0": 60, "ship  90.0": 90}
    assert places[0] == "dog  25.0" and axes.get_ylim()[0] > axes.get_ylim()[1]
    assert [line.get_xdata()[0] for line in axes.lines] == [pytest.approx(55)], "that of all images"


def test_of_many_classes_the_worst_are_shown_and_cells_have_no_numbers(drawn):
    accuracies = {f"class{number:03}": number / 160 for number in range(160)}
    many = replace(TEST, per_class_accuracy=accuracies, confusion_matrix=np.eye(160, dtype=int).tolist())
    draw_confusion(many, Path("confusion.png"), title="")
    draw_per_class(many, Path("per_class.png"), title="all")
    assert list(drawn["confusion"].axes[0].texts) == []
    assert len(drawn["per_class"].axes[0].patches) == 40
    assert drawn["per_class"].get_suptitle() == "all (the 40 worst of 160 classes)"


def test_curves_mark_epochs_and_name_last_values(drawn):
    records = [record(epoch, val_loss=1 / epoch, val_acc=epoch / 10) for epoch in (1, 2, 3)]
    draw_curves({"x": records}, Path("curves.png"), title="", marks={"best epoch": 2, "early stop": None})
    loss, accuracy, rate = drawn["curves"].axes
    assert [axes.get_title() for axes in (loss, rate)] == ["Cross-entropy loss", "Learning rate"]
    labels = [line.get_label() for line in accuracy.lines]
    assert labels == ["training (50.0%)", "validation (30.0%)", "best epoch (2)"]
    assert [list(line.get_ydata()) for line in accuracy.lines[:2]] == [[0.5] * 3, [0.1, 0.2, 0.3]]
    assert list(loss.lines[1].get_ydata()) == [1, 1 / 2, 1 / 3]
    assert [accuracy.yaxis.get_major_formatter()(value) for value in (0.3, 0.325)] == ["30%", "32.5%"]


def test_a_high_first_loss_leaves_room_for_the_others(drawn):
    for first, scale in ((18.0, "log"), (1.0, "linear")):
        losses = [record(epoch, val_loss=loss) for epoch, loss in ((1, first), (2, 0.5))]
        draw_curves({"x": losses}, Path("curves.png"), title="", marks={})
        assert drawn["curves"].axes[0].get_yscale() == scale


def test_a_logarithmic_axis_has_plain_numbers(drawn):
    draw_curves({"x": [record(1, val_loss=4.1), record(2, val_loss=0.25)]}, Path("curves.png"), title="", marks={})
    axis = drawn["curves"].axes[0].yaxis
    drawn["curves"].draw_without_rendering()
    labels = [label.get_text() for label in axis.get_ticklabels(which="both") if label.get_text()]
    assert len(labels) > 2 and all(re.fullmatch(r"[\d.]+", label) for label in labels), labels


@pytest.mark.parametrize(("name", "turn"), [("cat", 0), ("automobile", 90)])
def test_short_class_names_are_not_turned(drawn, name, turn):
    accuracies = {f"{name}{number}": 0.5 for number in range(10)}
    matrix = np.eye(10, dtype=int).tolist()
    test = replace(TEST, per_class_accuracy=accuracies, confusion_matrix=matrix)
    draw_confusion(test, Path("confusion.png"), title="")
    assert {text.get_rotation() for text in drawn["confusion"].axes[0].get_xticklabels()} == {turn}


def test_mistakes_are_marked_with_the_predicted_class_and_its_probability(drawn):
    files = draw_evaluation(Path(), TEST, SAVED, title="x")
    assert [path.stem for path in files] == list(drawn) == ["confusion", "per_class", "predictions", "mistakes"]
    shown, surest = ([axes.get_title() for axes in drawn[name].axes] for name in ("predictions", "mistakes"))
    assert shown == ["cat", "✗ cat\n→ dog 70%", "✗ dog\n→ ship 80%"]
    assert surest == ["dog\n→ ship 80%", "cat\n→ dog 70%"], "all are mistakes: no mark"
    assert [axes.title.get_color() for axes in drawn["mistakes"].axes] == ["black"] * 2
    legend = "true class → predicted class with its probability"
    titles = {name: figure.get_suptitle() for name, figure in drawn.items()}
    assert titles["per_class"] == titles["confusion"] == "55.00% of 40 images right: x"
    assert titles["predictions"] == f"55.00% of 40 images right: x\ntrue class; ✗ marks a mistake: {legend}"
    assert titles["mistakes"] == f"x\nthe most confident mistakes: {legend}"
    draw_evaluation(Path(), TEST, SAVED | {"shown": np.array([0])}, title="x")
    assert drawn["predictions"].get_suptitle() == "55.00% of 40 images right: x\ntrue class; all of these are right"


@pytest.mark.parametrize(("count", "width", "columns"), [(1, 8, 1), (3, 8, 3), (9, 8, 5), (24, 12, 8)])
def test_a_figure_has_the_size_of_its_images(drawn, count, width, columns):
    images = np.zeros((count, 3, 8, 8), np.uint8)
    saved = SAVED | {"mistakes": np.ones(count, int), "mistaken_images": images}
    draw_evaluation(Path(), TEST, saved, title="x")
    figure = drawn["mistakes"]
    assert figure.get_figwidth() == width
    assert figure.axes[0].get_gridspec().ncols == columns
    figure.draw_without_rendering()
    covered = sum(axes.get_position().width * axes.get_position().height for axes in figure.axes[:count])
    assert covered > 0.35, "most would be white"


def test_the_shown_images_are_spread_over_all_that_were_saved(drawn):
    shown = np.arange(64) + 100
    many = {"labels": np.arange(164) % 3, "logits": np.zeros((164, 3), np.float16), "shown": shown}
    images = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None, None], (64, 3, 8, 8))
    draw_evaluation(Path(), TEST, SAVED | many | {"images": images}, title="x")
    places = [int(axes.images[0].get_array()[0, 0, 0]) for axes in drawn["predictions"].axes]
    assert len(places) == 24 and set(np.diff(places)) == {2, 3} and places[-1] >= 60
    captions = [axes.get_title() for axes in drawn["predictions"].axes]
    assert [("cat", "dog", "ship")[(100 + place) % 3] in each for place, each in zip(places, captions, strict=True)]


def test_every_run_is_in_the_legend_and_looks_different(drawn):
    """A label that begins with an underscore is none to matplotlib."""
    runs = {"_x": [record(1)], "empty": [], **{f"run{number}": [record(1)] for number in range(28)}}
    draw_curves(runs, Path("curves.png"), title="", marks={})
    (legend,) = drawn["curves"].legends
    assert [text.get_text() for text in legend.get_texts()] == list(runs)
    assert len({(line.get_color(), line.get_marker()) for line in legend.get_lines()}) == 30
    assert [len(axes.lines) for axes in drawn["curves"].axes] == [29] * 3


def test_a_users_style_and_names_of_any_bytes_do_no_harm(tmp_path):
    dollars = replace(TEST, per_class_accuracy={"$\\dog": 0.1, "$": 0.2, "cat": 0.3})
    with matplotlib.rc_context({"text.usetex": True, "figure.facecolor": "red"}):
        draw_confusion(dollars, tmp_path / "confusion.png", title=os.fsdecode(b"d\xff"))
    assert Image.open(tmp_path / "confusion.png").getpixel((0, 0))[:3] == (255, 255, 255)


@pytest.mark.full
def test_a_notebooks_backend_leaves_the_figures(tmp_path):
    run = make_run(tmp_path / "run")
    environ = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    command = [sys.executable, ROOT / "launch.py", "report", run]
    assert subprocess.run(command, env=environ, capture_output=True, text=True).stderr == ""
    assert {path.name for path in (run / "figures").iterdir()} == EVERY_FIGURE


@pytest.mark.parametrize("setting", ["font.family", "font.sans-serif"])
def test_the_users_font_comes_first_and_then_an_installed_one_with_chinese_characters(monkeypatch, setting):
    used = []
    default = next(font for font in fontManager.ttflist if font.name == "DejaVu Sans")
    monkeypatch.setattr(fontManager, "ttflist", [default, replace(default, name="SimHei")])
    monkeypatch.setattr("cifar_dist.display.figures._save", lambda *_: used.append(dict(matplotlib.rcParams)))
    with matplotlib.rc_context({setting: ["My Font"]}):
        draw_per_class(TEST, Path(), title="")
    families = used[0]["font.family"]
    assert used[0][setting][0] == "My Font" and families[1:] == ["SimHei", "DejaVu Sans"]


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Leave DejaVu Sans alone, and return a function that installs a font with the given letters, one em wide each."""
    default = next(font for font in fontManager.ttflist if font.name == "DejaVu Sans" and font.weight == 400)
    monkeypatch.setattr(fontManager, "ttflist", [default])
    (tmp_path / "damaged.ttf").touch()
    files = [str(tmp_path / "damaged.ttf")]
    monkeypatch.setattr("cifar_dist.display.figures.findSystemFonts", lambda: files)

    def install(name: str, letters: str) -> None:
        pen = TTGlyphPen(None)
        pen.moveTo((0, 0))
        for corner in ((0, 900), (1000, 900), (1000, 0)):
            pen.lineTo(corner)
        pen.closePath()
        glyphs = {".notdef": pen.glyph(), **{f"u{ord(letter):04X}": pen.glyph() for letter in letters}}
        font = FontBuilder(1000)
        font.setupGlyphOrder(list(glyphs))
        font.setupCharacterMap({ord(letter): f"u{ord(letter):04X}" for letter in letters})
        font.setupGlyf(glyphs)
        font.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
        font.setupHorizontalHeader(ascent=900, descent=-100)
        font.setupNameTable({"familyName": name, "styleName": "Regular"})
        font.setupOS2()
        font.setupPost()
        font.save(tmp_path / f"{name}.ttf")
        files.append(str(tmp_path / f"{name}.ttf"))
        _add_new_fonts.cache_clear()

    _add_new_fonts.cache_clear()
    fontManager._findfont_cached.cache_clear()
    yield install
    _add_new_fonts.cache_clear()
    fontManager._findfont_cached.cache_clear()


NAMES = ["cat", "红色方块", "绿色三角", "蓝圆", "黄星", "café"]


def test_a_note_names_what_no_font_draws_until_one_is_installed(install):
    package = "apt install fonts-noto-cjk"
    head, tail = "note: no font here draws", f"; install one ({package}), then: draw"
    assert font_note(NAMES, "draw") == f"{head} 红色方块, 绿色三角, 蓝圆, ...{tail}"
    assert font_note(["蓝圆", "cat"], "draw") == f"{head} 蓝圆{tail}"
    assert font_note(["cat", "café", "🥑"], "draw") is None
    assert describe_fonts() == f"none for Chinese, Japanese, Korean: {package}"
    install("SimHei", "红色方块绿三角中あ")
    assert font_note(NAMES, "draw") == f"{head} 蓝圆, 黄星{tail}"
    assert describe_fonts() == f"SimHei for Chinese, Japanese; none for Korean: {package}"


def test_a_font_that_is_newer_than_matplotlibs_list_is_used(install, monkeypatch, tmp_path):
    install("WenQuanYi Micro Hei", "红中あ한")
    monkeypatch.setattr("cifar_dist.display.figures.warnings.filterwarnings", lambda *_, **__: None)  # an error, then
    names = {name.replace("cat", "红红"): value for name, value in TEST.per_class_accuracy.items()}
    draw_per_class(replace(TEST, per_class_accuracy=names), tmp_path / "per_class.png", title="红")
    assert describe_fonts() == "WenQuanYi Micro Hei for Chinese, Japanese, Korean"
    with pytest.raises(UserWarning, match="missing from font"):
        draw_per_class(TEST, tmp_path / "per_class.png", title="蓝")


def test_long_chinese_names_do_not_overlap_and_stay_within_the_figure(install, monkeypatch):
    install("SimHei", "红色方块")
    boxes = {}

    def measure(figure, path: Path) -> None:
        figure.draw_without_rendering()
        extents = [axes.title.get_window_extent() for axes in figure.axes if axes.get_title()]
        ticks = [label.get_window_extent() for axes in figure.axes[:1] for label in axes.get_yticklabels()]
        boxes[path.stem] = (figure.bbox.width, [(box.x0, box.x1) for box in extents or ticks])
        title = figure.texts[0].get_window_extent()
        assert figure.get_suptitle() == figure.texts[0].get_text() and 0 <= title.x0 and title.x1 <= figure.bbox.width

    monkeypatch.setattr("cifar_dist.display.figures._save", measure)
    names = ["红色方块" * 10, "方块" * 20, "红色" * 20]
    logits = np.eye(3)[[1] * 16].astype(np.float16) * 90
    saved = SAVED | {"labels": np.zeros(16, int), "logits": logits, "class_names": np.array(names)}
    saved |= {"images": np.zeros((16, 3, 8, 8), np.uint8), "mistakes": np.arange(16)}
    saved["mistaken_images"] = saved["images"]
    accuracies = dict(zip(names, TEST.per_class_accuracy.values(), strict=True))
    draw_evaluation(Path(), replace(TEST, per_class_accuracy=accuracies), saved, title="红色 方块 " * 12)
    for name, (width, places) in boxes.items():
        assert places and all(0 <= left and right <= width for left, right in places), name
    for name in ("predictions", "mistakes"):
        row = sorted(boxes[name][1][:8])
        assert all(right < left for (_, right), (left, _) in pairwise(row)), name
