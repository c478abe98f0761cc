"""Checkpoints: one file of plain containers and tensors, written so that a killed process leaves a whole one behind.

Accelerate's `save_state` is not used: it is not atomic, reads some of its files by running pickles, and keeps random
states that do not survive a change of world size.
"""

import io
import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from cifar_dist.config.errors import UserError
from cifar_dist.config.files import write_atomically
from cifar_dist.run.run_files import verify_checksums

FORMAT_VERSION = 1


def save_checkpoint(path: Path, content: dict[str, Any], *, previous: Path | None = None) -> None:
    """Write a checkpoint atomically; what was at `path` becomes `previous`.

    One of the two is always there: `path` itself, where the file system knows hard links.
    """
    if previous is not None and path.exists():
        link = previous.with_name(f".{previous.name}.{os.getpid()}.tmp")
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
            link.replace(previous)
            link.unlink(missing_ok=True)  # it stays where both names were the same file already
        except OSError:  # a file system without hard links
            with suppress(OSError):
                link.unlink(missing_ok=True)
            path.replace(previous)
    write_atomically(path, lambda file: _write_content(file, {"format_version": FORMAT_VERSION, **content}))


def _write_content(file: BinaryIO, content: dict[str, Any]) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:
        # torch's zip writer covers what came between its steps: what the disk said, or a second Ctrl-C.
        if isinstance(error.__context__, OSError | KeyboardInterrupt):
            raise error.__context__ from None
        raise


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this program, or what another one saved with torch.save or as `.safetensors`.

    Nothing in the file is run, and its checksums are verified. Raises UserError that says what is wrong with the file.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror}") from None
    content = (_unpack_safetensors if path.suffix == ".safetensors" else _unpack)(path, data)
    version = content.get("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UserError(f"checkpoint {path} has format {version}, and this version reads {FORMAT_VERSION}: update it")
    return content


@contextmanager
def refusing_foreign_content(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a loaded file's content is used into a UserError that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"checkpoint {path} does not hold what this program writes ({what})") from None


def is_bare_weights(content: dict[str, Any]) -> bool:
    """Return whether a loaded file is no checkpoint of this program."""
    return "format_version" not in content


def averaged_weights(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Give the weights of a checkpoint of ours that are evaluated: the average, where there is one."""
    weights: dict[str, torch.Tensor] = content.get("model_ema", content["model"])
    return weights


def _unpack(path: Path, data: bytes) -> dict[str, Any]:
    verify_checksums(path, io.BytesIO(data))
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's remarks on pickles that are not its own
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
    """Return the tensors; of a file that `export` wrote with its recipe, the content of a checkpoint."""
    try:
        tensors = load_safetensors(data)
    except SafetensorError as error:
        raise UserError(f"checkpoint {path} is not a .safetensors file, or damaged: {error}") from None
    about = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    if "recipe" not in about:
        return tensors
    with refusing_foreign_content(path):
        stored = {"recipe": json.loads(about["recipe"]), "class_names": json.loads(about["classes"])}
    return {"format_version": FORMAT_VERSION, "model": tensors, "precision": "no", **stored}
