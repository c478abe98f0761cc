"""Cutout, mixup and CutMix of a batch, each image by its own parameters."""

import torch
from torch import Tensor


def cutout(pixels: Tensor, center_y: Tensor, center_x: Tensor, side: int, fill: Tensor) -> None:
    """Blank a square of `side` pixels about each image's own centre, in place (arXiv 1708.04552).

    `pixels` (N, 3, H, W), centres (N,) whole pixels; the square is cut off at the border. `fill` (3,) is the colour
    that normalisation turns into 0, as the paper has it.
    """
    height, width = pixels.shape[2:]
    blank = _span(center_y - side // 2, center_y - side // 2 + side, height).unsqueeze(2)
    blank = blank & _span(center_x - side // 2, center_x - side // 2 + side, width).unsqueeze(1)
    torch.where(blank.unsqueeze(1), fill.view(1, 3, 1, 1), pixels, out=pixels)


def mix(
    pixels: Tensor, partners: Tensor, *, weight: Tensor, is_box: Tensor, center_y: Tensor, center_x: Tensor
) -> tuple[Tensor, Tensor]:
    """Mix each image with its partner: blended (mixup, arXiv 1710.09412) or a box of it (CutMix, arXiv 1905.04899).

    `pixels` and `partners` (N, 3, H, W); `weight` (N,) is the image's own share; `is_box` (N,) tells which way. The box
    has the area 1 - weight, its centre at (center_y, center_x), whole pixels, and is cut off at the border; the share
    is then what is left, as in torchvision's CutMix. Gives the mixed images and the shares (N,).
    """
    height, width = pixels.shape[2:]
    half = 0.5 * (1 - weight).sqrt()
    half_y, half_x = (half * height).floor(), (half * width).floor()
    rows = _span(center_y - half_y, center_y + half_y, height)
    columns = _span(center_x - half_x, center_x + half_x, width)
    box = (rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1)
    area = rows.sum(1) * columns.sum(1) / (height * width)
    share = torch.where(is_box, 1 - area, weight)
    per_pixel = torch.where(is_box.view(-1, 1, 1, 1), 1 - box.to(pixels.dtype), weight.view(-1, 1, 1, 1))
    return torch.lerp(partners, pixels, per_pixel), share


def _span(start: Tensor, end: Tensor, size: int) -> Tensor:
    """Tell which of `size` positions lie in [start, end): (N, size) bool."""
    position = torch.arange(size, device=start.device)
    return (position >= start.unsqueeze(1)) & (position < end.unsqueeze(1))
