"""A convolution over few pixels is a matrix product: the same outputs and gradients as torch's own."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from cifar_dist.config.plan import make_plan
from cifar_dist.model.networks import SmallImageConv2d, build_network, use_dense_products
from cifar_dist.run.results import Observer
from cifar_dist.training.setup import build_trainer
from tests.conftest import make_dataset, make_recipe

DENSE = {
    (3, 1, 1, 1): 1, (3, 2, 1, 1): 1, (3, 2, 1, 2): 1, (3, 1, 1, 2): 2, (1, 2, 0, 2): 1, (1, 2, 0, 1): 1,
    (1, 1, 0, 1): 1,
}  # fmt: skip
"""(kernel, stride, padding, pixels a side) whose outputs see every pixel that is used -> outputs a side."""
STRANGE = {(5, 3, 3, 4), (3, 2, 2, 2)}  # outputs that see some of the pixels, at a first glance all
GEOMETRIES = sorted(
    {*DENSE, *STRANGE, *((k, s, k // 2, n) for k in (1, 3, 7) for s in (1, 2) for n in (1, 2, 3, 4, 5))}
)


def record_calls(monkeypatch) -> list[str]:
    """Return a list that grows by the name of each convolution and matrix product of torch."""
    names = []
    for name in ("conv2d", "linear"):
        function = getattr(functional, name)
        counted = lambda *a, name=name, function=function, **k: names.append(name) or function(*a, **k)  # noqa: E731
        monkeypatch.setattr(functional, name, counted)
    return names


def both(geometry, width=None):
    kernel, stride, padding, side = geometry
    torch.manual_seed(0)
    plain = nn.Conv2d(5, 7, kernel, stride=stride, padding=padding, bias=False).double()
    plain = plain.to(memory_format=torch.channels_last)
    fast = copy.deepcopy(plain)
    use_dense_products(fast)
    images = torch.randn(4, 5, side, width or side, dtype=torch.float64).to(memory_format=torch.channels_last)
    return plain, fast, images


def outcome(conv, images):
    images = images.clone().requires_grad_()
    outputs = conv(images)
    (outputs * torch.arange(outputs.numel(), dtype=outputs.dtype).view_as(outputs)).sum().backward()
    return outputs, images.grad, conv.weight.grad


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_outputs_and_gradients_are_those_of_a_convolution(geometry, monkeypatch):
    for width in (None, 2):
        plain, fast, images = both(geometry, width)
        for ours, theirs in zip(outcome(fast, images), outcome(plain, images), strict=True):
            assert ours.shape == theirs.shape
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-9)
        assert fast.weight.grad.stride() == fast.weight.stride(), "the optimiser would have to reorder it"
    assert fast(images[:0]).shape == plain(images[:0]).shape, "a rank may have none of the last batch"
    if geometry[0] != 7:  # of 7x7 there is the stem alone
        _, fast, images = both(geometry)
        calls = record_calls(monkeypatch)
        outputs = fast(images)
        assert calls == ["linear" if geometry in DENSE else "conv2d"]
        assert outputs.shape[-1] == DENSE.get(geometry, outputs.shape[-1])


def test_other_convolutions_stay_as_they_are(monkeypatch):
    _, fast, images = both((3, 1, 1, 1))
    calls = record_calls(monkeypatch)
    fast.eval()(images)
    fast.train().to("meta")(images.to("meta"))
    assert calls == ["conv2d"] * 2, "in evaluation, and on other devices"
    for other in ({"bias": True}, {"groups": 5}, {"dilation": 2}):
        conv = nn.Conv2d(5, 5, 3, padding=1, **({"bias": False} | other))
        use_dense_products(conv)
        assert type(conv) is nn.Conv2d


@pytest.mark.parametrize("geometry", sorted(DENSE))
def test_under_autocast_only_rounding_differs(geometry):
    plain, fast, images = both(geometry)
    exact = outcome(plain, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = outcome(fast.float(), images.float())
    assert rounded[0].dtype == torch.bfloat16 and rounded[2].dtype == torch.float32
    for ours, theirs in zip(rounded, exact, strict=True):
        assert float((ours.double() - theirs).detach().norm() / theirs.detach().norm()) < 0.01


@pytest.mark.parametrize(("stem", "count"), [("imagenet", 8), ("small", 3)])
def test_the_networks_last_layers_are_products(stem, count, monkeypatch, runtime):
    plain = build_network(make_recipe(f"stem={stem}"), 10).double()
    fast = copy.deepcopy(plain)
    use_dense_products(fast)
    assert all(type(module) is not nn.Conv2d for module in fast.modules())
    assert fast.state_dict().keys() == plain.state_dict().keys()
    images, labels = torch.rand(3, 3, 32, 32, dtype=torch.float64), torch.arange(3)
    functional.cross_entropy(plain(images), labels).backward()
    calls = record_calls(monkeypatch)
    functional.cross_entropy(fast(images), labels).backward()
    assert calls.count("linear") == count + 1  # the head is one as well
    for ours, theirs in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-12)
    # The trainer uses them.
    recipe, dataset = make_recipe("global_batch_size=16", f"stem={stem}"), make_dataset()
    plan = make_plan(recipe, world_size=1, sizes=dataset.sizes, device_type="cpu")
    model = build_trainer(recipe, plan, dataset, runtime, Observer()).state.model
    assert sum(isinstance(module, SmallImageConv2d) for module in model.modules()) == 20
