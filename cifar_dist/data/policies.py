"""TrivialAugmentWide (arXiv 2103.10158) and RandAugment (arXiv 1909.13719), each image with operations of its own.

The ranges, the meaning of a level and the arithmetic are those of `torchvision.transforms.v2`: nearest pixel, fill 0.
Every result is exact or elementwise, so an image's bytes do not depend on the batch.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cifar_dist.data.transforms import AffineMove, move_pixels, to_device, to_gray

NUM_OPERATIONS = {"none": 0, "trivial": 1, "randaugment": 2}
"""Operations on an image, one after the other."""
NUM_BINS = 31
RANDAUGMENT_BIN = 9


def levels(policy: str, image_size: int) -> Tensor:
    """Return (14, 2, 31) float32: what an operation (row of OPERATIONS) takes at each sign and bin.

    Shears: a slope. Translations: whole pixels. Rotation: radians, counter-clockwise. Brightness, color, contrast,
    sharpness: what is added to the factor 1. Posterize: the mask of a pixel's bits. Solarize: the smallest pixel that
    is inverted. The others take nothing.
    """
    wide = policy == "trivial"

    def signed(largest: float) -> Tensor:
        values = torch.linspace(0, largest, NUM_BINS)
        return torch.stack([values, -values])

    bits = (8 - torch.arange(NUM_BINS) / ((NUM_BINS - 1) / (6 if wide else 4))).round()
    rows = dict.fromkeys(OPERATIONS, torch.zeros(2, NUM_BINS))
    rows |= dict.fromkeys(("shear_x", "shear_y"), signed(0.99 if wide else 0.3))
    rows |= dict.fromkeys(("translate_x", "translate_y"), signed(32 if wide else 150 / 331 * image_size).trunc())
    rows |= dict.fromkeys(("brightness", "color", "contrast", "sharpness"), signed(0.99 if wide else 0.9))
    rows["rotate"] = signed(135 if wide else 30) * (math.pi / 180)
    rows["posterize"] = (256 - 2 ** (8 - bits)).expand(2, -1)
    rows["solarize"] = (255 * torch.linspace(1, 0, NUM_BINS).double()).float().expand(2, -1)
    return torch.stack([rows[name] for name in OPERATIONS])


def apply_operations(images: Tensor, operations: Tensor, levels: Tensor) -> Tensor:
    """Apply to each image of (N, 3, H, W) uint8 its operation, (N,) int64, at its level, (N,) float32, both on the CPU.

    Images are sorted by operation on the CPU, because reading a device synchronizes. Returns a new tensor.
    """
    there, counts = operations.argsort(stable=True), operations.bincount(minlength=len(OPERATIONS)).tolist()
    parts = torch.split(images.index_select(0, to_device(there, images.device)), counts)
    arguments = torch.split(to_device(levels[there], images.device).view(-1, 1, 1, 1), counts)
    each = zip(OPERATIONS.values(), parts, arguments, strict=True)
    done = torch.cat([operation(part, argument) if len(part) else part for operation, part, argument in each])
    return done.index_select(0, to_device(there.argsort(), images.device))


def _moved(images: Tensor, **move: Tensor) -> Tensor:
    zero = torch.zeros(len(images), device=images.device)
    nowhere = {"angle": zero, "shift_y": zero, "shift_x": zero, "scale": zero + 1}
    affine = AffineMove(**(nowhere | {name: level.flatten() for name, level in move.items()}))
    return move_pixels(images, [affine], flip=zero, padding=0, crop_y=zero, crop_x=zero, reflect=False)


def _blend(images: Tensor, target: Tensor, level: Tensor) -> Tensor:
    """Return (1 + level) * images - level * target, cut to bytes."""
    return images.float().mul_(1 + level).sub_(target * level).clamp_(0, 255).to(torch.uint8)


def _brightness(images: Tensor, level: Tensor) -> Tensor:
    return images.float().mul_(1 + level).clamp_(0, 255).to(torch.uint8)


def _color(images: Tensor, level: Tensor) -> Tensor:
    return _blend(images, to_gray(images.float()).floor_().unsqueeze(1), level)


def _contrast(images: Tensor, level: Tensor) -> Tensor:
    gray = to_gray(images.float()).to(torch.int32)  # a sum of integers does not depend on its order
    return _blend(images, gray.sum((1, 2)).view(-1, 1, 1, 1).float() / gray[0].numel(), level)


def _sharpness(images: Tensor, level: Tensor) -> Tensor:
    """Blend with an average of 3 x 3 pixels that weighs the middle five times; the border stays."""
    pixels = images.float()
    inner = pixels[..., 1:-1, 1:-1]
    across = pixels[..., :-2] + pixels[..., 1:-1] + pixels[..., 2:]
    smooth = (across[..., :-2, :] + across[..., 1:-1, :] + across[..., 2:, :]).add_(inner, alpha=4).div_(13).round_()
    inner.sub_(smooth.sub_(inner).mul_(level))
    return pixels.clamp_(0, 255).to(torch.uint8)


def _posterize(images: Tensor, level: Tensor) -> Tensor:
    return images & level.to(torch.uint8)


def _solarize(images: Tensor, level: Tensor) -> Tensor:
    return torch.where(images >= level, images.bitwise_not(), images)


def _autocontrast(images: Tensor, level: Tensor) -> Tensor:
    """Stretch each channel to 0 to 255; a channel of one colour stays."""
    pixels = images.float()
    low, high = pixels.amin((2, 3), keepdim=True), pixels.amax((2, 3), keepdim=True)
    scale, flat = (high - low).mul_(1 / 255), high == low
    low, scale = low.masked_fill_(flat, 0), scale.masked_fill_(flat, 1)
    return pixels.sub_(low).div_(scale).clamp_(0, 255).to(torch.uint8)


def _equalize(images: Tensor, level: Tensor) -> Tensor:
    """Equalize each channel's histogram, by Pillow's formula; a channel stays where the formula's step is 0."""
    pixels = images.flatten(2).long()
    counts = pixels.new_zeros(*pixels.shape[:2], 256).scatter_add_(2, pixels, torch.ones_like(pixels))
    step = (pixels < pixels.amax(2, keepdim=True)).sum(2, keepdim=True) // 255
    table = (counts.cumsum(2) - counts + step // 2) // step.clamp(min=1)
    table = torch.where(step == 0, torch.arange(256, device=images.device), table.clamp_(max=255))
    return table.to(torch.uint8).gather(2, pixels).view_as(images)


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "identity": lambda images, level: images,
    "shear_x": lambda images, level: _moved(images, shear_x=level),
    "shear_y": lambda images, level: _moved(images, shear_y=level),
    "translate_x": lambda images, level: _moved(images, shift_x=level),
    "translate_y": lambda images, level: _moved(images, shift_y=level),
    "rotate": lambda images, level: _moved(images, angle=level),
    "brightness": _brightness,
    "color": _color,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}
"""Each takes images (n, 3, H, W) uint8 and levels (n, 1, 1, 1) float32."""
