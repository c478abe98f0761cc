"""Policies and random erasing against torchvision's, and a function of one's own: no image depends on its batch."""

import re

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode

from cifar_dist.config.errors import UserError
from cifar_dist.data.augmentation import COLUMNS, Augmentation, check_custom
from cifar_dist.data.policies import OPERATIONS, apply_operations, levels
from tests.conftest import make_recipe
from tests.unit.test_stream import batches_of

SIZE = 31  # odd, so that no row is a multiple of a vector register
POLICIES = {"trivial": v2.TrivialAugmentWide(), "randaugment": v2.RandAugment()}


def make_images() -> Tensor:
    """Draw (22, 3, 31, 31) uint8: noise, smooth colours, smooth grays, few values, one colour."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (6, 3, SIZE, SIZE), generator=generator) * torch.linspace(0.2, 1, 6).view(-1, 1, 1, 1)
    coarse = torch.rand(6, 3, 5, 5, generator=generator) * 255
    smooth = torch.nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear")
    few = torch.randint(2, (3, 3, SIZE, SIZE), generator=generator) * 90 + 40
    gray, flat = smooth[:, :1].expand(-1, 3, -1, -1), torch.full((1, 3, SIZE, SIZE), 77)
    return torch.cat([noise, smooth, gray, few, flat]).to(torch.uint8)


IMAGES = make_images()


def augmentation(*assignments: str, base: str = "plain", **how) -> Augmentation:
    fields = [f"augmentation.{assignment}" for assignment in assignments]
    return Augmentation(make_recipe(*fields, base=base).augmentation, seed=0, **{"image_size": SIZE, **how})


def columns(table: Tensor, *names: str) -> list[Tensor]:
    return [table[:, COLUMNS.index(name)] for name in names]


# The operations

# The share of pixels that may differ, over all levels. Those of one place, or of integers, are exact.
ROUNDING_TIES = {"Rotate": 0.002, "ShearX": 0.002, "ShearY": 0.002}  # another pixel; none does on x86
ONE_LEVEL = {"Color": 0.001, "Contrast": 1e-4, "Sharpness": 1e-4}  # torchvision rounds a * b + c once, not twice


@pytest.mark.parametrize(("row", "name"), [*enumerate(POLICIES["trivial"]._AUGMENTATION_SPACE)])
@pytest.mark.parametrize("policy", POLICIES)
def test_an_operation_equals_torchvisions(policy, row, name):
    theirs, ours = POLICIES[policy], levels(policy, SIZE)[row]
    draw_magnitudes, is_signed = theirs._AUGMENTATION_SPACE[name]
    magnitudes = draw_magnitudes(31, SIZE, SIZE)
    different, count = 0, 0
    for number in range(31) if policy == "trivial" else [9]:
        for sign in range(2):
            magnitude = 0.0 if magnitudes is None else magnitudes[number].item() * (-1 if is_signed and sign else 1)
            how = {"interpolation": InterpolationMode.NEAREST, "fill": theirs._fill}
            expected = theirs._apply_image_or_video_transform(IMAGES, name, float(magnitude), **how)
            rows = torch.full((len(IMAGES),), row)
            done = apply_operations(IMAGES, rows, ours[sign, number].expand(len(IMAGES)))
            difference = (done.int() - expected.int()).abs()
            assert name not in ONE_LEVEL or difference.max() <= 1
            different, count = different + difference.count_nonzero().item(), count + done.numel()
    assert different <= count * (ROUNDING_TIES | ONE_LEVEL).get(name, 0)


def test_the_operations_of_a_batch_are_each_images_own():
    rows = torch.tensor([13, 1, 5, 0, 12, 13, 9, 10, 11, 7, 8] * 2)
    arguments = levels("trivial", SIZE)[rows, 0, 20]
    together, before = apply_operations(IMAGES, rows, arguments), IMAGES.clone()
    for index, row in enumerate(rows):
        one = list(OPERATIONS.values())[row](IMAGES[index : index + 1].clone(), arguments[index].view(1, 1, 1, 1))
        assert torch.equal(together[index], one[0])
    assert torch.equal(IMAGES, before), "the images of the caller were changed"


# What is drawn


def test_each_operation_and_each_level_is_equally_likely():
    operations, arguments, second, none = columns(
        augmentation("policy=trivial").draw_table(1, 100_000), "operation_1", "level_1", "operation_2", "level_2"
    )
    counts = operations.long().bincount(minlength=14)
    assert len(counts) == 14 and (counts * 14 / 100_000 - 1).abs().max() < 0.05
    assert not second.any() and not none.any()
    for row, name in enumerate(OPERATIONS):
        drawn, expected = arguments[operations == row], levels("trivial", SIZE)[row].flatten()
        values, counts = drawn.unique(return_counts=True)
        likely = torch.stack([(expected == value).sum() for value in values]) / len(expected)
        assert likely.sum() == pytest.approx(1), name
        assert (counts / len(drawn) / likely - 1).abs().max() < 0.4, name


def test_randaugment_draws_two_operations_at_magnitude_9():
    first, level, second, other = columns(
        augmentation("policy=randaugment").draw_table(1, 100_000), "operation_1", "level_1", "operation_2", "level_2"
    )
    pairs = (14 * first + second).long().bincount(minlength=14 * 14)
    assert len(pairs) == 196 and (pairs * 196 / 100_000 - 1).abs().max() < 0.25
    for operations, arguments in ((first, level), (second, other)):
        for row in range(14):
            expected = levels("randaugment", SIZE)[row, :, 9]
            assert torch.equal(arguments[operations == row].unique(), expected.unique())
            assert (arguments[operations == row] == expected[0]).float().mean() > 0.45


def test_new_parameters_leave_the_draws_of_others_alone():
    before = augmentation("cutout=8", base="original").draw_table(1, 20_000)
    after = augmentation("cutout=8", "policy=trivial", "random_erasing=0.5", base="original").draw_table(1, 20_000)
    old = COLUMNS.index("operation_1")
    assert torch.equal(before[:, :old], after[:, :old]) and not before[:, old:].any()
    varied = after.var(0) > 0
    correlation = torch.corrcoef(after[:, varied].T)[: varied[:old].sum(), varied[:old].sum() :]
    assert correlation.shape[1] == 6 and correlation.abs().max() < 0.03, "two parameters share their draws"


# Random erasing


def test_random_erasing_is_torchvisions():
    table = augmentation("random_erasing=0.25", image_size=32).draw_table(1, 40_000)
    y, x, height, width = columns(table, "erase_y", "erase_x", "erase_height", "erase_width")
    erased = height > 0
    assert erased.float().mean() == pytest.approx(0.25, abs=0.01)
    assert y.min() == x.min() == 0 and (y + height).max() == (x + width).max() == 32
    torch.manual_seed(0)
    theirs = [v2.RandomErasing(p=1).make_params([torch.zeros(3, 32, 32)]) for _ in range(4_000)]
    area = (height * width)[erased]
    for ours, expected in (
        (area, [each["h"] * each["w"] for each in theirs]),
        (height[erased], [each["h"] for each in theirs]),
        (y[erased], [each["i"] for each in theirs]),
        (x[erased], [each["j"] for each in theirs]),
    ):
        expected = torch.tensor(expected).float()
        for share in (0.1, 0.5, 0.9):
            assert ours.quantile(share).item() == pytest.approx(expected.quantile(share).item(), abs=1.01, rel=0.05)
        assert ours.mean().item() == pytest.approx(expected.mean().item(), rel=0.03)


def test_a_box_is_erased_with_the_fill_colour():
    ours = augmentation("random_erasing=0.6", fill=(0.1, 0.2, 0.3))
    table = ours.draw_table(1, len(IMAGES))
    expected = IMAGES.float() / 255
    for image, row in zip(expected, table, strict=True):
        y, x, height, width = (int(row[COLUMNS.index(f"erase_{name}")]) for name in ("y", "x", "height", "width"))
        image[:, y : y + height, x : x + width] = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    assert torch.equal(ours.apply(IMAGES, table), expected)


# A function of the user's own


def noisy(images: Tensor, seeds: Tensor) -> Tensor:
    """Add noise: the example of docs/recipes.md."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
    noise = torch.stack([torch.randn(images.shape[1:], generator=generator) for generator in generators])
    return (images / 255 + 0.05 * noise.to(images.device)).clamp(0, 1)


def with_seeds(images: Tensor, seeds: Tensor) -> Tensor:
    """Return images whose pixels are their seeds."""
    return images.zero_() + (seeds % 251).to(torch.uint8).view(-1, 1, 1, 1)


@pytest.mark.parametrize("policy", POLICIES)
def test_bytes_do_not_depend_on_the_batch(policy):
    ours = augmentation(f"policy={policy}", "random_erasing=0.5", "affine_degrees=10", base="original", custom=noisy)
    images = IMAGES.repeat(6, 1, 1, 1)
    table, seeds = ours.draw_table(1, len(images)), ours.draw_seeds(1, len(images))
    whole = ours.apply(images, table, seeds)
    blocks = [torch.split(torch.arange(len(images)), size) for size in (1, 7, 50)]
    strides = [[torch.arange(first, len(images), count) for first in range(count)] for count in (2, 3, 4)]
    for parts in (*blocks, *strides, [torch.empty(0, dtype=torch.int64)]):
        for part in parts:
            assert torch.equal(ours.apply(images[part], table[part], seeds[part]), whole[part])


def test_a_function_gets_what_the_policy_made():
    given = []
    ours = augmentation("policy=trivial", "brightness=0.5", custom=lambda images, seeds: given.append(images) or images)
    table = ours.draw_table(1, len(IMAGES))
    ours.apply(IMAGES, table, ours.draw_seeds(1, len(IMAGES)))
    operations, arguments = columns(table, "operation_1", "level_1")
    assert torch.equal(given[0], apply_operations(IMAGES, operations.long(), arguments))


def test_a_function_may_work_in_place():
    before, ours = IMAGES.clone(), augmentation(custom=with_seeds)
    pixels = ours.apply(IMAGES, ours.draw_table(1, len(IMAGES)), torch.arange(len(IMAGES)))
    assert torch.equal(IMAGES, before), "the dataset itself was changed"
    assert (pixels[:, 0, 0, 0] * 255).round().tolist() == list(range(len(IMAGES)))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_seeds_belong_to_the_sample_and_the_epoch(world_size):
    ours = augmentation("mixup=1", custom=with_seeds, image_size=32)
    for epoch in (1, 2):
        drawn, seeds = ours.draw_table(epoch, 100, num_partners=100), ours.draw_seeds(epoch, 100)
        assert len(seeds.unique()) == 100 and seeds.min() >= 0
        pixels = (seeds % 251).float()
        for rank in range(world_size):
            batches = batches_of(100, rank, world_size, batch=30)
            batches.augmentation, batches.normalize = ours, lambda images: images
            for batch in batches.epoch(epoch, steps_done=1):
                share, partner = columns(drawn[batch.samples], "share", "partner")
                expected = share * pixels[batch.samples] + (1 - share) * pixels[partner.long()]
                torch.testing.assert_close(batch.images[:, 2, 3, 4] * 255, expected)
    assert not torch.equal(ours.draw_seeds(1, 100), ours.draw_seeds(2, 100))


def check(custom) -> None:
    check_custom(custom, "mine.py:custom", image_size=32, device=torch.device("cpu"))


def test_a_function_of_image_and_seed_is_accepted():
    for custom in (noisy, with_seeds, lambda images, seeds: images, lambda images, seeds: images.flip(3)):
        check(custom)


def raises(images, seeds):
    raise RuntimeError("no\nluck")


@pytest.mark.parametrize(
    ("custom", "message"),
    [
        (lambda images, seeds: images ^ (torch.rand(len(images), 1, 1, 1) < 0.1), "depends on the batch"),
        (lambda images, seeds: images // 2 + (images // 2).float().mean().to(torch.uint8), "depends on the batch"),
        (lambda images, seeds: images.roll(1, 0), "depends on the batch: draw from the seeds alone"),
        (lambda images, seeds: images[:, :, :4], "returned torch.uint8 (64, 3, 4, 32): return a tensor of the images'"),
        (lambda images, seeds: images.double() / 255, "returned torch.float64 (64, 3, 32, 32)"),
        (lambda images, seeds: images / 255 - 0.1, "uint8 or float32 in [0, 1]"),
        (lambda images, seeds: images.float(), "uint8 or float32 in [0, 1]"),
        (lambda images, seeds: images * float("nan"), "uint8 or float32 in [0, 1]"),
        (lambda images, seeds: None, "returned NoneType: return a tensor"),
        (raises, "augmentation.custom=mine.py:custom raised RuntimeError: no luck: it is called with images"),
        (lambda images: images, "raised TypeError"),
    ],
)
def test_another_function_is_refused(custom, message):
    with pytest.raises(UserError, match=re.escape(message)):
        check(custom)


def test_a_function_that_is_named_must_be_loaded():
    with pytest.raises(ValueError, match=r"mine.py:f is not loaded"):
        augmentation("custom=mine.py:f")
    ours = augmentation("custom=mine.py:f", custom=noisy)
    with pytest.raises(ValueError, match="needs seeds"):
        ours.apply(IMAGES, ours.draw_table(1, len(IMAGES)))
