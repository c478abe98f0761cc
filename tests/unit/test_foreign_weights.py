"""State dicts as other programs save them: read where they can mean one thing only, else refused by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cifar_dist import load_model, train
from cifar_dist.cli import main
from cifar_dist.config.errors import UserError
from cifar_dist.config.recipe import Recipe
from cifar_dist.run.checkpoint import load_checkpoint, refusing_foreign_content
from tests.commands.test_train import NarrowResNet, small_world_in
from tests.commands.test_train import train as train_run

STATE = NarrowResNet(num_classes=10).state_dict()


def renamed(*pairs: tuple[str, str]) -> dict[str, torch.Tensor]:
    state = STATE
    for old, new in pairs:
        state = {key.replace(old, new): value for key, value in state.items()}
    return state


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in STATE.items()}


CIFAR_SCRIPT = renamed(("downsample", "shortcut"), ("fc.", "linear."))
FOREIGN = {
    "plain": (STATE, None),
    "before 2018": ({key: value for key, value in STATE.items() if "num_batches" not in key}, None),
    "DataParallel": (prefixed("module."), "without 'module.'"),
    "compiled in Lightning": (prefixed("model._orig_mod."), "without 'model._orig_mod.'"),
    "a training script's": ({"epoch": 3, "model_state_dict": STATE, "optimizer": {"lr": 1}}, "from 'model_state_dict'"),
    "ours by name": ({"model": STATE, "recipe": "mine"}, "from 'model'"),
    "a head with dropout": (renamed(("fc.", "fc.1.")), "with fc.N as fc"),
    "the CIFAR script": (
        {"net": {f"module.{key}": value for key, value in CIFAR_SCRIPT.items()}, "acc": 95.1, "epoch": 1},
        "from 'net', without 'module.', with shortcut as downsample, with linear as fc",
    ),
}


@pytest.fixture(autouse=True)
def folder(tmp_path):
    with small_world_in(tmp_path):
        yield tmp_path


@pytest.mark.parametrize("kind", FOREIGN)
def test_weights_of_other_programs_are_read(kind, capsys):
    content, note = FOREIGN[kind]
    torch.save(content, "other.pth")
    assert main(["eval", "--dataset", "shapes", "--ckpt", "other.pth"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (f"other.pth is read {note}" in said) if note else ("is read" not in said)
    for key, value in load_model("other.pth").state_dict().items():
        assert key.endswith("num_batches_tracked") or torch.equal(value, STATE[key])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": STATE, "state_dict_ema": STATE}, "of state_dict, state_dict_ema save one alone"),
        ({"epoch": 3, "args": {"lr": 0.1}}, "nor a bare state dict: its keys are epoch, args"),
        (prefixed("model.") | {"criterion.weight": torch.ones(10)}, "under 'model.' and also criterion.weight"),
        (
            renamed(("fc.", "fc.0.")) | renamed(("fc.", "fc.3.")),
            "it has no fc.weight",
        ),
        ({"features.0.weight": torch.ones(1)}, "conv1.weight must be .*, and there are features.0.weight"),
        (STATE | {"linear.weight": torch.ones(1)}, 'Unexpected key.*"linear.weight"'),
    ],
)
def test_what_could_mean_several_things_is_refused_by_name(content, message):
    torch.save(content, "other.pth")
    with pytest.raises(UserError, match=message):
        load_model("other.pth")


def test_training_starts_from_them(capsys):
    content = {key: value for key, value in prefixed("module.").items() if "num_batches" not in key}
    save_file(content, "other.safetensors")
    recipe = Recipe.load("finetune", pretrained="other.safetensors", epochs=1, stem="cifar", image_size=32)
    train(recipe, dataset="shapes", run_dir="x")
    assert "other.safetensors is read without 'module.'" in capsys.readouterr().out
    assert torch.equal(load_model("x").state_dict()["layer3.0.conv1.weight"], STATE["layer3.0.conv1.weight"])
    torch.save(STATE | {"fc.bias": torch.full((10,), torch.nan)}, "nan.pth")
    with pytest.raises(UserError, match=r"nan\.pth holds numbers that are not finite"):
        train(Recipe.load("finetune", pretrained="nan.pth"), dataset="shapes", run_dir="y")


def test_our_safetensors_come_back_with_recipe_and_classes(folder):
    train_run("--epochs", "1", "--run-dir", "x", "--set", "stem=small", "normalization.mean=[0.1, 0.2, 0.3]")
    assert main(["export", "--ckpt", "x", "--out", "x.safetensors"]) == 0
    assert main(["eval", "--dataset", "shapes", "--ckpt", "x.safetensors", "--json", "x.json"]) == 0
    tested = json.loads(Path("x/summary.json").read_text())["test"]
    result = json.loads(Path("x.json").read_text())
    assert {key: result[key] for key in tested} == tested

    for damage in (b"{}", Path("x.safetensors").read_bytes()[:-1]):
        Path("damaged.safetensors").write_bytes(damage)
        with pytest.raises(UserError, match=r"damaged\.safetensors is not a \.safetensors file, or damaged"):
            load_model("damaged.safetensors")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000 bytes"),
        MemoryError(),
    ],
    ids=lambda error: str(error).split(":")[0] or "MemoryError",
)
def test_a_fault_of_the_machine_is_not_blamed_on_the_file(monkeypatch, error):
    def fail(*_, **__):
        raise error

    with pytest.raises(type(error)), refusing_foreign_content(Path("x")):
        fail()
    if "allocate" in str(error) or isinstance(error, MemoryError):
        torch.save(STATE, "x.pth")
        monkeypatch.setattr(torch, "load", fail)
        with pytest.raises(type(error)):
            load_checkpoint(Path("x.pth"))
