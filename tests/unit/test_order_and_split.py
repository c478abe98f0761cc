"""Which samples make which batch, at every world size; and which are held out."""

import pytest
import torch
from torch.utils.data import DistributedSampler

from cifar_dist.data.order import GlobalBatchSampler, Shard, derive_seed
from cifar_dist.data.split import stratified_split


def global_batches(num_samples: int, batch: int, world: int, *, epoch: int = 1, seed: int = 3) -> list[list[int]]:
    """Put the shards' parts of each batch together again, position by position."""
    parts = []
    for rank in range(world):
        sampler = GlobalBatchSampler(num_samples, batch, seed=seed, shard=Shard(index=rank, count=world))
        sampler.set_epoch(epoch)
        parts.append([micro_batch.positions for micro_batch in sampler.micro_batches()])
        assert list(sampler) == [sample for part in parts[-1] for sample in part.tolist()]
        assert len(sampler) == sum(len(part) for part in parts[-1])
    merged = []
    for shares in zip(*parts, strict=True):
        together = torch.full((sum(map(len, shares)),), -1)
        for rank, share in enumerate(shares):
            together[rank::world] = share
        merged.append(together.tolist())
    return merged


@pytest.mark.parametrize("num_samples", [1237, 512, 10, 1])
@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_the_global_batches_are_the_same_at_every_world_size(num_samples, world):
    alone = global_batches(num_samples, 64, 1)
    assert global_batches(num_samples, 64, world) == alone
    assert sorted(sample for batch in alone for sample in batch) == list(range(num_samples))
    assert all(len(batch) == 64 for batch in alone[:-1])


def test_the_permutation_is_that_of_a_distributed_sampler():
    ours = GlobalBatchSampler(100, 10, seed=5)
    theirs = DistributedSampler(range(100), num_replicas=1, rank=0, seed=5)
    for epoch in (0, 7):
        ours.set_epoch(epoch)
        theirs.set_epoch(epoch)
        assert list(ours) == list(theirs)


def test_every_epoch_and_seed_has_its_own_order():
    orders = [global_batches(50, 50, 1, epoch=e, seed=s)[0] for e, s in ((1, 3), (2, 3), (1, 8))]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert orders[0] == global_batches(50, 50, 1, epoch=1, seed=3)[0]


def test_the_tail_that_is_not_used_is_left_out():
    sampler = GlobalBatchSampler(65, 64, seed=0, num_used=64)
    assert [len(batch.positions) for batch in sampler.micro_batches()] == [64]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_micro_batches_are_pieces_of_the_global_batch(world):
    whole = GlobalBatchSampler(70, 32, seed=1)
    expected = [batch.tolist() for batch in whole.global_order().split(32)]
    shards = [
        list(
            GlobalBatchSampler(70, 32, seed=1, accumulation_steps=4, shard=Shard(index=i, count=world)).micro_batches()
        )
        for i in range(world)
    ]
    steps, step = [], []
    for parts in zip(*shards, strict=True):
        together = torch.full((sum(len(part.positions) for part in parts),), -1)
        for index, part in enumerate(parts):
            together[index::world] = part.positions
        step += together.tolist()
        if parts[0].ends_step:
            assert {part.images_in_step for part in parts} == {len(step)}
            steps.append(step)
            step = []
    assert steps == expected
    assert [batch.ends_step for batch in shards[0]] == [False] * 3 + [True] + [False] * 3 + [True] + [False] * 2 + [
        True
    ]


def test_no_micro_batch_has_a_single_sample():
    batches = list(GlobalBatchSampler(37, 32, seed=0, accumulation_steps=4).micro_batches())
    assert [len(batch.positions) for batch in batches] == [8, 8, 8, 8, 2, 3]


def test_a_shard_outside_its_count_is_refused():
    with pytest.raises(ValueError, match="index must be in"):
        Shard(index=2, count=2)


def test_derived_seeds_differ_and_stay():
    seeds = {derive_seed(seed, epoch, name) for seed in range(5) for epoch in range(5) for name in ("a", "b")}
    assert len(seeds) == 50
    assert derive_seed(1, 2) == derive_seed(1, 2) != derive_seed(12)
    assert derive_seed("augmentation", 0, 1, "flip") == 6451443817988940325, "old runs could not be repeated"


def test_the_split_is_stratified_and_exact():
    labels = torch.tensor([0] * 700 + [1] * 200 + [2] * 97 + [3] * 3)
    train, held_out = stratified_split(labels, 100, seed=0)
    assert len(held_out) == 100
    assert sorted(torch.cat([train, held_out]).tolist()) == list(range(1000))
    assert torch.bincount(labels[held_out], minlength=4).tolist() in ([70, 20, 10, 0], [70, 20, 9, 1])
    assert held_out.tolist() == sorted(held_out.tolist())


def test_the_split_is_fixed_by_the_seed_alone():
    labels = torch.arange(1000) % 10
    first, again, other = (stratified_split(labels, 100, seed=seed)[1] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("size", [0, 10])
def test_all_or_nothing_can_be_held_out(size):
    train, held_out = stratified_split(torch.arange(10) % 3, size, seed=0)
    assert (len(train), len(held_out)) == (10 - size, size)


def test_more_than_there_is_cannot_be_held_out():
    with pytest.raises(ValueError, match="validation_size must be in"):
        stratified_split(torch.zeros(3, dtype=torch.int64), 4, seed=0)
