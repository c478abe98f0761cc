"""FastNet: a small convolutional network for images of CIFAR's size (arXiv 2404.00498, section 3)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

_WIDTHS = (24, 64, 256, 256)
_EIGENVALUE_OFFSET = 5e-4
"""Added to the eigenvalues of normalized images' patches, so that a singular covariance has finite filters."""
_IMAGES_AT_ONCE = 500


class FastNet(nn.Module):
    """Seven convolutions and a linear head, 1.97 million parameters with 10 classes (section 3.1).

    The input is normalized images (N, 3, H, W) of at least 9 x 9 pixels, the output logits (N, num_classes). Unlike the
    paper's, the last pooling is over the whole image, so that any image size fits. The recipe `fast` scales the head
    and freezes BatchNorm's scales, as the paper does. The weights are drawn from torch's global generator. The filters
    of `whitening` are frozen, and random until `whiten` sets them.
    """

    whitening_is_frozen = False
    """Whether the bias of `whitening` has no gradient, too, which saves the backward pass through what follows it."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.whitening = nn.Conv2d(3, _WIDTHS[0], kernel_size=2)
        self.whitening.weight.requires_grad_(False)
        nn.init.zeros_(self.whitening.bias)  # type: ignore[arg-type]
        self.blocks = nn.Sequential(*map(_block, _WIDTHS, _WIDTHS[1:]))
        self.fc = nn.Linear(_WIDTHS[-1], num_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, num_classes) for normalized images (N, 3, H, W)."""
        patches = functional.gelu(self.whitening(images))
        features: Tensor = self.blocks(patches.detach() if self.whitening_is_frozen else patches)
        logits: Tensor = self.fc(features.amax((2, 3)))
        if self.whitening_is_frozen and self.training:  # DDP waits for a gradient of every parameter
            logits = logits + 0 * self.whitening.bias.sum()  # type: ignore[union-attr]
        return logits


def _block(channels_in: int, channels_out: int) -> nn.Sequential:
    """Build a block that halves the image.

    The first filters of its convolutions, one for each input channel, return that channel (section 3.3).
    """
    first = nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False)
    second = nn.Conv2d(channels_out, channels_out, kernel_size=3, padding=1, bias=False)
    for conv in (first, second):
        nn.init.dirac_(conv.weight.detach()[: conv.in_channels])
    norms = [nn.BatchNorm2d(channels_out) for _ in range(2)]
    return nn.Sequential(first, nn.MaxPool2d(2), norms[0], nn.GELU(), second, norms[1], nn.GELU())


@torch.no_grad()
def whiten(model: FastNet, images: Tensor) -> None:
    """Set the first layer's filters so that their outputs on `images` have identity covariance (section 3.2).

    `images` are normalized training images (N, 3, H, W) on the CPU; the filters are a function of them alone. The
    filters are the eigenvectors of the covariance of the 2x2 patches, scaled, and then their negatives, so that the
    activation loses nothing.
    """
    size, count = model.whitening.weight[0].numel(), 0
    total, products = torch.zeros(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
    for part in torch.split(images, _IMAGES_AT_ONCE):
        patches = functional.unfold(part.double(), kernel_size=2).transpose(0, 1).flatten(1)
        total += patches.sum(1)
        products += patches @ patches.T
        count += patches.shape[1]
    mean = total / count
    eigenvalues, eigenvectors = torch.linalg.eigh(products / count - mean.outer(mean))
    largest = eigenvectors.gather(0, eigenvectors.abs().argmax(0, keepdim=True))
    eigenvectors *= largest.sign()  # an eigenvector is known but for its sign
    filters = (eigenvectors / (eigenvalues + _EIGENVALUE_OFFSET).sqrt()).T
    model.whitening.weight.copy_(torch.cat([filters, -filters]).view_as(model.whitening.weight))
