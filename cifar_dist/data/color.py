"""torchvision's ColorJitter for a batch in which every image has its own factors and its own order of operations.

Definitions follow `torchvision.transforms.functional` on float images: each operation clamps to [0, 1].
"""

import torch
from torch import Tensor

from cifar_dist.data.dataset import to_device

_GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601-2 luma, as torchvision's rgb_to_grayscale has it
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)


def jitter(pixels: Tensor, factors: Tensor, hue: Tensor | None, orders: Tensor) -> Tensor:
    """Change a batch's colours; the result may be `pixels`, changed in place, or not.

    `pixels` (N, 3, H, W) float32 in [0, 1], contiguous; `factors` (N, 3) of brightness, contrast and saturation; `hue`
    (N,) in turns, or None; `orders` (N, 4) int64 on the CPU, each row a permutation of the four operations.

    Three of the four are blends, so a step blends every image with whatever its own order asks for. The hue comes
    before, between or after the three blends: the images are sorted by that place, so that those that have it together
    lie side by side.
    """
    is_hue = orders == _HUE
    blends = orders[~is_hue].view(len(orders), 3)
    if hue is None:
        return _jitter_sorted(pixels, factors, None, blends, counts=[0] * 4)
    hue_place = is_hue.int().argmax(1)
    by_place = hue_place.argsort(stable=True)
    there, back = to_device(by_place, pixels.device), to_device(by_place.argsort(), pixels.device)
    pixels = pixels.index_select(0, there)
    counts = hue_place.bincount(minlength=4).tolist()
    pixels = _jitter_sorted(pixels, factors[there], hue[there], blends[by_place], counts)
    return pixels.index_select(0, back)


def _jitter_sorted(pixels: Tensor, factors: Tensor, hue: Tensor | None, blends: Tensor, counts: list[int]) -> Tensor:
    """Do it in place; the first `counts[0]` images have their hue before all blends, the next after one, and so on."""
    blends = to_device(blends, pixels.device)
    start = 0
    for place, count in enumerate(counts):
        if hue is not None and count:
            shift_hue_(pixels[start : start + count], hue[start : start + count])
            start += count
        if place < 3:
            _blend(pixels, factors, blends[:, place])
    return pixels


def _blend(pixels: Tensor, factors: Tensor, operation: Tensor) -> None:
    """Apply to each image its blend: f * image + (1 - f) * (black, the image's mean gray, or its gray image)."""
    factor = factors.gather(1, operation.view(-1, 1)).view(-1, 1, 1)
    red, green, blue = pixels.unbind(1)
    gray = (red * _GRAY[0]).add_(green, alpha=_GRAY[1]).add_(blue, alpha=_GRAY[2])
    rest = 1 - factor
    mean = gray.mean((1, 2), keepdim=True).mul_(rest * (operation == _CONTRAST).view(-1, 1, 1))
    target = gray.mul_(rest * (operation == _SATURATION).view(-1, 1, 1)).add_(mean)
    pixels.mul_(factor.unsqueeze(1)).add_(target.unsqueeze(1)).clamp_(0, 1)


def shift_hue_(pixels: Tensor, turns: Tensor) -> None:
    """Turn the hue of images (N, 3, H, W) in [0, 1], in place, by `turns` (N,), each in [-0.5, 0.5].

    HSV's largest channel and its distance to the smallest, the chroma c, stay. On the circle of hues, six sixths of a
    turn long, red, green and blue lie at 0, 2 and 4, and a channel is smallest + c * clamp(2 - d, 0, 1), where d is the
    hue's distance from its place (https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative, said by distances).
    The distance from red is linear in the channels, (green + blue - red - smallest) / c + 1, and the hue lies on
    green's side where green is above blue: so there are no cases to choose between, which would be the slow part.
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
