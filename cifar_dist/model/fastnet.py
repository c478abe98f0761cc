"""Stub."""

from torch import Tensor, nn


class FastNet(nn.Module):
    """Stub."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Stub."""
        return self.head(x.mean((2, 3)))


def whiten(model: FastNet, images: Tensor) -> None:
    """Stub."""
