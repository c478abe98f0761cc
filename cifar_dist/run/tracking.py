"""Log a run to TensorBoard, Weights & Biases, MLflow and others, through Accelerate's trackers."""

import os
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from cifar_dist.config.recipe import recipe_to_mapping
from cifar_dist.config.schema import flatten
from cifar_dist.run.results import EpochRecord, RunMetadata, Summary
from cifar_dist.runtime.distributed import tracker_class

_MLFLOW_URI = "MLFLOW_TRACKING_URI"


class Trackers:
    """The trackers of a run. One that fails is reported once and left out; training continues without it."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._open: dict[str, Any] = {}
        self._has_set_uri = _MLFLOW_URI not in os.environ

    def start(self, metadata: RunMetadata, directory: Path, step: int) -> None:
        """Start the trackers. An id that is stored in the run directory continues the same tracked run after `step`."""
        parameters = flatten(recipe_to_mapping(metadata.recipe))
        parameters |= {name: getattr(metadata, name) for name in ("world_size", "device", "precision")}
        parameters = {key: value if isinstance(value, int | float) else str(value) for key, value in parameters.items()}
        for name in metadata.trackers:
            folder = directory / "tracking" / name
            self._try(name, partial(self._start, name, folder, directory.name, parameters, step))

    def _start(self, name: str, folder: Path, run: str, parameters: dict[str, Any], step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / "run-id"
        run_id = id_file.read_text() if id_file.exists() else ""
        resumed_after = step if run_id else None
        if not run_id and name != "mlflow":  # mlflow makes its own
            run_id = uuid.uuid4().hex[:12]
        tracker = tracker_class(name)(**_arguments(name, folder, run, run_id, resumed_after))
        tracker.start()
        self._open[name] = tracker
        if resumed_after is None:
            tracker.store_init_configuration(parameters)
            # Last: without this file a resumed run starts a new tracked run and stores its parameters.
            id_file.write_text(tracker.tracker.info.run_id if name == "mlflow" else run_id)

    def log(self, record: EpochRecord) -> None:
        """Log an epoch at its step."""
        names = {
            "train/loss": record.train_loss,
            "train/accuracy": record.train_acc,
            "val/loss": record.val_loss,
            "val/accuracy": record.val_acc,
            "learning_rate": record.lr,
            "images_per_second": record.images_per_second,
            "epoch": record.epoch,
        }
        self._log({name: value for name, value in names.items() if value is not None}, record.step)

    def log_test(self, summary: Summary, step: int, figures: Path) -> None:
        """Log the test result and the figures."""
        assert summary.test is not None
        top5 = {} if summary.test.top5 is None else {"test/top5": summary.test.top5}
        self._log({"test/accuracy": summary.test.top1, "test/loss": summary.test.loss, **top5}, step)
        for figure in sorted(figures.glob("*.png")):
            self._on_each(partial(_log_figure, path=figure, step=step))

    def finish(self) -> None:
        """Flush and close all trackers."""
        self._on_each(lambda tracker: tracker.finish())
        self._open.clear()
        if self._has_set_uri:  # another run of this process has a database of its own
            os.environ.pop(_MLFLOW_URI, None)

    def _log(self, values: dict[str, float], step: int) -> None:
        self._on_each(lambda tracker: tracker.log(values, step=step))

    def _on_each(self, action: Callable[[Any], object]) -> None:
        for name, tracker in list(self._open.items()):
            self._try(name, partial(action, tracker))

    def _try(self, name: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # the network, the disk, a server: training continues
            self._open.pop(name, None)
            text = str(error).strip().splitlines()
            self._note(f"{name} failed, and is left out from here on: {text[0] if text else type(error).__name__}")


def _arguments(name: str, folder: Path, run: str, run_id: str, after: int | None) -> dict[str, Any]:
    """Return the arguments of a tracker's class that continue the run with this id."""
    if name == "tensorboard":  # the steps after the checkpoint are logged again
        return {"run_name": "", "logging_dir": folder, "purge_step": None if after is None else after + 1}
    if name == "wandb":
        import wandb

        settings = wandb.Settings(silent=True, console="off")
        place = {"name": run, "dir": folder, "id": run_id, "resume": "allow"}
        return {"run_name": "cifar-dist", **place, "settings": settings}
    if name == "mlflow":
        arguments = {"experiment_name": "cifar-dist", "run_name": run, "run_id": run_id or None}
        if _MLFLOW_URI not in os.environ:
            os.environ[_MLFLOW_URI] = f"sqlite:///{(folder / 'mlflow.db').absolute()}"
            arguments["logging_dir"] = (folder / "artifacts").absolute().as_uri()  # else below the current folder
        return arguments
    needs_folder = tracker_class(name).requires_logging_directory
    return {"run_name": run, **({"logging_dir": folder} if needs_folder else {})}


def _log_figure(tracker: Any, path: Path, step: int) -> None:
    if tracker.name == "mlflow":
        tracker.log_artifact(str(path))
    elif tracker.name in ("tensorboard", "wandb"):
        import numpy as np

        pixels = np.asarray(Image.open(path).convert("RGB"))[None]
        form = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({f"figures/{path.stem}": pixels}, step=step, **form)
