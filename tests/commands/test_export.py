"""Exported files are loaded by the libraries that they are for, by the lines of docs/after-training.md."""

import dataclasses
import json
import re
from unittest.mock import Mock

import pytest
import torch

from cifar_dist.cli import main
from cifar_dist.commands import export
from cifar_dist.run.weights import read_weights
from tests.commands.test_train import NarrowResNet, error_of, small_world_in, train
from tests.conftest import ROOT, make_recipe

RUN = "runs/first-shapes-seed0"
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "after-training.md").read_text(), re.DOTALL)


def export_once(export):
    """Keep the first graph: there is one network here, and each export takes seconds."""
    programs = []

    def kept(*arguments, **options):
        programs.extend([] if programs else [export(*arguments, **options)])
        return programs[0]

    return kept


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The current folder, with a small run and its exports. Here torchvision's network is the narrow one, too."""
    folder = tmp_path_factory.mktemp("export")
    with small_world_in(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.models.resnet18", NarrowResNet)
        patch.setattr(torch.onnx, "export", export_once(torch.onnx.export))
        train("--epochs", "1", "--run-dir", RUN)
        for suffix in ("pth", "safetensors", "onnx"):
            assert main(["export", "--ckpt", RUN, "--out", f"model.{suffix}"]) == 0
        yield folder


@pytest.mark.parametrize("block", BLOCKS)
def test_the_lines_of_the_document_load_it(folder, block):
    names: dict[str, object] = {}
    exec(block, names)
    model = names.get("model")
    if "load_state_dict" in block:
        trained = read_weights(folder / RUN).tensors
        for name, value in model.state_dict().items():
            assert torch.equal(value, trained[name]), name
            assert value.is_contiguous()
    if "logits" in names and "load_state_dict" not in block:
        assert names["logits"].shape == (2, 10)
    if "onnxruntime" in block:
        assert names["classes"] == [f"class{i}" for i in range(10)]


def test_the_onnx_graph_normalises(folder):
    import onnxruntime

    recipe, model = read_weights(folder / RUN).recipe, NarrowResNet(num_classes=10).eval()
    model.load_state_dict(torch.load(folder / "model.pth", weights_only=True))
    images = torch.rand(5, 3, 32, 32)
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (recipe.normalization.mean, recipe.normalization.std))
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    (logits,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model((images - mean) / std).detach(), atol=1e-4, rtol=0)


def test_the_metadata_says_how_to_use_it(folder):
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        about = file.metadata()
    assert json.loads(about["mean"]) == [0.5, 0.5, 0.5] and about["stem"] == "imagenet"
    assert json.loads(about["classes"])[3] == "class3" and json.loads(about["image_size"]) == 32
    other = export._metadata(dataclasses.replace(read_weights(folder / RUN), recipe=make_recipe(base="standard")))
    assert json.loads(other["mean"]) == [0.4914, 0.4822, 0.4465]
    assert json.loads(other["std"]) == [0.2470, 0.2435, 0.2616]


def test_the_image_sizes_of_the_training_are_kept_with_the_network_named_again(folder):
    train("--epochs", "1", "--run-dir", "sized", "--skip-test", "--set", "image_size_schedule=[[0.5, 0.5], [1.0, 1.0]]")
    recipe = read_weights(folder / "sized", assignments={"model": "resnet18"}).recipe
    assert recipe.image_size_schedule == ((0.5, 0.5), (1.0, 1.0))
    larger = read_weights(folder / "sized", assignments={"image_size": 31}).recipe
    assert (larger.image_size, larger.image_size_schedule) == (31, None)


def test_a_graph_that_gives_other_logits_is_not_written(folder, monkeypatch, capsys):
    import onnxruntime

    run = onnxruntime.InferenceSession.run
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", lambda self, *words: [run(self, *words)[0] + 0.001])
    assert main(["export", "--ckpt", RUN, "--out", "other.onnx"]) == 2
    assert "differ from torch's by 0.001" in capsys.readouterr().err
    assert not (folder / "other.onnx").exists()


def test_a_network_that_has_no_graph_is_one_line(folder, monkeypatch, capsys):
    monkeypatch.setattr(torch.onnx, "export", Mock(side_effect=RuntimeError("a branch on the data\nand more")))
    assert main(["export", "--ckpt", RUN, "--out", "other.onnx"]) == 2
    assert error_of(capsys) == "torch.onnx cannot export this network; export to .safetensors: a branch on the data"
    assert not (folder / "other.onnx").exists()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("model.h5", "--out model.h5 must end in .pth, .safetensors, .onnx, not in '.h5'"),
        ("model.pth", "--out model.pth exists already: name a new file"),
        ("no/such/folder.pth", "--out no/such/folder.pth cannot be written"),
    ],
)
def test_a_place_that_will_not_do_is_refused(folder, capsys, out, message):
    before = (folder / "model.pth").read_bytes()
    assert main(["export", "--ckpt", RUN, "--out", out]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert (folder / "model.pth").read_bytes() == before


def test_a_full_disk_is_one_line(folder, capsys, monkeypatch):
    def full(path, write):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cifar_dist.config.files.write_atomically", full)
    assert main(["export", "--ckpt", RUN, "--out", "no-space.pth"]) == 2
    error = capsys.readouterr().err
    assert error == "error: cannot write no-space.pth: No space left on device; name another place\n"


def test_a_missing_package_is_named(folder, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    assert main(["export", "--ckpt", RUN, "--out", "another.onnx"]) == 2
    message = "error: .onnx needs the package onnx: pip install onnx onnxscript onnxruntime\n"
    assert capsys.readouterr().err == message and not (folder / "another.onnx").exists()


def test_the_classes_are_printed_in_the_order_of_the_logits(folder, capsys):
    assert main(["export", "--ckpt", RUN, "--out", "named.pth"]) == 0
    assert "10 classes (class0, class1, " in capsys.readouterr().out
