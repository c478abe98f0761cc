"""The stream of batches: byte for byte the same in every world, and from any step on."""

import functools
import hashlib

import pytest
import torch

from cifar_dist.data.augmentation import Augmentation
from cifar_dist.data.batches import Normalizer, TrainingBatches
from cifar_dist.data.dataset import LabelledImages
from cifar_dist.data.order import GlobalBatchSampler, Shard
from tests.conftest import make_recipe


def batches_of(num_images: int, rank: int, world_size: int, *, accumulation_steps: int = 1) -> TrainingBatches:
    recipe = make_recipe("augmentation.mixup=1", "augmentation.cutmix=1", "augmentation.cutout=8")
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(256, (num_images, 3, 32, 32), generator=generator, dtype=torch.uint8)
    shard = Shard(index=rank, count=world_size)
    return TrainingBatches(
        LabelledImages(images=images, labels=torch.arange(num_images) % 10),
        torch.arange(num_images),
        sampler=GlobalBatchSampler(num_images, 120, seed=3, shard=shard, accumulation_steps=accumulation_steps),
        augmentation=Augmentation(recipe.augmentation, seed=3),
        normalize=Normalizer(recipe.normalization, torch.device("cpu"), torch.contiguous_format),
        image_size=lambda epoch, step: 32,
    )


@functools.cache
def stream(num_images: int, world_size: int) -> tuple[bytes, ...]:
    """Two epochs as `world_size` ranks see them: a hash of each global batch's samples, parameters and pixels."""
    shards = [batches_of(num_images, rank, world_size) for rank in range(world_size)]
    digests = []
    for epoch in (1, 2):
        table = shards[0].augmentation.draw_table(epoch, num_images, num_partners=num_images)
        for parts in zip(*(shard.epoch(epoch) for shard in shards), strict=True):
            size = sum(len(part.samples) for part in parts)
            samples, pixels = torch.empty(size, dtype=torch.int64), torch.empty(size, 3, 32, 32)
            for rank, part in enumerate(parts):
                samples[rank::world_size], pixels[rank::world_size] = part.samples, part.images
            digest = hashlib.sha256(samples.numpy().tobytes())
            digest.update(table[samples].numpy().tobytes())
            digest.update(pixels.numpy().tobytes())
            digests.append(digest.digest())
    return tuple(digests)


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("num_images", [5_000, 1_237])
def test_every_world_sees_the_same_bytes(num_images, world_size):
    alone = stream(num_images, 1)
    assert len(alone) == len(set(alone)) == 2 * -(-num_images // 120)
    assert stream(num_images, world_size) == alone


def test_batches_are_augmented_together_until_there_is_enough_for_all_threads():
    batches, together = batches_of(1320, 0, 1), []
    apply = batches.augmentation.apply
    batches.augmentation.apply = lambda images, rows: together.append(len(images)) or apply(images, rows)
    assert len(list(batches.epoch(1))) == 11
    assert together == [600] * 4 + [120] * 2, "512 of 32 pixels are enough; each window has its partners too"


def test_batches_that_are_augmented_together_have_sizes_of_their_own():
    batches = batches_of(480, 0, 1)
    batches.image_size = lambda epoch, step: 8 * (step + epoch)
    for epoch in (1, 2):
        assert [len(batch.images[0, 0]) for batch in batches.epoch(epoch)] == [
            8 * (step + epoch) for step in range(1, 5)
        ]


@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("steps_done", [0, 1, 3, 4])
def test_an_epoch_goes_on_from_any_step(steps_done, accumulation_steps):
    batches = batches_of(400, 1, 2, accumulation_steps=accumulation_steps)
    whole = list(batches.epoch(2))
    rest = list(batches.epoch(2, steps_done=steps_done))
    skipped, ended = len(whole) - len(rest), 0
    assert sum(batch.ends_step for batch in whole[:skipped]) == steps_done
    for before, after in zip(whole[skipped:], rest, strict=True):
        assert torch.equal(before.images, after.images)
        assert torch.equal(before.samples, after.samples)
        ended += after.ends_step
    assert ended == 4 - steps_done
