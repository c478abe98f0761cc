"""The network is torchvision's; its weights go there and back."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from cifar_dist.config.errors import UserError
from cifar_dist.model.optimizer import build_optimizer, set_learning_rate
from cifar_dist.model.resnet import build_resnet, infer_architecture, load_weights
from cifar_dist.model.schedule import learning_rate
from tests.conftest import make_recipe

STEMS = ("imagenet", "cifar", "small")


def torchvisions(stem: str, num_classes: int) -> nn.Module:
    """torchvision's network, its stem adapted as people do by hand."""
    model = resnet18(num_classes=num_classes)
    if stem != "imagenet":
        model.conv1 = nn.Conv2d(3, 64, 3, stride=1 if stem == "cifar" else 2, padding=1, bias=False)
        model.maxpool = nn.Identity()
    return model


@pytest.mark.parametrize("stem", STEMS)
def test_weights_load_into_torchvisions_network_and_give_the_same_logits(stem):
    ours, theirs = build_resnet(stem, 10, seed=3), torchvisions(stem, 10)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours.eval()(images), theirs.eval()(images))


def test_the_cifar_stem_has_the_published_number_of_parameters():
    assert sum(parameter.numel() for parameter in build_resnet("cifar", 10, seed=0).parameters()) == 11_173_962


@pytest.mark.parametrize(("stem", "side"), [("cifar", 32), ("small", 16), ("imagenet", 8)])
def test_the_stems_keep_so_many_pixels(stem, side):
    model = build_resnet(stem, 10, seed=0)
    features = model.maxpool(model.relu(model.bn1(model.conv1(torch.rand(2, 3, 32, 32)))))
    assert features.shape == (2, 64, side, side)


def test_the_seed_alone_decides_the_weights():
    before = torch.get_rng_state()
    first, again, other = (build_resnet("cifar", 10, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(*pair) for pair in zip(first.values(), again.values(), strict=True))
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])
    assert torch.equal(before, torch.get_rng_state()), "the caller's random state was changed"


@pytest.mark.parametrize(("stem", "inferred"), [("imagenet", "imagenet"), ("cifar", "cifar"), ("small", "cifar")])
def test_stem_and_classes_are_read_off_the_tensors(stem, inferred):
    assert infer_architecture(build_resnet(stem, 7, seed=0).state_dict()) == (inferred, 7)


def test_another_network_is_refused():
    with pytest.raises(UserError, match=r"conv1\.weight or fc\.weight is missing"):
        infer_architecture(nn.Linear(3, 3).state_dict())
    with pytest.raises(UserError, match=r"conv1\.weight has the shape \[64, 3, 5, 5\]"):
        infer_architecture({"conv1.weight": torch.zeros(64, 3, 5, 5), "fc.weight": torch.zeros(10, 512)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("bn1.weight"), "bn1.weight is missing from the file"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "extra is unknown in the model"),
        (lambda weights: weights.update({"fc.bias": torch.zeros(3)}), r"fc.bias has the shape \[3\], not \[10\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(change, message):
    model = build_resnet("cifar", 10, seed=0)
    weights = copy.deepcopy(dict(model.state_dict()))
    change(weights)
    with pytest.raises(UserError, match=message):
        load_weights(model, weights)


def test_the_optimizer_steps_as_torchs_sgd_does():
    recipe = make_recipe()
    ours = build_resnet("imagenet", 10, seed=0)
    theirs = copy.deepcopy(ours)
    optimizers = (
        build_optimizer(ours, recipe.optimizer),
        torch.optim.SGD(theirs.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4),
    )
    for _ in range(3):
        images, labels = torch.rand(4, 3, 32, 32), torch.arange(4)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    for mine, yours in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, yours, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("decay_all", [True, False])
def test_norms_and_biases_decay_only_where_they_should(decay_all):
    recipe = make_recipe(f"optimizer.decay_norm_and_bias={str(decay_all).lower()}", "optimizer.weight_decay=0.1")
    model = build_resnet("imagenet", 10, seed=0)
    optimizer = build_optimizer(model, recipe.optimizer)
    decay = {id(each): group["weight_decay"] for group in optimizer.param_groups for each in group["params"]}
    for name, parameter in model.named_parameters():
        expected = 0.1 if decay_all or parameter.ndim > 1 else 0.0
        assert decay[id(parameter)] == expected, name


def test_the_learning_rate_is_set_in_every_group():
    recipe = make_recipe("optimizer.decay_norm_and_bias=false")
    optimizer = build_optimizer(build_resnet("imagenet", 10, seed=0), recipe.optimizer)
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_the_constant_schedule_is_constant():
    recipe = make_recipe("optimizer.learning_rate=0.3")
    assert {learning_rate(recipe, step) for step in (0, 1, 1000)} == {0.3}
