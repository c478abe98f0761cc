"""Crop, flip, rotation and affine of a batch in a single gather of whole pixels."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AffineMove:
    """A rotation about the image's centre, with a shift and a change of size; all (N,) float32."""

    angle: Tensor
    """Counter-clockwise, in radians."""
    shift_y: Tensor | None = None
    """Pixels, down."""
    shift_x: Tensor | None = None
    """Pixels, to the right."""
    scale: Tensor | None = None


def move_pixels(
    images: Tensor,
    *,
    padding: int,
    crop_y: Tensor,
    crop_x: Tensor,
    reflect: bool,
    flip: Tensor,
    moves: list[AffineMove],
) -> Tensor:
    """Pad, crop, flip, then move (once or more) a batch (N, 3, H, W) uint8; what lies outside becomes 0.

    A pixel of the result is followed back through the moves (each to the nearest pixel, ties to even, as `grid_sample`
    does), the flip and the crop. All are moves of whole pixels, so one gather equals the operations one after the
    other. `crop_y` and `crop_x` (N,), from 0 to 2 `padding`, are the window's corner in the padded image, whose border
    is 0, or with `reflect` the image's reflection about its border pixels; `flip` (N,) is 0 or 1.
    """
    num_images, channels, height, width = images.shape
    y = torch.arange(height, device=images.device, dtype=torch.float32).view(1, height, 1)
    x = torch.arange(width, device=images.device, dtype=torch.float32).view(1, 1, width)
    inside: Tensor | None = None
    for move in reversed(moves):
        y, x = _source_of(move, y, x, height, width)
        within = _within(y, x, height, width)
        inside = within if inside is None else inside & within
    if moves:
        y, x = y.clamp_(0, height - 1), x.clamp_(0, width - 1)
    border = 0 if reflect else min(padding, max(height, width))  # farther out there are zeros, too
    excess = padding - border
    x = (x * (1 - 2 * flip).view(-1, 1, 1)).add_(((width - 1) * flip + crop_x - excess).view(-1, 1, 1))
    y = y + (crop_y - excess).view(-1, 1, 1)
    if reflect:
        y, x = _reflected(y, height), _reflected(x, width)
    elif border:
        images = functional.pad(images, (border, border, border, border))
    if excess:
        y, x = y.clamp(0, images.shape[2] - 1), x.clamp(0, images.shape[3] - 1)
    source = torch.add(x, y, alpha=images.shape[3]).to(torch.int64).flatten(1).unsqueeze(1)
    moved = images.flatten(2).gather(2, source.expand(-1, channels, -1)).view(num_images, channels, height, width)
    return moved if inside is None else moved.mul_(inside.unsqueeze(1))


def _source_of(move: AffineMove, y: Tensor, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Give the nearest pixels from which a move takes the pixels at (y, x)."""
    cos, sin = move.angle.cos().view(-1, 1, 1), move.angle.sin().view(-1, 1, 1)
    y, x = y - (height - 1) / 2, x - (width - 1) / 2
    if move.shift_y is not None and move.shift_x is not None:
        y, x = y - move.shift_y.view(-1, 1, 1), x - move.shift_x.view(-1, 1, 1)
    if move.scale is not None:
        cos, sin = cos / move.scale.view(-1, 1, 1), sin / move.scale.view(-1, 1, 1)
    source_y = (x * sin).add(y * cos).add_((height - 1) / 2).round_()
    source_x = (x * cos).sub(y * sin).add_((width - 1) / 2).round_()
    return source_y, source_x


def _within(y: Tensor, x: Tensor, height: int, width: int) -> Tensor:
    """Tell which pixels lie in the image: bool."""
    # Compared as floats, in place, which is several times faster on a CPU than a comparison that gives bools.
    within_y = (y - (height - 1) / 2).abs_().le_((height - 1) / 2)
    within_x = (x - (width - 1) / 2).abs_().le_((width - 1) / 2)
    return within_y.mul_(within_x).to(torch.bool)


def _reflected(coordinate: Tensor, size: int) -> Tensor:
    """Fold coordinates up to size - 1 beyond a border back into the image, the border pixel itself not repeated."""
    return (size - 1) - ((size - 1) - coordinate.abs()).abs()
