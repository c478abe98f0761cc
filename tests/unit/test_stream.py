"""The stream of batches: byte for byte the same in every world, and from any step on."""

import functools
import hashlib

import pytest
import torch

from cifar_dist.data.augmentation import Augmentation
from cifar_dist.data.dataset import LabelledImages
from cifar_dist.data.loader import Normalizer, TrainingBatches
from cifar_dist.data.sampler import GlobalBatchSampler
from tests.conftest import make_recipe


def batches_of(
    num_images: int, rank: int = 0, world_size: int = 1, *, accumulation_steps: int = 1, batch: int = 120
) -> TrainingBatches:
    recipe = make_recipe("augmentation={mixup: 1, cutmix: 1, cutout: 8, affine_degrees: 10, policy: trivial}")
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(256, (num_images, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return TrainingBatches(
        LabelledImages(images=images, labels=torch.arange(num_images) % 10),
        torch.arange(num_images),
        sampler=GlobalBatchSampler(
            num_images, batch, seed=3, rank=rank, num_replicas=world_size, accumulation_steps=accumulation_steps
        ),
        augmentation=Augmentation(recipe.augmentation, seed=3),
        normalize=Normalizer(recipe.normalization, torch.device("cpu"), torch.contiguous_format),
        image_size=lambda epoch, step: 32,
    )


@functools.cache
def stream(num_images: int, world_size: int) -> tuple[bytes, ...]:
    """Hash the samples, labels and pixels of each global batch of two epochs, as `world_size` ranks see them."""
    shards = [batches_of(num_images, rank, world_size) for rank in range(world_size)]
    digests = []
    for epoch in (1, 2):
        for parts in zip(*(shard.epoch(epoch) for shard in shards), strict=True):
            size, digest = sum(len(part.samples) for part in parts), hashlib.sha256()
            for name in ("samples", "labels", "partner_labels", "shares", "images"):
                values = [getattr(part, name) for part in parts]
                together = torch.empty(size, *values[0].shape[1:], dtype=values[0].dtype)
                for rank, part in enumerate(values):
                    together[rank::world_size] = part
                digest.update(together.numpy().tobytes())
            digests.append(digest.digest())
    return tuple(digests)


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("num_images", [720, 841])
def test_every_world_sees_the_same_bytes(num_images, world_size):
    alone = stream(num_images, 1)
    assert len(alone) == len(set(alone)) == 2 * -(-num_images // 120)
    assert stream(num_images, world_size) == alone


def test_labels_and_shares_belong_to_the_mixed_images():
    """Each image is `share` of its own and the rest of a partner's, from the training set: here each second image."""
    batches = batches_of(30, batch=10)
    recipe = make_recipe("augmentation.mixup=1", base="plain")
    batches.augmentation = Augmentation(recipe.augmentation, seed=3)
    batches.normalize = lambda pixels: pixels
    batches.indices = torch.arange(1, 60, 2)
    batches.data = LabelledImages(
        images=torch.arange(60, dtype=torch.uint8).view(-1, 1, 1, 1).expand(60, 3, 32, 32).contiguous(),
        labels=torch.arange(60),
    )
    for batch in batches.epoch(1):
        assert batch.partner_labels.remainder(2).all()
        mixed = batch.shares * batch.labels + (1 - batch.shares) * batch.partner_labels
        torch.testing.assert_close(batch.images[:, 0, 0, 0] * 255, mixed)
        assert torch.equal(batch.labels, batch.samples)


def test_batches_are_augmented_together_until_there_is_enough_for_all_threads():
    batches, together = batches_of(1320), []
    apply = batches.augmentation.apply
    batches.augmentation.apply = lambda images, *rows: together.append(len(images)) or apply(images, *rows)
    assert len(list(batches.epoch(1))) == 11
    assert together == [600] * 4 + [120] * 2, "512 of 32 pixels are enough; each window has its partners too"


def test_batches_that_are_augmented_together_have_sizes_of_their_own():
    batches = batches_of(480)
    batches.image_size = lambda epoch, step: 8 * (step + epoch)
    for epoch in (1, 2):
        sizes = [batch.images.shape[2] for batch in batches.epoch(epoch)]
        assert sizes == [8 * (step + epoch) for step in range(1, 5)]


@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("steps_done", [0, 1, 3, 4])
def test_an_epoch_resumes_from_any_step(steps_done, accumulation_steps):
    batches = batches_of(100, 1, 2, accumulation_steps=accumulation_steps, batch=30)
    whole = list(batches.epoch(2))
    rest = list(batches.epoch(2, steps_done=steps_done))
    skipped = len(whole) - len(rest)
    assert sum(batch.ends_step for batch in whole[:skipped]) == steps_done
    assert sum(batch.ends_step for batch in rest) == 4 - steps_done
    for before, after in zip(whole[skipped:], rest, strict=True):
        assert torch.equal(before.images, after.images)
        assert torch.equal(before.samples, after.samples)
