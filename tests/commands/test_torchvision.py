"""Torchvision's networks in the commands: bare weights, fine-tuning, export."""

from pathlib import Path

import pytest
import torch
from torchvision import models

from cifar_dist import load_model, train
from cifar_dist.cli import main
from cifar_dist.config.recipe import Recipe
from cifar_dist.run.checkpoint import load_checkpoint
from tests.commands.test_train import small_world_in


@pytest.fixture(autouse=True)
def folder(tmp_path):
    with small_world_in(tmp_path):
        yield tmp_path


@pytest.mark.parametrize("prefix", ["", "module."])
def test_bare_weights_of_a_named_network(capsys, prefix):
    state = models.mobilenet_v3_small(num_classes=10).state_dict()
    torch.save({prefix + name: value for name, value in state.items()}, "w.pth")
    assert main(["eval", "--ckpt", "w.pth", "--dataset", "shapes", "--set", "model=mobilenet_v3_small"]) == 0
    said = capsys.readouterr().out
    assert "bare weights: mobilenet_v3_small, stem imagenet, 10 classes; normalization of original" in said
    assert ("without 'module.'" in said) == bool(prefix)
    loaded = load_model("w.pth", model="mobilenet_v3_small")
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert main(["export", "--ckpt", "w.pth", "--out", "again.pth", "--set", "model=mobilenet_v3_small"]) == 0
    models.mobilenet_v3_small(num_classes=10).load_state_dict(torch.load("again.pth", weights_only=True), strict=True)
    assert main(["eval", "--ckpt", "w.pth", "--dataset", "shapes"]) == 2
    assert "name another network with --set model=NAME" in capsys.readouterr().err


def test_finetuning_replaces_the_head_and_freezes_the_rest():
    pretrained = models.mobilenet_v3_small(num_classes=100).state_dict()
    torch.save(pretrained, "pretrained.pth")
    changes = {"image_size": 32, "global_batch_size": 32, "epochs": 1, "pretrained": "pretrained.pth"}
    recipe = Recipe.load("finetune", model="mobilenet_v3_small", **changes)
    assert recipe.freeze_epochs == 1
    train(recipe, dataset="shapes", run_dir="run", precision="no", quiet=True)
    trained = load_checkpoint(Path("run/checkpoints/last.pt"))["model"]
    network = models.mobilenet_v3_small(num_classes=100)
    for name, _ in network.named_parameters():
        if not name.startswith("classifier.3."):
            assert torch.equal(trained[name], pretrained[name]), name
    assert trained["classifier.3.weight"].shape == (10, 1024) and trained["classifier.3.bias"].abs().sum() > 0


def test_there_are_no_imagenet_weights_of_other_networks(capsys):
    assert main(["--recipe", "finetune", "--dataset", "shapes", "--set", "model=fastnet"]) == 2
    assert "there are no ImageNet weights of fastnet: set pretrained=null, or name a file" in capsys.readouterr().err
    assert list(Path().iterdir()) == []
