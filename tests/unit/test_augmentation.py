"""Each operation against torchvision's own, each random parameter against torchvision's definition."""

import math

import pytest
import torch
import torchvision.transforms.functional as vision
from torch import Tensor
from torchvision import transforms

from cifar_dist.data.augmentation import COLUMNS, JITTER_ORDERS, Augmentation, move_pixels
from cifar_dist.data.cifar import load_cifar10
from cifar_dist.data.color import jitter, shift_hue
from cifar_dist.data.shapes import load_shapes
from tests.conftest import make_recipe

# Float32 arithmetic in another order; one step of an 8-bit pixel is 4e-3.
TOLERANCE = 5e-6


@pytest.fixture(scope="module", params=["shapes", pytest.param("cifar10", marks=pytest.mark.official)])
def images(request) -> Tensor:
    """(100, 3, 32, 32) uint8, drawn ones and real ones."""
    if request.param == "shapes":
        return load_shapes().train.images[:100]
    return load_cifar10(request.getfixturevalue("official_data")).train.images[:100]


def augmentation(*assignments: str, seed: int = 0) -> Augmentation:
    return Augmentation(make_recipe(*assignments).augmentation, seed=seed)


def column(table: Tensor, name: str) -> Tensor:
    return table[:, COLUMNS.index(name)]


def torchvision_augment(image: Tensor, row: Tensor, padding: int) -> Tensor:
    """The script's transforms, one after the other, with the parameters of a row."""
    value = {name: row[i].item() for i, name in enumerate(COLUMNS)}
    image = vision.pad(image, padding)
    image = vision.crop(image, int(value["crop_y"]), int(value["crop_x"]), 32, 32)
    if value["flip"]:
        image = vision.hflip(image)
    image = vision.rotate(image, math.degrees(value["angle"])).float() / 255
    operations = [
        (vision.adjust_brightness, "brightness"),
        (vision.adjust_contrast, "contrast"),
        (vision.adjust_saturation, "saturation"),
        (vision.adjust_hue, "hue"),
    ]
    for index in JITTER_ORDERS[int(value["jitter_order"])].tolist():
        operation, name = operations[index]
        image = operation(image, value[name])
    return image


def test_the_whole_augmentation_equals_torchvisions(images):
    ours = augmentation()
    table = ours.draw_table(1, len(images))
    expected = torch.stack([torchvision_augment(*pair, padding=4) for pair in zip(images, table, strict=True)])
    torch.testing.assert_close(ours.apply(images, table), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("corner", [(0, 0), (8, 8), (0, 8), (3, 5)])
def test_crop_equals_torchvisions(images, corner):
    offsets = torch.tensor(corner, dtype=torch.float32).expand(len(images), 2) - 4
    none = torch.zeros(len(images))
    moved = move_pixels(images, crop_y=offsets[:, 0], crop_x=offsets[:, 1], flip=none, angle=None)
    assert torch.equal(moved, vision.crop(vision.pad(images, 4), *corner, 32, 32))


def test_flip_equals_torchvisions(images):
    flip = torch.arange(len(images)) % 2
    none = torch.zeros(len(images))
    moved = move_pixels(images, crop_y=none, crop_x=none, flip=flip.float(), angle=None)
    assert torch.equal(moved[1::2], vision.hflip(images[1::2]))
    assert torch.equal(moved[::2], images[::2])


@pytest.mark.parametrize("degrees", [-180.0, -90.0, -10.0, -3.3, 0.0, 0.5, 7.7, 45.0, 90.0])
def test_rotation_equals_torchvisions(images, degrees):
    none = torch.zeros(len(images))
    angle = torch.full((len(images),), math.radians(degrees))
    moved = move_pixels(images, crop_y=none, crop_x=none, flip=none, angle=angle)
    different = (moved != vision.rotate(images, degrees)).any(1)
    # Where a source falls exactly between two pixels, rounding may go either way: only at multiples of 45 degrees.
    assert different.float().mean() <= (0.05 if degrees == 45 else 0)


@pytest.mark.parametrize(
    ("operation", "name"),
    [(vision.adjust_brightness, 0), (vision.adjust_contrast, 1), (vision.adjust_saturation, 2)],
)
@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 1.7])
def test_a_blend_equals_torchvisions(images, operation, name, factor):
    pixels = images.float() / 255
    expected = operation(pixels, factor)
    factors = torch.ones(len(images), 3)
    factors[:, name] = factor
    jitter(pixels, factors, None, JITTER_ORDERS[:1].expand(len(images), 4))
    torch.testing.assert_close(pixels, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("turns", [-0.5, -0.2, 0.0, 0.13, 0.5])
def test_hue_equals_torchvisions(images, turns):
    pixels = images.float() / 255
    shifted = shift_hue(pixels, torch.full((len(images),), turns))
    torch.testing.assert_close(shifted, vision.adjust_hue(pixels, turns), atol=TOLERANCE, rtol=0)


def test_hue_of_gray_and_primary_colours():
    colours = torch.tensor([[0.0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    pixels = colours.view(1, -1, 3).permute(0, 2, 1).unsqueeze(3)
    for turns in (-1 / 3, 0.0, 1 / 3):
        expected = vision.adjust_hue(pixels, turns)
        torch.testing.assert_close(shift_hue(pixels, torch.tensor([turns])), expected, atol=TOLERANCE, rtol=0)


def test_the_order_of_the_jitter_matters(images):
    ours = augmentation("augmentation.contrast=0.9", "augmentation.brightness=0.9")
    table = ours.draw_table(1, len(images))
    other = table.clone()
    column(other, "jitter_order")[:] = 23 - column(table, "jitter_order")
    assert not torch.allclose(ours.apply(images, table), ours.apply(images, other), atol=0.01)


def test_the_distributions_are_torchvisions():
    """Compare with the bounds and moments of the script's own transforms."""
    script = transforms.ColorJitter(0.2, 0.2, 0.2, 0.2)
    table = augmentation().draw_table(1, 40_000)
    bounds = {"brightness": script.brightness, "contrast": script.contrast, "saturation": script.saturation}
    bounds["hue"] = script.hue
    low, high = transforms.RandomRotation(10).degrees
    bounds["angle"] = (math.radians(low), math.radians(high))
    for name, (low, high) in bounds.items():
        values = column(table, name)
        assert low <= values.min() < low + 0.001 * (high - low), name
        assert high >= values.max() > high - 0.001 * (high - low), name
        counts = torch.histc(values, bins=20, min=low, max=high)
        assert (counts / 2000 - 1).abs().max() < 0.12, f"{name} is not uniform"
    for name, count in (("crop_y", 9), ("crop_x", 9), ("flip", 2), ("jitter_order", 24)):
        counts = torch.bincount(column(table, name).long(), minlength=count)
        assert len(counts) == count, name
        assert (counts * count / 40_000 - 1).abs().max() < 0.15, f"{name} is not uniform"
    correlation = torch.corrcoef(table.T) - torch.eye(len(COLUMNS))
    assert correlation.abs().max() < 0.03, "two parameters share their draws"


def test_a_wide_jitter_is_cut_at_zero_as_torchvision_does():
    low, high = transforms.ColorJitter(brightness=1.5).brightness
    values = column(augmentation("augmentation.brightness=1.5").draw_table(1, 10_000), "brightness")
    assert (low, high) == (0.0, 2.5)
    assert 0 <= values.min() < 0.01
    assert 2.49 < values.max() <= 2.5


def test_the_table_depends_on_seed_and_epoch_alone():
    first = augmentation().draw_table(1, 100)
    torch.rand(5)
    later = augmentation()
    later.draw_table(9, 50)
    assert torch.equal(first, later.draw_table(1, 100))
    assert not torch.equal(first, augmentation().draw_table(2, 100))
    assert not torch.equal(first, augmentation(seed=1).draw_table(1, 100))


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    augmentation().draw_table(1, 100)
    assert torch.equal(before, torch.get_rng_state())


def test_an_operation_that_is_switched_off_does_not_change_the_others_draws():
    full, less = augmentation().draw_table(1, 100), augmentation("augmentation.hue=0").draw_table(1, 100)
    kept = [i for i, name in enumerate(COLUMNS) if name != "hue"]
    assert torch.equal(full[:, kept], less[:, kept])
    assert column(less, "hue").abs().max() == 0


def test_pixels_do_not_depend_on_how_the_batch_is_cut(images):
    ours = augmentation()
    table = ours.draw_table(1, len(images))
    whole = ours.apply(images, table)
    for size in (3, 7, 64):
        pieces = [ours.apply(*pair) for pair in zip(images.split(size), table.split(size), strict=True)]
        assert torch.equal(torch.cat(pieces), whole), size
    backwards = torch.arange(len(images) - 1, -1, -1)
    assert torch.equal(ours.apply(images[backwards], table[backwards])[backwards], whole)


def test_pixels_do_not_depend_on_the_number_of_threads(images):
    ours = augmentation()
    table = ours.draw_table(1, len(images))
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append(ours.apply(images, table))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_nothing_happens_without_augmentation(images):
    plain = Augmentation(make_recipe(base="plain").augmentation, seed=0)
    before = images.clone()
    assert torch.equal(plain.apply(images, plain.draw_table(1, len(images))), images.float() / 255)
    augmentation().apply(images, augmentation().draw_table(1, len(images)))
    assert torch.equal(images, before), "the dataset itself was changed"
