"""Weights that were trained elsewhere: torchvision's, and state dicts of other programs."""

import contextlib
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights

from cifar_dist.config.errors import UserError
from cifar_dist.model.resnet import load_weights

_IMAGENET = ResNet18_Weights.IMAGENET1K_V1


def imagenet_weights_path() -> Path:
    """Return the file in torch's cache that holds torchvision's ImageNet weights."""
    url: str = _IMAGENET.url
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]


def imagenet_weights(note: Callable[[str], None] = lambda text: None) -> dict[str, Tensor]:
    """Load torchvision's ImageNet weights from its cache; download them if missing, after a line to `note`.

    Raises UserError that names the file if that fails.
    """
    path = imagenet_weights_path()
    if not path.exists():
        note(f"downloading the ImageNet weights to {path} (45 MB)")
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # torch.hub prints a line of its own
            state: dict[str, Tensor] = _IMAGENET.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        reason = str(getattr(error, "reason", error)).split("\n")[0] or type(error).__name__
        what = "are damaged" if path.exists() else "could not be downloaded"  # torch checks no file that is there
        raise UserError(
            f"the ImageNet weights {path} {what} ({reason}): put the file there, or name another with"
            " --set pretrained=FILE"
        ) from None
    return state


def find_state_dict(path: Path, content: Mapping[str, Any]) -> tuple[dict[str, Tensor], str | None]:
    """Return a state dict with torchvision's names from another program's file, and a note of what was renamed.

    Raises UserError unless `content` is a state dict, or holds exactly one.
    """
    weights, changes = dict(content), []
    if not _is_state_dict(content):
        found = [key for key, value in content.items() if _is_state_dict(value)]
        if len(found) != 1:
            what = f"of {', '.join(found)} save one alone" if found else f"its keys are {', '.join(list(content)[:5])}"
            raise UserError(f"{path} is neither a checkpoint of this program nor a bare state dict: {what}")
        weights, changes = dict(content[found[0]]), [f"from '{found[0]}'"]
    prefix = min((key for key in weights if key.endswith("conv1.weight")), key=len, default="conv1.weight")[:-12]
    if others := [key for key in weights if not key.startswith(prefix)]:
        raise UserError(f"{path} holds a network under '{prefix}' and also {', '.join(others[:3])}: save it alone")
    for pattern, new, change in (
        (rf"^{re.escape(prefix)}", "", f"without '{prefix}'"),  # DataParallel, torch.compile, Lightning
        (r"\.shortcut\.", ".downsample.", "shortcut as downsample"),  # https://github.com/kuangliu/pytorch-cifar
        (r"^linear\.", "fc.", "linear as fc"),
        (r"^fc\.\w+\.(?=weight$|bias$)", "fc.", "the one layer in fc as fc"),  # a Sequential with dropout
    ):
        renamed = {re.sub(pattern, new, key): value for key, value in weights.items()}
        if renamed.keys() != weights.keys() and len(renamed) == len(weights):  # all names stay different
            weights = renamed
            changes.append(change)
    return weights, f"{path} is read {', '.join(changes)}" if changes else None


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(each, Tensor) for each in value.values())


def start_from(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load a ResNet-18's weights; a stem or head of another shape keeps its initial weights.

    Raises UserError if another tensor differs.
    """
    own: dict[str, Tensor] = model.state_dict()
    replaced = {
        name: own[name]
        for name, value in weights.items()
        if name.startswith(("conv1.", "fc.")) and name in own and own[name].shape != value.shape
    }
    load_weights(model, weights | replaced)


def parts_to_freeze(model: nn.Module, stem: str) -> tuple[nn.Parameter, ...]:
    """Return the parameters that are frozen at first: all but the head and a new 3x3 stem."""
    new = ("fc.",) if stem == "imagenet" else ("fc.", "conv1.", "bn1.")
    return tuple(parameter for name, parameter in model.named_parameters() if not name.startswith(new))
