"""Training and evaluation batches, from images in the device's memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from cifar_dist.config.recipe import NormalizationConfig
from cifar_dist.data.augmentation import COLUMNS, Augmentation, mix
from cifar_dist.data.dataset import LabelledImages
from cifar_dist.data.sampler import GlobalBatchSampler, MicroBatch
from cifar_dist.data.transforms import to_device

# Small batches are augmented together: most of their time is calls, not pixels. On a CPU as much as its caches hold,
# about 512 images of 32 pixels; on an accelerator, where launches cost, 4096 of them, in 50 MiB.
_PIXELS_TOGETHER = {"cpu": 1 << 19, "mps": 1 << 22, "cuda": 1 << 22}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """A micro-batch on the device."""

    images: Tensor
    """(B, 3, S, S) float32, normalized."""
    labels: Tensor
    """(B,) int64."""
    samples: Tensor
    """(B,) int64: indices in the dataset."""
    partner_labels: Tensor | None = None
    """(B,) int64: classes of the mixing partners; None without mixing."""
    shares: Tensor | None = None
    """(B,): how much of each image is its own."""
    images_together: int
    images_in_step: int
    ends_step: bool


class Normalizer(nn.Module):
    """(pixel - mean) / std per channel, in the model's memory format."""

    scale: Tensor
    shift: Tensor

    def __init__(self, config: NormalizationConfig, device: torch.device, memory_format: torch.memory_format) -> None:
        super().__init__()
        mean, std = (torch.tensor(each, dtype=torch.float64).view(1, 3, 1, 1) for each in (config.mean, config.std))
        self.register_buffer("scale", (1 / std).float().to(device))
        self.register_buffer("shift", (-mean / std).float().to(device))
        self.memory_format = memory_format

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalize (N, 3, H, W) float32 in [0, 1]."""
        return (pixels * self.scale).add_(self.shift).contiguous(memory_format=self.memory_format)


def resized(pixels: Tensor, size: int) -> Tensor:
    """Return images (N, 3, H, W) with sides of `size` pixels: bilinear, antialiased if they shrink."""
    if pixels.shape[2:] == (size, size):
        return pixels
    return functional.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


@dataclass(eq=False)
class TrainingBatches:
    """The training batches of one rank: order -> indices -> rows of the table -> augmented batch."""

    data: LabelledImages
    indices: Tensor
    """(n,) int64 on the CPU: the samples of `data` in the training set; the sampler returns positions in it."""
    sampler: GlobalBatchSampler
    augmentation: Augmentation
    normalize: Normalizer
    image_size: Callable[[int, int], int]
    """Returns the side of the images at (epoch, step of the epoch), both counted from 1."""
    _drawn: tuple[int, Tensor, Tensor] = field(default=(0, torch.empty(0), torch.empty(0)), init=False)

    def _draw(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Draw the table and the seeds of an epoch; the last ones are cached."""
        if self._drawn[0] != epoch:
            table = self.augmentation.draw_table(epoch, len(self.data), num_partners=len(self.indices))
            self._drawn = (epoch, table, self.augmentation.draw_seeds(epoch, len(self.data)))
        return self._drawn[1:]

    def epoch(self, epoch: int, *, steps_done: int = 0) -> Iterator[Batch]:
        """Iterate over an epoch's batches after its first `steps_done` steps."""
        self.sampler.set_epoch(epoch)
        table, seeds = self._draw(epoch)
        enough = max(1, _PIXELS_TOGETHER[self.data.images.device.type] // self.data.images[0, 0].numel())
        step, window, num_images = 1, [], 0
        for micro_batch in self.sampler.micro_batches():
            if step > steps_done:
                window.append((micro_batch, self.image_size(epoch, step)))
                num_images += len(micro_batch.positions)
            step += micro_batch.ends_step
            if num_images >= enough:
                yield from self._batches(window, table, seeds)
                window, num_images = [], 0
        if window:
            yield from self._batches(window, table, seeds)
        self._draw(epoch + 1)  # while an accelerator is still busy with the last steps

    def _batches(self, window: list[tuple[MicroBatch, int]], table: Tensor, seeds: Tensor) -> Iterator[Batch]:
        """Augment the images of several micro-batches at once, then yield each at its image size."""
        samples = self.indices[torch.cat([micro_batch.positions for micro_batch, _ in window])]
        on_device, rows = to_device(samples, self.data.images.device), table[samples]
        pixels, labels = self._augmented(on_device, rows, seeds[samples]), self.data.labels[on_device]
        mixed: dict[str, Tensor] = {}
        if self.augmentation.mixes:
            partners = self.indices[rows[:, COLUMNS.index("partner")].long()]
            partners_on_device = to_device(partners, on_device.device)
            partner_labels = self.data.labels[partners_on_device]
            partner_pixels = self._augmented(partners_on_device, table[partners], seeds[partners])
            pixels, shares = mix(pixels, partner_pixels, rows)
            mixed = {"partner_labels": partner_labels, "shares": shares}
        start = 0
        for micro_batch, size in window:
            own = slice(start, start := start + len(micro_batch.positions))
            yield Batch(
                images=self.normalize(resized(pixels[own], size)),
                labels=labels[own],
                samples=on_device[own],
                **{name: values[own] for name, values in mixed.items()},
                images_together=micro_batch.images_together,
                images_in_step=micro_batch.images_in_step,
                ends_step=micro_batch.ends_step,
            )

    def _augmented(self, on_device: Tensor, rows: Tensor, seeds: Tensor) -> Tensor:
        # images[on_device] is twenty times slower on a CPU (torch 2.14).
        return self.augmentation.apply(self.data.images.index_select(0, on_device), rows, seeds)


def evaluation_batches(
    data: LabelledImages, indices: Tensor, *, batch_size: int, normalize: Normalizer, image_size: int
) -> Iterator[Tensor]:
    """Iterate once over the samples `indices` (n,) int64: (B, 3, S, S) float32, normalized."""
    for samples in torch.split(indices, batch_size):
        images = data.images.index_select(0, to_device(samples, data.images.device))
        yield normalize(resized(images.to(torch.float32).div_(255), image_size))
