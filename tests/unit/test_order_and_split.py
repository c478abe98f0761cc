"""Which samples make which batch, at every world size; and which are held out."""

import pytest
import torch

from cifar_dist.data.sampler import GlobalBatchSampler, Shard, derive_seed
from cifar_dist.data.split import stratified_split


def global_batches(
    num_samples: int, world_size: int, *, epoch: int = 1, seed: int = 3, batch: int = 64, parts: int = 1
) -> list[list[list[int]]]:
    """Return the micro-batches of each step, put together from the parts of all ranks."""
    samplers = [
        GlobalBatchSampler(
            num_samples, batch, seed=seed, shard=Shard(index=rank, count=world_size), accumulation_steps=parts
        )
        for rank in range(world_size)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
        own = [sample for part in sampler.micro_batches() for sample in part.positions.tolist()]
        assert list(sampler) == own
        assert len(sampler) == len(own)
    steps, step = [], []
    for shares in zip(*(sampler.micro_batches() for sampler in samplers), strict=True):
        together = torch.full((sum(len(share.positions) for share in shares),), -1)
        for rank, share in enumerate(shares):
            together[rank::world_size] = share.positions
        assert {share.images_together for share in shares} == {len(together)}
        step.append(together.tolist())
        assert len({share.ends_step for share in shares}) == 1
        if shares[0].ends_step:
            assert {share.images_in_step for share in shares} == {sum(map(len, step))}
            steps.append(step)
            step = []
    assert not step
    return steps


@pytest.mark.parametrize("num_samples", [1237, 512, 10, 1])
@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_global_batches_are_the_same_at_every_world_size(num_samples, world_size):
    alone = global_batches(num_samples, 1)
    assert global_batches(num_samples, world_size) == alone
    assert sorted(sample for [batch] in alone for sample in batch) == list(range(num_samples))
    assert all(len(batch) == 64 for [batch] in alone[:-1])


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    ("num_samples", "sizes"), [(70, [[8] * 4, [8] * 4, [2, 2, 2]]), (37, [[8] * 4, [2, 3]]), (33, [[8] * 4, [1]])]
)
def test_micro_batches_are_pieces_of_the_global_batch(num_samples, sizes, world_size):
    steps = global_batches(num_samples, world_size, batch=32, parts=4)
    assert [[len(part) for part in step] for step in steps] == sizes  # BatchNorm needs two samples
    assert [[[sample for part in step for sample in part]] for step in steps] == global_batches(
        num_samples, 1, batch=32
    )


def test_every_epoch_and_seed_has_its_own_order():
    orders = [global_batches(50, 1, epoch=epoch, seed=seed) for epoch, seed in ((1, 3), (2, 3), (1, 8))]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_the_tail_that_is_not_used_is_left_out():
    sampler = GlobalBatchSampler(65, 64, seed=0, num_used=64)
    assert [len(batch.positions) for batch in sampler.micro_batches()] == [64]


def test_a_shard_outside_its_count_is_refused():
    with pytest.raises(ValueError, match="index must be in"):
        Shard(index=2, count=2)


def test_derived_seeds_differ_and_stay():
    seeds = {derive_seed(seed, epoch, name) for seed in range(5) for epoch in range(5) for name in ("a", "b")}
    assert len(seeds) == 50
    assert derive_seed(1, 2) != derive_seed(12)
    assert derive_seed("augmentation", 0, 1, "flip") == 6451443817988940325, "old runs could not be repeated"


def test_the_split_is_stratified_exact_and_fixed_by_the_seed():
    labels = torch.tensor([0] * 700 + [1] * 200 + [2] * 97 + [3] * 3)[torch.arange(1000) * 7 % 1000]
    train, held_out = stratified_split(labels, 100, seed=0)
    assert sorted(torch.cat([train, held_out]).tolist()) == list(range(1000))
    assert torch.bincount(labels[held_out], minlength=4).tolist() == [70, 20, 10, 0]
    assert held_out.tolist() == sorted(held_out.tolist())
    assert torch.equal(held_out, stratified_split(labels, 100, seed=0)[1])
    assert not torch.equal(held_out, stratified_split(labels, 100, seed=1)[1])


@pytest.mark.parametrize("size", [0, 7])
def test_nothing_or_all_but_one_of_each_class_can_be_held_out(size):
    train, held_out = stratified_split(torch.arange(10) % 3, size, seed=0)
    assert (len(train), len(held_out)) == (10 - size, size)
    with pytest.raises(ValueError, match="validation_size must be in"):
        stratified_split(torch.zeros(3, dtype=torch.int64), 4, seed=0)
