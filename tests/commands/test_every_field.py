"""Every field of the recipe changes the result of a training."""

import functools
from pathlib import Path

import pytest
import torch
from torchvision.models._api import BUILTIN_MODELS

from cifar_dist.config.accelerate_config import AccelerateConfig
from cifar_dist.config.plan import fit_to_dataset, make_plan
from cifar_dist.config.recipe import recipe_to_mapping
from cifar_dist.config.schema import flatten
from cifar_dist.config.world import World
from cifar_dist.run.results import Observer
from cifar_dist.run.weights import pretrained_weights
from cifar_dist.runtime.distributed import connect, start
from cifar_dist.training.setup import build_trainer
from tests.commands.test_train import NarrowResNet
from tests.conftest import make_dataset, make_recipe

SMALL = ("epochs=2", "global_batch_size=16", "early_stopping.enabled=false")

# another value of each field
CHANGES = {
    "stem": "small", "pretrained": "weights.pth", "freeze_epochs": "1", "dropout": "0.5",
    "epochs": "1", "global_batch_size": "24", "gradient_accumulation_steps": "2", "image_size": "40",
    "image_size_schedule": "[[16, 0.5], [32, 1.0]]", "label_smoothing": "0.2", "ema_decay": "0.9",
    "gradient_clipping": "0.1", "seed": "1", "validation_size": "8", "train_size": "24",
    "batch_norm_group_size": "4", "normalization.mean": "[0.4, 0.4, 0.4]", "normalization.std": "[0.4, 0.4, 0.4]",
    "optimizer.name": "adamw", "optimizer.learning_rate": "0.02", "optimizer.momentum": "0.5",
    "optimizer.nesterov": "true", "optimizer.weight_decay": "0.1", "optimizer.decay_norm_and_bias": "false",
    "optimizer.sgd_learning_rate": "0.05", "optimizer.normalize_filters": "true",
    "optimizer.orthogonalization_steps": "3", "optimizer.sgd_momentum": "0.5", "optimizer.head_learning_rate": "0.05",
    "optimizer.bias_learning_rate": "0.05", "batch_norm_momentum": "0.5", "batch_norm_scale": "false",
    "head_scale": "0.5", "whitening_bias_epochs": "1",
    "schedule.name": "cosine", "schedule.warmup_fraction": "0.5", "schedule.step_epochs": "2", "schedule.gamma": "0.5",
    "early_stopping.enabled": "false", "early_stopping.monitor": "val_acc", "early_stopping.patience": "2",
    "early_stopping.min_delta": "0",
    "augmentation.crop_padding": "2", "augmentation.crop_mode": "reflect", "augmentation.flip": "alternating",
    "augmentation.rotation_degrees": "45", "augmentation.brightness": "0.5", "augmentation.contrast": "0.5",
    "augmentation.saturation": "0.9", "augmentation.hue": "0.5", "augmentation.affine_degrees": "45",
    "augmentation.affine_translate": "0.2", "augmentation.affine_scale": "0.5", "augmentation.cutout": "8",
    "augmentation.custom": "dark.py:darker", "augmentation.mixup": "1", "augmentation.cutmix": "1",
    "augmentation.policy": "trivial", "augmentation.random_erasing": "1",
}  # fmt: skip
HELD_OUT = ("validation_size=8",)
STEPPED = ("schedule={name: step, step_epochs: 1, gamma: 0.1}",)
STOPPING = ("epochs=4", "early_stopping={enabled: true, patience: 1, min_delta: 9}")
# what else must be set for a field to matter
NEEDED = {
    "freeze_epochs": ("pretrained=weights.pth",),
    "ema_decay": HELD_OUT,
    "optimizer.decay_norm_and_bias": ("optimizer.weight_decay=0.1",),
    "optimizer.sgd_learning_rate": ("optimizer.name=muon",),
    "optimizer.normalize_filters": ("optimizer.name=muon",),
    "optimizer.orthogonalization_steps": ("optimizer.name=muon",),
    "optimizer.sgd_momentum": ("optimizer.name=muon",),
    "batch_norm_momentum": HELD_OUT,
    "whitening_bias_epochs": ("model=fastnet",),
    "schedule.step_epochs": STEPPED,
    "schedule.gamma": STEPPED,
    "early_stopping.enabled": STOPPING,
    "early_stopping.monitor": (*HELD_OUT, "early_stopping.monitor=val_loss", "epochs=4"),
    "early_stopping.patience": STOPPING,
    "early_stopping.min_delta": STOPPING,
}
ELSEWHERE = {"model", "selection", "allow_untracked_randomness"}  # tests/commands; tests/unit/test_probe.py


@functools.cache
def outcome(*assignments: str) -> tuple:
    """Train briefly and return numbers that no two different trainings share."""
    dataset = make_dataset(num_train=40, num_test=10)
    recipe = fit_to_dataset(make_recipe(*SMALL, *assignments), dataset.sizes)
    plan = make_plan(recipe, world_size=1, sizes=dataset.sizes, device_type="cpu")
    config = AccelerateConfig(use_cpu=True)
    with connect(World(), config) as ranks:
        runtime = start(ranks, config, requested_precision="no", num_threads=1)
        weights = pretrained_weights(recipe)
        trainer = build_trainer(recipe, plan, dataset, runtime, Observer(), pretrained=weights)
        records = trainer.fit()
    best = trainer.state.best
    head = trainer.state.model.state_dict()["fc.weight"].double()
    kept = None if best is None else (best.epoch, best.value, best.weights["fc.weight"].double().sum().item())
    return len(records), records[-1].train_loss, records[-1].val_loss, head.sum().item(), head.abs().sum().item(), kept


@pytest.fixture(autouse=True)
def narrow_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("dark.py").write_text("def darker(images, seeds):\n    return images // 2\n")
    monkeypatch.setitem(BUILTIN_MODELS, "resnet18", NarrowResNet)


@pytest.mark.parametrize("field", CHANGES)
def test_a_field_matters(field):
    torch.manual_seed(1)  # a run begins with 0
    torch.save(NarrowResNet().state_dict(), "weights.pth")
    needed = NEEDED.get(field, ())
    assert outcome(*needed) != outcome(*needed, f"{field}={CHANGES[field]}")


def test_the_same_recipe_has_the_same_outcome():
    assert outcome.__wrapped__() == outcome()


def test_every_field_has_its_test():
    assert set(flatten(recipe_to_mapping(make_recipe()))) == set(CHANGES) | ELSEWHERE
