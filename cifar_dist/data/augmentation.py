"""Augmentation, batched on the device and driven by a table of random parameters.

The parameters of an epoch are drawn at once on the CPU from (seed, epoch): one row a sample, one column a parameter. So
a sample depends neither on its batch nor on the world size. Each parameter has its own stream: enabling an operation
does not change the draws of another. The order is crop, flip, rotation, affine, policy, a function of the user's own,
colour jitter, cutout, random erasing, and mixup or CutMix of two finished images.
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from cifar_dist.config.errors import UserError
from cifar_dist.config.recipe import AugmentationConfig
from cifar_dist.data.policies import NUM_BINS, NUM_OPERATIONS, OPERATIONS, RANDAUGMENT_BIN, apply_operations, levels
from cifar_dist.data.sampler import derive_seed
from cifar_dist.data.transforms import AffineMove, jitter, move_pixels, to_device

COLUMNS = (
    "crop_y", "crop_x", "flip", "angle", "affine_angle", "affine_y", "affine_x", "affine_scale",
    "brightness", "contrast", "saturation", "hue", "jitter_order",
    "cutout_y", "cutout_x", "partner", "share", "is_box", "box_y", "box_x",
    "operation_1", "level_1", "operation_2", "level_2", "erase_y", "erase_x", "erase_height", "erase_width",
)  # fmt: skip
"""The table's columns.

crop, cutout, box, erase, affine_y, affine_x: pixels. flip, is_box: 0 or 1. angles: radians, counter-clockwise.
affine_scale, brightness, contrast, saturation: factors. hue: part of a turn. jitter_order: row of JITTER_ORDERS.
partner: position in the training set. share: the image's own part in a mix. operation: row of OPERATIONS; level: what
it takes.
"""

CustomAugmentation = Callable[[Tensor, Tensor], Tensor]
"""A function of images (N, 3, H, W) uint8 on the device and of seeds (N,) int64 on the CPU, one for each image.

Its result has the same shape, and is uint8 or float32 in [0, 1].
"""

JITTER_ORDERS = torch.tensor(list(itertools.permutations(range(4))))
"""(24, 4): every order of brightness 0, contrast 1, saturation 2, hue 3."""


class Augmentation:
    """A recipe's augmentation of training images, for one seed."""

    def __init__(
        self,
        config: AugmentationConfig,
        *,
        seed: int,
        image_size: int = 32,
        fill: tuple[float, ...] = (0.5, 0.5, 0.5),
        custom: CustomAugmentation | None = None,
    ) -> None:
        """Store the side of the images in memory, and the colour (in [0, 1]) of what cutout and random erasing blank.

        `custom` is the function that `config.custom` names; see `check_custom`. Raises UserError if the padding is
        wider than the images.
        """
        if config.crop_padding >= image_size:
            raise UserError(
                f"augmentation.crop_padding={config.crop_padding} is too wide for images of {image_size} pixels:"
                f" set it to at most {image_size - 1}"
            )
        if config.custom is not None and custom is None:
            raise ValueError(f"augmentation.custom={config.custom} is not loaded")
        self.config, self.seed, self.image_size, self.fill = config, seed, image_size, torch.tensor(fill)
        self.custom = custom
        self.moves_affinely = max(config.affine_degrees, config.affine_translate, config.affine_scale) > 0
        rotates = config.rotation_degrees > 0 or self.moves_affinely
        self.moves_pixels = config.crop_padding > 0 or config.flip != "none" or rotates
        self.mixes = max(config.mixup, config.cutmix) > 0

    def draw_table(self, epoch: int, num_samples: int, *, num_partners: int = 1) -> Tensor:
        """Draw an epoch's parameters: (num_samples, len(COLUMNS)) float32 on the CPU, indexed by sample.

        `num_partners` is the size of the training set, which a mix draws its partner from.
        """
        draw, config, size = _Draw(self.seed, epoch, num_samples), self.config, self.image_size
        angle, affine_angle = math.radians(config.rotation_degrees), math.radians(config.affine_degrees)
        farthest = config.affine_translate * size
        columns = (  # in the order of COLUMNS
            *(draw.integers(name, 2 * config.crop_padding + 1) for name in ("crop_y", "crop_x")),
            self._draw_flip(draw, epoch),
            draw.uniform("angle", -angle, angle),
            draw.uniform("affine_angle", -affine_angle, affine_angle),
            # Whole pixels, as in torchvision's RandomAffine.
            *(draw.uniform(name, -farthest, farthest).round() for name in ("affine_y", "affine_x")),
            draw.factor("affine_scale", config.affine_scale),
            draw.factor("brightness", config.brightness),
            draw.factor("contrast", config.contrast),
            draw.factor("saturation", config.saturation),
            draw.uniform("hue", -config.hue, config.hue),
            draw.integers("jitter_order", len(JITTER_ORDERS)),
            *(draw.integers(name, size if config.cutout else 1) for name in ("cutout_y", "cutout_x")),
            draw.integers("partner", num_partners if self.mixes else 1),
            *self._draw_mix(draw),
            *(draw.integers(name, size if config.cutmix else 1) for name in ("box_y", "box_x")),
            *self._draw_policy(draw),
            *self._draw_erasing(draw),
        )
        return torch.stack(columns, dim=1)

    def draw_seeds(self, epoch: int, num_samples: int) -> Tensor:
        """Draw an epoch's seeds for `custom`: (num_samples,) int64 on the CPU, indexed by sample."""
        return torch.randint(2**63 - 1, (num_samples,), generator=_Draw(self.seed, epoch, num_samples).stream("custom"))

    def _draw_flip(self, draw: "_Draw", epoch: int) -> Tensor:
        """Draw flips; alternating ones at random in epoch 1 and inverted in each later epoch (arXiv 2404.00498)."""
        if self.config.flip == "none":
            return torch.zeros(draw.num_samples)
        if self.config.flip == "random":
            return draw.integers("flip", 2)
        return (_Draw(self.seed, 1, draw.num_samples).integers("flip", 2) + epoch + 1) % 2

    def _draw_mix(self, draw: "_Draw") -> tuple[Tensor, Tensor]:
        """Draw each image's own share, from Beta(alpha, alpha), and whether it is mixed by a box."""
        mixup, cutmix = self.config.mixup, self.config.cutmix
        is_box = draw.integers("is_box", 2) if mixup and cutmix else torch.full((draw.num_samples,), float(cutmix > 0))
        shares = draw.beta("mixup", mixup) if mixup else torch.ones(draw.num_samples)
        if cutmix:
            shares = torch.where(is_box.bool(), draw.beta("cutmix", cutmix), shares)
        return shares, is_box

    def _draw_policy(self, draw: "_Draw") -> list[Tensor]:
        """Draw each operation and its level: the sign at random, and the bin too for TrivialAugmentWide."""
        policy, columns = self.config.policy, [torch.zeros(draw.num_samples)] * 4
        arguments, num_bins = levels(policy, self.image_size), NUM_BINS if policy == "trivial" else 1
        for slot in range(NUM_OPERATIONS[policy]):
            operation = draw.integers(f"operation_{slot + 1}", len(OPERATIONS))
            sign, number = draw.integers(f"sign_{slot + 1}", 2), draw.integers(f"bin_{slot + 1}", num_bins)
            if policy == "randaugment":
                number += RANDAUGMENT_BIN
            columns[2 * slot : 2 * slot + 2] = operation, arguments[operation.long(), sign.long(), number.long()]
        return columns

    def _draw_erasing(self, draw: "_Draw") -> tuple[Tensor, ...]:
        """Draw the box of random erasing (arXiv 1708.04896), of height 0 where nothing is erased.

        As in torchvision's RandomErasing, the first box of 10 that is smaller than the image counts.
        """
        size, height, width = self.image_size, torch.zeros(draw.num_samples), torch.zeros(draw.num_samples)
        if not self.config.random_erasing:
            return height, height, height, height
        for attempt in range(10):
            area = size * size * draw.uniform(f"erase_area_{attempt}", 0.02, 0.33)
            ratio = draw.uniform(f"erase_ratio_{attempt}", math.log(0.3), math.log(3.3)).exp()
            tall, wide = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
            fits = (height == 0) & (torch.maximum(tall, wide) < size)
            height, width = torch.where(fits, tall, height), torch.where(fits, wide, width)
        height = height * (draw.uniform("erase", 0, 1) < self.config.random_erasing)
        y, x = (draw.uniform(name, 0, 1) for name in ("erase_y", "erase_x"))
        return (y * (size - height + 1)).floor(), (x * (size - width + 1)).floor(), height, width

    def apply(self, images: Tensor, rows: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Augment a batch, each image by itself.

        `images` is (B, 3, H, W) uint8 on any device, `rows` their rows of the table, (B, len(COLUMNS)), and `seeds`
        their seeds, (B,) int64, which `custom` needs, both on the CPU. Returns (B, 3, H, W) float32 in [0, 1],
        contiguous, on the images' device.
        """
        config, column, given = self.config, _columns(rows, images.device), images
        if self.moves_pixels:
            none, one = torch.zeros_like(column["angle"]), torch.ones_like(column["angle"])
            moves = [AffineMove(column["angle"], none, none, one)] if config.rotation_degrees else []
            if self.moves_affinely:
                moves.append(AffineMove(*(column[f"affine_{name}"] for name in ("angle", "y", "x", "scale"))))
            images = move_pixels(
                images,
                moves,
                flip=column["flip"],
                padding=config.crop_padding,
                crop_y=column["crop_y"],
                crop_x=column["crop_x"],
                reflect=config.crop_mode == "reflect",
            )
        for slot in range(1, NUM_OPERATIONS[config.policy] + 1):
            operation, level = (rows[:, COLUMNS.index(f"{name}_{slot}")] for name in ("operation", "level"))
            images = apply_operations(images, operation.long(), level)
        if self.custom is not None and len(images):
            if seeds is None:
                raise ValueError("augmentation.custom needs seeds")
            images = self.custom(images.clone() if images is given else images, seeds)
        pixels = images.to(torch.float32).div_(255) if images.dtype == torch.uint8 else images.contiguous()
        if max(config.brightness, config.contrast, config.saturation, config.hue) > 0:
            # The orders stay on the CPU: they decide which images go together, and reading a device synchronizes.
            orders = JITTER_ORDERS[rows[:, COLUMNS.index("jitter_order")].long()]
            factors = torch.stack([column["brightness"], column["contrast"], column["saturation"]], dim=1)
            pixels = jitter(pixels, factors, column["hue"] if config.hue else None, orders)
        if config.cutout:
            cutout(pixels, column["cutout_y"], column["cutout_x"], config.cutout, to_device(self.fill, pixels.device))
        if config.random_erasing:
            y, x, height, width = (column[f"erase_{name}"] for name in ("y", "x", "height", "width"))
            erase(pixels, y, x, height, width, to_device(self.fill, pixels.device))
        return pixels


def _columns(rows: Tensor, device: torch.device) -> dict[str, Tensor]:
    return dict(zip(COLUMNS, to_device(rows, device).unbind(1), strict=True))


class _Draw:
    """Draws of one epoch; each name has its own generator."""

    def __init__(self, seed: int, epoch: int, num_samples: int) -> None:
        self.seed, self.epoch, self.num_samples = seed, epoch, num_samples

    def stream(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed("augmentation", self.seed, self.epoch, name))

    def uniform(self, name: str, low: float, high: float) -> Tensor:
        if low == high:
            return torch.full((self.num_samples,), low)
        return low + (high - low) * torch.rand(self.num_samples, generator=self.stream(name))

    def integers(self, name: str, count: int) -> Tensor:
        if count == 1:
            return torch.zeros(self.num_samples)
        return torch.randint(count, (self.num_samples,), generator=self.stream(name)).float()

    def factor(self, name: str, spread: float) -> Tensor:
        return self.uniform(name, max(0.0, 1 - spread), 1 + spread)

    def beta(self, name: str, alpha: float) -> Tensor:
        # A ratio of Gamma draws, in float64: small alphas give tiny numbers.
        shape = torch.full((2, self.num_samples), alpha, dtype=torch.float64)
        first, second = torch._standard_gamma(shape, generator=self.stream(name))
        return (first / (first + second)).nan_to_num_(0.5).float()


def cutout(pixels: Tensor, center_y: Tensor, center_x: Tensor, side: int, fill: Tensor) -> None:
    """Blank a square of `side` pixels about each image's own centre, in place (arXiv 1708.04552).

    The square is cut off at the border. `fill` (3,) is the colour that normalization turns into 0, as in the paper.
    """
    sides = torch.full_like(center_y, side)
    erase(pixels, center_y - side // 2, center_x - side // 2, sides, sides, fill)


def erase(pixels: Tensor, y: Tensor, x: Tensor, height: Tensor, width: Tensor, fill: Tensor) -> None:
    """Blank each image's box, in place; (y, x) is its upper left corner."""
    blank = _span(y, y + height, pixels.shape[2]).unsqueeze(2) & _span(x, x + width, pixels.shape[3]).unsqueeze(1)
    torch.where(blank.unsqueeze(1), fill.view(1, 3, 1, 1), pixels, out=pixels)


def check_custom(custom: Callable[..., object], name: str, *, image_size: int, device: torch.device) -> None:
    """Call a user's function on 64 images as one batch and as two; raise UserError if an image depends on its batch."""
    generator, results = torch.Generator().manual_seed(0), []
    noise = torch.rand(64, 3, image_size, image_size, generator=generator)
    brightness = torch.rand(64, 1, 1, 1, generator=generator)  # so that the two batches differ in their mean, too
    images = (256 * noise * brightness).to(device, torch.uint8)
    seeds = torch.randint(2**63 - 1, (64,), generator=generator)
    for part in (slice(None), slice(0, None, 2), slice(1, None, 2)):
        given = images[part].clone(memory_format=torch.contiguous_format)
        try:
            result = custom(given, seeds[part].clone())
        except Exception as error:
            raised = f"augmentation.custom={name} raised {type(error).__name__}: {error}"
            raise UserError(f"{raised}: it is called with images (N, 3, H, W) uint8, seeds (N,) int64") from error
        if not isinstance(result, Tensor) or result.shape != given.shape or not _holds_pixels(result):
            what = f"{result.dtype} {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            allowed = "return a tensor of the images' shape, uint8 or float32 in [0, 1]"
            raise UserError(f"augmentation.custom={name} returned {what}: {allowed}")
        results.append(result)
    together = torch.stack(results[1:], dim=1).flatten(0, 1)
    if together.dtype != results[0].dtype or not torch.equal(together, results[0]):
        raise UserError(f"augmentation.custom={name}: its result depends on the batch: draw from the seeds alone")


def _holds_pixels(images: Tensor) -> bool:
    if images.dtype == torch.float32:
        return bool((images >= 0).logical_and(images <= 1).all())
    return images.dtype == torch.uint8


def mix(pixels: Tensor, partners: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Blend augmented images with their partners (mixup, arXiv 1710.09412) or paste a box (CutMix, arXiv 1905.04899).

    `pixels` and `partners` are (B, 3, H, W). The box has the area 1 - share and is cut off at the border; the share is
    then what is left, as in torchvision's CutMix. Returns the mixed images and their own shares (B,).
    """
    column, (height, width) = _columns(rows, pixels.device), pixels.shape[2:]
    share, is_box = column["share"], column["is_box"].bool()
    half = 0.5 * (1 - share).sqrt()
    half_y, half_x = (half * height).floor(), (half * width).floor()
    in_y = _span(column["box_y"] - half_y, column["box_y"] + half_y, height)
    in_x = _span(column["box_x"] - half_x, column["box_x"] + half_x, width)
    box = (in_y.unsqueeze(2) & in_x.unsqueeze(1)).unsqueeze(1)
    area = in_y.sum(1) * in_x.sum(1) / (height * width)
    per_pixel = torch.where(is_box.view(-1, 1, 1, 1), 1 - box.to(pixels.dtype), share.view(-1, 1, 1, 1))
    return torch.lerp(partners, pixels, per_pixel), torch.where(is_box, 1 - area, share)


def _span(start: Tensor, end: Tensor, size: int) -> Tensor:
    """Return which of `size` positions lie in [start, end): (N, size) bool."""
    position = torch.arange(size, device=start.device)
    return (position >= start.unsqueeze(1)) & (position < end.unsqueeze(1))
