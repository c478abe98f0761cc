"""The networks: torchvision's ResNet-18 with three stems, fast convolutions on CPUs, and weights from elsewhere."""

import contextlib
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import ResNet18_Weights, resnet18

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

    A 3x3 stem counts as `cifar`: the weights do not show its stride. Raises UserError for another network.
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
    """Load a whole state dict. Raises UserError that names the tensors that differ."""
    try:
        model.load_state_dict(dict(weights))  # in a plain dict torch allows missing BatchNorm counters
    except RuntimeError as error:
        reason = " ".join(str(error).partition("\n\t")[2].split())  # without torch's first line
        raise UserError(f"these weights are not this ResNet-18's: {reason[:200]}") from None


def use_dense_products(model: nn.Module) -> None:
    """Turn a ResNet's convolutions into SmallImageConv2d, in place; weights, keys and hooks stay."""
    for module in model.modules():
        if type(module) is nn.Conv2d and module.bias is None and module.groups == 1 and module.dilation == (1, 1):
            module.__class__ = SmallImageConv2d


class SmallImageConv2d(nn.Conv2d):
    """A Conv2d that is one matrix product in training on a CPU if each output depends on every pixel.

    So are the last layers of a ResNet-18 on CIFAR's images: a 3x3 kernel over one pixel or over 2x2. The product
    leaves out the taps on the padding, and avoids oneDNN's slow backward pass there, a third to a half of the stock
    network's step in float32 (docs/benchmarks.md). Only rounding differs.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return (N, C_out, H', W') for `input` (N, C, H, W)."""
        if self.training and input.device.type == "cpu":
            sizes = (self.kernel_size, self.stride, self.padding)
            rows, columns = (_windows(input.shape[2 + axis], *(int(size[axis]) for size in sizes)) for axis in (0, 1))
            if rows and columns:
                return self._product(input, *rows, *columns)
        return super().forward(input)

    def _product(self, input: Tensor, height: int, rows: list[int], width: int, columns: list[int]) -> Tensor:
        # Channels last, as the weights lie in memory: their gradient then needs no other order.
        pixels, taps = input.permute(0, 2, 3, 1), self.weight.permute(0, 2, 3, 1)
        windows = [
            taps[:, row : row + height, column : column + width].flatten(1) for row in rows for column in columns
        ]
        outputs = functional.linear(pixels[:, :height, :width].flatten(1), torch.cat(windows))
        return outputs.view(len(input), len(rows), len(columns), self.out_channels).permute(0, 3, 1, 2)


def _windows(size: int, kernel: int, stride: int, padding: int) -> tuple[int, list[int]] | None:
    """Return the number of pixels along an axis that all outputs depend on, and each output's first tap on them.

    None if the outputs depend on different pixels.
    """
    count = (size + 2 * padding - kernel) // stride + 1
    seen = size if count > 1 else min(size, kernel - padding)
    taps = [padding - stride * output for output in range(count)]
    return (seen, taps) if all(0 <= tap <= kernel - seen for tap in taps) else None


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
        (r"\.shortcut\.", ".downsample.", "with shortcut as downsample"),  # https://github.com/kuangliu/pytorch-cifar
        (r"^linear\.", "fc.", "with linear as fc"),
        (r"^fc\.\w+\.(?=weight$|bias$)", "fc.", "with fc.N as fc"),  # a Sequential with dropout
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
