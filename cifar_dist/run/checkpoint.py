"""Checkpoints: one file of plain containers and tensors, written atomically and read without running code.

Accelerate's `save_state` is not used: it is not atomic, it reads some of its files by running pickles, and its random
states do not survive a change of world size.
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
from cifar_dist.run.directory import verify_checksums
from cifar_dist.run.results import FORMAT_VERSION, check_format


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

    Verifies the checksums and runs no code of the file. Raises UserError with the reason if it cannot.
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
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    if "recipe" not in metadata:
        return tensors
    with refusing_foreign_content(path):
        recipe, class_names = json.loads(metadata["recipe"]), json.loads(metadata["classes"])
    return {"format_version": FORMAT_VERSION, "model": tensors, "recipe": recipe, "class_names": class_names}
