"""Training and evaluation as a user asks for them, through the command line, on a small dataset."""

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torchvision.models import resnet18

from cifar_dist.cli import main
from cifar_dist.commands.train import _leave_early
from cifar_dist.training.checkpoint import load_checkpoint
from cifar_dist.training.engine import InterruptedRun, Trainer
from cifar_dist.training.evaluation import EvaluationSet
from cifar_dist.training.run_directory import RunDirectory
from cifar_dist.training.session import Session
from tests.conftest import make_dataset

SMALL = ["--recipe", "original", "--dataset", "shapes", "--precision", "no", "--set", "global_batch_size=32"]
VALIDATION = ["--set", "validation_size=16", "selection=best", "early_stopping.monitor=val_loss"]


@pytest.fixture(autouse=True)
def small_world(tmp_path, monkeypatch):
    """An empty folder, a thread, 96 images where `shapes` is asked for, no wait for the disk, no pixels in figures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # tests/unit/test_faults.py looks at when it is called
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for command in ("train", "evaluate"):
        monkeypatch.setattr(f"cifar_dist.commands.{command}.load_dataset", lambda *_, **__: make_dataset())
    # Drawing takes longer than training here; tests/unit/test_display.py looks at what is drawn.
    monkeypatch.setattr("cifar_dist.display.figures.save_figure", lambda figure, path: path.touch())
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def train(*argv: str, code: int = 0) -> None:
    assert main(["train", *SMALL, *argv]) == code


def error_of(capsys) -> str:
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    return line.removeprefix("error: ").strip()


def test_a_run_leaves_what_it_should(capsys):
    train("--epochs", "2", *VALIDATION)
    run = RunDirectory(Path("runs/original-shapes-seed0"))
    left = sorted(str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file())
    assert left == [
        "checkpoints/best.pt", "checkpoints/last.pt", "config.yaml", "figures/confusion.png", "figures/curves.png",
        "figures/mistakes.png", "figures/per_class.png", "figures/predictions.png",
        "metrics.jsonl", "summary.json", "test_predictions.npz",
    ]  # fmt: skip
    records = run.read_records()
    assert [(record.epoch, record.step) for record in records] == [(1, 3), (2, 6)]

    summary = json.loads(run.summary.read_text())
    best = min(records, key=lambda record: record.val_loss)
    assert (summary["status"], summary["epochs"], summary["best_epoch"]) == ("completed", 2, best.epoch)
    assert (summary["device"], summary["precision"], summary["num_threads"]) == ("cpu", "no", 1)
    assert summary["train_seconds"] > sum(record.epoch_seconds for record in records), "with the time of checkpoints"
    assert summary["test"]["num_samples"] == sum(map(sum, summary["test"]["confusion_matrix"])) == 40
    assert summary["peak_memory_mib"] > 100

    with np.load(run.predictions, allow_pickle=False) as saved:
        assert (saved["logits"].dtype, saved["logits"].shape) == (np.float16, (40, 10))
        assert (saved["images"].dtype, saved["images"].shape) == (np.uint8, (40, 3, 32, 32))
        right = (saved["logits"].argmax(1) == saved["labels"]).mean()
        assert saved["indices"].tolist() == list(range(40))
    assert right == pytest.approx(summary["test"]["top1"], abs=0.03)

    config = yaml.safe_load(run.config.read_text())
    assert config["recipe"]["validation_size"] == 16
    assert config["plan"]["num_train"] == 80
    assert {"torch", "accelerate", "python"} <= set(config["versions"])
    assert "git_commit" in config

    shown = capsys.readouterr().out
    assert "global_batch_size 32 = 32 per device x 1 process x 1 accumulation" in shown
    assert "epoch 2/2" in shown
    assert "Training completed after 2 of 2 epochs in 0." in shown
    assert "class3" in shown


def test_a_checkpoint_says_all_that_is_needed():
    train("--epochs", "1", "--run-dir", "x")
    content = load_checkpoint(Path("x/checkpoints/last.pt"))
    assert (content["epoch"], content["step"], content["precision"], content["num_threads"]) == (1, 3, "no", 1)
    assert content["class_names"] == [f"class{i}" for i in range(10)]
    assert content["recipe"]["normalization"]["mean"] == [0.5, 0.5, 0.5]
    assert content["dataset"]["fingerprint"] == make_dataset().fingerprint()
    assert Path(content["dataset"]["data_dir"]).is_absolute()
    resnet18(num_classes=10).load_state_dict(content["model"], strict=True)


def assert_same_run(first: str, second: str, *, epochs: int = 3) -> None:
    """Two runs came to the same bits, in all that their checkpoints hold, and say the same but for times."""
    runs = [RunDirectory(Path(first)), RunDirectory(Path(second))]
    for file in ("last", "best") if runs[0].best.exists() else ("last",):
        ours, theirs = (dict(flat(load_checkpoint(getattr(run, file)))) for run in runs)
        assert ours.keys() == theirs.keys()
        differ = [key for key, value in ours.items() if not is_equal(value, theirs[key])]
        times = ("/train_seconds", "/epoch_seconds", "record/epoch_seconds", "record/images_per_second")
        assert not [key for key in differ if not key.endswith(times)]
    timeless = [
        [{**vars_of(record), "images_per_second": 0, "epoch_seconds": 0} for record in run.read_records()]
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


def vars_of(record) -> dict:
    return json.loads(record.to_json())


def test_a_taken_name_gets_a_number_and_a_typed_folder_is_refused(capsys):
    train("--epochs", "1")
    train("--epochs", "1")
    assert sorted(path.name for path in Path("runs").iterdir()) == ["original-shapes-seed0", "original-shapes-seed0-2"]
    capsys.readouterr()
    train("--epochs", "1", "--run-dir", "runs/original-shapes-seed0", code=2)
    assert "holds a run already: add --resume to go on with it, or name another --run-dir" in error_of(capsys)


def test_a_dry_run_shows_the_plan_and_writes_nothing(capsys, tmp_path):
    train("--dry-run")
    shown = capsys.readouterr().out
    assert "run            runs/original-shapes-seed0" in shown
    assert "157 an epoch x 800 epochs = 125,600" in shown
    assert list(tmp_path.iterdir()) == []


def test_quiet_shows_the_result_only(capsys):
    train("--epochs", "1", "--quiet")
    shown = capsys.readouterr().out
    assert "epoch 1/1" not in shown
    assert "global_batch_size" not in shown
    assert "test accuracy" in shown


def test_a_diverged_run_says_so_and_keeps_its_checkpoint(capsys):
    train("--epochs", "1", "--run-dir", "x")
    good = Path("x/checkpoints/last.pt").read_bytes()
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
    assert good


def test_the_result_alone_is_on_the_standard_output_where_it_was_asked_for(capsys):
    train("--epochs", "1", "--run-dir", "x")
    assert main(["eval", "--ckpt", "x", "--json", "result.json"]) == 0
    capsys.readouterr()
    assert main(["eval", "--ckpt", "x", "--json", "-"]) == 0
    said = capsys.readouterr()
    assert said.out == Path("result.json").read_text() and "accuracy " in said.err
    assert not Path("-").exists()


def test_figures_that_cannot_be_drawn_cost_no_result(capsys, monkeypatch):
    def no_latex(*_):
        raise RuntimeError("latex was not able to\nprocess this")
        yield

    monkeypatch.setattr("cifar_dist.display.page.write_run", no_latex)
    train("--epochs", "1", "--run-dir", "x")
    assert "the figures could not be drawn: RuntimeError: latex was not able to process this" in capsys.readouterr().out
    assert RunDirectory(Path("x")).read_summary().test is not None


def test_a_code_page_without_bars_is_no_reason_to_fail(monkeypatch):
    train("--epochs", "1", "--run-dir", "x")
    page = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", page)
    assert main(["eval", "--ckpt", "x", "--json", "result.json"]) == 0
    page.flush()
    assert b"%  ??" in page.buffer.getvalue()
    assert Path("result.json").exists()


@pytest.mark.parametrize("often", [["--checkpoint-every-steps", "1"], []], ids=["each step", "epochs"])
def test_weights_that_are_lost_are_not_saved(monkeypatch, often):
    """Neither in the step that lost them, whose own loss was still a number, nor in those after it."""
    original = Trainer._end_step

    def end(trainer):
        original(trainer)
        if trainer.state.step == 6:  # the last of the second epoch
            with torch.no_grad():
                trainer.state.model.fc.bias[0] = torch.nan

    monkeypatch.setattr(Trainer, "_end_step", end)
    train("--epochs", "4", "--run-dir", "x", *often, "--set", "validation_size=0", code=1)
    for name in ("last", "previous") if often else ():
        weights = load_checkpoint(Path(f"x/checkpoints/{name}.pt"))["model"]
        assert all(bool(tensor.isfinite().all()) for tensor in weights.values()), name
    assert not Path("x/checkpoints/last.pt").exists() or load_checkpoint(Path("x/checkpoints/last.pt"))["step"] < 6


def test_a_run_that_ends_early_says_so_before_others_may_end_it():
    calls = []
    session = SimpleNamespace(
        directory=SimpleNamespace(path="x"),
        trackers=SimpleNamespace(finish=lambda: calls.append("finished")),
        runtime=SimpleNamespace(is_main=True),
        state=SimpleNamespace(epoch=0, step=1),
        leave_together=lambda: calls.append(sys.stderr.getvalue()),
    )
    with contextlib.redirect_stderr(io.StringIO()):
        assert _leave_early(session, InterruptedRun(), "go on") == 75
    assert calls == ["finished", "interrupted in epoch 1, step 1, and saved; go on with: go on\n"]


@pytest.mark.parametrize("saving", [False, True])
def test_a_second_ctrl_c_ends_with_130_and_says_how_to_go_on(capsys, monkeypatch, saving):
    """Also while what the first one asked for is being saved."""

    def interrupt(self):
        raise KeyboardInterrupt

    def stop(self):
        raise InterruptedRun

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "epochs", stop if saving else interrupt)
        patch.setattr(Session, "save", interrupt)
        train("--epochs", "1", "--run-dir", "x", code=130)
    assert capsys.readouterr().err == "interrupted; go on with: python launch.py --resume x\n"
    assert RunDirectory(Path("x")).read_summary().status == "interrupted"
    assert main(["--resume", "x"]) == 0


def evaluate(*argv: str) -> dict:
    assert main(["eval", "--json", "result.json", *argv]) == 0
    return json.loads(Path("result.json").read_text())


def test_eval_gives_the_accuracy_of_the_training():
    train("--epochs", "3", "--run-dir", "x", *VALIDATION)
    test = json.loads(Path("x/summary.json").read_text())["test"]
    result = evaluate("--ckpt", "x")
    assert {key: result[key] for key in test} == test
    assert (result["dataset"], result["split"], result["tta"]) == ("brightness", "test", "none")
    assert (result["precision"], result["world_size"], result["checkpoint"]) == ("no", 1, "x/checkpoints/best.pt")


def test_eval_of_the_validation_split_gives_the_best_epochs_record():
    train("--epochs", "3", "--run-dir", "x", *VALIDATION)
    best = min(RunDirectory(Path("x")).read_records(), key=lambda record: record.val_loss)
    result = evaluate("--ckpt", "x", "--split", "validation")
    assert (result["loss"], result["top1"], result["num_samples"]) == (best.val_loss, best.val_acc, 16)


def test_eval_with_a_recipe_keeps_the_split_of_the_run():
    """A typed recipe says how images look, and not which of them were held out."""
    train("--epochs", "2", "--run-dir", "x", "--seed", "1", *VALIDATION)
    own = evaluate("--ckpt", "x", "--split", "validation")
    assert evaluate("--ckpt", "x", "--split", "validation", "--recipe", "original") == own
    torch.save(load_checkpoint(Path("x/checkpoints/last.pt"))["model"], "bare.pth")
    Path("mine.yaml").write_text("stem: imagenet\n")
    assert evaluate("--ckpt", "bare.pth", "--split", "validation", "--recipe", "mine.yaml")["num_samples"] == 9


def test_eval_of_a_file_takes_that_files_weights():
    train("--epochs", "2", "--run-dir", "x")
    assert evaluate("--ckpt", "x/checkpoints/last.pt")["loss"] == evaluate("--ckpt", "x")["loss"]


def test_eval_of_a_run_that_was_not_tested_takes_the_last_weights():
    train("--epochs", "2", "--run-dir", "x", *VALIDATION)
    summary = json.loads(Path("x/summary.json").read_text())
    Path("x/summary.json").write_text(json.dumps({**summary, "test": None, "status": "interrupted"}))
    assert evaluate("--ckpt", "x")["checkpoint"] == "x/checkpoints/last.pt"


def test_mirror_averages_over_both_sides():
    train("--epochs", "1", "--run-dir", "x")
    plain, mirror = evaluate("--ckpt", "x"), evaluate("--ckpt", "x", "--tta", "mirror")
    assert mirror["tta"] == "mirror"
    assert mirror["loss"] != plain["loss"]


def test_eval_draws_figures():
    train("--epochs", "1", "--run-dir", "x")
    evaluate("--ckpt", "x", "--figures", "new/figures")
    assert sorted(path.name for path in Path("new/figures").iterdir()) == [
        "confusion.png", "mistakes.png", "per_class.png", "predictions.png"
    ]  # fmt: skip


def test_the_original_scripts_file_is_evaluated(capsys):
    model = resnet18(num_classes=10)
    torch.save(model.state_dict(), "script.pth")
    result = evaluate("--ckpt", "script.pth", "--dataset", "shapes")
    assert "bare weights: stem imagenet, 10 classes; normalisation of original" in capsys.readouterr().out
    images = (make_dataset().test.images.float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        predicted = model.eval()(images).argmax(1)
    assert result["top1"] == pytest.approx((predicted == make_dataset().test.labels).double().mean().item())
    assert result["precision"] == "no"


def test_bare_weights_of_a_3x3_stem_are_taken_as_cifar_unless_told_otherwise(capsys):
    train("--epochs", "1", "--run-dir", "x", "--set", "stem=small")
    summary = json.loads(Path("x/summary.json").read_text())
    torch.save(load_checkpoint(Path("x/checkpoints/last.pt"))["model"], "bare.pth")
    evaluate("--ckpt", "bare.pth", "--dataset", "shapes")
    assert "stem cifar, 10 classes; normalisation of standard" in capsys.readouterr().out
    Path("mine.yaml").write_text("stem: small\nnormalization: {mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}\n")
    result = evaluate("--ckpt", "bare.pth", "--dataset", "shapes", "--recipe", "mine.yaml")
    assert result["loss"] == summary["test"]["loss"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ckpt", "none"], "there is no checkpoint none"),
        (["--ckpt", "."], "there is no checkpoint in .: checkpoints/last.pt does not exist"),
        (["--ckpt", "x", "--json", "no/where.json"], "--json no/where.json cannot be written"),
        (["--ckpt", "x", "--figures", "script.pth"], "--figures script.pth is a file: name a folder"),
        (["--ckpt", "x", "--split", "validation"], "was trained without a validation split"),
        (["--ckpt", "script.pth", "--split", "validation"], "bare weights have no validation split: add --recipe"),
        (["--ckpt", "script.pth", "--recipe", "standard"], "standard has the stem cifar, and script.pth has imagenet"),
        (["--ckpt", "seven.pth"], "seven.pth knows 7 classes, and cifar10 has 10: name its --dataset"),
        (["--ckpt", "list.pth"], "list.pth holds no state dict"),
        (["--ckpt", "mixed.pth"], "mixed.pth is neither a checkpoint of this program nor a bare state dict"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_one_line(capsys, argv, message):
    if "x" in argv:
        train("--epochs", "1", "--run-dir", "x")
    torch.save(resnet18(num_classes=10).state_dict(), "script.pth")
    torch.save(resnet18(num_classes=7).state_dict(), "seven.pth")
    torch.save([1], "list.pth")
    torch.save({"epoch": 3}, "mixed.pth")
    capsys.readouterr()
    assert main(["eval", *argv]) == 2
    assert message in error_of(capsys)


def test_another_classes_dataset_is_refused(capsys, monkeypatch):
    train("--epochs", "1", "--run-dir", "x")
    capsys.readouterr()
    other = make_dataset()
    object.__setattr__(other, "class_names", tuple("abcdefghij"))
    monkeypatch.setattr("cifar_dist.commands.evaluate.load_dataset", lambda *_, **__: other)
    assert main(["eval", "--ckpt", "x"]) == 2
    assert "was trained on other classes than shapes has" in error_of(capsys)


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_finetuning_starts_from_weights_in_a_file_and_goes_on(stem):
    """Both ways to fine-tune: the images enlarged (here to 64 pixels), or a 3x3 stem on the pretrained body."""
    torch.save(resnet18(num_classes=1000).state_dict(), "weights.pth")
    fields = ["pretrained=weights.pth", f"stem={stem}", f"image_size={64 if stem == 'imagenet' else 32}"]
    argv = ["--recipe", "finetune", "--dataset", "shapes", "--precision", "no", "--run-dir", "x"]
    fields += ["global_batch_size=16", "validation_size=16"]
    assert main([*argv, "--epochs", "1", "--set", *fields]) == 0
    first = load_checkpoint(Path("x/checkpoints/last.pt"))["model"]
    pretrained = load_checkpoint(Path("weights.pth"))
    assert torch.equal(first["layer3.0.conv1.weight"], pretrained["layer3.0.conv1.weight"]), "the body was not frozen"
    assert main(["--resume", "x", "--epochs", "2"]) == 0
    second = load_checkpoint(Path("x/checkpoints/last.pt"))["model"]
    assert not torch.equal(second["layer3.0.conv1.weight"], first["layer3.0.conv1.weight"])
    test = json.loads(Path("x/summary.json").read_text())["test"]
    assert evaluate("--ckpt", "x")["loss"] == test["loss"], "the images were not enlarged at evaluation"


def test_averaged_weights_are_tested_and_evaluated():
    train("--epochs", "2", "--run-dir", "x", "--set", "ema_decay=0.9")
    content = load_checkpoint(Path("x/checkpoints/last.pt"))
    assert not torch.equal(content["model"]["fc.weight"], content["model_ema"]["fc.weight"])
    test = json.loads(Path("x/summary.json").read_text())["test"]
    assert evaluate("--ckpt", "x")["loss"] == test["loss"]
    torch.save(content["model"], "raw.pth")
    assert evaluate("--ckpt", "raw.pth", "--dataset", "shapes")["loss"] != test["loss"]


def test_the_test_images_are_used_once_at_the_end(monkeypatch):
    """Neither selection nor early stopping sees them: they are evaluated after the last epoch, and only then."""
    seen, predict = [], EvaluationSet.predict

    def spy(self, *how):
        seen.append(len(self.indices))
        return predict(self, *how)

    monkeypatch.setattr(EvaluationSet, "predict", spy)
    train("--epochs", "2", *VALIDATION)
    assert seen == [16, 16, 40]
