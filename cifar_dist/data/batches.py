"""From images that live on the device to the batches that the model sees."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cifar_dist.config.recipe import NormalizationConfig
from cifar_dist.data.augmentation import COLUMNS, Augmentation
from cifar_dist.data.dataset import LabelledImages
from cifar_dist.data.order import GlobalBatchSampler, MicroBatch, Shard


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """What is forwarded at once, on the device."""

    images: Tensor
    """(B, 3, S, S) float32, normalised."""
    labels: Tensor
    """(B,) int64."""
    samples: Tensor
    """(B,) int64: their places in the dataset."""
    partner_labels: Tensor | None
    """(B,) int64: the classes that were mixed in; None where nothing is mixed."""
    shares: Tensor | None
    """(B,): how much of each image is its own."""
    images_together: int
    images_in_step: int
    ends_step: bool


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


def resized(pixels: Tensor, size: int) -> Tensor:
    """Give images (N, 3, H, W) with sides of `size` pixels: bilinear, antialiased where they shrink."""
    if pixels.shape[2:] == (size, size):
        return pixels
    return functional.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


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
        image_size: Callable[[int, int], int],
    ) -> None:
        """Take `indices` (n,) int64 on the CPU of `data` as the training set; the sampler orders positions in it.

        `image_size` gives the side of the images in an (epoch, step of the epoch), both counted from 1.
        """
        self.data = data
        self.indices = indices
        self.sampler = sampler
        self.augmentation = augmentation
        self.normalize = normalize
        self.image_size = image_size

    def epoch(self, epoch: int, *, steps_done: int = 0) -> Iterator[Batch]:
        """Go through an epoch's batches, but for those of its first steps that are done already."""
        self.sampler.set_epoch(epoch)
        table = self.augmentation.draw_table(epoch, len(self.data), num_partners=len(self.indices))
        step = 1
        for micro_batch in self.sampler.micro_batches():
            if step > steps_done:
                yield self._batch(micro_batch, table, self.image_size(epoch, step))
            step += micro_batch.ends_step

    def _batch(self, micro_batch: MicroBatch, table: Tensor, size: int) -> Batch:
        samples = self.indices[micro_batch.positions]
        on_device = samples.to(self.data.images.device)
        pixels = self._augmented(samples, on_device, table)
        partner_labels, shares = None, None
        if self.augmentation.mixes:
            partners = self.indices[table[samples, COLUMNS.index("partner")].long()]
            partners_on_device = partners.to(on_device.device)
            partner_labels = self.data.labels[partners_on_device]
            other = self._augmented(partners, partners_on_device, table)
            pixels, shares = self.augmentation.mix(pixels, other, table[samples])
        return Batch(
            images=self.normalize(resized(pixels, size)),
            labels=self.data.labels[on_device],
            samples=on_device,
            partner_labels=partner_labels,
            shares=shares,
            images_together=micro_batch.images_together,
            images_in_step=micro_batch.images_in_step,
            ends_step=micro_batch.ends_step,
        )

    def _augmented(self, samples: Tensor, on_device: Tensor, table: Tensor) -> Tensor:
        return self.augmentation.apply(self.data.images[on_device], table[samples])


def evaluation_batches(
    data: LabelledImages, indices: Tensor, *, batch_size: int, shard: Shard, normalize: Normalizer, image_size: int
) -> Iterator[Tensor]:
    """Go once through a shard's samples of `indices` (n,) int64, unpadded: images (B, 3, S, S) float32, normalised."""
    for samples in torch.split(indices[shard.index :: shard.count], batch_size):
        pixels = data.images[samples.to(data.images.device)].to(torch.float32).div_(255)
        yield normalize(resized(pixels, image_size))
