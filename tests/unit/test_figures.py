"""Figures: which number belongs to which name, and what of the surroundings counts."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.font_manager import fontManager
from PIL import Image

from cifar_dist.display.figures import draw_confusion, draw_curves, draw_evaluation, draw_per_class
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
    assert numbers[2, 0] == "25" and numbers[0, 2] == "10" and (1, 2) not in numbers, "(column, row)"
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["cat", "dog", "ship"]


def test_each_bar_stands_beside_its_class_the_worst_on_top(drawn):
    draw_per_class(TEST, Path("per_class.png"), title="")
    axes = drawn["per_class"].axes[0]
    places = {tick: label.get_text() for tick, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)}
    bars = {places[bar.get_y() + bar.get_height() / 2]: bar.get_width() for bar in axes.patches}
    assert bars == {"dog  25": 25, "cat  60": 60, "ship  90": 90}
    assert places[0] == "dog  25" and axes.get_ylim()[0] > axes.get_ylim()[1]
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


def test_mistakes_are_marked_with_the_predicted_class_and_its_probability(drawn):
    files = draw_evaluation(Path(), TEST, SAVED, title="x")
    assert [path.stem for path in files] == list(drawn) == ["confusion", "per_class", "predictions", "mistakes"]
    first, surest = ([axes.get_title() for axes in drawn[name].axes] for name in ("predictions", "mistakes"))
    assert first == ["cat", "✗ cat\n→ dog 70%", "✗ dog\n→ ship 80%", *[""] * 5]
    assert surest == ["✗ dog\n→ ship 80%", "✗ cat\n→ dog 70%", *[""] * 6]


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
