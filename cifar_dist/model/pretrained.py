"""Weights that were trained elsewhere, as a start."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights

from cifar_dist.config.errors import UserError
from cifar_dist.model.resnet import load_weights


def imagenet_weights(note: Callable[[str], None] = lambda text: None) -> dict[str, Tensor]:
    """Give torchvision's ImageNet weights from its cache, downloaded when they are missing, which `note` is told.

    Raises UserError that names the file's place where they are neither there nor to be had.
    """
    weights, place = ResNet18_Weights.IMAGENET1K_V1, imagenet_weights_place()
    if not place.exists():
        note(f"downloading the ImageNet weights to {place} (45 MB)")
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # torch.hub's own line; a refusal is one line, and ours
            state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        if place.exists() and not isinstance(error, OSError):  # torch does not look at a file that lies there already
            raise UserError(f"the ImageNet weights in {place} are damaged: remove the file") from None
        reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise UserError(
            f"the ImageNet weights are not in {place} and could not be downloaded ({reason}):"
            " put the file there, or name a state dict with --set pretrained=FILE"
        ) from None
    return state


def imagenet_weights_place() -> Path:
    """Give the file in torch's cache where torchvision keeps its ImageNet weights."""
    url: str = ResNet18_Weights.IMAGENET1K_V1.url
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]


def start_from(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load a ResNet-18's weights into the model; a stem or head of another shape stays as it was drawn.

    Raises UserError where another tensor differs.
    """
    own: dict[str, Any] = model.state_dict()
    merged = {
        name: own[name]
        if name in own and name.startswith(("conv1.", "fc.")) and own[name].shape != value.shape
        else value
        for name, value in weights.items()
    }
    load_weights(model, merged)


def parts_to_freeze(model: nn.Module, stem: str) -> tuple[nn.Parameter, ...]:
    """Give the parameters that stay as they are while the new parts are trained: all but the head and a 3x3 stem."""
    new = ("fc.",) if stem == "imagenet" else ("fc.", "conv1.", "bn1.")
    return tuple(parameter for name, parameter in model.named_parameters() if not name.startswith(new))
