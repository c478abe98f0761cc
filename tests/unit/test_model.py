"""The network is torchvision's; optimizers, schedules and averages are compared with torch's own."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torchvision.models import ResNet18_Weights, resnet18
from torchvision.models.resnet import BasicBlock

from cifar_dist.config.errors import UserError
from cifar_dist.config.plan import DatasetSizes, make_plan
from cifar_dist.config.recipe import Recipe
from cifar_dist.model import optimizer as optimizer_module
from cifar_dist.model.layers import Groups
from cifar_dist.model.networks import (
    build_network,
    find_head,
    parts_to_freeze,
)
from cifar_dist.model.optimizer import (
    ExponentialMovingAverage,
    MuonWithSGD,
    build_optimizer,
    learning_rate,
    learning_rate_line,
    load_optimizer_state,
    orthogonalized,
    set_learning_rate,
)
from cifar_dist.model.pretrained import imagenet_weights, infer_stem, load_weights, start_from
from tests.conftest import make_recipe


def narrow_resnet(stem: str = "imagenet", num_classes: int = 10, *, seed: int = 0) -> nn.Module:
    """Build a ResNet of two blocks with 8 and 16 channels, for tests in which the size is not the point."""
    with torch.device("meta"):
        model = resnet18()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.conv1, model.bn1 = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(8)
        shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, stride=2, bias=False), nn.BatchNorm2d(16))
        model.layer1, model.layer2 = BasicBlock(8, 8), BasicBlock(8, 16, 2, shortcut)
        model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(16, num_classes)
    return model


def build_narrow(recipe: Recipe, num_classes: int) -> nn.Module:
    """Build `narrow_resnet` in place of `build_network`."""
    return narrow_resnet(recipe.stem, num_classes, seed=recipe.seed)


@pytest.mark.parametrize(("images", "ranks", "own"), [(8, 1, 4), (7, 1, 0), (8, 2, 2), (64, 4, 1)])
def test_groups_have_two_images_each_or_are_one(images, ranks, own):
    assert Groups(count=4, num_ranks=ranks, images=images).own == own


@pytest.mark.parametrize(("stem", "inferred"), [("imagenet", "imagenet"), ("cifar", "cifar"), ("small", "cifar")])
def test_weights_load_into_torchvisions_network_and_give_the_same_logits(stem, inferred):
    theirs = resnet18(num_classes=7)
    if stem != "imagenet":  # the stem as people adapt it by hand
        theirs.conv1 = nn.Conv2d(3, 64, 3, stride=1 if stem == "cifar" else 2, padding=1, bias=False)
        theirs.maxpool = nn.Identity()
    ours = build_network(make_recipe(f"stem={stem}", "seed=3"), 7)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours.eval()(images), theirs.eval()(images))
    assert infer_stem(ours.state_dict()) == inferred


def test_the_seed_alone_decides_the_weights():
    before = torch.get_rng_state()
    first, again, other = (
        build_network(make_recipe("stem=cifar", f"seed={seed}"), 10).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(*pair) for pair in zip(first.values(), again.values(), strict=True))
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])
    assert torch.equal(before, torch.get_rng_state()), "the caller's random state was changed"


def test_muon_without_a_parameter_for_sgd_is_refused():
    config = make_recipe("optimizer.name=muon", "optimizer.sgd_learning_rate=0.1").optimizer
    with pytest.raises(UserError, match=r"muon needs a parameter that it leaves to SGD"):
        build_optimizer(nn.Linear(4, 3, bias=False), config)


def test_adamw_is_torchs():
    config = make_recipe("optimizer.name=adamw", "optimizer.momentum=0.8", "optimizer.weight_decay=0.1").optimizer
    optimizer = build_optimizer(narrow_resnet(), config)
    assert type(optimizer) is torch.optim.AdamW
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.01, (0.8, 0.999), 0.1)


def start(model, weights):
    start_from(model, weights, "fc")


@pytest.mark.parametrize(
    ("load", "name", "value", "message"),
    [
        (load_weights, "bn1.weight", None, 'Missing key.*"bn1.weight"'),
        (load_weights, "extra", torch.zeros(1), 'Unexpected key.*"extra"'),
        (load_weights, "fc.bias", torch.zeros(3), r"size mismatch for fc.bias: .*\[3\]"),
        (
            lambda *given: start_from(*given, "fc"),
            "layer1.conv1.weight",
            torch.zeros(64, 64, 5, 5),
            r"size mismatch for layer1\.conv1\.weight",
        ),
        (
            lambda _, weights: infer_stem(weights),
            "conv1.weight",
            None,
            r"conv1.weight must be .*, and there are bn1.weight",
        ),
        (lambda _, weights: infer_stem(weights), "conv1.weight", torch.zeros(64, 3, 5, 5), "must be.* 3, 5, 5"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(load, name, value, message):
    model = narrow_resnet()
    weights = dict(model.state_dict()) | {name: value}
    with pytest.raises(UserError, match=message):
        load(model, {key: each for key, each in weights.items() if each is not None})


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("decay_all", [True, False])
def test_norms_and_biases_decay_only_where_they_should(name, decay_all):
    fields = (f"name={name}", f"decay_norm_and_bias={decay_all}", "weight_decay=0.1")
    model = narrow_resnet()
    optimizer = build_optimizer(model, make_recipe(*(f"optimizer.{field}" for field in fields)).optimizer)
    decay = {id(each): group["weight_decay"] for group in optimizer.param_groups for each in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.1 if decay_all or parameter.ndim > 1 else 0.0), name


def rates(*assignments: str) -> list[float]:
    """Return all learning rates of a run of 10 epochs of 10 steps, whose peak is 1; the line in words must agree."""
    recipe = make_recipe("epochs=10", "optimizer.learning_rate=1", *assignments)
    sizes = DatasetSizes(num_train=1280, num_test=1)
    plan = make_plan(recipe, world_size=1, sizes=sizes, device_type="cpu")
    rates = [learning_rate(recipe, plan, step) for step in range(100)]
    peak = " 1 at its peak (step 20)," if rates[0] < 1 else ""
    first, last = f"{rates[0]:.4g} at the start", f"{rates[-1]:.4g} at the end"
    assert learning_rate_line(recipe, plan) == f"{recipe.schedule.name}, {first},{peak} {last}"
    return rates


def warmup(optimizer):
    return lr_scheduler.LinearLR(optimizer, start_factor=1 / 20, total_iters=19)


def cosine_after_warmup(optimizer):
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=80)
    return lr_scheduler.SequentialLR(optimizer, [warmup(optimizer), cosine], milestones=[20])


@pytest.mark.parametrize(
    ("fields", "make_scheduler"),
    [
        (["schedule.name=constant"], lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
        (["schedule.name=cosine"], lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)),
        (
            ["schedule={name: step, step_epochs: 3, gamma: 0.5}"],
            lambda optimizer: lr_scheduler.StepLR(optimizer, step_size=30, gamma=0.5),
        ),
        (["schedule.warmup_fraction=0.2"], warmup),
        (["schedule.name=cosine", "schedule.warmup_fraction=0.2"], cosine_after_warmup),
        (
            ["schedule.name=triangular"],
            lambda optimizer: lr_scheduler.LinearLR(optimizer, start_factor=1, end_factor=1e-9, total_iters=100),
        ),
    ],
    ids=["constant", "cosine", "step", "warmup", "cosine after warmup", "triangular"],
)
def test_a_schedule_is_torchs(fields, make_scheduler):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, expected = make_scheduler(optimizer), []
    for _ in range(100):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(*fields) == pytest.approx(expected, abs=1e-6)


def plain_newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """As https://kellerjordan.github.io/posts/muon/ has it, in float64."""
    wide = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT).double()
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.mT


@pytest.mark.parametrize("shape", [(64, 27), (128, 64), (64, 576)])
def test_matrices_are_orthogonalized_as_muon_does_it(shape):
    matrices = torch.randn(3, *shape)
    left, _, right = torch.linalg.svd(matrices[2], full_matrices=False)
    matrices[2] = left * torch.logspace(0, -5, min(shape)) @ right  # singular values over five orders of magnitude
    expected = torch.stack([plain_newton_schulz(each) for each in matrices])
    other = torch.randn(27, 64)  # what lies between them, of another shape, changes nothing
    first, second, between, third = orthogonalized([*matrices[:2], other, matrices[2]])
    torch.testing.assert_close(torch.stack([first, second, third]).double(), expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(torch.stack([first, second]).double(), expected[:2], rtol=0, atol=1e-5)
    torch.testing.assert_close(between.double(), plain_newton_schulz(other), rtol=0, atol=1e-5)
    assert torch.linalg.svdvals(expected[0]).min() > 0.6
    # The stages of a GPU, whose TF32 tests/gpu has: small matrices are padded to the size of large ones.
    staged = optimizer_module._newton_schulz_in_stages([matrices[0], torch.randn(160, 300)], 5)[0]
    torch.testing.assert_close(staged.double(), expected[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("precision", "steps", "most"), [("bf16", 3, 0.03), ("bf16", 5, 1e-6), ("no", 3, 1e-6)])
def test_muon_orthogonalizes_in_bfloat16_where_that_is_fine_enough(precision, steps, most):
    """Singular values over two orders of magnitude; after five steps in bfloat16 the error would be 0.2."""
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(64, 576), full_matrices=False)
    gradient = (left * torch.logspace(0, -2, 64) @ right).view(64, 64, 3, 3)
    config = make_recipe("optimizer.name=muon", f"optimizer.orthogonalization_steps={steps}").optimizer
    config = dataclasses.replace(config, weight_decay=0.0, normalize_filters=False, learning_rate=1.0, nesterov=False)
    model = nn.Sequential(nn.Conv2d(64, 64, 3))
    nn.init.zeros_(model[0].weight)
    optimizer = build_optimizer(model, config, precision=precision)
    model[0].weight.grad, model[0].bias.grad = gradient.clone(), torch.zeros(64)
    optimizer.step()
    (expected,) = orthogonalized([gradient.flatten(1)], steps)
    error = (model[0].weight.detach().flatten(1) + expected).norm() / expected.norm()
    assert error < most
    assert (error > 1e-4) == (most > 1e-4)


@pytest.mark.parametrize(
    ("layout", "nesterov"), [(torch.contiguous_format, True), (torch.channels_last, False)], ids=str
)
def test_muon_steps_the_filters_as_matrices_and_sgd_the_rest(layout, nesterov):
    fields = ("name=muon", "learning_rate=0.1", f"nesterov={nesterov}", "weight_decay=2.0")  # so much that it is seen
    model = narrow_resnet().to(memory_format=layout)
    config = make_recipe(*(f"optimizer.{field}" for field in fields)).optimizer
    optimizer = build_optimizer(model, config, find_head(model, 10))
    assert isinstance(optimizer, MuonWithSGD)
    filters = [model.layer1.conv1.weight, model.layer2.downsample[0].weight]
    matrices = [nn.Parameter(each.detach().flatten(1).clone()) for each in filters]
    head = nn.Parameter(model.fc.weight.detach().clone())
    muon = torch.optim.Muon(matrices, lr=0.05, weight_decay=2.0, momentum=0.9, nesterov=nesterov)
    sgd = torch.optim.SGD([head], lr=0.05, weight_decay=2.0, momentum=0.9, nesterov=nesterov)
    before = filters[0].detach().clone()
    set_learning_rate(optimizer, 0.05)
    for _ in range(3):
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape)
            parameter.grad = gradient.to(memory_format=layout) if parameter.ndim == 4 else gradient
        for matrix, each in zip(matrices, filters, strict=True):
            matrix.grad = each.grad.flatten(1).clone()
        head.grad = model.fc.weight.grad.clone()
        for each in (optimizer, muon, sgd):
            each.step()
    # torch's Muon works in bfloat16.
    for matrix, each in zip(matrices, filters, strict=True):
        torch.testing.assert_close(each.detach().flatten(1), matrix.detach(), atol=3e-3, rtol=0.02)
    assert (filters[0] - before).abs().max() > 0.01
    torch.testing.assert_close(model.fc.weight.detach(), head.detach())


def test_filters_are_brought_to_their_norm_before_a_step():
    names = ("name=muon", "learning_rate=0.1", "normalize_filters=true", "weight_decay=0", "sgd_learning_rate=0.05")
    model = narrow_resnet()
    config = make_recipe(*(f"optimizer.{name}" for name in names)).optimizer
    optimizer = build_optimizer(model, config, find_head(model, 10))
    set_learning_rate(optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.05])
    before = model.fc.weight.detach().clone()
    filters = model.layer2.conv1.weight
    filters.grad = torch.randn_like(filters)
    step = 0.1 * orthogonalized(filters.grad.flatten(1)[None])[0].view_as(filters)
    unit = filters.detach() / filters.detach().norm() * len(filters) ** 0.5
    optimizer.step()
    torch.testing.assert_close(filters.detach(), unit - step)
    assert torch.equal(model.fc.weight, before), "without a gradient nothing moves"


@pytest.mark.parametrize("name", ["sgd", "muon"])
def test_head_and_biases_may_have_rates_of_their_own(name):
    fields = (f"name={name}", "learning_rate=0.1", "weight_decay=0.02", "decay_norm_and_bias=true")
    own = ("head_learning_rate=0.4", "bias_learning_rate=0.05", "sgd_momentum=0.5")
    model = narrow_resnet()
    config = make_recipe(*(f"optimizer.{each}" for each in (*fields, *own))).optimizer
    optimizer = build_optimizer(model, config, find_head(model, 10))
    set_learning_rate(optimizer, 0.1)
    of = {id(each): group for group in optimizer.param_groups for each in group["params"]}
    head, bias, filters = (of[id(each)] for each in (model.fc.weight, model.bn1.bias, model.layer2.conv1.weight))
    assert [group["lr"] for group in (head, bias, filters)] == pytest.approx([0.4, 0.05, 0.1])
    assert [group["lr"] * group["weight_decay"] for group in (head, bias, filters)] == pytest.approx([0.002] * 3)
    assert of[id(model.fc.bias)] is head
    momenta = [group["momentum"] for group in (head, filters)]
    assert momenta == ([0.5, 0.9] if name == "muon" else [0.9, 0.9])


@pytest.mark.parametrize("model", ["fastnet", "resnet18"])
def test_batch_norm_and_the_head_are_as_the_recipe_says(model):
    plain, changed = (
        build_network(make_recipe(f"model={model}", *fields), 10)
        for fields in ((), ("batch_norm_momentum=0.4", "batch_norm_scale=false", "head_scale=0.25"))
    )
    norms = [each for each in changed.modules() if isinstance(each, nn.BatchNorm2d)]
    assert {each.momentum for each in norms} == {0.4}
    assert not any(each.weight.requires_grad for each in norms) and all(each.bias.requires_grad for each in norms)
    assert {each.momentum for each in plain.modules() if isinstance(each, nn.BatchNorm2d)} == {0.1}
    torch.testing.assert_close(changed.fc.weight, plain.fc.weight / 4)


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_a_state_from_another_device_gets_the_kernel_and_layout_of_this_one(name):
    """As from a CPU, which has a fused kernel and channels_last, to MPS and back."""
    optimizers = []
    for layout, fused in ((torch.channels_last, True), (torch.contiguous_format, False)) * 2:
        model = narrow_resnet().to(memory_format=layout)
        optimizer = build_optimizer(model, make_recipe(f"optimizer.name={name}").optimizer, fused=fused)
        if optimizers:
            load_optimizer_state(optimizer, copy.deepcopy(optimizers[-1].state_dict()))
        model(torch.rand(2, 3, 32, 32).to(memory_format=layout)).sum().backward()
        optimizer.step()
        optimizers.append(optimizer)
        inner = optimizer.sgd if name == "muon" else optimizer
        assert {group["fused"] for group in inner.param_groups} == {fused}
        for parameter, values in inner.state.items():
            for value in values.values():
                assert not isinstance(value, torch.Tensor) or not value.ndim or value.stride() == parameter.stride()
    if name == "adamw":
        assert {int(values["step"]) for values in optimizers[-1].state.values()} == {4}


@pytest.mark.parametrize("name", ["sgd", "muon"])
def test_a_first_step_that_the_fp16_scaler_skips_leaves_no_momentum(name):
    """torch's fused SGD makes the momentum's buffer in that step, and does not fill it."""
    model = narrow_resnet()
    optimizer = build_optimizer(model, make_recipe(f"optimizer.name={name}").optimizer)
    sgd = optimizer.sgd if name == "muon" else optimizer
    buffers = [sgd.state[each]["momentum_buffer"] for group in sgd.param_groups for each in group["params"]]
    assert len(buffers) == sum(len(group["params"]) for group in sgd.param_groups) > 0
    for each in model.parameters():
        each.grad = torch.full_like(each, math.inf)
    sgd.found_inf, sgd.grad_scale = torch.ones(()), torch.ones(())  # what the scaler tells a fused optimizer
    sgd.step()
    assert all(buffer.abs().max() == 0 for buffer in buffers)


def test_the_average_follows_the_weights():
    model = nn.BatchNorm1d(1)
    average = ExponentialMovingAverage(model, decay=0.9)
    expected = 1.0
    for step in range(1, 200):
        value = float(step % 7)
        with torch.no_grad():
            model.weight.fill_(value)
            model.running_mean.fill_(value)
            model.num_batches_tracked.fill_(step)
        average.update(model, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        assert average.model.weight.item() == pytest.approx(expected, rel=1e-4)
    assert average.model.running_mean.item() == pytest.approx(expected, rel=1e-2)
    assert average.model.num_batches_tracked == 199
    assert not average.model.training
    assert not average.model.weight.requires_grad


@pytest.mark.parametrize(("stem", "num_classes"), [("imagenet", 1000), ("imagenet", 10), ("cifar", 10)])
def test_a_pretrained_body_is_loaded_and_parts_of_another_shape_stay(stem, num_classes):
    weights = build_network(make_recipe("stem=imagenet", "seed=1"), num_classes).state_dict()
    recipe = make_recipe(f"stem={stem}")
    model = build_network(recipe, 10)
    drawn = copy.deepcopy(model.state_dict())
    start_from(model, weights, "fc")
    new = {"fc.": num_classes != 10, "conv1.": stem != "imagenet"}
    for name, value in model.state_dict().items():
        is_new = any(new[prefix] for prefix in new if name.startswith(prefix))
        assert torch.equal(value, drawn[name] if is_new else weights[name]), name
    frozen = {id(each) for each in parts_to_freeze(model, recipe, 10)}
    names = {name for name, each in model.named_parameters() if id(each) not in frozen}
    head = {"fc.weight", "fc.bias"}
    assert names == (head if stem == "imagenet" else head | {"conv1.weight", "bn1.weight", "bn1.bias"})


def test_imagenet_weights_come_from_torchvisions_cache(tmp_path, monkeypatch):
    """With weights made here in the place of the published ones, whose file name carries the hash of its content."""

    def refuse(*_, **__):
        raise OSError("no network here")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    told: list[str] = []
    with pytest.raises(UserError, match=r"resnet18-f37072fd\.pth could not be downloaded \(no network here\)"):
        imagenet_weights(note=told.append)
    assert len(told) == 1 and told[0].startswith("downloading the ImageNet weights to ")
    file = tmp_path / "checkpoints" / ResNet18_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1]
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"<html>moved</html>")
    with pytest.raises(UserError, match=r"resnet18-f37072fd\.pth are damaged"):
        imagenet_weights()
    torch.save({"fc.weight": torch.zeros(1000, 512)}, file)
    assert imagenet_weights(note=told.append)["fc.weight"].shape == (1000, 512) and len(told) == 1
