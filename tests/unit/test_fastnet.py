"""FastNet and its whitened first layer."""

import copy

import pytest
import torch
from torch.nn import functional

from cifar_dist.model.fastnet import FastNet, whiten


def make_fastnet(num_classes: int = 10, *, seed: int = 0) -> FastNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FastNet(num_classes)


def correlated_images(count: int) -> torch.Tensor:
    """Normalized images (count, 3, 8, 8) whose neighbouring pixels and channels are alike, as in photographs."""
    noise = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = noise + noise.roll(1, 1) / 2 + noise.roll(1, 2) + noise.roll(1, 3) / 2 + 0.3
    return images / images.std()


@pytest.fixture(scope="module")
def model() -> FastNet:
    """A whitened network. Read only."""
    model = make_fastnet()
    whiten(model, correlated_images(1200))
    return model


def test_it_has_two_million_parameters():
    sizes = [parameter.numel() for parameter in make_fastnet().parameters()]
    convolutions = 24 * 12 + 9 * (24 * 64 + 64 * 64 + 64 * 256 + 3 * 256 * 256)
    biases_and_norms = 24 + 2 * 2 * (64 + 256 + 256)
    assert sum(sizes) == convolutions + biases_and_norms + 256 * 10 == 1_972_792


def test_any_image_size_has_logits_and_one_layer_is_frozen(model):
    model = copy.deepcopy(model)
    for side in (9, 16, 24, 32, 64):
        logits = model(torch.randn(2, 3, side, side))
        assert logits.shape == (2, 10) and bool(logits.isfinite().all()), side
    logits.sum().backward()
    frozen = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert frozen == ["whitening.weight"]


def test_features_are_the_maxima_of_the_image(model):
    model, images, calls = copy.deepcopy(model).eval(), torch.randn(2, 3, 32, 32), {}
    for name in ("blocks", "fc"):
        getattr(model, name).register_forward_hook(lambda _, args, out, name=name: calls.update({name: (args[0], out)}))
    logits = model(images)
    torch.testing.assert_close(calls["blocks"][0], functional.gelu(model.whitening(images)))
    assert calls["blocks"][1].shape == (2, 256, 3, 3)
    torch.testing.assert_close(calls["fc"][0], calls["blocks"][1].flatten(2).max(2).values)
    assert torch.equal(logits, calls["fc"][1])


def test_a_frozen_first_layer_changes_no_output_and_has_no_gradient(model):
    free, frozen = copy.deepcopy(model), copy.deepcopy(model)
    frozen.whitening_is_frozen = True
    images = torch.randn(4, 3, 16, 16)
    for each in (free, frozen):
        each(images).logsumexp(1).sum().backward()
    assert torch.equal(free(images), frozen(images))
    assert bool(free.whitening.bias.grad.abs().min() > 0)
    assert torch.equal(frozen.whitening.bias.grad, torch.zeros(24)), "0 and not None: DDP waits for it"
    torch.testing.assert_close(frozen.blocks[0][0].weight.grad, free.blocks[0][0].weight.grad)


def test_whitened_patches_have_identity_covariance(model):
    images = correlated_images(1200)
    patches = functional.unfold(images, kernel_size=2).transpose(0, 1).flatten(1)
    assert (torch.cov(patches) - torch.eye(12)).abs().max() > 0.3, "they would be white without the layer"
    outputs = model.whitening(images).transpose(0, 1).flatten(1)
    covariance = torch.cov(outputs[:12], correction=0)
    assert (covariance - torch.eye(12)).abs().max() < 0.02
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-4
    torch.testing.assert_close(outputs[12:], -outputs[:12])


def test_whitening_is_a_function_of_the_images(model):
    other, images = make_fastnet(seed=1), correlated_images(1200)
    state = torch.get_rng_state()
    whiten(other, images)
    assert torch.equal(other.whitening.weight, model.whitening.weight)
    assert torch.equal(torch.get_rng_state(), state)
    whiten(other, images.flip(0))  # sums in another order: the signs stay
    torch.testing.assert_close(other.whitening.weight, model.whitening.weight)
    filters = other.whitening.weight[:12].flatten(1)
    assert bool((filters.amax(1) == filters.abs().amax(1)).all())
    whiten(other, torch.zeros(4, 3, 8, 8))
    assert bool(other.whitening.weight.isfinite().all()), "a singular covariance"


def test_the_first_filters_of_a_convolution_are_the_identity():
    images = torch.randn(1, 256, 4, 4)
    for block in make_fastnet().blocks:
        for conv in (block[0], block[4]):
            part = images[:, : conv.in_channels]
            outputs = conv(part)
            torch.testing.assert_close(outputs[:, : conv.in_channels], part)
            rest = conv.weight[conv.in_channels :].flatten(1)
            assert bool(((rest != 0).sum(1) > 100).all()), "the others are torch's own"


def test_the_seed_alone_decides_the_weights():
    first, again, other = (make_fastnet(seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(*pair) for pair in zip(first.values(), again.values(), strict=True))
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


def test_a_state_dict_has_the_whole_network(model):
    other = make_fastnet(seed=1)
    other.load_state_dict(model.state_dict(), strict=True)
    assert not other.whitening.weight.requires_grad
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(other.eval()(images), copy.deepcopy(model).eval()(images))
