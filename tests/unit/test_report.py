"""The report of one run and of several, from folders that hold what runs leave."""

import csv
import dataclasses
import html.parser
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml

from cifar_dist.cli import main
from cifar_dist.config.loading import recipe_to_mapping
from cifar_dist.records import Evaluation, Summary
from tests.conftest import make_recipe
from tests.unit.test_metrics import record

CLASSES = ["cat", "dog", "<b>&ship"]


def evaluation(top1: float) -> Evaluation:
    return Evaluation(
        num_samples=60, loss=0.5, top1=top1, top5=None,
        per_class_accuracy=dict(zip(CLASSES, (0.5, 1.0, 0.75), strict=True)),
        confusion_matrix=[[10, 8, 2], [0, 20, 0], [5, 0, 15]],
    )  # fmt: skip


def make_run(
    path: Path, *, seed: int = 0, top1: float | None = 0.75, status: str = "completed", epochs: int = 3
) -> Path:
    """A run directory, as training leaves it; `top1` None: it was not tested."""
    path.mkdir(parents=True)
    recipe = recipe_to_mapping(make_recipe(f"seed={seed}", "epochs=3"))
    config = {
        "recipe_name": "original", "recipe": recipe, "dataset": {"name": "shapes"}, "class_names": CLASSES,
        "versions": {"torch": "2.14"}, "git_commit": "abc",
    }  # fmt: skip
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    summary = Summary(
        status=status, epochs=epochs, best_epoch=2, train_seconds=100.0 + seed, world_size=1, device="cpu",
        precision="no", num_threads=1, peak_memory_mib=1, test=None if top1 is None else evaluation(top1),
    )  # fmt: skip
    (path / "summary.json").write_text(summary.to_json())
    lines = [record(epoch, val_loss=1 / epoch, val_acc=epoch / 10).to_json() + "\n" for epoch in range(1, epochs + 1)]
    (path / "metrics.jsonl").write_text("".join(lines))
    if top1 is not None:
        random = np.random.default_rng(seed)
        labels, logits = random.integers(3, size=60), random.normal(size=(60, 3)).astype(np.float16)
        wrong = np.flatnonzero(logits.argmax(1) != labels)[:5]
        images = random.integers(256, size=(60, 3, 8, 8), dtype=np.uint8)
        np.savez(
            path / "test_predictions.npz", indices=np.arange(60), labels=labels, logits=logits, images=images,
            class_names=np.array(CLASSES), mistakes=wrong, mistaken_images=images[wrong],
        )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    path = make_run(tmp_path_factory.mktemp("report") / "run")
    assert main(["report", str(path)]) == 0
    return path


def test_one_run_gets_its_figures_and_a_page(run):
    names = {"curves.png", "confusion.png", "per_class.png", "predictions.png", "mistakes.png"}
    assert {path.name for path in (run / "figures").iterdir()} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (run / "figures").iterdir())
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(names)
    for expected in (
        "original on shapes, seed 0",
        "75.00 %",
        "learning_rate",
        "torch",
        "abc",
        "40.0% of cat taken for dog",
    ):
        assert expected in page, expected


class Addresses(html.parser.HTMLParser):
    """Hears what a page would ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.asked += [value[:30] for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        assert tag not in ("script", "link", "iframe", "object")


def test_the_page_asks_for_nothing_and_takes_no_name_for_markup(run):
    page, heard = (run / "report.html").read_text(), Addresses()
    heard.feed(page)
    assert heard.asked and all(address.startswith("data:image/png;base64,") for address in heard.asked)
    assert "url(" not in page and "@import" not in page
    assert "<b>&ship" not in page and "&lt;b&gt;&amp;ship" in page
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [500, 1200])
def test_a_browser_shows_the_page_and_nothing_is_wider_than_its_window(run, tmp_path, width):
    """With a script of the test's own that says how wide the page is."""
    measured = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script></body>"
    page = tmp_path / "page.html"
    page.write_text((run / "report.html").read_text().replace("</body>", measured))
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},800", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    wide, window = map(int, re.search(r"<title>(\d+) of (\d+)</title>", shown).groups())
    assert wide <= window and shown.count("<img") == 5


def test_a_run_that_was_not_tested_has_its_curves(tmp_path, capsys):
    run = make_run(tmp_path / "run", top1=None, status="interrupted")
    assert main(["report", str(run), "--out", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"curves.png", "report.html"}
    assert not (run / "report.html").exists()
    assert "not tested yet, and not counted: 1" in capsys.readouterr().out


def test_a_run_without_images_of_its_mistakes_is_reported(tmp_path):
    run = make_run(tmp_path / "run", epochs=1)
    saved = dict(np.load(run / "test_predictions.npz"))
    del saved["mistakes"], saved["mistaken_images"]
    np.savez(run / "test_predictions.npz", **saved)
    assert main(["report", str(run)]) == 0
    assert not (run / "figures" / "mistakes.png").exists() and (run / "figures" / "predictions.png").exists()


def test_several_runs_have_a_table_in_three_forms(tmp_path, capsys):
    runs = [str(make_run(tmp_path / f"seed{seed}", seed=seed, top1=0.7 + seed / 10)) for seed in range(2)]
    assert main(["report", *runs]) == 0
    text = capsys.readouterr().out
    assert "accuracy 75.00 ± 7.07 %" in text and "training 100.5 ± 0.7 s" in text and "--out DIR" in text
    assert not any(Path(run, "figures").exists() for run in runs)
    out = tmp_path / "out"
    assert main(["report", *runs, "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"curves.png", "report.csv", "report.md", "report.html"}
    rows = list(csv.DictReader((out / "report.csv").read_text().splitlines()))
    assert [float(row["top1"]) for row in rows] == pytest.approx([0.7, 0.8]) and rows[0]["top5"] == ""
    assert [float(row["images_per_second"]) for row in rows] == [100.0, 100.0]
    markdown = (out / "report.md").read_text().splitlines()
    assert markdown[1].count("---|") == markdown[0].count(" | ") + 1 and len(markdown) > 6
    assert "accuracy 75.00 ± 7.07 %" in (out / "report.html").read_text()


def test_a_hundred_classes_are_drawn(tmp_path):
    run = make_run(tmp_path / "run")
    names = [f"class{i}" for i in range(100)]
    many = dataclasses.replace(
        evaluation(0.5), per_class_accuracy=dict.fromkeys(names, 0.5), confusion_matrix=np.eye(100, dtype=int).tolist()
    )
    summary = dataclasses.replace(Summary.from_json((run / "summary.json").read_text()), test=many)
    (run / "summary.json").write_text(summary.to_json())
    assert main(["report", str(run)]) == 0


def test_a_place_that_cannot_be_written_is_one_line(run, tmp_path, capsys):
    (tmp_path / "file").write_text("here already")
    assert main(["report", str(run), "--out", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cannot write ") and error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "here already"
