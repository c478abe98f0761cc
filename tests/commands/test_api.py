"""The Python of docs/python-api.md runs as it stands, and does what the commands do."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import distributed
from torch.utils.data import TensorDataset

import cifar_dist
from cifar_dist import Recipe, evaluate, load_model, predict, train
from cifar_dist.config.errors import UserError
from cifar_dist.run.directory import RunDirectory
from cifar_dist.run.results import Summary
from tests.commands.test_train import NarrowResNet, small_world_in
from tests.conftest import ROOT, make_images

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python-api.md").read_text(), re.DOTALL)


def test_the_package_itself_comes_without_torch():
    code = "import sys, cifar_dist; cifar_dist.Recipe; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    with pytest.raises(AttributeError, match="no attribute 'tain'"):
        __import__("cifar_dist").tain  # noqa: B018


def test_a_recipe_is_loaded_with_changes():
    recipe = Recipe.load("quick", epochs=2, **{"optimizer.learning_rate": 0.1})
    assert (recipe.epochs, recipe.optimizer.learning_rate, recipe.stem) == (2, 0.1, "small")
    with pytest.raises(UserError, match="did you mean 'epochs'"):
        Recipe.load("quick", epoch=2)


@pytest.fixture
def small(tmp_path):
    with small_world_in(tmp_path):
        yield


def train_briefly(**options) -> Summary:
    recipe = Recipe.load("original", epochs=1, validation_size=24, global_batch_size=24)
    return train(recipe, dataset="shapes", run_dir="run", quiet=True, **options)


def test_the_first_blocks_train_evaluate_and_load(small, capsys):
    names: dict[str, object] = {}
    for block in BLOCKS[:2]:
        exec(block, names)
    summary, evaluation = names["summary"], names["evaluation"]
    assert (summary.status, summary.epochs) == ("completed", 1)
    plain = evaluate("runs/mine", quiet=True)
    assert plain == summary.test != evaluation
    assert not names["model"].training
    again = train(names["recipe"], dataset="shapes", run_dir="runs/mine", resume=True, quiet=True)
    assert again == summary, "there was nothing left to do"
    assert train(run_dir="runs/mine", resume=True, quiet=True) == summary, "what is not given is the run's"
    train_briefly()
    assert "validation_size: 24" in Path("run/config.yaml").read_text()
    assert capsys.readouterr().err == ""


def test_the_block_of_a_network_of_your_own(small):
    names: dict[str, object] = {}
    exec(BLOCKS[3], names)
    names["net"](10).load_state_dict(names["model"].state_dict(), strict=True)
    with pytest.raises(UserError, match="needs the code of its"):
        load_model("runs/net")


def test_mistakes_are_exceptions(small):
    assert issubclass(cifar_dist.UserError, Exception) and "UserError" in dir(cifar_dist)
    with pytest.raises(UserError, match="unknown recipe 'quik'"):
        train("quik")
    with pytest.raises(UserError, match="asks for 2 processes, and this is one"):
        train("original", dataset="shapes", config=str(ROOT / "accelerate_configs" / "multi_cpu.yaml"))
    for wrong in ({"split": "train"}, {"tta": "Mirror"}, {"precision": "fp32"}):
        with pytest.raises(UserError, match=rf"{next(iter(wrong))} must be one of "):
            evaluate("x", **wrong)
    with pytest.raises(UserError, match="run_dir is empty"):
        train("original", dataset="shapes", run_dir="")
    diverging = Recipe.load("original", epochs=1, **{"optimizer.learning_rate": 1e30})
    with pytest.raises(RuntimeError, match="exit code 1"):
        train(diverging, dataset="shapes", run_dir="diverged", quiet=True)


def test_what_is_given_is_passed_on(monkeypatch, tmp_path):
    """All that can be typed besides, under the same name."""
    heard = {}
    monkeypatch.setattr("cifar_dist.api.train_command.train", lambda options, *_: heard.update(train=options) or (0, 1))
    monkeypatch.setattr("cifar_dist.api.evaluate_command.evaluate", lambda options, *_: heard.update(evaluate=options))
    both = {"dataset": tmp_path / "images", "data_dir": "data", "precision": "bf16", "config": None}
    train("quick", run_dir="runs/x", resume=True, trackers=["wandb"], quiet=True, **both)
    evaluate("runs/x", split="validation", recipe="original", tta="mirror", **both)
    both |= {"dataset": str(tmp_path / "images"), "data_dir": Path("data")}
    expected = {"recipe": "quick", "run_dir": Path("runs/x"), "resume": True, "trackers": ("wandb",), "quiet": True}
    for name, value in (expected | both).items():
        assert getattr(heard["train"], name) == value, name
    expected = {"checkpoint": Path("runs/x"), "split": "validation", "recipe": "original", "tta": "mirror"}
    for name, value in (expected | both).items():
        assert getattr(heard["evaluate"], name) == value, name


@pytest.mark.full
def test_a_notebook_launches_two_processes(tmp_path):
    """The last block, in a script; on a small part of the images, for time."""
    script = tmp_path / "notebook.py"
    body = BLOCKS[-1].replace('"first",', 'Recipe.load("first", epochs=1, global_batch_size=500, image_size=16),')
    script.write_text(body.replace("import train", "import Recipe, train"))
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1"}
    ended = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    config = (tmp_path / "runs" / "notebook" / "config.yaml").read_text()
    assert "world_size: 2" in config
    assert "completed" in (tmp_path / "runs" / "notebook" / "summary.json").read_text()


def test_a_path_is_a_folder_also_if_a_dataset_has_its_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    datasets, name = [], "cifar_dist.api.train_command.train"
    monkeypatch.setattr(name, lambda options, *_: datasets.append(options.dataset) or (0, 1))
    train("quick", dataset="shapes")
    train("quick", dataset=Path("./shapes"))
    assert datasets == ["shapes", str(tmp_path / "shapes")]


def test_an_accelerator_of_the_caller_and_ours_do_not_hear_of_each_other(small):
    own = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=4)
    try:
        assert train_briefly(precision="no").precision == "no"
        assert (own.mixed_precision, own.device.type, own.num_processes) == ("bf16", "cpu", 1)
        assert own.gradient_state.num_steps == 4
        model = own.prepare(torch.nn.Linear(2, 2))
        with own.accumulate(model):
            assert not own.sync_gradients
            own.backward(model(torch.ones(1, 2)).sum())
    finally:
        for kind in (PartialState, AcceleratorState, GradientState):
            kind._shared_state.clear()


def test_a_process_group_of_the_caller_stays(small):
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        train_briefly()
        assert distributed.is_initialized()
    finally:
        distributed.destroy_process_group()


def test_the_callers_number_of_threads_stays(small):
    torch.set_num_threads(3)
    assert train_briefly().num_threads != 3 and torch.get_num_threads() == 3


BRIEF = Recipe.load("original", epochs=2, validation_size=24, global_batch_size=24)


@pytest.fixture
def images(small) -> list[str]:
    """Five image files and one that is none; in the current folder, a state dict of two classes."""
    make_images(Path("images"))
    torch.save(NarrowResNet(num_classes=2).state_dict(), "bare.pth")
    Path("broken.png").write_bytes(b"no image")
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


def test_a_summary_has_the_validation_accuracy_of_the_best_epoch(small):
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
    Path("docs").symlink_to(ROOT / "docs")
    (block,) = (each for each in BLOCKS if "predict(" in each)
    exec(block, {})
    model = load_model("runs/mine")
    assert model.class_names == tuple(f"class{i}" for i in range(10))
    assert model.recipe.normalization.mean == (0.5, 0.5, 0.5)
    assert load_model("bare.pth").class_names is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: train("quick", dataset="shapes", run_dir="held"), "add resume=True to resume it"),
        (lambda: train("quick", resume=True), "resume=True needs run_dir"),
        (lambda: train("quick", dataset=TensorDataset(torch.ones(1))), "dataset is of type TensorDataset: it must be"),
        (lambda: train(Path("my.yaml"), dataset="shapes"), "recipe file my.yaml does not exist"),
        (lambda: evaluate(None), "checkpoint is empty: it must be"),
        (lambda: predict("bare.pth", [torch.ones(3, 32, 32)]), "images is of type Tensor: it must be a path"),
        (lambda: predict("bare.pth", "images", top=0), "^top must be 1 or more"),
        (lambda: predict("bare.pth", "images", top="3"), "top must be a whole number, not .3"),
        (lambda: predict("bare.pth", []), "images is empty: it must be paths"),
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
