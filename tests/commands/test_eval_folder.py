"""`eval` on folders that the weights were, or were not, trained on; `predict` on links."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from cifar_dist.cli import main
from cifar_dist.run.checkpoint import load_checkpoint
from tests.commands.test_train import NarrowResNet


def put(folder: Path, count: int, first: int = 0) -> None:
    """Write images of two classes; no two are alike."""
    for name, grey in (("a", 0), ("b", 120)):
        (folder / name).mkdir(parents=True)
        for number in range(first, first + count):
            Image.new("L", (16, 16), grey + number).save(folder / name / f"{number:02}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run on a folder without parts; other folders."""
    folder = tmp_path_factory.mktemp("eval")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("cifar_dist.display.figures._save", lambda figure, path: path.touch())
        patch.setattr("cifar_dist.model.resnet.resnet18", NarrowResNet)
        put(folder / "own", 20)
        put(folder / "foreign", 5, first=50)
        put(folder / "tested/test", 3, first=60)
        put(folder / "validated/val", 4, first=70)
        fields = ["--set", "global_batch_size=8", "stem=small", "image_size=16", "validation_size=4"]
        argv = ["--recipe", "original", "--precision", "no", "--epochs", "1", "--dataset", "own", "--run-dir", "run"]
        assert main([*argv, *fields]) == 0
        torch.save(load_checkpoint(Path("run/checkpoints/last.pt"))["model"], "bare.pth")
        yield folder


def evaluate(*argv: str) -> int:
    assert main(["eval", "--json", "result.json", *argv]) == 0
    return int(json.loads(Path("result.json").read_text())["num_samples"])


WHOLE = "has no test/ of its own: all its images are evaluated"


@pytest.mark.parametrize(("dataset", "count"), [("foreign", 10), ("tested", 6), ("validated", 8), ("tested/test", 6)])
@pytest.mark.parametrize("weights", [["--ckpt", "run"], ["--ckpt", "bare.pth", "--recipe", "mine.yaml"]])
def test_a_foreign_folder_is_evaluated_whole(folder, capsys, dataset, count, weights):
    Path("mine.yaml").write_text("stem: small\nimage_size: 16\nimage_size_schedule: null\n")
    assert evaluate(*weights, "--dataset", dataset) == count
    shown = capsys.readouterr().out
    assert (WHOLE in shown) == (dataset in ("foreign", "tested/test"))
    assert f"{count} image files, resized and cropped to 16x16 pixels" in shown


def test_of_the_runs_own_folder_only_the_test_images_are_evaluated_also_from_elsewhere(folder, capsys):
    shutil.copytree("own", "moved")
    assert evaluate("--ckpt", "run") == evaluate("--ckpt", "run", "--dataset", "moved") == 8
    assert evaluate("--ckpt", "run", "--split", "validation", "--dataset", "moved") == 4
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
    assert "bare weights do not know which images were held out" in capsys.readouterr().err


def test_links_to_one_file_are_predicted_each(folder, capsys):
    for name in ("l1.png", "l2.png"):
        Path(name).symlink_to("own/a/00.png")
    assert main(["predict", "--ckpt", "run", "--json", "-", "l1.png", "l2.png"]) == 0
    first, second = json.loads(capsys.readouterr().out)["predictions"]
    assert (first["file"], second["file"]) == ("l1.png", "l2.png")
    assert first["classes"] == second["classes"]
