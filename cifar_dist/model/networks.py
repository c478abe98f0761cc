"""The networks: torchvision's, `fastnet`, and functions of your own; and fast convolutions on CPUs."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision import models
from torchvision.models import EfficientNet, MobileNetV2, MobileNetV3, ResNet

from cifar_dist.config.errors import UserError
from cifar_dist.config.own_code import is_own_code, load_function
from cifar_dist.config.recipe import Recipe
from cifar_dist.config.schema import nearest
from cifar_dist.model.fastnet import FastNet

TORCHVISION = models.list_models(module=models)
"""The names of torchvision's classification networks."""
_AUXILIARY = ("googlenet", "inception_v3")


def build_network(recipe: Recipe, num_classes: int) -> nn.Module:
    """Build the recipe's untrained network for images (N, 3, H, W), which returns logits (N, num_classes).

    The weights are drawn on the CPU from the recipe's seed, so that they are equal on every device; the caller's random
    state stays. Raises UserError.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        if is_own_code(recipe.model):
            model = _build_own(recipe.model, num_classes)
        elif recipe.model == "fastnet":
            model = FastNet(num_classes)
        else:
            model = _with_stem(_build_torchvision(recipe, num_classes), recipe)
    _set_batch_norm(model, recipe)
    if recipe.head_scale != 1:
        _scale_head(model, recipe, num_classes)
    return model


def _set_batch_norm(model: nn.Module, recipe: Recipe) -> None:
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = recipe.batch_norm_momentum or module.momentum
            if not recipe.batch_norm_scale and module.affine:
                module.weight.requires_grad_(False)


@torch.no_grad()
def _scale_head(model: nn.Module, recipe: Recipe, num_classes: int) -> None:
    head = find_head(model, num_classes)
    if head is None:
        raise UserError(f"head_scale needs a last layer with {num_classes} outputs, and {recipe.model} has none")
    for parameter in head[1].parameters():
        parameter.mul_(recipe.head_scale)


def _build_own(name: str, num_classes: int) -> nn.Module:
    try:
        model = load_function(name)(num_classes=num_classes)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # of the user's function
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{name} failed ({reason}): it must return a network for num_classes={num_classes}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{name} returns a {type(model).__name__}, not a torch.nn.Module")
    return model


def _build_torchvision(recipe: Recipe, num_classes: int) -> nn.Module:
    name = recipe.model
    if name not in TORCHVISION:
        raise UserError(
            f"unknown model '{name}'{nearest(name, [*TORCHVISION, 'fastnet'])} (resnet18, mobilenet_v2 or another"
            " classification network of torchvision, fastnet, or file.py:function)"
        )
    if name in _AUXILIARY:
        raise UserError(f"{name} has auxiliary outputs, which this loop does not train: name another model")
    sides = {"image_size": recipe.image_size} if name.startswith("vit_") else {}
    if sides and recipe.image_size % (patch := int(name.rpartition("_")[2])):
        raise UserError(f"{name} needs images whose side is a multiple of {patch}: set image_size={14 * patch}")
    model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **sides)
    return model


def _with_stem(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Change the first layers for small images.

    A ResNet's `cifar` is 3x3, stride 1, without max-pool (the 32x32 form of arXiv 1512.03385); `small` is 3x3, stride
    2, without max-pool. `cifar` of a MobileNet or EfficientNet gives its first two strided convolutions stride 1, so
    that 32x32 images end as 4x4. `imagenet` is torchvision's own.
    """
    stem = recipe.stem
    if stem == "imagenet":
        return model
    if isinstance(model, ResNet):
        stride = 1 if stem == "cifar" else 2
        conv = nn.Conv2d(3, 64, kernel_size=3, stride=stride, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        model.conv1, model.maxpool = conv, nn.Identity()
    elif isinstance(model, MobileNetV2 | MobileNetV3 | EfficientNet) and stem == "cifar":
        strided = [each for each in model.modules() if isinstance(each, nn.Conv2d) and each.stride == (2, 2)]
        for conv in strided[:2]:
            conv.stride = (1, 1)
    else:
        raise UserError(f"{recipe.model} has no stem '{stem}': set stem=imagenet, torchvision's own")
    return model


def find_head(model: nn.Module, num_classes: int) -> tuple[str, nn.Module] | None:
    """Return the last linear layer or convolution with `num_classes` outputs, and its dotted name, if there is one."""
    layers = [(name, each) for name, each in model.named_modules() if isinstance(each, nn.Linear | nn.Conv2d)]
    return next((named for named in reversed(layers) if len(named[1].weight) == num_classes), None)


def parts_to_freeze(model: nn.Module, recipe: Recipe, num_classes: int) -> tuple[nn.Parameter, ...]:
    """Return the parameters that are frozen at first: all but the head and a ResNet's new 3x3 stem.

    Raises UserError if there is no head.
    """
    head = find_head(model, num_classes)
    if head is None:
        raise UserError(f"freeze_epochs needs a last layer with {num_classes} outputs, and {recipe.model} has none")
    new = [f"{head[0]}."]
    if isinstance(model, ResNet) and recipe.stem != "imagenet":
        new += ["conv1.", "bn1."]
    return tuple(each for name, each in model.named_parameters() if not name.startswith(tuple(new)))


def use_dense_products(model: nn.Module) -> None:
    """Turn plain convolutions into SmallImageConv2d, in place; weights, keys and hooks stay."""
    for module in model.modules():
        if (
            type(module) is nn.Conv2d
            and module.bias is None
            and module.groups == 1
            and module.dilation == (1, 1)
            and module.padding_mode == "zeros"
            and isinstance(module.padding, tuple)
        ):
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
