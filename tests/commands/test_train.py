"""Training and evaluation as a user asks for them, through the command line, on a small dataset."""

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from torchvision.models._api import BUILTIN_MODELS
from torchvision.models.resnet import BasicBlock, ResNet

from cifar_dist.cli import main
from cifar_dist.commands.train import _end_early
from cifar_dist.config.plan import DatasetSizes, make_plan
from cifar_dist.config.recipe import recipe_names
from cifar_dist.run.checkpoint import load_checkpoint
from cifar_dist.run.directory import RunDirectory
from cifar_dist.run.prepare import RunRecorder
from cifar_dist.training.evaluation import EvaluationSet
from cifar_dist.training.trainer import InterruptedRun, Trainer
from tests.conftest import make_dataset, make_images, make_recipe

DATA = ["--dataset", "shapes", "--data-dir", "/no/data", "--precision", "no"]
SMALL = ["--recipe", "original", *DATA, "--set", "global_batch_size=32"]
VALIDATION = ["--set", "validation_size=16", "selection=best", "early_stopping.monitor=val_loss"]
EVERYTHING = (*VALIDATION, "ema_decay=0.9", "dropout=0.2", "optimizer.nesterov=true", "augmentation.mixup=0.5")
SIZES = DatasetSizes(num_train=40 * 128, num_test=10)
FIGURES = ["confusion.png", "curves.png", "mistakes.png", "per_class.png", "predictions.png"]


class NarrowResNet(ResNet):
    """A ResNet with torchvision's names and stem, one block a stage, and 4 to 32 channels: 32,000 weights."""

    def __init__(self, weights=None, num_classes=1000):
        super().__init__(BasicBlock, [1, 1, 1, 1], num_classes=num_classes)
        self.fc = nn.Linear(32, num_classes)

    def _make_layer(self, block, planes, *rest, **named):
        return super()._make_layer(block, planes // 16, *rest, **named)


def save_empty_figure(*arguments, **_) -> None:
    (path,) = (each for each in arguments if isinstance(each, Path))
    Image.new("RGB", (2, 2)).save(path)


@contextlib.contextmanager
def small_world_in(folder: Path, *, has_images: bool = False) -> Iterator[None]:
    """Make commands in `folder` fast: 96 images (if it has none), a narrow network, no fsync, empty figures.

    tests/unit covers what is left out: test_figures.py the figures, test_faults.py the calls of fsync. With nothing
    left out: test_end_to_end.py.
    """
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("CIFAR_DIST_PROGRAM", "python launch.py")  # also under python -m pytest
        patch.setattr(os, "fsync", lambda descriptor: None)
        for command in () if has_images else ("train", "evaluate"):
            patch.setattr(f"cifar_dist.commands.{command}.load_dataset", lambda *_, **__: make_dataset())
        patch.setitem(BUILTIN_MODELS, "resnet18", NarrowResNet)
        patch.setattr("cifar_dist.commands.train.git_commit", lambda: "abc")  # it starts git twice
        for kind in ("curves", "confusion", "per_class", "images"):
            patch.setattr(f"cifar_dist.display.figures.draw_{kind}", save_empty_figure)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def small_world(tmp_path):
    with small_world_in(tmp_path):
        yield


def train(*argv: str, code: int = 0) -> None:
    assert main(["train", *SMALL, *argv]) == code


def evaluate(*argv: str) -> dict:
    assert main(["eval", "--json", "result.json", *argv]) == 0
    return json.loads(Path("result.json").read_text())


def error_of(capsys) -> str:
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    return line.removeprefix("error: ").strip()


def files_of(folder: str) -> dict[Path, bytes]:
    files = (path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".lock")
    return {path: path.read_bytes() for path in files}


def assert_same_run(first: str | Path, second: str | Path, *, epochs: int = 3) -> None:
    """Two runs have the same bits in their checkpoints, and the same records but for times."""
    runs = [RunDirectory(Path(first)), RunDirectory(Path(second))]
    for file in ("last", "best") if runs[0].best.exists() else ("last",):
        ours, theirs = (dict(flat(load_checkpoint(getattr(run, file)))) for run in runs)
        assert ours.keys() == theirs.keys()
        differ = [key for key, value in ours.items() if not is_equal(value, theirs[key])]
        times = ("/train_seconds", "/epoch_seconds", "record/epoch_seconds", "record/images_per_second")
        intervals = ("/checkpoint_every_steps", "/checkpoint_every_minutes", "/plan/agree_every_steps", "/git_commit")
        assert not [key for key in differ if not key.endswith(times + intervals)]
    timeless = [
        [{**json.loads(record.to_json()), "images_per_second": 0, "epoch_seconds": 0} for record in run.read_records()]
        for run in runs
    ]
    assert timeless[0] == timeless[1]
    assert len(timeless[0]) == epochs
    assert runs[0].read_summary().test == runs[1].read_summary().test


def flat(content, path=""):
    """Every value in nested dicts and lists, with where it is."""
    if isinstance(content, dict | list | tuple):
        yield path, type(content)
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from flat(value, f"{path}/{key}")
    else:
        yield path, content


def is_equal(ours, theirs) -> bool:
    if isinstance(ours, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    return ours == theirs


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of three epochs, of three steps each, with `EVERYTHING`. Read only."""
    folder = tmp_path_factory.mktemp("whole")
    with small_world_in(folder):
        train("--epochs", "3", "--run-dir", "whole", *EVERYTHING)
    return folder / "whole"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> SimpleNamespace:
    """A run with a validation split, what it printed, and the number of images in each evaluation. Read only."""
    folder, output, evaluated = tmp_path_factory.mktemp("finished"), io.StringIO(), []
    predict = EvaluationSet.predict

    def count(self, *how):
        evaluated.append(len(self.indices))
        return predict(self, *how)

    with small_world_in(folder), pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(EvaluationSet, "predict", count)
        argv = ["--recipe", "plain", "--epochs", "3", "--seed", "1", "--data-dir", "data", *VALIDATION]
        train(*argv, "global_batch_size=16", "optimizer.learning_rate=0.1")
    run = RunDirectory(folder / "runs" / "plain-shapes-seed1")
    return SimpleNamespace(run=run, path=str(run.path), output=output.getvalue(), evaluated=evaluated)


def test_a_run_directory_is_complete(finished):
    run, records = finished.run, finished.run.read_records()
    assert sorted(str(path.relative_to(run.path)) for path in files_of(finished.path)) == [
        "checkpoints/best.pt", "checkpoints/last.pt", "config.yaml", *(f"figures/{name}" for name in FIGURES),
        "metrics.jsonl", "summary.json", "test_predictions.npz",
    ]  # fmt: skip
    assert [(record.epoch, record.step) for record in records] == [(1, 5), (2, 10), (3, 15)]

    summary = json.loads(run.summary.read_text())
    best = min(records, key=lambda record: record.val_loss)
    assert (summary["status"], summary["epochs"], summary["best_epoch"]) == ("completed", 3, best.epoch)
    assert (summary["device"], summary["precision"], summary["num_threads"]) == ("cpu", "no", 1)
    assert summary["train_seconds"] > sum(record.epoch_seconds for record in records), "with the time of checkpoints"
    assert summary["test"]["num_samples"] == sum(map(sum, summary["test"]["confusion_matrix"])) == 40
    assert summary["peak_memory_mib"] > 100

    with np.load(run.predictions, allow_pickle=False) as saved:
        assert (saved["logits"].dtype, saved["logits"].shape) == (np.float16, (40, 10))
        assert (saved["images"].dtype, saved["images"].shape) == (np.uint8, (40, 3, 32, 32))
        right = (saved["logits"].argmax(1) == saved["labels"]).mean()
        assert saved["indices"].tolist() == list(range(40))
        assert saved["class_names"].tolist() == [f"class{i}" for i in range(10)]
    assert right == pytest.approx(summary["test"]["top1"], abs=0.03)

    config = yaml.safe_load(run.config.read_text())
    assert (config["recipe"]["validation_size"], config["plan"]["num_train"], config["git_commit"]) == (16, 80, "abc")
    assert {"torch", "accelerate", "python"} <= set(config["versions"])

    content = load_checkpoint(run.last)
    assert (content["epoch"], content["step"], content["precision"], content["num_threads"]) == (3, 15, "no", 1)
    assert content["class_names"] == [f"class{i}" for i in range(10)]
    assert content["recipe"]["normalization"]["mean"] == [0.5, 0.5, 0.5]
    assert content["dataset"]["fingerprint"] == make_dataset().fingerprint()
    assert content["dataset"]["data_dir"] == str(run.path.parent.parent / "data")
    NarrowResNet(num_classes=10).load_state_dict(content["model"], strict=True)

    for text in (
        "global_batch_size 16 = 16 per device x 1 process x 1 accumulation",
        "epoch 3/3",
        "Training completed after 3 of 3 epochs in ",
        "worst classes:",
    ):
        assert text in finished.output


def test_the_test_images_are_used_once_at_the_end(finished):
    """Neither selection nor early stopping uses them."""
    assert finished.evaluated == [16, 16, 16, 40]


def test_eval_repeats_the_results_of_training(finished):
    test = json.loads(finished.run.summary.read_text())["test"]
    result = evaluate("--ckpt", finished.path)
    assert {key: result[key] for key in test} == test
    assert (result["dataset"], result["split"], result["tta"]) == ("brightness", "test", "none")
    assert (result["precision"], result["world_size"]) == ("no", 1)
    assert result["checkpoint"] == str(finished.run.best)

    best = min(finished.run.read_records(), key=lambda record: record.val_loss)
    result = evaluate("--ckpt", finished.path, "--split", "validation")
    assert (result["loss"], result["top1"], result["num_samples"]) == (best.val_loss, best.val_acc, 16)
    # A recipe on the command line changes how images look, not which of them were held out.
    assert evaluate("--ckpt", finished.path, "--split", "validation", "--recipe", "original") == result


def test_eval_of_a_file_or_of_an_untested_run_uses_those_weights(finished, capsys):
    last = evaluate("--ckpt", str(finished.run.last))
    shutil.copytree(finished.path, "x")
    summary = json.loads(Path("x/summary.json").read_text())
    Path("x/summary.json").write_text(json.dumps({**summary, "test": None, "status": "interrupted"}))
    untested = evaluate("--ckpt", "x")
    assert untested["checkpoint"] == "x/checkpoints/last.pt" and untested["loss"] == last["loss"]
    out = capsys.readouterr().out
    assert "not at its end" not in out and "\nx/checkpoints/last.pt, brightness test, tta none, float32\n" in out
    content = torch.load("x/checkpoints/last.pt", weights_only=True)
    torch.save({**content, "epoch": 1}, "x/checkpoints/last.pt")
    evaluate("--ckpt", "x")
    assert "x/checkpoints/last.pt is of a run that is not at its end: 1 of 3 epochs are done" in capsys.readouterr().out


def test_eval_with_mirror_and_figures(finished, capsys, monkeypatch):
    titles = []
    monkeypatch.setattr("cifar_dist.display.figures.draw_per_class", lambda *_, title: titles.append(title))
    for named in (finished.path, str(finished.run.last)):
        evaluate("--ckpt", named, "--figures", "named")
    name = finished.run.path.name
    for title, weights in zip(titles, (name, f"{name} last.pt"), strict=True):
        assert title.endswith(f"% of 40 images right: {weights}, brightness test, tta none, float32")
    monkeypatch.undo()
    assert "\npictures: named\n" in capsys.readouterr().out
    mirror = evaluate("--ckpt", finished.path, "--tta", "mirror", "--figures", "new/figures")
    assert mirror["tta"] == "mirror"
    assert mirror["loss"] != evaluate("--ckpt", finished.path)["loss"]
    assert sorted(path.name for path in Path("new/figures").iterdir()) == [
        name for name in FIGURES if name != "curves.png"
    ]


def test_json_on_standard_output_is_alone_there(finished, capsys):
    evaluate("--ckpt", finished.path)
    capsys.readouterr()
    assert main(["eval", "--ckpt", finished.path, "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert captured.out == Path("result.json").read_text() and "accuracy " in captured.err
    assert not Path("-").exists()


def test_a_code_page_without_bars_is_no_reason_to_fail(finished, monkeypatch):
    page = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", page)
    evaluate("--ckpt", finished.path)
    page.flush()
    assert b"%  ??" in page.buffer.getvalue()


def test_a_new_run_takes_a_free_name(capsys):
    train("--epochs", "1", "--quiet")
    shown = capsys.readouterr().out
    assert "test accuracy" in shown and "epoch 1/1" not in shown and "global_batch_size" not in shown
    train("--epochs", "1")
    assert sorted(path.name for path in Path("runs").iterdir()) == ["original-shapes-seed0", "original-shapes-seed0-2"]
    note = "runs/original-shapes-seed0 exists: this run is runs/original-shapes-seed0-2\n"
    assert note in capsys.readouterr().out and "this run is" not in shown


# `finetune` needs weights: see below.
@pytest.mark.parametrize("recipe", sorted(set(recipe_names()) - {"finetune"}))
def test_a_recipe_of_the_package_trains(recipe):
    argv = ["--recipe", recipe, *DATA, "--epochs", "1", "--run-dir", "x", "--set", "image_size=16"]
    assert main(argv) == 0
    summary = RunDirectory(Path("x")).read_summary()
    assert (summary.status, summary.test.num_samples) == ("completed", 40)


def test_a_diverged_run_keeps_its_checkpoint(capsys):
    train("--epochs", "1", "--run-dir", "x")
    state = load_checkpoint(Path("x/checkpoints/last.pt"))
    state["optimizer"]["state"][0]["momentum_buffer"].fill_(float("inf"))
    torch.save(state, "x/checkpoints/last.pt")
    capsys.readouterr()
    assert main(["--resume", "x", "--epochs", "2"]) == 1
    line = capsys.readouterr().err
    assert line.startswith("diverged: the loss is not finite in epoch 2, step ")
    assert line.count("\n") == 1
    assert RunDirectory(Path("x")).read_summary().status == "diverged"
    assert load_checkpoint(Path("x/checkpoints/last.pt"))["epoch"] == 1


@pytest.mark.parametrize("often", [["--checkpoint-every-steps", "1"], []], ids=["each step", "epochs"])
def test_weights_that_are_not_finite_are_not_saved(monkeypatch, often):
    """Neither in the step that lost them, whose own loss was finite, nor later."""
    original = Trainer._end_step

    def end(trainer, epoch):
        original(trainer, epoch)
        if trainer.state.step == 6:  # the last of the second epoch
            with torch.no_grad():
                trainer.state.model.fc.bias[0] = torch.nan

    monkeypatch.setattr(Trainer, "_end_step", end)
    train("--epochs", "4", "--run-dir", "x", *often, "--set", "validation_size=0", code=1)
    saved = [load_checkpoint(path) for path in Path("x/checkpoints").iterdir()]
    assert sorted(content["step"] for content in saved) == ([4, 5] if often else [])
    assert all(bool(tensor.isfinite().all()) for content in saved for tensor in content["model"].values())


def test_an_interrupted_rank_prints_before_the_others_may_end_it():
    calls = []
    plan = make_plan(make_recipe(), world_size=1, sizes=SIZES, device_type="cpu")
    ranks = SimpleNamespace(is_main=True, world=SimpleNamespace(size=1), barrier=lambda: calls.append("barrier"))
    recorder = SimpleNamespace(
        directory=SimpleNamespace(path="x"),
        trackers=SimpleNamespace(finish=lambda: calls.append("finished")),
        write_summary=lambda status, _: calls.append(status),
    )
    trainer = SimpleNamespace(plan=plan, state=SimpleNamespace(step=46), runtime=SimpleNamespace(ranks=ranks))
    assert _end_early(trainer, recorder, InterruptedRun(), "go on", calls.append) == 75
    text = "interrupted in epoch 2, step 6, and saved; resume with: go on"
    assert calls == ["interrupted", "finished", text, "barrier"]


@pytest.mark.parametrize("saving", [False, True])
def test_a_second_ctrl_c_ends_with_130_and_the_command_to_resume(capsys, monkeypatch, saving):
    """Also while the first one's checkpoint is written."""

    def interrupt(self, *_, **__):
        raise KeyboardInterrupt

    def stop(self):
        self.interrupt.requested = "SIGTERM"
        self._agree()

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", stop if saving else interrupt)
        patch.setattr(RunRecorder, "save", interrupt)
        train("--epochs", "1", "--run-dir", "x", code=130)
    assert capsys.readouterr().err == "interrupted; resume with: python launch.py --resume x\n"
    assert RunDirectory(Path("x")).read_summary().status == "interrupted"
    assert main(["--resume", "x"]) == 0


def test_bare_weights_of_torchvisions_stem_are_evaluated_as_the_original_script_does(capsys):
    model = NarrowResNet(num_classes=10)
    torch.save(model.state_dict(), "script.pth")
    result = evaluate("--ckpt", "script.pth", "--dataset", "shapes")
    assert "bare weights: resnet18, stem imagenet, 10 classes; normalization of original" in capsys.readouterr().out
    images = (make_dataset().test.images.float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        logits = model.eval()(images)
    labels = make_dataset().test.labels
    assert result["top1"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert result["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert result["precision"] == "no"


def test_bare_weights_of_a_3x3_stem_are_taken_as_cifar_unless_a_recipe_is_named(capsys):
    train("--epochs", "1", "--run-dir", "x", "--set", "stem=small")
    summary = json.loads(Path("x/summary.json").read_text())
    torch.save(load_checkpoint(Path("x/checkpoints/last.pt"))["model"], "bare.pth")
    evaluate("--ckpt", "bare.pth", "--dataset", "shapes")
    assert "stem cifar, 10 classes; normalization of standard" in capsys.readouterr().out
    Path("mine.yaml").write_text("stem: small\nnormalization: {mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}\n")
    result = evaluate("--ckpt", "bare.pth", "--dataset", "shapes", "--recipe", "mine.yaml")
    assert result["loss"] == summary["test"]["loss"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ckpt", "script.pth", "--split", "validation"], "bare weights do not name the images that were held out"),
        (["--ckpt", "script.pth", "--recipe", "standard"], "standard has the stem cifar, and script.pth has imagenet"),
        (["--ckpt", "seven.pth"], "seven.pth has 7 classes, and cifar10 has 10: name its --dataset"),
        (["--ckpt", "mixed.pth"], "mixed.pth is neither a checkpoint of this program nor a bare state dict"),
        (["--ckpt", "{run}", "--dataset", "other"], "was trained on other classes than other has"),
    ],
)
def test_weights_that_cannot_be_evaluated_are_one_line(finished, capsys, monkeypatch, argv, message):
    torch.save(NarrowResNet(num_classes=10).state_dict(), "script.pth")
    torch.save(NarrowResNet(num_classes=7).state_dict(), "seven.pth")
    torch.save({"epoch": 3}, "mixed.pth")
    make_images(Path("other"))
    if "other" in argv:
        other = make_dataset()
        object.__setattr__(other, "class_names", tuple("abcdefghij"))
        monkeypatch.setattr("cifar_dist.commands.evaluate.load_dataset", lambda *_, **__: other)
    assert main(["eval", *(word.format(run=finished.path) for word in argv)]) == 2
    assert message in error_of(capsys)


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_finetuning_starts_from_weights_in_a_file_and_resumes(stem):
    """Both ways to fine-tune: the images enlarged (here to 64 pixels), or a 3x3 stem on the pretrained body."""
    torch.save(NarrowResNet(num_classes=1000).state_dict(), "weights.pth")
    fields = ["pretrained=weights.pth", f"stem={stem}", f"image_size={64 if stem == 'imagenet' else 32}"]
    fields += ["global_batch_size=32", "validation_size=16"]
    assert main(["--recipe", "finetune", *DATA, "--run-dir", "x", "--epochs", "1", "--set", *fields]) == 0
    first = load_checkpoint(Path("x/checkpoints/last.pt"))["model"]
    pretrained = load_checkpoint(Path("weights.pth"))
    assert torch.equal(first["layer3.0.conv1.weight"], pretrained["layer3.0.conv1.weight"]), "the body was not frozen"
    assert main(["--resume", "x", "--epochs", "2"]) == 0
    second = load_checkpoint(Path("x/checkpoints/last.pt"))["model"]
    assert not torch.equal(second["layer3.0.conv1.weight"], first["layer3.0.conv1.weight"])
    test = json.loads(Path("x/summary.json").read_text())["test"]
    assert evaluate("--ckpt", "x")["loss"] == test["loss"], "the images were not enlarged at evaluation"


def test_averaged_weights_are_tested_and_evaluated(capsys):
    train("--epochs", "2", "--run-dir", "x", "--set", "ema_decay=0.9")
    content = load_checkpoint(Path("x/checkpoints/last.pt"))
    assert not torch.equal(content["model"]["fc.weight"], content["model_ema"]["fc.weight"])
    test = json.loads(Path("x/summary.json").read_text())["test"]
    assert evaluate("--ckpt", "x")["loss"] == test["loss"]
    torch.save(content["model"], "raw.pth")
    assert evaluate("--ckpt", "raw.pth", "--dataset", "shapes")["loss"] != test["loss"]
    capsys.readouterr()
    assert main(["eval", "--ckpt", "x", "--split", "validation"]) == 2
    assert "was trained without a validation split" in error_of(capsys)
