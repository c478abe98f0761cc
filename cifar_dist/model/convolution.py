"""Convolutions over so few pixels that each output sees the whole image: dense layers on a CPU."""

import torch
from torch import Tensor, nn
from torch.nn import functional


def use_dense_products(model: nn.Module) -> None:
    """Turn a ResNet's convolutions into SmallImageConv2d, in place; weights, keys and hooks stay."""
    for module in model.modules():
        if type(module) is nn.Conv2d and module.bias is None and module.groups == 1 and module.dilation == (1, 1):
            module.__class__ = SmallImageConv2d


class SmallImageConv2d(nn.Conv2d):
    """A Conv2d that is one matrix product in training on a CPU if each output sees every pixel.

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
    """Return the pixels along an axis that the outputs see, and each output's first tap on them.

    None if the outputs see different pixels.
    """
    count = (size + 2 * padding - kernel) // stride + 1
    seen = size if count > 1 else min(size, kernel - padding)
    taps = [padding - stride * output for output in range(count)]
    return (seen, taps) if all(0 <= tap <= kernel - seen for tap in taps) else None
