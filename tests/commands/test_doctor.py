"""The command `doctor`, and the plan of a dry run, for any world size and without starting anything."""

import re

import pytest
import torch
import torch._dynamo  # looks, when it is imported, at what is patched below

from cifar_dist.cli import main
from cifar_dist.data.cifar import CIFAR10
from tests.conftest import ROOT

CONFIGS = ROOT / "accelerate_configs"


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """An empty folder, no accelerator, and nothing that may be started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def refuse(*_, **__):
        raise AssertionError("processes were started")

    monkeypatch.setattr("cifar_dist.runtime.launch.launch", refuse)


def lines_of(capsys, *argv: str) -> dict[str, str]:
    assert main(list(argv)) == 0
    lines = {}
    for line in capsys.readouterr().out.splitlines():
        name, _, value = line.partition("  ")
        lines[name.strip()] = value.strip()
    return lines


def test_doctor_prints_the_machine_and_what_is_missing(capsys, tmp_path):
    lines = lines_of(capsys, "doctor")
    assert f"torch {torch.__version__.split('+')[0]}" in lines["versions"]
    assert "for this process" in lines["processor"]
    assert lines["CPU"].endswith("fast bf16 arithmetic")
    assert lines["CUDA"].startswith("no GPU is visible")
    assert lines["cifar10"].startswith(f"the folder {tmp_path / 'data'} is not there yet: a training makes it"), (
        "a typo?"
    )
    assert lines["ImageNet weights"].startswith("missing")
    assert " for Chinese" in lines["fonts"]
    assert list(lines)[-2:] == ["plan of a run", "time of a run"]
    assert lines["plan of a run"].endswith(" --dry-run") and lines["time of a run"].endswith(" --dry-run --measure")
    assert list(tmp_path.iterdir()) == []


def test_doctor_finds_data_and_weights(capsys, tmp_path):
    folder, hub = tmp_path / CIFAR10.folder, tmp_path / "hub" / "checkpoints"
    folder.mkdir()
    hub.mkdir(parents=True)
    for file in CIFAR10.train:
        (folder / file).touch()
    (hub / "resnet18-f37072fd.pth").touch()
    lines = lines_of(capsys, "doctor", "--data-dir", ".")
    assert lines["cifar10"] == f"test_batch missing in {folder}: would be downloaded"
    assert lines["ImageNet weights"].startswith("found: ")
    (tmp_path / CIFAR10.tarball).touch()
    assert lines_of(capsys, "doctor", "--data-dir", ".")["cifar10"].endswith(f"{CIFAR10.tarball}, to be unpacked")
    (folder / "test_batch").touch()
    assert lines_of(capsys, "doctor", "--data-dir", ".")["cifar10"] == f"found: {folder}"


@pytest.mark.parametrize(
    ("config", "batch", "starts"),
    [
        ("mps", "512 = 512 per device x 1 process", "one process"),
        ("multi_gpu", "512 = 256 per device x 2 processes", "2 processes here"),
        ("multi_node", "512 = 64 per device x 8 processes", "4 processes on each of 2 machines"),
    ],
)
def test_the_plan_of_a_config(capsys, tmp_path, config, batch, starts):
    lines = lines_of(capsys, "--dry-run", "--config", str(CONFIGS / f"{config}.yaml"))
    assert lines["run"] == "runs/standard-cifar10-seed0"
    assert re.match(r"cpu \(no MPS or CUDA device here\), (float32|bfloat16) \(", lines["device"])
    assert lines["batch"] == f"global_batch_size {batch} x 1 accumulation"
    assert lines["learning rate"].startswith("triangular, ")

    assert lines["would start"] == starts
    assert list(tmp_path.iterdir()) == []
