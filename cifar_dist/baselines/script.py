"""The loop of the original script: PIL transforms a sample, two loader workers, the loss read in every step."""

import itertools
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

NUM_WORKERS = 2
PREFETCHED = 2 * NUM_WORKERS
"""Batches that the workers prepare ahead, torch's default."""


@dataclass(eq=False)
class TransformedImages(Dataset[tuple[Tensor, int]]):
    """Images that are transformed one by one, when a worker asks for them."""

    images: Any
    """N of what `transform` takes, by their places."""
    labels: Sequence[int]
    transform: Callable[[Any], Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def end_quietly(worker: int) -> None:
    """Have a worker end without a fault at SIGTERM, which goes to all processes of a group.

    Of a worker that a signal has killed torch raises an error in the parent, at any time, even in its last moments.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def make_loader(samples: TransformedImages, batch_size: int, device: torch.device) -> DataLoader[tuple[Tensor, int]]:
    """Give the script's loader."""
    return DataLoader(
        samples,
        batch_size=batch_size,
        shuffle=True,
        num_workers=NUM_WORKERS,
        worker_init_fn=end_quietly,
        pin_memory=device.type == "cuda",
        drop_last=True,  # so that every step is as long as any other
    )


class ScriptLoop:
    """The script's training step, called again and again; in float32 and contiguous, on one process."""

    def __init__(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int, device: torch.device
    ) -> None:
        """Take `images` (N, 3, H, W) uint8 and `labels` (N,); the samples are what torchvision's CIFAR10 gives."""
        transform = transforms.Compose(
            [
                Image.fromarray,
                transforms.RandomCrop(images.shape[-1], padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.RandomRotation(10),
                transforms.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.2),
                transforms.ToTensor(),
                transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
            ]
        )
        pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.device = device
        self.model = model.to(device).train()
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        self.loader = make_loader(TransformedImages(pixels, labels.tolist(), transform), batch_size, device)
        self.epoch_loss = 0.0
        self._batches = (batch for _ in itertools.count() for batch in self.loader)  # again and again

    def __call__(self) -> None:
        """Do one step."""
        data = next(self._batches)
        inputs, labels = data[0].to(self.device), data[1].to(self.device)
        self.optimizer.zero_grad()
        loss = self.criterion(self.model(inputs), labels)
        loss.backward()
        self.optimizer.step()
        self.epoch_loss += loss.item()
