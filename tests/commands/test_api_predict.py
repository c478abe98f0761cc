"""The Python functions print nothing if they are to be quiet, name arguments as Python does, and predict."""

import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from cifar_dist import Recipe, UserError, evaluate, load_model, predict, train
from cifar_dist.run.directory import RunDirectory
from tests.commands.test_train import NarrowResNet, small_world_in
from tests.conftest import ROOT, make_images

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)
BRIEF = Recipe.load("original", epochs=2, validation_size=24, global_batch_size=24)


@pytest.fixture(autouse=True)
def folder(tmp_path):
    with small_world_in(tmp_path):
        yield tmp_path


@pytest.fixture
def images(folder) -> list[str]:
    """Five image files and one that is none; in the current folder, a state dict of two classes."""
    make_images(folder / "images")
    torch.save(NarrowResNet(num_classes=2).state_dict(), "bare.pth")
    (folder / "broken.png").write_bytes(b"no image")
    return ["images/test/dark", "images/test/light/0.png", "broken.png"]


def test_what_is_quiet_prints_nothing(images, capfd):
    summary = train(BRIEF, dataset="shapes", run_dir="x", quiet=True)
    assert train(BRIEF, dataset="shapes", run_dir="x", resume=True, quiet=True) == summary
    evaluate("x", quiet=True)
    predict("x", images, quiet=True)
    load_model("x")
    with pytest.raises(RuntimeError, match=r"\(exit code 1\): diverged: the loss is not finite in epoch 1"):
        train(Recipe.load("original", **{"optimizer.learning_rate": 1e30}), dataset="shapes", run_dir="y", quiet=True)
    assert capfd.readouterr() == ("", "")
    train(BRIEF, dataset="shapes", run_dir="z")
    assert "epoch 2/2" in capfd.readouterr().out


def test_a_summary_has_the_validation_accuracy_of_the_best_epoch():
    summary = train(BRIEF, dataset="shapes", run_dir="x", quiet=True)
    best = RunDirectory(Path("x")).read_records()[summary.best_epoch - 1]
    assert summary.best_val_acc == best.val_acc
    assert RunDirectory(Path("x")).read_summary() == summary
    assert train("original", dataset="shapes", run_dir="y", quiet=True).best_val_acc is None, "it has no validation"


def test_predictions_are_records(images, capfd):
    *read, broken = predict("bare.pth", images, top=1)
    assert [each.file for each in read] == [*(f"images/test/dark/{i}.png" for i in range(4)), images[1]]
    assert all(each.error is None and len(each.classes) == 1 and each.classes[0][0] in "01" for each in read)
    assert (broken.file, broken.classes) == ("broken.png", ()) and "damaged" in broken.error
    assert "error: broken.png cannot be read" in capfd.readouterr().err
    (one,) = predict("bare.pth", Path(images[1]), quiet=True)
    assert sum(probability for _, probability in one.classes) == pytest.approx(1, abs=1e-4)


def test_the_block_on_images_runs(images):
    train(BRIEF, dataset="shapes", run_dir="runs/mine", quiet=True)
    Path("cat.png").write_bytes(Path(images[1]).read_bytes())
    Path("photos").symlink_to(images[0])
    (block,) = (each for each in BLOCKS if "predict(" in each)
    exec(block, {})
    model = load_model("runs/mine")
    assert model.class_names == tuple(f"class{i}" for i in range(10))
    assert model.recipe.normalization.mean == (0.5, 0.5, 0.5)
    assert load_model("bare.pth").class_names is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: train("quick", dataset="shapes", run_dir="held"), "add resume=True to go on .* name another run_dir"),
        (lambda: train("quick", resume=True), "resume=True needs run_dir"),
        (lambda: train("quick", dataset=TensorDataset(torch.ones(1))), "dataset is of type TensorDataset: it must be"),
        (lambda: train({"epochs": 1}), "recipe is of type dict: it must be a name, a file or a Recipe"),
        (lambda: train(Path("my.yaml"), dataset="shapes"), "recipe file my.yaml does not exist"),
        (lambda: train("quick", data_dir=3), "data_dir is of type int: it must be a folder"),
        (lambda: train("quick", config=3), "config is of type int: it must be a file"),
        (lambda: evaluate(None), "checkpoint is empty: it must be"),
        (lambda: predict("bare.pth", [torch.ones(3, 32, 32)]), "images is of type Tensor: it must be paths"),
        (lambda: predict("bare.pth", "images", top=0), "^top must be 1 or more"),
        (lambda: predict("bare.pth", "images", top="3"), "top must be a whole number, not .3"),
        (lambda: predict("bare.pth", None), "images is empty: it must be"),
        (lambda: predict("bare.pth", []), "images is empty: it must be"),
        (lambda: train("quick", trackers=5), "trackers is of type int: it must be"),
        (lambda: load_model(torch.nn.Identity()), "checkpoint is of type Identity: it must be"),
    ],
)
def test_errors_name_arguments_of_python(images, call, message):
    Path("held").mkdir()
    Path("held/metrics.jsonl").touch()
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "--" not in str(error.value)
