"""Orders and splits: which seed draws what, and what each class keeps."""

import pytest
import torch
from PIL import Image

from cifar_dist.config.errors import UserError
from cifar_dist.config.plan import DatasetSizes, fit_to_dataset
from cifar_dist.data.datasets import known_sizes, load_dataset
from cifar_dist.data.sampler import GlobalBatchSampler
from cifar_dist.data.split import stratified_split
from tests.conftest import make_recipe


def test_no_two_seeds_and_epochs_share_an_order():
    orders = set()
    for seed in range(10):
        sampler = GlobalBatchSampler(50, 10, seed=seed)
        for epoch in range(1, 21):
            sampler.set_epoch(epoch)
            orders.add(tuple(sampler.global_order().tolist()))
    assert len(orders) == 200


@pytest.mark.parametrize("size", [1, 3, 10, 69])
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
    for num_classes in (38, 40):
        sizes = DatasetSizes(num_train=40, num_test=1, num_classes=num_classes)
        recipe = fit_to_dataset(make_recipe(base="quick"), sizes)
        assert recipe.validation_size == 40 - num_classes
    sizes = DatasetSizes(num_train=40, num_test=1, num_classes=38)
    with pytest.raises(UserError, match=r"leaves a class without an image .* of 38 classes, set it to at most 2"):
        fit_to_dataset(make_recipe("validation_size=3"), sizes)


def test_the_seed_of_a_training_does_not_choose_the_test_images_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR_DIST_CACHE", str(tmp_path / "cache"))
    for name, grey in (("a", 0), ("b", 100)):
        (tmp_path / "flat" / name).mkdir(parents=True)
        for number in range(12):
            Image.new("L", (8, 8), grey + number).save(tmp_path / "flat" / name / f"{number}.png")
    recipes = [make_recipe("image_size=8", f"seed={seed}") for seed in (0, 1)]
    zero, one = (load_dataset(str(tmp_path / "flat"), tmp_path, recipe) for recipe in recipes)
    assert torch.equal(zero.test.images, one.test.images)
    assert zero.fingerprint() == one.fingerprint()
    assert known_sizes(str(tmp_path / "flat")) == zero.sizes == DatasetSizes(num_train=20, num_test=4, num_classes=2)
