"""One path through the program as a user takes it. Nothing is replaced: real files, network, figures and process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchvision.models import resnet18

from cifar_dist.cli import main
from cifar_dist.run.checkpoint import load_checkpoint
from tests.commands.test_train import FIGURES, assert_same_run
from tests.conftest import ROOT, make_images

TRAIN = ["--recipe", "original", "--dataset", "images", "--precision", "no", "--epochs", "2"]
TRAIN += ["--set", "global_batch_size=13", "optimizer.learning_rate=0.005"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    make_images(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def test_from_an_interrupted_training_to_exported_weights(folder, capsys):
    # A process trains until its time is over. It saves, and names the command that resumes the run.
    command = [sys.executable, str(ROOT / "launch.py"), *TRAIN, "--run-dir", "run", "--max-minutes", "0.0001"]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 75, ended.stdout + ended.stderr
    assert "and saved; resume with: python " in ended.stderr and ended.stderr.endswith(" --resume run\n")
    assert json.loads(Path("run/summary.json").read_text())["status"] == "interrupted"
    assert load_checkpoint(Path("run/checkpoints/last.pt"))["step"] < 4

    # Resumed, it ends with the bits of a run that was never interrupted.
    assert main(["--resume", "run"]) == 0
    assert main([*TRAIN, "--run-dir", "whole"]) == 0
    assert_same_run("whole", "run", epochs=2)
    assert Path("run/checkpoints/previous.pt").exists()
    assert all(Path("run/figures", name).read_bytes().startswith(b"\x89PNG") for name in FIGURES)

    # The evaluation repeats the test result, and predictions of the same files agree with it.
    test = json.loads(Path("run/summary.json").read_text())["test"]
    assert main(["eval", "--ckpt", "run", "--json", "eval.json"]) == 0
    evaluation = json.loads(Path("eval.json").read_text())
    assert {name: evaluation[name] for name in test} == test
    assert test["num_samples"] == 7
    assert main(["predict", "--ckpt", "run", "images/test", "--json", "predictions.json"]) == 0
    predictions = json.loads(Path("predictions.json").read_text())["predictions"]
    right = [each["classes"][0]["name"] == Path(each["file"]).parent.name for each in predictions]
    assert len(right) == 7 and sum(right) / 7 == pytest.approx(test["top1"])

    capsys.readouterr()
    assert main(["report", "run"]) == 0
    assert f"accuracy {test['top1']:.2%}" in capsys.readouterr().out
    assert "data:image/png" in Path("run/report.html").read_text()

    # torchvision's own network takes the exported weights, and gives the logits of the checkpoint's.
    trained = load_checkpoint(Path("run/checkpoints/last.pt"))["model"]
    for name, load in (("model.pth", torch.load), ("model.safetensors", load_file)):
        assert main(["export", "--ckpt", "run", "--out", name]) == 0
        model = resnet18(num_classes=2)
        model.load_state_dict(load(name))
        assert all(torch.equal(value, trained[key]) for key, value in model.state_dict().items())
