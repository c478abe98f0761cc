"""Trackers (TensorBoard, Weights & Biases, MLflow, ...) through Accelerate: what a run says goes there too."""

import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from cifar_dist.run.results import EpochRecord, Summary
from cifar_dist.runtime.distributed import tracker_class


class Trackers:
    """All trackers of a run. One that fails is said once and left out from then on: training goes on without it."""

    def __init__(self, note: Callable[[str], None]) -> None:
        """Take `note`, which tells the person at the screen; there are no trackers yet."""
        self.note = note
        self._open: dict[str, Any] = {}

    def start(self, names: Sequence[str], folder: Path, run: str, parameters: Mapping[str, Any], step: int) -> None:
        """Begin, or go on after a step, in `folder` of the run directory; an id in it makes that the same run.

        `run` is the name that a person sees; `parameters` are the hyperparameters, by dotted names.
        """
        for name in names:
            self._try(name, partial(self._start, name, folder / name, run, parameters, step))

    def _start(self, name: str, folder: Path, run: str, parameters: Mapping[str, Any], step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        known = folder / "run-id"
        identity = known.read_text() if known.exists() else ""
        goes_on_after = step if identity else None
        if not identity and name != "mlflow":  # which makes its own
            identity = uuid.uuid4().hex[:12]
        tracker = tracker_class(name)(**_arguments(name, folder, run, identity, goes_on_after))
        tracker.start()
        self._open[name] = tracker
        if goes_on_after is None:
            tracker.store_init_configuration(
                {
                    key: value if isinstance(value, bool | int | float | str) else str(value)
                    for key, value in parameters.items()
                }
            )
            # Last: without it a resumed run begins anew, and says its parameters.
            known.write_text(tracker.tracker.info.run_id if name == "mlflow" else identity)

    def log(self, record: EpochRecord) -> None:
        """Log an epoch, at its step."""
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
        """Log the test result and the figures of a run that has come to its end."""
        assert summary.test is not None
        top5 = {} if summary.test.top5 is None else {"test/top5": summary.test.top5}
        self._log({"test/accuracy": summary.test.top1, "test/loss": summary.test.loss, **top5}, step)
        for name, tracker in list(self._open.items()):
            for figure in sorted(figures.glob("*.png")):
                self._try(name, partial(_log_figure, tracker, figure, step))

    def _log(self, values: dict[str, float], step: int) -> None:
        for name, tracker in list(self._open.items()):
            self._try(name, partial(tracker.log, values, step=step))

    def finish(self) -> None:
        """Write what is not written yet, and close."""
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.finish)
        self._open.clear()

    def _try(self, name: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # a network, a disk, a server: whatever it is, the training is worth more
            self._open.pop(name, None)
            text = str(error).strip().splitlines()
            self.note(f"{name} failed, and is left out from here on: {text[0] if text else type(error).__name__}")


def _arguments(name: str, folder: Path, run: str, identity: str, after: int | None) -> dict[str, Any]:
    """Give what a tracker's class is made with, so that it goes on where the run with this id was."""
    if name == "tensorboard":  # what was logged after the checkpoint that the run goes on from is not shown twice
        return {"run_name": "", "logging_dir": folder, "purge_step": None if after is None else after + 1}
    if name == "wandb":
        import wandb

        quiet = wandb.Settings(silent=True, console="off")
        return {
            "run_name": "cifar-dist",
            "name": run,
            "dir": folder,
            "id": identity,
            "resume": "allow",
            "settings": quiet,
        }
    if name == "mlflow":
        arguments = {"experiment_name": "cifar-dist", "run_name": run, "run_id": identity or None}
        if "MLFLOW_TRACKING_URI" not in os.environ:
            os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{(folder / 'mlflow.db').absolute()}"
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
