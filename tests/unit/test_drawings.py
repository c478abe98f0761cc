"""Contents of the figures and of the page: which number belongs to which name."""

import html
import os
import re
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import yaml
from PIL import Image

from cifar_dist.cli import main
from cifar_dist.display.comparison import ReportedRun
from cifar_dist.display.figures import draw_confusion, draw_curves, draw_overlay, draw_per_class, draw_predictions
from cifar_dist.display.page import page_of_run, page_of_runs, write_run
from cifar_dist.run.results import Evaluation, Summary
from tests.unit.test_metrics import record
from tests.unit.test_report import addresses_in, make_run

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
    monkeypatch.setattr(
        "cifar_dist.display.figures.save_figure", lambda figure, path: figures.update({path.name: figure})
    )
    return figures


def a_run(path, **changes) -> ReportedRun:
    make_run(path)
    given = {
        "status": "early_stopped", "epochs": 3, "best_epoch": 2, "train_seconds": 4.0, "world_size": 1, "device": "cpu",
        "precision": "no", "num_threads": 1, "peak_memory_mib": 1, "test": TEST,
    }  # fmt: skip
    records = [record(epoch, val_loss=1 / epoch, val_acc=epoch / 10) for epoch in (1, 2, 3)]
    config = yaml.safe_load((path / "config.yaml").read_text())
    return ReportedRun(path=path, config=config, summary=Summary(**given | changes), records=records)


def test_a_row_of_the_confusion_matrix_is_a_true_class(drawn, tmp_path):
    draw_confusion(TEST, tmp_path / "confusion.png", title="")
    axes = drawn["confusion.png"].axes[0]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true class", "predicted class")
    assert axes.images[0].get_array()[0].tolist() == [60, 15, 25]
    numbers = {text.get_position(): text.get_text() for text in axes.texts}
    assert numbers[2, 0] == "25" and numbers[0, 2] == "10" and (1, 2) not in numbers, "(column, row)"
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["cat", "dog", "ship"]


def test_somebodys_own_style_and_names_of_any_bytes_do_no_harm(tmp_path):
    with matplotlib.rc_context({"text.usetex": True, "figure.facecolor": "red"}):
        draw_confusion(TEST, tmp_path / "confusion.png", title=os.fsdecode(b"d\xff"))
    assert Image.open(tmp_path / "confusion.png").getpixel((0, 0))[:3] == (255, 255, 255)


def test_each_bar_stands_beside_its_class_the_worst_on_top(drawn, tmp_path):
    draw_per_class(TEST, tmp_path / "per_class.png", title="")
    axes = drawn["per_class.png"].axes[0]
    places = {tick: label.get_text() for tick, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)}
    bars = {places[bar.get_y() + bar.get_height() / 2]: bar.get_width() for bar in axes.patches}
    assert bars == {"dog": 25, "cat": 60, "ship": 90}
    assert places[0] == "dog" and axes.get_ylim()[0] > axes.get_ylim()[1]
    assert [line.get_xdata()[0] for line in axes.lines] == [pytest.approx(55)], "that of all images"


def test_the_figures_of_a_run_mark_its_best_epoch_and_its_early_stop(drawn, tmp_path):
    files = list(write_run(a_run(tmp_path / "run"), SAVED, tmp_path, None))
    assert [path.name for path in files] == list(drawn)
    loss, accuracy, rate = drawn["curves.png"].axes
    for axes in (loss, accuracy):
        labels = [line.get_label() for line in axes.lines]
        assert labels == ["training", "validation", "best epoch (2)", "early stop (3)"]
    assert [list(line.get_ydata()) for line in accuracy.lines[:2]] == [[0.5] * 3, [0.1, 0.2, 0.3]]
    assert rate.get_title() == "Learning rate"
    first, surest = (
        [text.get_text() for text in drawn[name].axes[0].texts] for name in ("predictions.png", "mistakes.png")
    )
    assert first == ["cat", "✗ cat\n→ dog 70%", "✗ dog\n→ ship 80%"]
    assert surest == ["✗ dog\n→ ship 80%", "✗ cat\n→ dog 70%"]


def test_of_few_epochs_the_last_values_are_written(drawn, tmp_path):
    records = [record(epoch, train_acc=epoch / 10, val_acc=epoch / 5, val_loss=0.5) for epoch in (1, 2, 3, 4)]
    for count, expected in ((3, ["30.0%", "60.0%"]), (4, [])):
        draw_curves(records[:count], tmp_path / "curves.png", title="", best_epoch=None)
        texts = drawn["curves.png"].axes[1].texts
        assert [text.get_text() for text in texts] == expected


def test_the_colours_are_linear_where_numbers_stand_and_explained_elsewhere(drawn, tmp_path):
    many = {f"class{number}": 0.5 for number in range(30)}
    large = replace(TEST, per_class_accuracy=many, confusion_matrix=np.eye(30, dtype=int).tolist())
    for evaluation, scale in ((TEST, 0.5), (large, 0.5**0.5)):
        draw_confusion(evaluation, tmp_path / "confusion.png", title="")
        axes, bar = drawn["confusion.png"].axes
        assert axes.images[0].norm(50) == pytest.approx(scale)
        assert ("square root" in bar.get_ylabel()) == (scale != 0.5)


def test_a_picture_has_24_images_and_explains_its_marks(drawn, tmp_path):
    images = np.zeros((64, 3, 8, 8), np.uint8)
    labels, logits = np.zeros(64, np.int64), np.tile(LOGITS[:1], (64, 1))
    draw_predictions(images, labels, logits, ["cat", "dog", "ship"], tmp_path / "mistakes.png", title="")
    figure = drawn["mistakes.png"]
    assert len(figure.axes[0].images) == 24
    assert "with its probability" in figure.texts[1].get_text()


def test_no_number_has_a_needless_zero(drawn, tmp_path):
    draw_per_class(replace(TEST, per_class_accuracy={"a": 1.0, "b": 0.3333}), tmp_path / "per_class.png", title="")
    assert [text.get_text() for text in drawn["per_class.png"].axes[0].texts] == ["33.3", "100"]


def test_the_page_marks_what_differs_from_standard_and_breaks_keys_between_words(tmp_path):
    page = page_of_run(a_run(tmp_path / "run"), SAVED)
    marked = dict(re.findall(r'<div class="marked"><span>(.*?)</span><span>(.*?)</span>', page))
    assert marked["epochs"] == "3 (13)" and marked["stem"] == "imagenet (cifar)"
    assert marked["optimizer.<wbr>learning_<wbr>rate"] == "0.01 (0.05)" and "model" not in marked
    assert "<div><span>model</span><span>resnet18</span></div>" in page


def test_without_validation_the_titles_name_training(drawn, tmp_path):
    draw_curves([record(1), record(2)], tmp_path / "curves.png", title="", best_epoch=None)
    titles = [axes.get_title() for axes in drawn["curves.png"].axes]
    assert titles == ["Cross-entropy loss in training", "Accuracy in training", "Learning rate"]


def test_many_classes_have_no_numbers_and_the_worst_have_bars(drawn, tmp_path):
    accuracies = {f"class{number:03}": number / 160 for number in range(160)}
    many = replace(TEST, per_class_accuracy=accuracies, confusion_matrix=np.eye(160, dtype=int).tolist())
    draw_confusion(many, tmp_path / "confusion.png", title="")
    axes = drawn["confusion.png"].axes[0]
    assert list(axes.texts) == [] and len(axes.get_xticks()) < 20
    draw_per_class(many, tmp_path / "per_class.png", title="all")
    columns = drawn["per_class.png"].axes
    assert [len(axes.patches) for axes in columns] == [34, 34, 34]
    assert drawn["per_class.png"].get_suptitle() == "all (the 102 worst of 160 classes)"


def test_every_run_is_in_the_legend(drawn, tmp_path):
    """A label that begins with an underscore is none to matplotlib."""
    long = "a/folder/with/a/name/that/is/far/too/long/for/three/columns/run"
    runs = {name: [record(1)] for name in ("_x", "b", long)}
    draw_overlay(runs, tmp_path / "curves.png", title="")
    (legend,) = drawn["curves.png"].legends
    assert [text.get_text() for text in legend.get_texts()] == list(runs)
    assert legend._ncols < 3


def test_the_page_of_a_run_says_what_the_figures_say(tmp_path):
    page = html.unescape(page_of_run(a_run(tmp_path / "run"), SAVED))
    captions = re.findall(r"<figure( class=\"wrong\")?><img .*?<figcaption>(.*?)</figcaption>", page)
    mistakes = [(' class="wrong"', "dog → ship 80%"), (' class="wrong"', "cat → dog 70%")]
    first = [("", "cat"), (' class="wrong"', "cat → dog 70%"), (' class="wrong"', "dog → ship 80%")]
    assert captions == mistakes + first
    rows = re.findall(r"<tr><td>(\w+)</td><td>([\d.%]+)</td><td>.*?</td><td>(.*?)</td><td>(\d+)</td></tr>", page)
    assert rows == [
        ("dog", "25.0%", "ship (4)", "8"), ("cat", "60.0%", "ship (5)", "20"), ("ship", "90.0%", "cat (1)", "10")
    ]  # fmt: skip


def test_the_page_of_several_runs_shows_their_lines_and_loads_nothing(tmp_path):
    runs = [a_run(tmp_path / f"{place}") for place in range(3)]
    page = page_of_runs(runs, "three runs")
    assert addresses_in(page) == [] and "://" not in page
    lines = re.findall(r'<td colspan="1"><svg class="line".*?stroke="var\(--c(\d)\)"(.*?)/></svg>(\w+)</td>', page)
    assert [(color, name) for color, _, name in lines] == [("0", "0"), ("1", "1"), ("2", "2")]
    assert ["dasharray" in dashes for _, dashes, _ in lines] == [False, True, True]


def test_the_rate_of_a_run_is_over_all_its_epochs(tmp_path):
    fast, slow = {"images_per_second": 100.0, "epoch_seconds": 1.0}, {"images_per_second": 300.0, "epoch_seconds": 3.0}
    run = replace(a_run(tmp_path / "run"), records=[record(1, **fast), record(2, **slow)])
    assert run.facts["images_per_second"] == 250


def test_an_unfinished_run_is_reported_from_its_epochs(tmp_path, capsys, drawn):
    """Its summary.json is from its beginning."""
    path = make_run(tmp_path / "run", top1=None, status="running", epochs=0)
    lines = [
        record(epoch, train_loss=abs(epoch - 2.0), val_loss=1.0, val_acc=0.1 * epoch).to_json() for epoch in (1, 2, 3)
    ]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert main(["report", str(path)]) == 0
    assert "Running after 3 of 3 epochs" in (text := capsys.readouterr().out) and "best epoch 2" in text
    assert "3 of 3" in (path / "report.html").read_text()


def test_two_runs_of_one_seed_are_no_statistics(tmp_path, capsys):
    runs = [str(make_run(tmp_path / f"{place}")) for place in range(2)]
    assert main(["report", *runs]) == 0
    text = capsys.readouterr().out
    assert "mean ± sd" not in text
    assert "no mean over these runs, which have the same recipe and the same seed: 0 (seed 0), 1 (seed 0)\n" in text


def test_a_mean_of_times_is_over_one_number_of_processes(tmp_path, capsys):
    runs = [make_run(tmp_path / f"{seed}", f"seed={seed}") for seed in range(2)]
    summary = (runs[0] / "summary.json").read_text()
    (runs[0] / "summary.json").write_text(summary.replace('"world_size": 2', '"world_size": 4'))
    assert main(["report", *map(str, runs)]) == 0
    assert re.search(r"mean ± sd of 2 runs +75.00 ± 0.00 +0.5000 ± 0.0000 +- +-\n", capsys.readouterr().out)


def test_runs_of_one_name_are_told_by_the_folders_above(tmp_path, capsys):
    runs = [str(make_run(tmp_path / folder / "run", f"seed={seed}")) for seed, folder in enumerate(("a", "b"))]
    assert main(["report", *runs]) == 0
    assert re.findall(r"^(\w/run) ", capsys.readouterr().out, re.MULTILINE) == ["a/run", "b/run"]
