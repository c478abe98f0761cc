"""torchvision's ResNet-18 with one of three stems; state dicts keep torchvision's key names."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from cifar_dist.config.errors import UserError


def build_resnet(stem: str, num_classes: int, *, seed: int) -> nn.Module:
    """Build an untrained ResNet-18 for images (N, 3, H, W), which returns logits (N, num_classes).

    `stem` is `imagenet` (torchvision's own: 7x7, stride 2, max-pool), `cifar` (3x3, stride 1, no max-pool; the
    32x32 form of arXiv 1512.03385) or `small` (3x3, stride 2, no max-pool). The weights are drawn on the CPU from
    `seed`, so that they are equal on every device; the caller's random state stays.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = resnet18(weights=None, num_classes=num_classes)
        if stem != "imagenet":
            stride = {"cifar": 1, "small": 2}[stem]
            conv = nn.Conv2d(3, 64, kernel_size=3, stride=stride, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            model.conv1, model.maxpool = conv, nn.Identity()
    return model


def infer_architecture(weights: Mapping[str, Tensor]) -> tuple[str, int]:
    """Return the stem and the number of classes of a ResNet-18's tensors.

    A 3x3 stem counts as `cifar`: its stride leaves no trace in the weights. Raises UserError for another network.
    """
    conv, head = weights.get("conv1.weight"), weights.get("fc.weight")
    stems: dict[tuple[int, ...], str] = {(64, 3, 7, 7): "imagenet", (64, 3, 3, 3): "cifar"}
    stem = None if conv is None else stems.get(tuple(conv.shape))
    if stem is None or head is None or head.ndim != 2:
        found = {name: list(value.shape) for name, value in weights.items() if name in ("conv1.weight", "fc.weight")}
        raise UserError(
            "these weights are not a ResNet-18's: conv1.weight must be [64, 3, 7, 7] or [64, 3, 3, 3] and fc.weight"
            f" have two dimensions, and there are {found or ', '.join(list(weights)[:3])}"
        )
    return stem, head.shape[0]


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load a whole state dict. Raises UserError that names the tensors that differ.

    As in torch, BatchNorm's counters may be missing: files from before 2018 have none.
    """
    counters = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
    try:
        model.load_state_dict(counters | dict(weights))
    except RuntimeError as error:
        reason = " ".join(str(error).partition("\n\t")[2].split())  # without torch's first line
        raise UserError(f"these weights are not this ResNet-18's: {reason[:200]}") from None
