"""Weights from elsewhere: torchvision's ImageNet weights, and the state dicts of other programs."""

import contextlib
import io
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from cifar_dist.config.errors import UserError
from cifar_dist.model.networks import TORCHVISION


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load a whole state dict. Raises UserError that names the tensors that differ."""
    try:
        model.load_state_dict(dict(weights))  # in a plain dict torch allows missing BatchNorm counters
    except RuntimeError as error:
        reason = " ".join(str(error).partition("\n\t")[2].split())  # without torch's first line
        raise UserError(f"these weights are not this network's ({type(model).__name__}): {reason[:200]}") from None


def start_from(model: nn.Module, weights: Mapping[str, Tensor], head: str | None) -> None:
    """Load weights; the layer `head`, or a ResNet's stem, of another shape keeps its initial weights.

    Raises UserError if another tensor differs.
    """
    own: dict[str, Tensor] = model.state_dict()
    new = ("conv1.", *([f"{head}."] if head else []))
    replaced = {
        name: own[name]
        for name, value in weights.items()
        if name.startswith(new) and name in own and own[name].shape != value.shape
    }
    load_weights(model, {**weights, **replaced})


def infer_stem(weights: Mapping[str, Tensor]) -> str:
    """Return the stem of a ResNet's tensors. A 3x3 stem counts as `cifar`: the weights do not show its stride.

    Raises UserError for another network.
    """
    conv = weights.get("conv1.weight")
    stems: dict[tuple[int, ...], str] = {(3, 7, 7): "imagenet", (3, 3, 3): "cifar"}
    stem = None if conv is None else stems.get(tuple(conv.shape[1:]))
    if stem is None:
        found = ", ".join(list(weights)[:3]) if conv is None else f"conv1.weight {list(conv.shape)}"
        raise UserError(
            f"these weights are not a ResNet's: conv1.weight must be [64, 3, 7, 7] or [64, 3, 3, 3], and there"
            f" are {found}; name another network with --set model=NAME"
        )
    return stem


def _imagenet(model: str) -> Any:
    if model not in TORCHVISION:
        raise UserError(f"there are no ImageNet weights of {model}: set pretrained=null, or name a file")
    return models.get_model_weights(model).DEFAULT


def imagenet_weights_path(model: str = "resnet18") -> Path:
    """Return the file in torch's cache that holds torchvision's ImageNet weights of a model. Raises UserError."""
    url: str = _imagenet(model).url
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]


def imagenet_weights(model: str = "resnet18", *, note: Callable[[str], None] = lambda text: None) -> dict[str, Tensor]:
    """Load torchvision's ImageNet weights from its cache; download them if missing, after a line to `note`.

    Raises UserError that names the file if that fails.
    """
    path, weights = imagenet_weights_path(model), _imagenet(model)
    if not path.exists():
        note(f"downloading the ImageNet weights to {path} ({weights.meta['_file_size']:.0f} MB)")
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # torch.hub prints a line of its own
            state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        reason = str(getattr(error, "reason", error)).split("\n")[0] or type(error).__name__
        what = "are damaged" if path.exists() else "could not be downloaded"  # torch checks no file that is there
        raise UserError(
            f"the ImageNet weights {path} {what} ({reason}): put the file there, or name another with"
            " --set pretrained=FILE"
        ) from None
    return state


def find_state_dict(
    path: Path, content: Mapping[str, Any], names: Collection[str]
) -> tuple[dict[str, Tensor], str | None]:
    """Return a state dict with the network's `names` from another program's file, and a note of what was renamed.

    Raises UserError unless `content` is a state dict, or holds exactly one.
    """
    weights, changes = dict(content), []
    if not _is_state_dict(content):
        found = [key for key, value in content.items() if _is_state_dict(value)]
        if len(found) != 1:
            what = f"of {', '.join(found)} save one alone" if found else f"its keys are {', '.join(list(content)[:5])}"
            raise UserError(f"{path} is neither a checkpoint of this program nor a bare state dict: {what}")
        weights, changes = dict(content[found[0]]), [f"from '{found[0]}'"]
    first = next(iter(names))
    prefix = min((key for key in weights if f".{key}".endswith(f".{first}")), key=len, default=first)[: -len(first)]
    if others := [key for key in weights if not key.startswith(prefix)]:
        raise UserError(f"{path} holds a network under '{prefix}' and also {', '.join(others[:3])}: save it alone")
    for pattern, new, change in (
        (rf"^{re.escape(prefix)}", "", f"without '{prefix}'"),  # DataParallel, torch.compile, Lightning
        (r"\.shortcut\.", ".downsample.", "with shortcut as downsample"),  # https://github.com/kuangliu/pytorch-cifar
        (r"^linear\.", "fc.", "with linear as fc"),
        (r"^fc\.\w+\.(?=weight$|bias$)", "fc.", "with fc.N as fc"),  # a Sequential with dropout
    ):
        renamed = {re.sub(pattern, new, key): value for key, value in weights.items()}
        known = len(renamed.keys() & names) > len(weights.keys() & names)
        if known and len(renamed) == len(weights):  # all names stay different
            weights = renamed
            changes.append(change)
    return weights, f"{path} is read {', '.join(changes)}" if changes else None


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(each, Tensor) for each in value.values())
