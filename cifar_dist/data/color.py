"""torchvision's ColorJitter for a batch in which every image has its own factors and its own order of operations.

Definitions follow `torchvision.transforms.functional` on float images: each operation clamps to [0, 1].
"""

import torch
from torch import Tensor

_GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601-2 luma, as torchvision's rgb_to_grayscale has it
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)


def jitter(pixels: Tensor, factors: Tensor, hue: Tensor | None, orders: Tensor) -> None:
    """Change a batch's colours in place.

    `pixels` (N, 3, H, W) float32 in [0, 1]; `factors` (N, 3) of brightness, contrast and saturation; `hue` (N,) in
    turns, or None; `orders` (N, 4) int64 on the CPU, each row a permutation of the four operations.

    Three of the four are blends, so a step blends every image with whatever its own order asks for. The hue comes
    before, between or after the three blends: at each place it is applied to just the images that have it there.
    """
    is_hue = orders == _HUE
    hue_place = is_hue.int().argmax(1)
    blends = orders[~is_hue].view(len(orders), 3).to(pixels.device)
    for place in range(4):
        if hue is not None:
            chosen = torch.nonzero(hue_place == place).squeeze(1).to(pixels.device)
            if len(chosen):
                pixels[chosen] = shift_hue(pixels[chosen], hue[chosen])
        if place < 3:
            _blend(pixels, factors, blends[:, place])


def _blend(pixels: Tensor, factors: Tensor, operation: Tensor) -> None:
    """Apply to each image its blend: f * image + (1 - f) * (black, the image's mean gray, or its gray image)."""
    factor = factors.gather(1, operation.view(-1, 1)).view(-1, 1, 1, 1)
    red, green, blue = pixels.unbind(1)
    gray = (red * _GRAY[0]).add_(green, alpha=_GRAY[1]).add_(blue, alpha=_GRAY[2]).unsqueeze(1)
    rest = 1 - factor
    target = gray * (rest * (operation == _SATURATION).view(-1, 1, 1, 1))
    target += gray.mean((1, 2, 3), keepdim=True) * (rest * (operation == _CONTRAST).view(-1, 1, 1, 1))
    pixels.mul_(factor).add_(target).clamp_(0, 1)


def shift_hue(pixels: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of images (N, 3, H, W) in [0, 1] by `turns` (N,), each in [-0.5, 0.5].

    HSV's value is the largest channel and its chroma the distance to the smallest; both stay. With the hue h in
    sixths of a turn, a channel is value - chroma * clamp(min(k, 4 - k), 0, 1), where k = (n + h) mod 6 and
    n is 5, 3, 1 for red, green, blue (the form of https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative).
    """
    red, green, blue = pixels.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    per_chroma = chroma.clamp_min(1e-12).reciprocal_()  # gray pixels have chroma 0, and any hue
    sixths = torch.where(
        value == red,
        (green - blue) * per_chroma,
        torch.where(value == green, (blue - red) * per_chroma + 2, (red - green) * per_chroma + 4),
    )
    sixths += 6 * turns.view(-1, 1, 1)
    offsets = torch.tensor([5.0, 3.0, 1.0], device=pixels.device).view(1, 3, 1, 1)
    k = (sixths.unsqueeze(1) + offsets).remainder_(6)
    weight = torch.minimum(k, 4 - k).clamp_(0, 1)
    return torch.addcmul(value.unsqueeze(1), chroma.unsqueeze(1), weight, value=-1)
