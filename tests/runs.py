"""Runs without a command: metadata, a recorder, and going on from a checkpoint."""

from pathlib import Path
from types import SimpleNamespace

from cifar_dist.config.recipe import Recipe
from cifar_dist.run.checkpoint import load_checkpoint
from cifar_dist.run.directory import RunDirectory
from cifar_dist.run.prepare import PreparedRun, RunRecorder, restore
from cifar_dist.run.results import DatasetMetadata, Observer, RunMetadata
from cifar_dist.run.tracking import Trackers


def make_metadata(**changes) -> RunMetadata:
    values = {
        "recipe_name": "plain",
        "recipe": Recipe.load("plain"),
        "dataset": DatasetMetadata(name="shapes", data_dir="data", fingerprint="x"),
        "class_names": ("a", "b"),
        "world_size": 1,
        "device": "cpu",
        "precision": "no",
        "num_threads": 1,
        "plan": {},
        "versions": {},
    }
    return RunMetadata(**(values | changes))


def make_recorder(directory: RunDirectory, metadata: RunMetadata) -> RunRecorder:
    """A recorder without a trainer, whose process has no state."""
    return RunRecorder(directory, metadata, SimpleNamespace(state=dict, is_main=True), Trackers(print))


def begin(trainer, folder: Path, **changes) -> RunDirectory:
    """Have a trainer record a run in a folder, which it goes on with if there is a checkpoint."""
    directory = RunDirectory(folder)
    metadata = make_metadata(**changes)
    trainer.recorder = RunRecorder(directory, metadata, trainer.runtime, Trackers(Observer().on_note))
    if directory.last.exists():
        content = load_checkpoint(directory.last)
        spec = SimpleNamespace(stored=None)
        restore(PreparedRun(spec=spec, directory=folder, checkpoint=content), trainer, metadata)
    trainer.recorder.begin(trainer.state, damage=None)
    return directory
