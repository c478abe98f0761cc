"""The command `report`, for one run directory and for several."""

import html
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib import image as matplotlib_image

from cifar_dist.cli import main
from cifar_dist.config.command_line import parse_arguments
from cifar_dist.config.recipe import read_recipe, recipe_to_mapping
from cifar_dist.display.report import read_run
from cifar_dist.run.lock import RunLock
from cifar_dist.run.results import Evaluation, Summary
from tests.conftest import make_recipe
from tests.unit.test_metrics import record

CLASSES = ["cat", r"$\dog$", "<b>&ship"]
EVERY_FIGURE = {"curves.png", "confusion.png", "per_class.png", "predictions.png", "mistakes.png"}


def evaluation(top1: float) -> Evaluation:
    """Of 20 images of each class 8 are taken for the next one."""
    return Evaluation(
        num_samples=60, loss=0.5, top1=top1, top5=None, per_class_accuracy=dict.fromkeys(CLASSES, 0.6),
        confusion_matrix=[[12, 8, 0], [0, 12, 8], [8, 0, 12]],
    )  # fmt: skip


def make_run(
    path: Path, *changes: str, top1: float | None = 0.75, status: str = "completed", epochs: int = 3,
    precision: str = "bf16",
) -> Path:  # fmt: skip
    """A run directory, as training leaves it; `top1` None: it was not tested."""
    path.mkdir(parents=True)
    recipe = recipe_to_mapping(make_recipe("epochs=3", *changes))
    config = {
        "format_version": 3, "recipe_name": "original", "recipe": recipe, "class_names": CLASSES, "world_size": 2,
        "dataset": {"name": "shapes", "data_dir": "/data", "fingerprint": "f0"}, "device": "cpu", "num_threads": 1,
        "precision": precision, "versions": {"torch": "2.14"}, "git_commit": "abc",
    }  # fmt: skip
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    summary = Summary(
        status=status, epochs=epochs, best_epoch=2, train_seconds=100.0 + recipe["seed"],
        world_size=2, device="cpu", precision=precision, num_threads=1, peak_memory_mib=1,
        test=None if top1 is None else evaluation(top1),
    )  # fmt: skip
    (path / "summary.json").write_text(summary.to_json())
    records = [record(epoch, val_loss=1 / epoch, val_acc=epoch / 10) for epoch in range(1, epochs + 1)]
    (path / "metrics.jsonl").write_text("".join(each.to_json() + "\n" for each in records))
    if top1 is not None:
        random, count = np.random.default_rng(0), 60
        labels = np.arange(count) % 3
        logits = random.normal(size=(count, 3)).astype(np.float16)
        wrong = np.flatnonzero(logits.argmax(1) != labels)[:5]
        images = random.integers(256, size=(count, 3, 8, 8), dtype=np.uint8)
        np.savez(
            path / "test_predictions.npz", indices=np.arange(count), labels=labels, logits=logits, images=images[:64],
            class_names=np.array(CLASSES), mistakes=wrong, mistaken_images=images[wrong],
        )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    path = make_run(tmp_path_factory.mktemp("report") / "run", status="early_stopped")
    assert main(["report", str(path)]) == 0
    return path


@pytest.fixture
def no_pixels(monkeypatch):
    """Leave the drawing of files out, which takes most of the time."""
    monkeypatch.setattr("cifar_dist.display.figures._save", lambda figure, path: path.touch())


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_one_run_gets_its_figures_and_a_page(run):
    assert names_in(run / "figures") == EVERY_FIGURE
    for path in (run / "figures").iterdir():
        assert matplotlib_image.imread(path)[..., :3].std() > 0.02, f"{path} is empty"
    page = html.unescape((run / "report.html").read_text())
    for expected in (
        "original on shapes, seed 0", "75.00", "Early stopping triggered", "torch: '2.14'", "git_commit: abc",
        "precision: bfloat16,", r"40.0% of cat taken for $\dog$ (8 of 20)", "epochs: 3  (standard: 12)",
    ):  # fmt: skip
        assert expected in page, expected
    assert page.count("data:image/png;base64,") == len(EVERY_FIGURE)


def test_the_command_to_run_it_again_can_be_typed(run):
    page = (run / "report.html").read_text()
    words = re.search(r"<pre>(?:python launch.py|python -m cifar_dist|cifar-dist) (.*?)</pre>", page)[1].split()
    command, options = parse_arguments(words)
    assert (command, options.dataset, options.precision, options.num_processes) == ("train", "shapes", "bf16", 2)
    assert read_recipe(options.recipe) == yaml.safe_load((run / "config.yaml").read_text())["recipe"]


def test_a_run_of_ones_own_network_is_named_and_run_again_with_it(tmp_path, no_pixels, capsys):
    own = make_run(tmp_path / "own", "model=mynet.py:net", top1=None)
    (own / "checkpoints").mkdir()
    (own / "checkpoints" / "last.pt").touch()
    assert main(["report", str(own)]) == 0
    page = (own / "report.html").read_text()
    assert "<h1>original with net on shapes, seed 0</h1>" in page
    words = re.search(r"<pre>.*? (--recipe .*?)</pre>", page)[1].split()
    assert parse_arguments(words)[1].assignments == {"model": "mynet.py:net"}
    assert f"eval --ckpt {own} --set model=mynet.py:net\n" in capsys.readouterr().out


def test_a_replaced_network_is_in_the_title_and_that_of_a_recipe_is_not(tmp_path):
    assert read_run(make_run(tmp_path / "a", "model=resnet34"), "a").title == "original with resnet34 on shapes, seed 0"
    assert read_run(make_run(tmp_path / "b"), "b").title == "original on shapes, seed 0"
    config = make_run(tmp_path / "c", "model=mynet.py:net") / "config.yaml"
    config.write_text(config.read_text().replace("recipe_name: original", "recipe_name: mine"))
    assert read_run(config.parent, "c").title == "mine with net on shapes, seed 0"


def test_a_name_that_no_font_draws_is_noted_with_the_command_that_draws_it(tmp_path, no_pixels, capsys, monkeypatch):
    run, out = make_run(tmp_path / "run"), tmp_path / "out"
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("- cat", "- 蓝圆"))
    monkeypatch.setattr("cifar_dist.display.figures._find_font", lambda letter: None)
    for words in ([str(run)], [str(run), "--out", str(out)]):
        assert main(["report", *words]) == 0
        line = capsys.readouterr().out.splitlines()[-1]
        assert line.startswith("note: no font here draws 蓝圆; install one (apt install fonts-noto-cjk), then: ")
        assert line.endswith(f" report {' '.join(words)}")
    words = [str(run), str(make_run(tmp_path / "红")), "--out", str(out)]
    assert main(["report", *words]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("note: no font here draws 红; ") and line.endswith(f" report {shlex.join(words)}")


def test_the_page_loads_nothing_and_escapes_names(run):
    page = (run / "report.html").read_text()
    addresses = re.findall(r"""\b(?:src|href|srcset|data|action)=["']?([^#"'\s>][^"'\s>]*)""", page)
    assert {address.split(",")[0] for address in addresses} == {"data:image/png;base64"}
    assert not set(re.findall(r"<(\w+)", page)) & {"script", "link", "iframe", "object"}
    assert "url(" not in page and "@import" not in page and "://" not in page
    assert "default-src 'none'" in page
    assert "<b>&ship" not in page and "&lt;b&gt;&amp;ship" in page


@pytest.mark.parametrize("epochs", [0, 2])
def test_a_run_without_a_test_has_its_curves(tmp_path, capsys, no_pixels, epochs):
    run = make_run(tmp_path / "run", top1=None, status="interrupted", epochs=epochs)
    assert main(["report", str(run), "--out", str(tmp_path / "out")]) == 0
    assert names_in(tmp_path / "out") == {"report.html", *(["curves.png"] if epochs else [])}
    assert names_in(run) == {"config.yaml", "metrics.jsonl", "summary.json"}
    assert re.search(
        rf"^not at its end; resume with: \S+.* --num-processes 2 --resume {run}$", capsys.readouterr().out, re.MULTILINE
    )


def test_an_unfinished_run_is_reported_from_its_epochs(tmp_path):
    """Its summary.json is from its beginning."""
    path = make_run(tmp_path / "run", top1=None, status="running", epochs=0)
    records = [record(1, epoch_seconds=1.0), record(2, images_per_second=300.0, epoch_seconds=300.0)]
    (path / "metrics.jsonl").write_text("".join(each.to_json() + "\n" for each in records))
    with RunLock() as lock:
        lock.acquire(path)
        assert read_run(path, "run").summary.status == "running"
    run = read_run(path, "run")
    assert (run.summary.status, run.summary.epochs, run.summary.train_seconds) == ("interrupted", 2, 301), "killed"
    assert run.measures["images_per_second"] == pytest.approx((100 + 300 * 300) / 301), "over all epochs"


def test_several_runs_have_one_table_everywhere(tmp_path, capsys):
    names = ("seed0", "seed\n1|b")
    runs = [str(make_run(tmp_path / name, f"seed={n}", top1=0.7 + n / 10)) for n, name in enumerate(names)]
    assert main(["report", *runs, runs[0]]) == 0
    text = capsys.readouterr().out
    assert re.search(r"mean ± sd of 2 runs +75.00 ± 7.07 +0.5000 ± 0.0000 +100.5 ± 0.7 +100 ± 0\n", text)
    assert "--out DIR" in text
    assert not any(Path(run, "figures").exists() for run in runs)
    out = tmp_path / "out"
    assert main(["report", *runs, "--out", str(out)]) == 0
    assert names_in(out) == {"curves.png", "report.md", "report.html"}
    assert matplotlib_image.imread(out / "curves.png")[..., :3].std() > 0.02
    markdown = (out / "report.md").read_text().splitlines()
    assert len({line.count(" | ") for line in markdown[:5]}) == 1
    assert markdown[2] == "| seed0 | completed | 0 | 3/3 | 70.00 | 0.5000 | 100.0 | 100 |"
    assert markdown[3].startswith("| seed 1\\|b | completed |"), "one cell, whatever the name"
    assert "75.00 ± 7.07" in markdown[4] and "75.00 ± 7.07" in (out / "report.html").read_text()


def test_untested_runs_are_in_no_mean(tmp_path, capsys):
    runs = [str(make_run(tmp_path / f"a{seed}", f"seed={seed}", top1=0.5 + seed / 10)) for seed in range(3)]
    untested = make_run(tmp_path / "c", "seed=9", top1=None)
    assert main(["report", *runs, str(untested)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"mean ± sd of 3 runs +60.00 ± 10.00", text)
    assert "\nc is in no mean: not tested yet\n" in text
    (untested / "checkpoints").mkdir()
    (untested / "checkpoints" / "last.pt").touch()
    assert main(["report", str(untested)]) == 0
    command = rf"not tested yet: (cifar-dist|python launch.py|python -m cifar_dist) eval --ckpt {untested}"
    assert re.search(f"^{command}$", capsys.readouterr().out, re.MULTILINE)
    assert re.search(f"<p>{command}</p>", (untested / "report.html").read_text())


@pytest.mark.parametrize("differing", ["global_batch_size", "precision", "content of the dataset"])
def test_a_mean_is_over_runs_that_differ_in_their_seed_only(tmp_path, capsys, differing):
    runs = []
    for number in range(4):
        second = number // 2
        changes = [f"seed={number}", f"global_batch_size={256 if second and differing == 'global_batch_size' else 128}"]
        precision = "no" if second and differing == "precision" else "bf16"
        run = make_run(tmp_path / f"{number}", *changes, top1=0.5 + number / 10, precision=precision)
        if second and differing == "content of the dataset":
            (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("f0", "f1"))
        runs.append(str(run))
    assert main(["report", *runs]) == 0
    text = capsys.readouterr().out
    means = re.findall(rf"mean ± sd of 2 runs \({differing}=\w+\) +(\S+) ± 7.07", text)
    assert means == ["55.00", "75.00"]
    assert f"the runs differ in {differing}\n" in text


def test_a_folder_at_another_image_size_is_no_other_content(tmp_path, capsys):
    sizes = {"a": ("f0", 32), "b": ("f1", 48), "c": ("f2", 48)}
    for name, (fingerprint, size) in sizes.items():
        config = make_run(tmp_path / name, f"image_size={size}") / "config.yaml"
        config.write_text(config.read_text().replace("fingerprint: f0", f"fingerprint: {fingerprint}"))
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "the runs differ in image_size\n" in capsys.readouterr().out
    assert main(["report", *(str(tmp_path / name) for name in sizes)]) == 0
    assert "the runs differ in content of the dataset, image_size\n" in capsys.readouterr().out


def test_runs_of_one_seed_have_no_mean_and_other_worlds_no_mean_of_times(tmp_path, capsys):
    runs = [str(make_run(tmp_path / folder / "run", f"seed={n % 2}")) for n, folder in enumerate("abc")]
    assert main(["report", *runs]) == 0
    text = capsys.readouterr().out
    assert "mean ± sd" not in text
    repeated = "a/run (seed 0), c/run (seed 0)"
    assert f"no mean over these runs, which have the same recipe and the same seed: {repeated}\n" in text
    summary = Path(runs[0], "summary.json")
    summary.write_text(summary.read_text().replace('"world_size": 2', '"world_size": 4'))
    assert main(["report", *runs[:2]]) == 0
    assert re.search(r"mean ± sd of 2 runs +75.00 ± 0.00 +0.5000 ± 0.0000 +- +-\n", capsys.readouterr().out)


MISTAKES = {
    "no summary": ("has no summary.json", lambda run: (run / "summary.json").unlink()),
    "damaged predictions": (
        "test_predictions.npz is damaged",
        lambda run: (run / "test_predictions.npz").write_text(""),
    ),
    "figures is a file": ("cannot write", lambda run: (run / "figures").write_text("here already")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(tmp_path, capsys, mistake):
    run = make_run(tmp_path / "run")
    message, spoil = MISTAKES[mistake]
    spoil(run)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["report", str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert all(path.read_bytes() == content for path, content in before.items())
