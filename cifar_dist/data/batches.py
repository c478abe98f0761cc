"""From images that live on the device to the batches that the model sees."""

from collections.abc import Iterator

import torch
from torch import Tensor

from cifar_dist.config.recipe import NormalizationConfig
from cifar_dist.data.augmentation import Augmentation
from cifar_dist.data.dataset import LabelledImages
from cifar_dist.data.order import GlobalBatchSampler, Shard


class Normalizer:
    """(pixel - mean) / std per channel, in the memory layout that the model wants."""

    def __init__(self, config: NormalizationConfig, device: torch.device, memory_format: torch.memory_format) -> None:
        mean, std = torch.tensor(config.mean, dtype=torch.float64), torch.tensor(config.std, dtype=torch.float64)
        self.scale = (1 / std).float().view(1, 3, 1, 1).to(device)
        self.shift = (-mean / std).float().view(1, 3, 1, 1).to(device)
        self.memory_format = memory_format

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalise (N, 3, H, W) float32 in [0, 1]."""
        return torch.addcmul(self.shift, pixels, self.scale).contiguous(memory_format=self.memory_format)


class TrainingBatches:
    """The training images of one shard, epoch by epoch: order -> indices -> rows of the table -> augmented batch."""

    def __init__(
        self,
        data: LabelledImages,
        indices: Tensor,
        *,
        sampler: GlobalBatchSampler,
        augmentation: Augmentation,
        normalize: Normalizer,
    ) -> None:
        """Take `indices` (n,) int64 on the CPU of `data` as the training set; the sampler orders positions in it."""
        self.data = data
        self.indices = indices
        self.sampler = sampler
        self.augmentation = augmentation
        self.normalize = normalize

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Go through an epoch's batches: images (B, 3, H, W) float32 normalised, labels (B,) int64."""
        self.sampler.set_epoch(epoch)
        table = self.augmentation.draw_table(epoch, len(self.data))
        device = self.data.images.device
        for positions in self.sampler.batches():
            samples = self.indices[positions]
            on_device = samples.to(device)
            pixels = self.augmentation.apply(self.data.images[on_device], table[samples])
            yield self.normalize(pixels), self.data.labels[on_device]


def evaluation_batches(
    data: LabelledImages, indices: Tensor, *, batch_size: int, shard: Shard, normalize: Normalizer
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Go once through a shard's samples of `indices` (n,) int64, unpadded: sample indices, images, labels."""
    for samples in torch.split(indices[shard.index :: shard.count], batch_size):
        on_device = samples.to(data.images.device)
        pixels = data.images[on_device].to(torch.float32).div_(255)
        yield samples, normalize(pixels), data.labels[on_device]
