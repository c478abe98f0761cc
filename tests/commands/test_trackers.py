"""Trackers get the metrics of a run, and a resumed run continues in the same place."""

import importlib.util
import json
import os
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml

from cifar_dist.cli import main
from cifar_dist.run import tracking
from cifar_dist.run.directory import RunDirectory
from cifar_dist.run.tracking import Trackers
from cifar_dist.runtime.distributed import tracker_class
from tests.commands.test_train import error_of, small_world, train
from tests.runs import make_metadata

__all__ = ["small_world"]  # a fixture that every test here uses


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs the package {package}")


def start(name: str, *argv: str, code: int = 0) -> None:
    train("--run-dir", "run", "--tracker", name, *argv, "--set", "validation_size=16", code=code)


def train_and_resume(name: str) -> None:
    start(name, "--epochs", "2")
    assert main(["--resume", "run", "--epochs", "3"]) == 0, "the tracker is stored with the run"
    assert yaml.safe_load(Path("run/config.yaml").read_text())["trackers"] == [name]


@needs("tensorboard")
def test_tensorboard_has_each_epoch_once_at_its_step():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    start("tensorboard", "--epochs", "2", "--checkpoint-every-steps", "3")
    Path("run/checkpoints/previous.pt").replace("run/checkpoints/last.pt")  # as after a kill in the second epoch
    assert main(["--resume", "run", "--epochs", "3"]) == 0
    events = EventAccumulator("run/tracking/tensorboard")
    events.Reload()
    records = RunDirectory(Path("run")).read_records()
    for tag, field in (("train/loss", "train_loss"), ("val/accuracy", "val_acc"), ("learning_rate", "lr")):
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        assert [step for step, _ in found] == [record.step for record in records] == [3, 6, 9]
        assert [value for _, value in found] == pytest.approx([getattr(each, field) for each in records], rel=1e-5)
    test = json.loads(Path("run/summary.json").read_text())["test"]
    for tag, field in (("test/accuracy", "top1"), ("test/loss", "loss")):
        assert events.Scalars(tag)[-1].value == pytest.approx(test[field])
    assert {"figures/curves", "figures/confusion", "figures/per_class"} <= set(events.Tags()["images"])
    (parameters,) = Path("run/tracking/tensorboard").glob("*/hparams.yml")
    stored = yaml.safe_load(parameters.read_text())
    assert (stored["optimizer.learning_rate"], stored["world_size"], stored["device"]) == (0.01, 1, "cpu")


def test_each_run_of_a_process_has_a_database_of_its_own(tmp_path, monkeypatch):
    places = []

    def mlflow(**named):
        places.append(os.environ["MLFLOW_TRACKING_URI"])
        tracker = Mock()
        tracker.tracker.info.run_id = "7"
        return tracker

    monkeypatch.setattr(tracking, "tracker_class", lambda name: mlflow)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("a", "b"):
        trackers = Trackers(pytest.fail)
        trackers.start(make_metadata(trackers=("mlflow",)), tmp_path / name, 0)
        trackers.finish()
    assert places == [f"sqlite:///{tmp_path}/{name}/tracking/mlflow/mlflow.db" for name in ("a", "b")]
    assert "MLFLOW_TRACKING_URI" not in os.environ


@pytest.mark.full  # it starts a process of its own
@needs("wandb")
def test_wandb_continues_under_the_same_id(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    train_and_resume("wandb")
    identity = Path("run/tracking/wandb/run-id").read_text()
    kept = sorted(Path("run/tracking/wandb/wandb").glob("offline-run-*"))
    assert len(kept) == 2 and all(folder.name.endswith(identity) for folder in kept)
    assert all(list(folder.glob("*.wandb")) for folder in kept)


@needs("tensorboard")
def test_a_tracker_that_could_not_start_starts_when_the_run_is_resumed(monkeypatch):
    """And gets the parameters then."""
    with monkeypatch.context() as patch:
        patch.setattr(tracker_class("tensorboard"), "start", lambda self: 1 / 0)
        start("tensorboard", "--epochs", "1")
    assert main(["--resume", "run", "--epochs", "2"]) == 0
    assert list(Path("run/tracking/tensorboard").glob("*/hparams.yml"))


@needs("mlflow")
@pytest.mark.filterwarnings("ignore")  # of what MLflow itself is built on
def test_mlflow_continues_in_the_same_run():
    import mlflow

    train_and_resume("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{Path('run/tracking/mlflow/mlflow.db').absolute()}")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert run.info.run_id == Path("run/tracking/mlflow/run-id").read_text()
    figures = {path.name for path in Path("run/tracking/mlflow/artifacts").rglob("*.png")}
    assert "curves.png" in figures and not Path("mlruns").exists(), "all of it is in the run directory"
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")] == [3, 6, 9]
    assert run.data.params["optimizer.learning_rate"] == "0.01"


@pytest.mark.parametrize("more", [[], ["--num-processes", "2"], ["--dry-run"]])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_starts(tmp_path, capsys, more):
    start("swanlab", *more, code=2)
    assert error_of(capsys) == "--tracker swanlab needs the package swanlab: pip install swanlab"
    assert list(tmp_path.iterdir()) == []


@needs("tensorboard")
def test_a_tracker_that_fails_is_left_out(capsys, monkeypatch):
    from accelerate.tracking import TensorBoardTracker

    def fail(*_, **__):
        raise OSError("the network is gone")

    monkeypatch.setattr(TensorBoardTracker, "log", fail)
    start("tensorboard", "--epochs", "2")
    out = capsys.readouterr().out
    assert out.count("tensorboard failed, and is left out from here on: the network is gone") == 1
