"""Logits that are not finite numbers are one error line without an accuracy; large logits are not an error."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cifar_dist.cli import main
from cifar_dist.commands import export
from cifar_dist.config.errors import UserError
from cifar_dist.run.weights import read_weights
from cifar_dist.training.evaluation import EvaluationSet
from tests.commands.test_train import NarrowResNet, small_world_in, train
from tests.conftest import make_images


@pytest.fixture(autouse=True)
def folder(tmp_path):
    """The current folder, with finite weights whose logits overflow (overflow.pth) or are about 100 (large.pth)."""
    with small_world_in(tmp_path):
        state = NarrowResNet(num_classes=10).state_dict()
        state["fc.weight"] *= 1e3 / state["fc.weight"].abs().max()
        torch.save(state, "large.pth")
        state |= {"fc.weight": torch.full_like(state["fc.weight"], 3e38), "layer4.0.bn2.bias": torch.full((32,), 10.0)}
        torch.save(state, "overflow.pth")
        yield tmp_path


@pytest.mark.parametrize(
    "command", [["eval", "--dataset", "shapes"], ["predict", "images/test"], ["export", "--out", "x.onnx"]]
)
def test_logits_that_are_not_finite_are_one_line(folder, capsys, command):
    make_images(folder / "images")
    assert main([*command, "--ckpt", "overflow.pth"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: overflow.pth gives logits that are not finite numbers: ")
    assert err.count("\n") == 1 and "accuracy" not in out and "nan" not in out
    assert not (folder / "x.onnx").exists()


def test_a_run_that_diverges_in_its_test_leaves_no_predictions(monkeypatch):
    predict = EvaluationSet.predict

    def lost(self, *words):
        logits = predict(self, *words)
        logits[0] = torch.nan
        return logits

    monkeypatch.setattr(EvaluationSet, "predict", lost)
    train("--epochs", "1", "--run-dir", "x", "--set", "validation_size=0", code=1)
    assert not Path("x/test_predictions.npz").exists()


@pytest.mark.parametrize(("error", "is_refused"), [(5e-5, False), (5e-4, True)])
def test_a_graph_is_compared_relative_to_its_largest_logit(monkeypatch, error, is_refused):
    weights = read_weights(Path("large.pth"))

    def run(_, inputs):
        """Return the logits of onnxruntime with an error in proportion to them."""
        with torch.no_grad():
            logits = export._normalized(weights)(torch.from_numpy(inputs["images"]))
        assert logits.abs().max() > 50
        return [(logits + error * logits.abs().max()).numpy()]

    program = SimpleNamespace(model_proto=pytest.importorskip("onnx").ModelProto())
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *_, **__: SimpleNamespace(run=run))
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: program)
    if is_refused:
        with pytest.raises(UserError, match=r"differ from torch's by .*: nothing was written"):
            export._onnx(weights)
    else:
        assert export._onnx(weights)
