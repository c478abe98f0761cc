"""Checkpoints: one file of plain containers and tensors, written atomically and read without running code.

Accelerate's `save_state` is not used: it is not atomic, it reads some of its files by running pickles, and its random
states do not survive a change of world size.
"""

import io
import json
import math
import os
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from cifar_dist.config.errors import UserError
from cifar_dist.config.files import write_atomically
from cifar_dist.run.directory import RunDirectory, verify_checksums
from cifar_dist.run.results import FORMAT_VERSION, RunMetadata, check_format
from cifar_dist.training.state import Best, TrainState


class CheckpointWriter:
    """Write the checkpoints of a run when they are due.

    Without `checkpoint_every_minutes` one is due at the end of an epoch, at most once a minute, and so rarely that
    saving takes at most 1 % of the time.
    """

    def __init__(self, directory: RunDirectory, metadata: RunMetadata) -> None:
        self._directory = directory
        self._metadata = metadata.to_mapping()
        minutes = metadata.checkpoint_every_minutes
        self._saves_within_epochs = minutes is not None
        self._every_seconds = 60 * (1 if minutes is None else minutes)
        self._largest_share = 0.01 if minutes is None else math.inf
        self._every_steps = metadata.checkpoint_every_steps
        self._written_at = time.monotonic()
        self._save_seconds = 0.0
        self._written_step: int | None = None
        self._best_epoch: int | None = None

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is due at the end of an epoch, after this step of the run."""
        return self._time_is_over() or self.is_due_by_step(step)

    def is_due_by_step(self, step: int) -> bool:
        """Return whether a checkpoint is due after this step, within an epoch too."""
        return self._every_steps is not None and step % self._every_steps == 0

    def is_due_by_time(self) -> bool:
        """Return whether a checkpoint is due now, within an epoch."""
        return self._saves_within_epochs and self._time_is_over()

    def save(
        self,
        state: TrainState,
        process_state: dict[str, Any],
        *,
        epoch_sums: Sequence[Sequence[float]] = (),
        statistics: Sequence[Sequence[float]] = (),
    ) -> None:
        """Write last.pt (the former one becomes previous.pt), and best.pt if the best epoch has changed.

        `process_state` is `Runtime.state()`. Within an epoch there is a row for each rank: its sums and, with ghost
        groups, its running statistics.
        """
        if self._written_step == state.step:
            return
        begun = time.monotonic()
        rows = {"epoch_sums": [list(row) for row in epoch_sums], "statistics": [list(row) for row in statistics]}
        content = {**self._metadata, **process_state, **rows, **state.to_mapping()}
        self._directory.write_checkpoint(self._directory.last, content, previous=self._directory.previous)
        if state.best is not None and state.best.epoch != self._best_epoch:
            self._save_best(state.best)
        self._written_at, self._written_step = time.monotonic(), state.step
        self._save_seconds = self._written_at - begun

    def _time_is_over(self) -> bool:
        interval_seconds = max(self._every_seconds, self._save_seconds / self._largest_share)
        return time.monotonic() - self._written_at >= interval_seconds

    def _save_best(self, best: Best) -> None:
        content = {**self._metadata, "epoch": best.epoch, "record": best.record, "model": best.weights}
        self._directory.write_checkpoint(self._directory.best, content)
        self._best_epoch = best.epoch


def save_checkpoint(path: Path, content: dict[str, Any], *, previous: Path | None = None) -> None:
    """Write a checkpoint atomically. The file that was at `path` becomes `previous`.

    One of the two always exists: `path` itself, if the file system has hard links.
    """
    if previous is not None and path.exists():
        link = previous.with_name(f".{previous.name}.{os.getpid()}.tmp")
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
            link.replace(previous)
            link.unlink(missing_ok=True)  # it stays if both names were the same file already
        except OSError:  # a file system without hard links
            with suppress(OSError):
                link.unlink(missing_ok=True)
            path.replace(previous)
    write_atomically(path, lambda file: _write_content(file, {"format_version": FORMAT_VERSION, **content}))


def _write_content(file: BinaryIO, content: dict[str, Any]) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:
        # torch's zip writer hides the disk's error, or a second Ctrl-C, behind its own.
        if isinstance(error.__context__, OSError | KeyboardInterrupt):
            raise error.__context__ from None
        raise


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this program, or what another one saved with torch.save or as `.safetensors`.

    Verifies the checksums and runs no code of the file. Raises UserError that says what is wrong with it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror}") from None
    content = (_unpack_safetensors if path.suffix == ".safetensors" else _unpack)(path, data)
    if not is_bare_weights(content):
        check_format(content, f"checkpoint {path}")
    return content


@contextmanager
def refusing_foreign_content(path: Path) -> Iterator[None]:
    """Raise a UserError that names the file if its content does not have the expected structure."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"checkpoint {path} does not hold what this program writes ({what})") from None


def is_bare_weights(content: dict[str, Any]) -> bool:
    """Return whether a loaded file is no checkpoint of this program."""
    return "format_version" not in content


def _unpack(path: Path, data: bytes) -> dict[str, Any]:
    verify_checksums(path, io.BytesIO(data))
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's remarks on foreign pickles
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file makes the unpickler fail in any way
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise
        if named := re.search(r"GLOBAL:? (?:GLOBAL )?([\w.]+)", str(error), re.IGNORECASE):
            what = f"it is more than tensors and plain values, and could run code ({named[1]})"
            raise UserError(f"checkpoint {path} is refused: {what}; save its state dict alone") from None
        raise UserError(f"checkpoint {path} is not a file that torch.save wrote") from None
    if not isinstance(content, dict) or not content or not all(isinstance(key, str) for key in content):
        raise UserError(f"checkpoint {path} holds no state dict")
    return content


def _unpack_safetensors(path: Path, data: bytes) -> dict[str, Any]:
    """Return the tensors; for a file that `export` wrote with its recipe, the content of a checkpoint."""
    try:
        tensors = load_safetensors(data)
    except SafetensorError as error:
        raise UserError(f"checkpoint {path} is not a .safetensors file, or damaged: {error}") from None
    about = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    if "recipe" not in about:
        return tensors
    with refusing_foreign_content(path):
        stored = {"recipe": json.loads(about["recipe"]), "class_names": json.loads(about["classes"])}
    return {"format_version": FORMAT_VERSION, "model": tensors, **stored}
