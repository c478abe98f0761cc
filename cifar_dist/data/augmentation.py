"""Augmentation, batched on the device and driven by a table of random parameters.

The parameters of a whole epoch are drawn at once on the CPU from (seed, epoch): one row a sample, one column a
parameter. A row says all that will happen to its sample, so what a sample looks like depends neither on the batch it
is in nor on the world size. Each operation's parameters have a stream of their own: switching one operation on does
not change the draws of another.

The operations are those of the original script, in its order: random crop with zero padding, horizontal flip,
rotation (nearest pixel), and torchvision's ColorJitter in a random order of its own.
"""

import itertools
import math

import torch
from torch import Tensor

from cifar_dist.config.recipe import AugmentationConfig
from cifar_dist.data.color import jitter
from cifar_dist.data.order import derive_seed

COLUMNS = ("crop_y", "crop_x", "flip", "angle", "brightness", "contrast", "saturation", "hue", "jitter_order")
"""The table's columns: offsets in pixels, 0 or 1, radians, three factors, a part of a turn, a row of JITTER_ORDERS."""

JITTER_ORDERS = torch.tensor(list(itertools.permutations(range(4))))
"""(24, 4): every order of brightness 0, contrast 1, saturation 2, hue 3."""


class Augmentation:
    """What a recipe does to training images, for one seed."""

    def __init__(self, config: AugmentationConfig, *, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.moves_pixels = config.crop_padding > 0 or config.flip != "none" or config.rotation_degrees > 0
        self.changes_colors = max(config.brightness, config.contrast, config.saturation, config.hue) > 0

    def draw_table(self, epoch: int, num_samples: int) -> Tensor:
        """Draw an epoch's parameters: (num_samples, len(COLUMNS)) float32 on the CPU, indexed by sample."""
        config = self.config

        def uniform(name: str, low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(num_samples, generator=self._generator(epoch, name))

        def integers(name: str, count: int) -> Tensor:
            return torch.randint(count, (num_samples,), generator=self._generator(epoch, name)).float()

        def factor(name: str, spread: float) -> Tensor:
            return uniform(name, max(0.0, 1 - spread), 1 + spread)

        offsets = 2 * config.crop_padding + 1
        angle = math.radians(config.rotation_degrees)
        columns = {
            "crop_y": integers("crop_y", offsets),
            "crop_x": integers("crop_x", offsets),
            "flip": integers("flip", 2) if config.flip == "random" else torch.zeros(num_samples),
            "angle": uniform("angle", -angle, angle),
            "brightness": factor("brightness", config.brightness),
            "contrast": factor("contrast", config.contrast),
            "saturation": factor("saturation", config.saturation),
            "hue": uniform("hue", -config.hue, config.hue),
            "jitter_order": integers("jitter_order", len(JITTER_ORDERS)),
        }
        return torch.stack([columns[name] for name in COLUMNS], dim=1)

    def _generator(self, epoch: int, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed("augmentation", self.seed, epoch, name))

    def apply(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Augment a batch.

        `images` is (B, 3, H, W) uint8 on any device, `parameters` their rows of the table, (B, len(COLUMNS)) on the
        CPU. Gives (B, 3, H, W) float32 in [0, 1], contiguous, on the images' device.
        """
        column = dict(zip(COLUMNS, parameters.to(images.device).unbind(1), strict=True))
        if self.moves_pixels:
            images = move_pixels(
                images,
                crop_y=column["crop_y"] - self.config.crop_padding,
                crop_x=column["crop_x"] - self.config.crop_padding,
                flip=column["flip"],
                angle=column["angle"] if self.config.rotation_degrees else None,
            )
        pixels = images.to(torch.float32).div_(255)
        if self.changes_colors:
            # The order stays on the CPU: it decides which images go together, and asking a device would make it wait.
            orders = JITTER_ORDERS[parameters[:, COLUMNS.index("jitter_order")].long()]
            factors = torch.stack([column["brightness"], column["contrast"], column["saturation"]], dim=1)
            jitter(pixels, factors, column["hue"] if self.config.hue else None, orders)
        return pixels


def move_pixels(images: Tensor, *, crop_y: Tensor, crop_x: Tensor, flip: Tensor, angle: Tensor | None) -> Tensor:
    """Crop, flip and rotate a batch (N, 3, H, W) uint8 in a single gather; what lies outside becomes 0.

    A pixel of the result is followed back through the rotation (to the nearest pixel, ties to even, as
    `grid_sample` does), the flip and the crop. All are moves of whole pixels, so one gather equals the three
    operations one after the other. `crop_y` and `crop_x` (N,) are the window's corner relative to the unpadded
    image, `flip` (N,) is 0 or 1, `angle` (N,) is counter-clockwise in radians.
    """
    num_images, channels, height, width = images.shape
    y = torch.arange(height, device=images.device, dtype=torch.float32).view(1, height, 1)
    x = torch.arange(width, device=images.device, dtype=torch.float32).view(1, 1, width)
    inside: Tensor | None = None
    if angle is not None:
        cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
        from_center_y, from_center_x = y - (height - 1) / 2, x - (width - 1) / 2
        y = (from_center_x * sin).add(from_center_y * cos).add_((height - 1) / 2).round_()
        x = (from_center_x * cos).sub(from_center_y * sin).add_((width - 1) / 2).round_()
        inside = _within(y, height) & _within(x, width)
    flipped = flip.view(-1, 1, 1)
    x = x + flipped * ((width - 1) - 2 * x)
    y, x = y + crop_y.view(-1, 1, 1), x + crop_x.view(-1, 1, 1)
    in_image = _within(y, height) & _within(x, width)
    inside = in_image if inside is None else inside & in_image
    source = (y.clamp(0, height - 1) * width + x.clamp(0, width - 1)).to(torch.int64).view(num_images, 1, -1)
    moved = images.view(num_images, channels, -1).gather(2, source.expand(-1, channels, -1))
    return moved.mul_(inside.view(num_images, 1, -1)).view_as(images)


def _within(coordinate: Tensor, size: int) -> Tensor:
    return (coordinate >= 0) & (coordinate <= size - 1)
