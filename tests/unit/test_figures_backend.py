"""Figures are drawn by Agg whatever the surroundings say, and in fonts that have the characters."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.font_manager import fontManager

from cifar_dist.display.figures import draw_per_class
from cifar_dist.run.results import Evaluation
from tests.unit.test_report import EVERY_FIGURE, make_run

CHINESE = Evaluation(
    num_samples=2, loss=0.5, top1=0.5, top5=None, per_class_accuracy={"猫": 0.5, "cat": 0.5},
    confusion_matrix=[[1, 0], [1, 0]],
)  # fmt: skip


REPORT = "from cifar_dist.cli import main; main(['report', 'run'])"
END_OF_TRAIN = """
from pathlib import Path
from types import SimpleNamespace
from cifar_dist.commands.train import _draw_figures
from cifar_dist.run.directory import RunDirectory
run = RunDirectory(Path("run"))
observer = SimpleNamespace(on_note=print)
session = SimpleNamespace(directory=run, trainer=SimpleNamespace(observer=observer))
_draw_figures(session, run.read_summary(), run.read_predictions())
"""


@pytest.mark.full
@pytest.mark.parametrize("program", [REPORT, END_OF_TRAIN], ids=["report", "train"])
def test_a_notebooks_backend_leaves_the_figures(tmp_path, program):
    figures = make_run(tmp_path / "run") / "figures"
    figures.mkdir()
    program += "\nimport os; print(os.environ['MPLBACKEND'])"
    environ = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run([sys.executable, "-c", program], env=environ, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "could not" not in done.stdout
    assert done.stdout.endswith("module://matplotlib_inline.backend_inline\n")
    assert {path.name for path in figures.iterdir()} == EVERY_FIGURE


@pytest.fixture
def font(tmp_path):
    """Return what installs a font under a name; it has one character, a cat in Chinese."""

    def install(name: str) -> None:
        builder, empty = FontBuilder(1000, isTTF=True), TTGlyphPen(None).glyph()
        builder.setupGlyphOrder([".notdef", "cat"])
        builder.setupCharacterMap({ord("猫"): "cat"})
        builder.setupGlyf({".notdef": empty, "cat": empty})
        builder.setupHorizontalMetrics({".notdef": (1000, 0), "cat": (1000, 0)})
        builder.setupHorizontalHeader(ascent=800, descent=-200)
        builder.setupNameTable({"familyName": name, "styleName": "Regular"})
        builder.setupOS2()
        builder.setupPost()
        builder.save(tmp_path / "font.ttf")
        fontManager.addfont(tmp_path / "font.ttf")

    before = list(fontManager.ttflist)
    yield install
    fontManager.ttflist[:] = before


def missing_characters(monkeypatch) -> list[str]:
    """Draw the name of a class in Chinese; return the warnings of characters that no font has."""

    def draw(figure, path: Path) -> None:
        FigureCanvasAgg(figure).draw()

    monkeypatch.setattr("cifar_dist.display.figures.save_figure", draw)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draw_per_class(CHINESE, Path(), title="")
    return [str(each.message) for each in caught if "missing" in str(each.message)]


def test_an_installed_font_has_the_characters_that_the_default_lacks(font, monkeypatch):
    monkeypatch.setattr(fontManager, "ttflist", [each for each in fontManager.ttflist if "DejaVu" in each.name])
    assert missing_characters(monkeypatch)
    font("WenQuanYi Micro Hei")
    assert missing_characters(monkeypatch) == []


@pytest.mark.parametrize("setting", [{"font.family": ["My Font"]}, {"font.sans-serif": ["My Font"]}])
def test_the_users_font_counts(font, monkeypatch, setting):
    font("My Font")
    with matplotlib.rc_context(setting):
        assert missing_characters(monkeypatch) == []
