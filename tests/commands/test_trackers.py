"""Trackers hear what a run says, and a resumed run goes on in the same place."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from cifar_dist.cli import main
from cifar_dist.runtime.distributed import tracker_class
from cifar_dist.training.run_directory import RunDirectory
from tests.conftest import make_dataset

SMALL = ["--recipe", "original", "--dataset", "shapes", "--precision", "no", "--run-dir", "run"]
SETTINGS = ["--set", "global_batch_size=32", "validation_size=16"]


@pytest.fixture(autouse=True)
def small_world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("cifar_dist.commands.train.load_dataset", lambda *_, **__: make_dataset())


def need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs the package {package}")


def train_and_go_on(name: str) -> None:
    assert main([*SMALL, *SETTINGS, "--epochs", "2", "--tracker", name]) == 0
    assert main(["--resume", "run", "--epochs", "3"]) == 0, "the tracker is the run's, and need not be typed again"
    assert yaml.safe_load(Path("run/config.yaml").read_text())["trackers"] == [name]


def test_tensorboard_has_each_epoch_once_at_its_step():
    need("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = [*SMALL, *SETTINGS, "--epochs", "2", "--tracker", "tensorboard", "--checkpoint-every-steps", "3"]
    assert main(words) == 0
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


def test_wandb_goes_on_under_the_same_id():
    need("wandb")
    train_and_go_on("wandb")
    identity = Path("run/tracking/wandb/run-id").read_text()
    kept = sorted(Path("run/tracking/wandb/wandb").glob("offline-run-*"))
    assert len(kept) == 2 and all(folder.name.endswith(identity) for folder in kept)
    assert all(list(folder.glob("*.wandb")) for folder in kept)


def test_a_tracker_that_could_not_begin_begins_when_the_run_goes_on(monkeypatch):
    """And is told the parameters then."""
    need("tensorboard")
    tracker = tracker_class("tensorboard")
    with monkeypatch.context() as patch:
        patch.setattr(tracker, "start", lambda self: 1 / 0)
        assert main([*SMALL, *SETTINGS, "--epochs", "1", "--tracker", "tensorboard"]) == 0
    assert main(["--resume", "run", "--epochs", "2"]) == 0
    assert list(Path("run/tracking/tensorboard").glob("*/hparams.yml"))


@pytest.mark.filterwarnings("ignore")  # of what MLflow itself is built on
def test_mlflow_goes_on_in_the_same_run():
    need("mlflow")
    import mlflow

    train_and_go_on("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{Path('run/tracking/mlflow/mlflow.db').absolute()}")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert run.info.run_id == Path("run/tracking/mlflow/run-id").read_text()
    figures = {path.name for path in Path("run/tracking/mlflow/artifacts").rglob("*.png")}
    assert "curves.png" in figures and not Path("mlruns").exists(), "all of it is in the run directory"
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")] == [3, 6, 9]
    assert run.data.params["optimizer.learning_rate"] == "0.01"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbord", "unknown tracker 'tensorbord', did you mean 'tensorboard'?"),
        ("swanlab", "--tracker swanlab needs the package swanlab: pip install swanlab"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--num-processes", "2"], ["--dry-run"]])
def test_what_cannot_be_is_one_line_before_anything_begins(tmp_path, capsys, name, message, more):
    assert main([*SMALL, *SETTINGS, "--tracker", name, *more]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_fails_is_left_out_and_training_goes_on(capsys, monkeypatch):
    need("tensorboard")
    from accelerate.tracking import TensorBoardTracker

    def fail(*_, **__):
        raise OSError("the network is gone")

    monkeypatch.setattr(TensorBoardTracker, "log", fail)
    assert main([*SMALL, *SETTINGS, "--epochs", "2", "--tracker", "tensorboard"]) == 0
    out = capsys.readouterr().out
    assert out.count("tensorboard failed, and is left out from here on: the network is gone") == 1
