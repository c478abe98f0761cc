"""Geometry and colour of a batch in which each image has its own parameters."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601-2 luma, as in torchvision's rgb_to_grayscale
_CONTRAST, _SATURATION, _HUE = 1, 2, 3


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small CPU tensor to a device; on CUDA through pinned memory, without synchronization.

    MPS has no pinned memory, and its non-blocking copies can corrupt (pytorch#139550).
    """
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True, slots=True, eq=False)
class AffineMove:
    """A rotation about the image's centre with a shift and a change of size, or one shear; all (N,) float32."""

    angle: Tensor  # counter-clockwise, in radians
    shift_y: Tensor  # pixels, down
    shift_x: Tensor  # pixels, to the right
    scale: Tensor
    shear_y: Tensor | None = None  # a slope: so much of x, from the left edge, is added to the source's y
    shear_x: Tensor | None = None  # the same for y, from the upper edge


def move_pixels(
    images: Tensor,
    moves: list[AffineMove],
    *,
    flip: Tensor,
    padding: int,
    crop_y: Tensor,
    crop_x: Tensor,
    reflect: bool,
) -> Tensor:
    """Pad, crop, flip, then move (once or more) a batch (N, 3, H, W) uint8; what lies outside becomes 0.

    Each pixel of the result is traced back through the moves (to the nearest pixel, ties to even, as `grid_sample`
    does), the flip and the crop, so that one gather replaces all operations. `flip` (N,) is 0 or 1. `crop_y` and
    `crop_x` (N,), from 0 to 2 `padding`, are the window's corner in the padded image. The border is 0 or, with
    `reflect`, the reflection about the border pixels.
    """
    num_images, channels, height, width = images.shape
    y = torch.arange(height, device=images.device, dtype=torch.float32).view(1, height, 1)
    x = torch.arange(width, device=images.device, dtype=torch.float32).view(1, 1, width)
    inside: Tensor | None = None
    for move in reversed(moves):
        y, x = _source_of(move, y, x, height, width)
        # Compared as floats, in place, which is several times faster on a CPU than a comparison that returns bools.
        within_y = (y - (height - 1) / 2).abs_().le_((height - 1) / 2)
        within_x = (x - (width - 1) / 2).abs_().le_((width - 1) / 2)
        within = within_y.mul_(within_x).to(torch.bool)
        inside = within if inside is None else inside & within
    if moves:
        y, x = y.clamp_(0, height - 1), x.clamp_(0, width - 1)
    x = (x * (1 - 2 * flip).view(-1, 1, 1)).add_(((width - 1) * flip + crop_x).view(-1, 1, 1))
    y = y + crop_y.view(-1, 1, 1)
    if reflect:
        y, x = _reflected(y - padding, height), _reflected(x - padding, width)
    elif padding:
        images = functional.pad(images, (padding, padding, padding, padding))
    source = torch.add(x, y, alpha=images.shape[3]).to(torch.int64).flatten(1).unsqueeze(1)
    moved = images.flatten(2).gather(2, source.expand(-1, channels, -1)).view(num_images, channels, height, width)
    return moved if inside is None else moved.mul_(inside.unsqueeze(1))


def _source_of(move: AffineMove, y: Tensor, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the nearest pixels from which a move takes the pixels at (y, x)."""
    cos, sin = move.angle.cos().view(-1, 1, 1), move.angle.sin().view(-1, 1, 1)
    cos, sin = cos / move.scale.view(-1, 1, 1), sin / move.scale.view(-1, 1, 1)
    y = y - (height - 1) / 2 - move.shift_y.view(-1, 1, 1)
    x = x - (width - 1) / 2 - move.shift_x.view(-1, 1, 1)
    if move.shear_y is not None:
        y = y + (x + width / 2) * move.shear_y.view(-1, 1, 1)
    if move.shear_x is not None:
        x = x + (y + height / 2) * move.shear_x.view(-1, 1, 1)
    source_y = (x * sin).add(y * cos).add_((height - 1) / 2).round_()
    source_x = (x * cos).sub(y * sin).add_((width - 1) / 2).round_()
    return source_y, source_x


def _reflected(coordinate: Tensor, size: int) -> Tensor:
    """Fold coordinates up to size - 1 beyond a border back into the image; the border pixel is not repeated."""
    return (size - 1) - ((size - 1) - coordinate.abs()).abs()


def to_gray(pixels: Tensor) -> Tensor:
    """Return the luma (N, H, W) of images (N, 3, H, W) float32."""
    red, green, blue = pixels.unbind(1)
    return (red * _GRAY[0]).add_(green, alpha=_GRAY[1]).add_(blue, alpha=_GRAY[2])


def jitter(pixels: Tensor, factors: Tensor, hue: Tensor | None, orders: Tensor) -> Tensor:
    """Apply torchvision's ColorJitter, each image with its own factors and order; `pixels` may be changed in place.

    `pixels` (N, 3, H, W) float32 in [0, 1], contiguous; `factors` (N, 3) of brightness, contrast and saturation; `hue`
    (N,) in turns, or None; `orders` (N, 4) int64 on the CPU, each row a permutation of the four operations.

    Three of the four are blends: a step applies to each image the next blend of its own order. The hue comes before,
    between or after the blends: images are sorted by that place.
    """
    is_hue = orders == _HUE
    blends, counts, back = orders[~is_hue].view(len(orders), 3), [0] * 4, None
    if hue is not None:
        hue_place = is_hue.int().argmax(1)
        by_place = hue_place.argsort(stable=True)
        there, back = to_device(by_place, pixels.device), to_device(by_place.argsort(), pixels.device)
        pixels, factors, hue = pixels.index_select(0, there), factors[there], hue[there]
        blends, counts = blends[by_place], hue_place.bincount(minlength=4).tolist()
    blends, start = to_device(blends, pixels.device), 0
    for place, count in enumerate(counts):
        if hue is not None and count:
            shift_hue_(pixels[start : start + count], hue[start : start + count])
            start += count
        if place < 3:
            _blend_(pixels, factors, blends[:, place])
    return pixels if back is None else pixels.index_select(0, back)


def _blend_(pixels: Tensor, factors: Tensor, operation: Tensor) -> None:
    """Apply to each image its blend: f * image + (1 - f) * (black, the image's mean gray, or its gray image)."""
    factor = factors.gather(1, operation.view(-1, 1)).view(-1, 1, 1)
    gray, rest = to_gray(pixels), 1 - factor
    # Twice, because threads share the sum of a large image that is alone, and round it otherwise.
    mean = (gray if len(gray) > 1 else gray.repeat(2, 1, 1)).mean((1, 2), keepdim=True)[: len(gray)]
    mean = mean.mul_(rest * (operation == _CONTRAST).view(-1, 1, 1))
    target = gray.mul_(rest * (operation == _SATURATION).view(-1, 1, 1)).add_(mean)
    pixels.mul_(factor.unsqueeze(1)).add_(target.unsqueeze(1)).clamp_(0, 1)


def shift_hue_(pixels: Tensor, turns: Tensor) -> None:
    """Shift the hue of images (N, 3, H, W) in [0, 1], in place, by `turns` (N,), each in [-0.5, 0.5].

    HSV's largest channel and the chroma c, its distance to the smallest, stay. On the circle of hues, in sixths of a
    turn, red, green and blue lie at 0, 2 and 4. A channel is smallest + c * clamp(2 - d, 0, 1), where d is the hue's
    distance from its place (https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative). The distance from red is
    (green + blue - red - smallest) / c + 1, on green's side where green is above blue: no slow case distinctions.
    """
    red, green, blue = pixels.unbind(1)
    smallest = torch.minimum(red, green)
    torch.minimum(smallest, blue, out=smallest)
    chroma = torch.maximum(red, green)
    torch.maximum(chroma, blue, out=chroma).sub_(smallest)
    hue = (green - red).add_(blue).sub_(smallest)
    hue.div_(chroma.clamp_min(1e-12)).add_(1).copysign_(green - blue)  # gray has chroma 0, and any hue
    # 2 - d is ||x| - 3| - 1 for a difference x up to 6, and up to 7 both are clamped to 1. The hue is within 3, a turn
    # adds up to 3 on one side, and on that side the places are.
    places = torch.arange(0, 6, 2, device=pixels.device)
    places = places - 6 * ((places > 0) & (turns < 0).view(-1, 1))
    torch.sub(hue.unsqueeze(1), (places - 6 * turns.view(-1, 1)).view(-1, 3, 1, 1), out=pixels)
    pixels.abs_().sub_(3).abs_().sub_(1).clamp_(0, 1)
    pixels.mul_(chroma.unsqueeze(1)).add_(smallest.unsqueeze(1))
