"""Which samples make which batch, at every world size; and which are held out."""

import pytest
import torch
from PIL import Image

from cifar_dist.config.errors import UserError
from cifar_dist.config.plan import DatasetSizes, fit_to_dataset, make_plan
from cifar_dist.data.dataset import LabelledImages, known_sizes, load_dataset, stratified_split, stratified_subset
from cifar_dist.data.sampler import GlobalBatchSampler, derive_seed
from tests.conftest import make_recipe


def global_batches(
    num_samples: int, world_size: int, *, epoch: int = 1, seed: int = 3, batch: int = 64, parts: int = 1
) -> list[list[list[int]]]:
    """Return the micro-batches of each step, put together from the parts of all ranks."""
    samplers = [
        GlobalBatchSampler(num_samples, batch, seed=seed, rank=rank, num_replicas=world_size, accumulation_steps=parts)
        for rank in range(world_size)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
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


def test_no_two_seeds_and_epochs_share_an_order():
    orders = set()
    for seed in range(10):
        sampler = GlobalBatchSampler(50, 10, seed=seed)
        for epoch in range(1, 21):
            sampler.set_epoch(epoch)
            orders.add(tuple(sampler.order().tolist()))
    assert len(orders) == 200


def test_the_tail_that_is_not_used_is_left_out():
    sampler = GlobalBatchSampler(65, 64, seed=0, num_used=64)
    assert [len(batch.positions) for batch in sampler.micro_batches()] == [64]
    assert len(sampler) == len(set(sampler)) == 64, "it is a DistributedSampler for others, too"


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


@pytest.mark.parametrize("size", [0, 1, 3, 10, 69])
@pytest.mark.parametrize(
    "counts", [[1] * 30 + [70], [70] + [1] * 30, [1, 2, 3, 94], [0, 1, 0, 2, 97], [2] * 45 + [3] * 3 + [61]]
)
def test_each_class_keeps_a_training_image(counts, size):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    train, held_out = stratified_split(labels, size, seed=0)
    assert len(held_out) == size
    assert sorted(torch.cat([train, held_out]).tolist()) == list(range(len(labels)))
    kept = torch.bincount(labels[train], minlength=len(counts))
    assert [bool(number) for number in kept] == [bool(number) for number in counts]
    most = len(labels) - sum(count > 0 for count in counts)
    assert len(stratified_split(labels, most, seed=0)[1]) == most
    with pytest.raises(ValueError, match=rf"validation_size must be in \[0, {most}\]"):
        stratified_split(labels, most + 1, seed=0)


def test_auto_leaves_each_class_an_image_and_a_typed_one_is_refused():
    for num_classes, size in ((940, 60), (951, 0)):
        sizes = DatasetSizes(num_train=1000, num_test=1, num_classes=num_classes)
        assert fit_to_dataset(make_recipe(base="quick"), sizes).validation_size == size
    sizes = DatasetSizes(num_train=40, num_test=1, num_classes=38)
    with pytest.raises(UserError, match=r"leaves a class without an image .* of 38 classes, set it to at most 2"):
        fit_to_dataset(make_recipe("validation_size=3"), sizes)


def test_the_seed_of_a_training_does_not_choose_the_test_images_of_a_folder(tmp_path):
    for name, grey in (("a", 0), ("b", 100)):
        (tmp_path / "flat" / name).mkdir(parents=True)
        for number in range(12):
            Image.new("L", (8, 8), grey + number).save(tmp_path / "flat" / name / f"{number}.png")
    recipes = [make_recipe("image_size=8", f"seed={seed}") for seed in (0, 1)]
    zero, one = (load_dataset(str(tmp_path / "flat"), tmp_path, recipe) for recipe in recipes)
    assert torch.equal(zero.test.images, one.test.images)
    assert zero.fingerprint() == one.fingerprint()
    assert known_sizes(str(tmp_path / "flat")) == zero.sizes == DatasetSizes(num_train=20, num_test=4, num_classes=2)


def test_a_subset_is_chosen_by_the_pixels_in_proportion_to_the_classes():
    labels = torch.tensor([0] * 70 + [1] * 20 + [2] * 9 + [3])
    images = torch.randint(256, (100, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[:5] = images[0]  # files of equal content
    data, everything = LabelledImages(images=images, labels=labels), torch.arange(100)

    def chosen(order: torch.Tensor, size: int) -> list[bytes]:
        moved = LabelledImages(images=images[order].contiguous(), labels=labels[order])
        subset = stratified_subset(moved, everything, size)
        assert subset.tolist() == sorted(set(subset.tolist()))
        return sorted(moved.images[index].numpy().tobytes() for index in subset)

    subset = stratified_subset(data, everything, 20)
    assert torch.bincount(labels[subset]).tolist() == [14, 4, 1, 1]
    assert subset[:14].tolist() != list(range(14)), "not the first ones"
    for seed in range(3):
        order = torch.randperm(100, generator=torch.Generator().manual_seed(seed))
        assert chosen(order, 20) == chosen(everything, 20)
    smaller = stratified_subset(data, everything, 4)
    assert torch.bincount(labels[smaller]).tolist() == [1, 1, 1, 1]
    assert set(smaller.tolist()) < set(subset.tolist())
    train, _ = stratified_split(labels, 30, seed=0)
    assert set(stratified_subset(data, train, 20).tolist()) <= set(train.tolist())
    assert torch.equal(stratified_subset(data, train, 70), train)


def test_the_plan_counts_the_subset_and_refuses_one_that_is_too_small():
    def plan_of(*changes: str, base: str = "original"):
        sizes = DatasetSizes(num_train=1_000, num_test=100, num_classes=10)
        recipe = fit_to_dataset(make_recipe(*changes, base=base), sizes)
        return make_plan(recipe, world_size=1, sizes=sizes, device_type="cpu")

    plan = plan_of("train_size=0.5", base="quick")
    assert (plan.num_train, plan.num_left_out, plan.num_validation, plan.images_per_epoch) == (450, 450, 100, 450)
    assert plan.lines["images"] == "450 of 900 training, 100 validation, 100 test"
    assert plan_of("train_size=900", base="quick").num_left_out == plan_of().num_left_out == 0
    assert plan_of("train_size=129").images_per_epoch == 128, "BatchNorm needs two"
    for changes in (("train_size=9",), ("train_size=0.009",), ("train_size=901", "validation_size=100")):
        with pytest.raises(UserError, match=r"of 10 classes: set it to null or to 10 to (1,0|9)00 images$"):
            plan_of(*changes)
