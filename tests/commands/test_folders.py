"""Class folders through the command line: any number of classes and images, and the same answers as official files."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from cifar_dist.cli import main
from cifar_dist.data.archives import CIFAR10
from cifar_dist.data.cifar import load_archive
from cifar_dist.training.run_directory import RunDirectory
from tests.conftest import make_dataset

QUICKLY = ["--recipe", "original", "--precision", "no", "--epochs", "1"]


@pytest.fixture(autouse=True)
def small_world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CIFAR_DIST_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def write_images(folder: Path, count: int, *, size: tuple[int, int] = (32, 32)) -> None:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(len(str(folder)) + count)
    for index in range(count):
        pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{index:04}.png")


def evaluate(*argv: str) -> dict:
    assert main(["eval", "--json", "result.json", *argv]) == 0
    return json.loads(Path("result.json").read_text())


@pytest.mark.parametrize("typed", [(), ("--dataset", "zoo")])
def test_a_folder_that_has_changed_since_the_training_is_told_of(capsys, typed):
    for name in ("ant", "bee"):
        write_images(Path("zoo") / name, 20)
    settings = ["--set", "global_batch_size=8", "stem=small", "validation_size=4"]
    assert main([*QUICKLY, *settings, "--dataset", "zoo", "--run-dir", "run"]) == 0
    capsys.readouterr()
    assert main(["eval", "--ckpt", "run", *typed]) == main(["eval", "--ckpt", "run", "--split", "validation"]) == 0
    assert "has changed" not in capsys.readouterr().out
    (Path("zoo") / "ant" / "0000.png").unlink()
    assert main(["eval", "--ckpt", "run", *typed]) == 0
    assert "zoo has changed since the training, which may have seen these images" in capsys.readouterr().out
    assert main(["eval", "--ckpt", "run", "--split", "validation", *typed]) == 2
    assert "which images were held out is not known" in capsys.readouterr().err


def test_1237_images_in_seven_classes_one_of_three_images(capsys):
    counts = {"ant": 3, "bee": 190, "cow": 211, "doe": 200, "eel": 211, "fox": 211, "gnu": 211}
    assert sum(counts.values()) == 1237
    for name, count in counts.items():
        write_images(Path("zoo") / name, count, size=(32, 32) if name != "bee" else (40, 36))
    assert main([*QUICKLY, "--dataset", "zoo", "--run-dir", "run"]) == 0
    shown = capsys.readouterr().out
    assert "1,237 files of 32x32 to 40x36 pixels, resized and cropped to 32x32, 3.6 MiB in memory" in shown
    assert "mean [0.5, 0.5, 0.5], std [0.5, 0.5, 0.5]" in shown
    test = RunDirectory(Path("run")).read_summary().test
    assert list(test.per_class_accuracy) == sorted(counts)
    assert test.num_samples == sum(max(1, round(count / 5)) for count in counts.values())
    assert sum(test.confusion_matrix[0]) == 1

    Path("elsewhere").mkdir()
    os.chdir("elsewhere")  # the run remembers where its images are
    again = evaluate("--ckpt", "../run")
    assert again["loss"] == test.loss
    assert "read from the cache" not in shown
    assert main(["--resume", "../run", "--epochs", "2"]) == 0
    assert "read from the cache" in capsys.readouterr().out


def test_a_validation_folder_is_the_validation_set(capsys):
    for part, count in (("train", 20), ("val", 6), ("test", 4)):
        for name in ("left", "right"):
            write_images(Path("data") / part / name, count)
    fields = [
        "--set",
        "selection=best",
        "early_stopping.monitor=val_loss",
        "validation_size=12",
        "global_batch_size=16",
    ]
    assert main([*QUICKLY, "--dataset", "data", "--run-dir", "run", *fields]) == 0
    assert "40 training, 12 validation, 8 test" in capsys.readouterr().out
    record = RunDirectory(Path("run")).read_records()[0]
    result = evaluate("--ckpt", "run", "--split", "validation")
    assert (result["loss"], result["num_samples"]) == (record.val_loss, 12)
    assert main([*QUICKLY, "--dataset", "data", "--dry-run"]) == 0
    assert "40 training, 12 validation, 8 test" in capsys.readouterr().out


def test_a_typed_size_that_is_not_the_folders_is_refused(capsys):
    for part in ("train", "val", "test"):
        for name in ("left", "right"):
            write_images(Path("data") / part / name, 4)
    assert main([*QUICKLY, "--dataset", "data", "--set", "validation_size=3"]) == 2
    assert "validation_size=3, but the dataset brings its own 8: leave it out" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_unreadable_images_are_named_all_at_once(capsys):
    for name in ("left", "right"):
        write_images(Path("data") / name, 6)
    Path("data/left/empty.png").touch()
    Path("data/right/text.jpg").write_text("I am no image")
    assert main([*QUICKLY, "--dataset", "data"]) == 2
    line = capsys.readouterr().err
    assert "left/empty.png" in line
    assert "right/text.jpg" in line
    assert line.count("\n") == 1
    assert not Path("runs").exists()


def save_as_folders(names: dict[str, str]) -> None:
    """Write the test images of the small dataset as class folders, each class under another name."""
    dataset = make_dataset()
    for part, images in (("train", dataset.train), ("test", dataset.test)):
        for index, (pixels, label) in enumerate(zip(images.images, images.labels.tolist(), strict=True)):
            folder = Path("png", part, names[dataset.class_names[label]])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{index}.png")


@pytest.fixture
def small_shapes(monkeypatch):
    """A dataset of 96 images whose classes are not in alphabetical order, where `shapes` is asked for."""
    names = tuple("jihgfedcba")
    dataset = make_dataset()
    object.__setattr__(dataset, "class_names", names)
    monkeypatch.setattr("cifar_dist.data.datasets.load_shapes", lambda: dataset)
    return dict(zip(make_dataset().class_names, names, strict=True))


def test_folders_give_the_accuracy_of_the_dataset_they_were_made_from(small_shapes):
    save_as_folders(small_shapes)
    assert main([*QUICKLY, "--dataset", "shapes", "--run-dir", "run", "--set", "global_batch_size=32"]) == 0
    first, second = evaluate("--ckpt", "run"), evaluate("--ckpt", "run", "--dataset", "png")
    assert second["per_class_accuracy"] == first["per_class_accuracy"]
    assert second["confusion_matrix"] == first["confusion_matrix"]
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-6)


def test_a_folder_that_lacks_a_class_is_evaluated_and_a_foreign_class_refused(small_shapes, capsys):
    save_as_folders(small_shapes)
    assert main([*QUICKLY, "--dataset", "shapes", "--run-dir", "run", "--set", "global_batch_size=32"]) == 0
    for part in ("train", "test"):
        shutil.rmtree(Path("png", part, "c"))
    result = evaluate("--ckpt", "run", "--dataset", "png")
    assert result["per_class_accuracy"]["c"] is None
    assert result["num_samples"] == 36
    for part in ("train", "test"):
        Path("png", part, "d").rename(Path("png", part, "zebra"))
    assert main(["eval", "--ckpt", "run", "--dataset", "png"]) == 2
    assert "was trained on other classes than png has: there is no class 'zebra'" in capsys.readouterr().err


@pytest.mark.official
def test_official_files_and_png_folders_give_the_same_accuracy(official_data, monkeypatch):
    """1,000 of the official test images as PNG files; the whole set would take minutes on one thread."""
    dataset = load_archive(CIFAR10, official_data)
    part = dataset.test
    for index in range(1000):
        name = dataset.class_names[part.labels[index]]
        for folder in (Path("png/test", name), Path("png/train", name)):
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(part.images[index].permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
    few = type(part)(images=part.images[:1000], labels=part.labels[:1000])
    object.__setattr__(dataset, "test", few)
    object.__setattr__(dataset, "train", few)
    monkeypatch.setattr("cifar_dist.data.datasets.load_archive", lambda *_, **__: dataset)
    assert main([*QUICKLY, "--run-dir", "run"]) == 0
    first, second = evaluate("--ckpt", "run"), evaluate("--ckpt", "run", "--dataset", "png")
    assert second["top1"] == first["top1"]
    assert second["confusion_matrix"] == first["confusion_matrix"]
