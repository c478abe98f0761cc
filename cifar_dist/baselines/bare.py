"""The floor: forward, backward and optimiser on one fixed batch on the device, with torch alone."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class BareStep:
    """The training step, called again and again: nobody's loop is faster with this model, precision and layout."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        images: Tensor,
        labels: Tensor,
        dtype: torch.dtype | None,
    ) -> None:
        """Take `images` (B, 3, S, S) float32 and `labels` (B,), both where the model is; `dtype` is autocast's."""
        self.model = model.train()
        self.optimizer = optimizer
        self.images = images
        self.labels = labels
        self.dtype = dtype

    def forward(self) -> Tensor:
        """Give the loss."""
        with torch.autocast(self.images.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            logits = self.model(self.images)
        return functional.cross_entropy(logits.float(), self.labels)

    def __call__(self) -> None:
        """Do one step."""
        self.forward().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
