"""A common pattern: tensor transforms in loader workers, and everything prepared by Accelerate."""

import itertools

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torchvision.transforms import v2

from cifar_dist.baselines.script import TransformedImages, make_loader


class PeerLoop:
    """The training step of such a program, called again and again; where and how precisely, Accelerate knows."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int) -> None:
        """Take `images` (N, 3, H, W) uint8 and `labels` (N,); the transforms are the script's, on tensors."""
        transform = v2.Compose(
            [
                v2.RandomCrop(images.shape[-1], padding=4),
                v2.RandomHorizontalFlip(),
                v2.RandomRotation(10),
                v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.2),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
            ]
        )
        self.accelerator = Accelerator()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        samples = TransformedImages(images, labels.tolist(), transform)
        loader = make_loader(samples, batch_size, self.accelerator.device)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model.train(), optimizer, loader)
        self._batches = (batch for _ in itertools.count() for batch in self.loader)  # again and again

    def __call__(self) -> None:
        """Do one step."""
        data = next(self._batches)
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(data[0]), data[1])
        self.accelerator.backward(loss)
        self.optimizer.step()
