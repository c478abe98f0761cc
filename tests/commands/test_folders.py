"""Class folders through the command line: trained on, and evaluated by weights that may not know them."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from cifar_dist.cli import main
from cifar_dist.data.dataset import Dataset
from cifar_dist.run.checkpoint import load_checkpoint
from cifar_dist.run.directory import RunDirectory
from tests.commands.test_train import evaluate, small_world_in
from tests.conftest import make_dataset

QUICK = ["--recipe", "original", "--precision", "no", "--epochs", "1"]


@pytest.fixture(autouse=True)
def small_world(tmp_path):
    with small_world_in(tmp_path, has_images=True):
        yield


def put(folder: str, *, first: int = 0, size: tuple[int, int] = (32, 32), **counts: int) -> None:
    """Write images of each class; no two are alike."""
    for index, (name, count) in enumerate(counts.items()):
        Path(folder, name).mkdir(parents=True)
        for number in range(first, first + count):
            Image.new("L", size, 120 * index + number).save(Path(folder, name, f"{number:02}.png"))


def train(*argv: str, code: int = 0) -> None:
    assert main([*QUICK, *argv]) == code


def test_folder_that_changed_since_the_training_is_reported(capsys):
    put("zoo", ant=20, bee=20)
    train("--dataset", "zoo", "--run-dir", "run", "--set", "global_batch_size=8", "validation_size=4")
    capsys.readouterr()
    for typed in ((), ("--dataset", "zoo"), ("--split", "validation")):
        evaluate("--ckpt", "run", *typed)
    assert "has changed" not in capsys.readouterr().out
    Path("zoo/ant/00.png").unlink()
    for typed in ((), ("--dataset", "zoo")):
        evaluate("--ckpt", "run", *typed)
        assert "zoo has changed since the training, which may have seen these images" in capsys.readouterr().out
        assert main(["eval", "--ckpt", "run", "--split", "validation", *typed]) == 2
        assert "which images were held out is not known" in capsys.readouterr().err


def test_classes_of_any_size_and_number_of_images(capsys):
    put("zoo", ant=3, cow=21)
    put("zoo", bee=19, size=(40, 36), first=60)
    reason = " (too few images to hold some out)"
    for typed, note in (((), reason), (("--set", "validation_size=0"), "")):
        assert main(["--recipe", "quick", "--dataset", "zoo", "--dry-run", *typed]) == 0
        assert f"34 training, 0 validation{note}, 9 test\n" in capsys.readouterr().out
    train("--dataset", "zoo", "--run-dir", "run")
    output = capsys.readouterr().out
    assert "43 image files, resized and cropped to 32x32 pixels" in output
    test = RunDirectory(Path("run")).read_summary().test
    assert list(test.per_class_accuracy) == ["ant", "bee", "cow"]
    assert [sum(row) for row in test.confusion_matrix] == [1, 4, 4]

    Path("elsewhere").mkdir()
    os.chdir("elsewhere")  # the run records where its images are
    assert evaluate("--ckpt", "../run")["loss"] == test.loss
    assert main(["--resume", "../run", "--epochs", "2"]) == 0


def test_classes_that_no_font_draws_are_noted_below_the_pictures(capsys, monkeypatch):
    monkeypatch.setattr("cifar_dist.display.figures._find_font", lambda letter: None)
    put("照片", 蓝圆=20, cat=20)
    train("--dataset", "照片", "--run-dir", "run", "--set", "global_batch_size=8")
    note = "note: no font here draws 蓝圆, 照片; install one (apt install fonts-noto-cjk), then: "
    pictures = "pictures: run/figures"
    assert f"\n{pictures}\n{note}python launch.py report run\nnext:\n" in capsys.readouterr().out
    evaluate("--ckpt", "run", "--figures", "drawn")
    assert f"\npictures: drawn\n{note}repeat this command\n" in capsys.readouterr().out


def test_validation_folder_is_the_validation_set(capsys):
    for part, count in (("train", 20), ("val", 6), ("test", 4)):
        put(f"data/{part}", left=count, right=count)
    train("--dataset", "data", "--set", "validation_size=3", code=2)
    assert "validation_size=3, but the dataset brings its own 12: leave it out" in capsys.readouterr().err
    train("--dataset", "data", "--dry-run")
    assert "40 training, 12 validation, 8 test" in capsys.readouterr().out
    assert not Path("runs").exists()
    fields = ["selection=best", "early_stopping.monitor=val_loss", "validation_size=12", "global_batch_size=16"]
    train("--dataset", "data", "--run-dir", "run", "--set", *fields)
    assert "40 training, 12 validation, 8 test" in capsys.readouterr().out
    record = RunDirectory(Path("run")).read_records()[0]
    result = evaluate("--ckpt", "run", "--split", "validation")
    assert (result["loss"], result["num_samples"]) == (record.val_loss, 12)


def save_as_folders(dataset: Dataset) -> None:
    for part, images in (("train", dataset.train), ("test", dataset.test)):
        for index, (pixels, label) in enumerate(zip(images.images, images.labels.tolist(), strict=True)):
            folder = Path("png", part, dataset.class_names[label])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{index}.png")


def test_folders_give_the_results_of_the_dataset_they_were_made_from(monkeypatch, capsys):
    dataset = make_dataset()
    object.__setattr__(dataset, "class_names", tuple("jihgfedcba"))  # not in the order of folders
    monkeypatch.setattr("cifar_dist.data.dataset.load_shapes", lambda: dataset)
    save_as_folders(dataset)
    train("--dataset", "shapes", "--run-dir", "run", "--set", "global_batch_size=32")
    first, second = evaluate("--ckpt", "run"), evaluate("--ckpt", "run", "--dataset", "png")
    assert second["per_class_accuracy"] == first["per_class_accuracy"]
    assert second["confusion_matrix"] == first["confusion_matrix"]
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-6)

    for part in ("train", "test"):
        shutil.rmtree(f"png/{part}/c")
    result = evaluate("--ckpt", "run", "--dataset", "png")
    assert (result["per_class_accuracy"]["c"], result["num_samples"]) == (None, 36)
    for part in ("train", "test"):
        Path("png", part, "d").rename(f"png/{part}/zebra")
    assert main(["eval", "--ckpt", "run", "--dataset", "png"]) == 2
    assert "was trained on other classes than png has: 'zebra' is none of " in capsys.readouterr().err


# Evaluated by weights that were, or were not, trained on them


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run on a folder without parts, and of other folders."""
    folder = tmp_path_factory.mktemp("eval")
    with small_world_in(folder, has_images=True):
        put("own", a=20, b=20)
        put("foreign", first=50, a=5, b=5)
        put("tested/test", first=60, a=3, b=3)
        put("validated/val", first=70, a=4, b=4)
        fields = ["global_batch_size=8", "stem=small", "image_size=16", "validation_size=4"]
        train("--dataset", "own", "--run-dir", "run", "--set", *fields)
        torch.save(load_checkpoint(Path("run/checkpoints/last.pt"))["model"], "bare.pth")
    return folder


@pytest.fixture
def folder(trained, monkeypatch):
    monkeypatch.chdir(trained)


WHOLE = "has no test/ of its own: all its images are evaluated"


@pytest.mark.parametrize(("dataset", "count"), [("foreign", 10), ("tested", 6), ("validated", 8), ("tested/test", 6)])
@pytest.mark.parametrize("weights", [["--ckpt", "run"], ["--ckpt", "bare.pth", "--recipe", "mine.yaml"]])
def test_a_foreign_folder_is_evaluated_whole(folder, capsys, dataset, count, weights):
    Path("mine.yaml").write_text("stem: small\nimage_size: 16\nimage_size_schedule: null\n")
    assert evaluate(*weights, "--dataset", dataset)["num_samples"] == count
    shown = capsys.readouterr().out
    assert (WHOLE in shown) == (dataset in ("foreign", "tested/test"))
    assert f"{count} image files, resized and cropped to 16x16 pixels" in shown


def test_only_the_test_images_of_the_runs_own_folder_are_evaluated(folder, capsys):
    shutil.copytree("own", "moved")
    for argv, count in (([], 8), (["--dataset", "moved"], 8), (["--split", "validation", "--dataset", "moved"], 4)):
        assert evaluate("--ckpt", "run", *argv)["num_samples"] == count
    assert WHOLE not in capsys.readouterr().out


def test_validation_images_of_another_dataset_are_refused(folder, capsys):
    """The same images in other parts: most of what would be held out was trained on."""
    shutil.copytree("own", "parts/train")
    shutil.copytree("foreign", "parts/test")
    shutil.copytree("validated/val", "parts/val")
    capsys.readouterr()
    for dataset in ("parts", "foreign", "validated"):
        assert main(["eval", "--ckpt", "run", "--split", "validation", "--dataset", dataset]) == 2
        out, err = capsys.readouterr()
        assert f"{Path(dataset).name} is not what run/checkpoints/last.pt was trained on" in err
        assert err.count("\n") == 1 and WHOLE not in out
    bare = ["eval", "--ckpt", "bare.pth", "--split", "validation", "--dataset", "own"]
    assert main([*bare, "--recipe", "run/config.yaml"]) == 2
    assert "bare weights do not name the images that were held out" in capsys.readouterr().err
