"""Each operation against torchvision's own, each random parameter against torchvision's definition."""

import math

import pytest
import torch
import torchvision.transforms.functional as vision
from torch import Tensor
from torchvision import transforms

from cifar_dist.config.errors import UserError
from cifar_dist.data.archives import CIFAR10
from cifar_dist.data.augmentation import COLUMNS, JITTER_ORDERS, Augmentation
from cifar_dist.data.cifar import load_archive
from cifar_dist.data.color import jitter, shift_hue_
from cifar_dist.data.geometry import AffineMove, move_pixels
from cifar_dist.data.mixing import cutout, mix
from cifar_dist.data.shapes import load_shapes
from tests.conftest import make_recipe

# Float32 arithmetic in another order; one step of an 8-bit pixel is 4e-3.
TOLERANCE = 5e-6


@pytest.fixture(scope="module", params=["shapes", pytest.param("cifar10", marks=pytest.mark.official)])
def images(request) -> Tensor:
    """(100, 3, 32, 32) uint8, drawn ones and real ones."""
    if request.param == "shapes":
        return load_shapes().train.images[:100]
    return load_archive(CIFAR10, request.getfixturevalue("official_data")).train.images[:100]


def test_no_more_is_reflected_than_there_is():
    reflecting = make_recipe("augmentation.crop_padding=32", "augmentation.crop_mode=reflect").augmentation
    with pytest.raises(UserError, match=r"crop_padding=32 reflects more than images of 32 pixels have: .* at most 31"):
        Augmentation(reflecting, seed=0)
    Augmentation(reflecting, seed=0, image_size=33)
    augmentation("augmentation.crop_padding=40")  # zeros there are enough of


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


def moved_by(images: Tensor, **how) -> Tensor:
    none = torch.zeros(len(images))
    still = {"padding": 0, "crop_y": none, "crop_x": none, "reflect": False, "flip": none, "moves": []}
    return move_pixels(images, **{**still, **how})


@pytest.mark.parametrize("corner", [(0, 0), (120, 120), (60, 70), (95, 20)])
def test_padding_wider_than_the_image_leaves_zeros_or_a_border_pixel(images, corner):
    corners = torch.tensor(corner, dtype=torch.float32).expand(len(images), 2)
    moved = moved_by(images, padding=60, crop_y=corners[:, 0], crop_x=corners[:, 1])
    assert torch.equal(moved, vision.crop(vision.pad(images, 60), *corner, 32, 32))
    moved = moved_by(images, padding=90, crop_y=1.5 * corners[:, 0] // 1, crop_x=corners[:, 1], reflect=True)
    assert moved.shape == images.shape
    assert images.amin((2, 3)).le(moved.amin((2, 3))).all()


@pytest.mark.parametrize("corner", [(0, 0), (8, 8), (0, 8), (3, 5)])
def test_crop_equals_torchvisions(images, corner):
    corners = torch.tensor(corner, dtype=torch.float32).expand(len(images), 2)
    moved = moved_by(images, padding=4, crop_y=corners[:, 0], crop_x=corners[:, 1])
    assert torch.equal(moved, vision.crop(vision.pad(images, 4), *corner, 32, 32))
    moved = moved_by(images, padding=4, crop_y=corners[:, 0], crop_x=corners[:, 1], reflect=True)
    assert torch.equal(moved, vision.crop(vision.pad(images, 4, padding_mode="reflect"), *corner, 32, 32))


def test_flip_equals_torchvisions(images):
    flip = torch.arange(len(images)) % 2
    moved = moved_by(images, flip=flip.float())
    assert torch.equal(moved[1::2], vision.hflip(images[1::2]))
    assert torch.equal(moved[::2], images[::2])


@pytest.mark.parametrize("degrees", [-180.0, -90.0, -10.0, -3.3, 0.0, 0.5, 7.7, 45.0, 90.0])
def test_rotation_equals_torchvisions(images, degrees):
    moved = moved_by(images, moves=[AffineMove(angle=torch.full((len(images),), math.radians(degrees)))])
    different = (moved != vision.rotate(images, degrees)).any(1)
    # Where a source falls exactly between two pixels, rounding may go either way: only at multiples of 45 degrees.
    assert different.float().mean() <= (0.05 if degrees == 45 else 0)


@pytest.mark.parametrize(("degrees", "y", "x", "scale"), [(15.0, 3, -2, 1.1), (-8.0, 0, 5, 0.8), (0.0, -4, 1, 1.0)])
def test_affine_equals_torchvisions(images, degrees, y, x, scale):
    def full(value: float) -> Tensor:
        return torch.full((len(images),), float(value))

    move = AffineMove(angle=full(-math.radians(degrees)), shift_y=full(y), shift_x=full(x), scale=full(scale))
    expected = vision.affine(images, degrees, [x, y], scale, [0.0, 0.0])
    assert (moved_by(images, moves=[move]) != expected).any(1).float().mean() < 0.002


def test_rotation_and_affine_follow_each_other_as_two_operations(images):
    angles = torch.full((2, len(images)), 0.2)
    expected = vision.rotate(vision.rotate(images, math.degrees(0.2)), math.degrees(0.2))
    moved = moved_by(images, moves=[AffineMove(angle=angles[0]), AffineMove(angle=angles[1])])
    assert (moved != expected).any(1).float().mean() < 0.002


def test_the_recipes_affine_is_torchvisions():
    """The bounds of RandomAffine(20, translate=(0.1, 0.1), scale=(0.8, 1.2)) for 32 pixels."""
    fields = ("affine_degrees=20", "affine_translate=0.1", "affine_scale=0.2")
    table = augmentation(*(f"augmentation.{field}" for field in fields)).draw_table(1, 20_000)
    low, high = math.radians(-20), math.radians(20)
    assert column(table, "affine_angle").min() == pytest.approx(low, abs=0.01)
    assert column(table, "affine_angle").max() == pytest.approx(high, abs=0.01)
    for name in ("affine_y", "affine_x"):
        assert column(table, name).unique().tolist() == [-3, -2, -1, 0, 1, 2, 3]
    assert (column(table, "affine_scale").min(), column(table, "affine_scale").max()) == pytest.approx(
        (0.8, 1.2), abs=1e-3
    )


@pytest.mark.parametrize(
    "field",
    "crop_padding=1 flip=random rotation_degrees=9 affine_degrees=9 affine_translate=0.2 affine_scale=0.3"
    " brightness=0.3 contrast=0.3 saturation=0.3 hue=0.2 cutout=6".split(),
)
def test_each_operation_is_done_where_it_alone_is_asked_for(field):
    off = ("crop_padding=0", "flip=none", "rotation_degrees=0", "brightness=0", "contrast=0", "saturation=0", "hue=0")
    images = load_shapes().train.images[:20]
    nothing, alone = (augmentation(*(f"augmentation.{each}" for each in wanted)) for wanted in (off, (*off, field)))
    assert torch.equal(nothing.apply(images, nothing.draw_table(1, 20)), images.float() / 255)
    changed = alone.apply(images, alone.draw_table(1, 20)) != images.float() / 255
    assert changed.flatten(1).any(1).float().mean() > 0.3


def test_cutout_is_the_papers():
    """A square of the fill colour about the centre, cut off at the border, as in the paper's code."""
    pixels = torch.rand(3, 3, 32, 32)
    before, fill = pixels.clone(), torch.tensor([0.1, 0.2, 0.3])
    cutout(pixels, torch.tensor([16.0, 0.0, 31.0]), torch.tensor([10.0, 0.0, 30.0]), 8, fill)
    for image, old, (y1, y2, x1, x2) in zip(
        pixels, before, [(12, 20, 6, 14), (0, 4, 0, 4), (27, 32, 26, 32)], strict=True
    ):
        old[:, y1:y2, x1:x2] = fill.view(3, 1, 1)
        assert torch.equal(image, old)


def test_mixup_is_the_papers():
    first, second, share = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8), torch.tensor([0.0, 0.3, 0.9, 1.0])
    none = torch.zeros(4)
    mixed, shares = mix(first, second, weight=share, is_box=none.bool(), center_y=none, center_x=none)
    torch.testing.assert_close(mixed, share.view(-1, 1, 1, 1) * first + (1 - share.view(-1, 1, 1, 1)) * second)
    assert torch.equal(shares, share)


def test_cutmix_is_torchvisions():
    """The box of torchvision.transforms.v2.CutMix, written down from its definition, and what is left of the image."""
    size, count = 32, 200
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(count, generator=generator)
    y, x = (torch.randint(size, (count,), generator=generator) for _ in range(2))
    first, second = torch.zeros(count, 3, size, size), torch.ones(count, 3, size, size)
    mixed, shares = mix(
        first, second, weight=weight, is_box=torch.ones(count).bool(), center_y=y.float(), center_x=x.float()
    )
    for index in range(count):
        half = int(0.5 * math.sqrt(1 - weight[index].item()) * size)
        y1, y2 = max(int(y[index]) - half, 0), min(int(y[index]) + half, size)
        x1, x2 = max(int(x[index]) - half, 0), min(int(x[index]) + half, size)
        expected = torch.zeros(size, size)
        expected[y1:y2, x1:x2] = 1
        assert torch.equal(mixed[index, 0], expected)
        assert shares[index] == pytest.approx(1 - (y2 - y1) * (x2 - x1) / size**2)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0])
def test_shares_are_beta_distributed(alpha):
    shares = column(augmentation(f"augmentation.mixup={alpha}").draw_table(1, 40_000), "share")
    assert shares.mean() == pytest.approx(0.5, abs=0.01)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.04)
    assert (shares.min() >= 0) & (shares.max() <= 1)


def test_mixup_and_cutmix_share_the_images_when_both_are_on():
    table = augmentation("augmentation.mixup=0.2", "augmentation.cutmix=1").draw_table(1, 20_000, num_partners=50)
    is_box = column(table, "is_box").bool()
    assert is_box.float().mean() == pytest.approx(0.5, abs=0.02)
    assert column(table, "share")[is_box].var() < 0.1 < column(table, "share")[~is_box].var()
    assert column(table, "partner").unique().tolist() == list(range(50))
    only = augmentation("augmentation.cutmix=1").draw_table(1, 100)
    assert column(only, "is_box").min() == 1


def test_random_flips_know_nothing_of_the_last_epoch():
    ours = augmentation("augmentation.flip=random")
    first, second = (column(ours.draw_table(epoch, 1000), "flip") for epoch in (1, 2))
    assert first.mean() == pytest.approx(0.5, abs=0.05)
    assert (first == second).float().mean() == pytest.approx(0.5, abs=0.05)


def test_alternating_flips_show_both_sides_in_two_epochs():
    ours = augmentation("augmentation.flip=alternating")
    flips = [column(ours.draw_table(epoch, 1000), "flip") for epoch in range(1, 5)]
    assert flips[0].mean() == pytest.approx(0.5, abs=0.05)
    assert torch.equal(flips[0] + flips[1], torch.ones(1000))
    assert torch.equal(flips[0], flips[2])
    assert torch.equal(flips[1], flips[3])


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
    pixels = jitter(pixels, factors, None, JITTER_ORDERS[:1].expand(len(images), 4))
    torch.testing.assert_close(pixels, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("turns", [-0.5, -0.4, -0.2, 0.0, 0.13, 0.4, 0.5])
def test_hue_equals_torchvisions(images, turns):
    pixels = images.float() / 255
    shifted = pixels.clone()
    shift_hue_(shifted, torch.full((len(images),), turns))
    torch.testing.assert_close(shifted, vision.adjust_hue(pixels, turns), atol=TOLERANCE, rtol=0)


def test_hue_of_gray_and_primary_colours():
    colours = torch.tensor([[0.0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    pixels = colours.view(1, -1, 3).permute(0, 2, 1).unsqueeze(3)
    for turns in (-1 / 3, 0.0, 1 / 3):
        expected = vision.adjust_hue(pixels, turns)
        shifted = pixels.clone()
        shift_hue_(shifted, torch.tensor([turns]))
        torch.testing.assert_close(shifted, expected, atol=TOLERANCE, rtol=0)


def test_the_order_of_the_jitter_matters(images):
    ours = augmentation("augmentation.contrast=0.9", "augmentation.brightness=0.9")
    table = ours.draw_table(1, len(images))
    other = table.clone()
    column(other, "jitter_order")[:] = 23 - column(table, "jitter_order")
    assert not torch.allclose(ours.apply(images, table), ours.apply(images, other), atol=0.01)


def test_the_distributions_are_torchvisions():
    """Compare with the bounds and moments of the script's own transforms."""
    script = transforms.ColorJitter(0.2, 0.2, 0.2, 0.2)
    table = augmentation("augmentation.cutout=8").draw_table(1, 40_000)
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
    drawn = table[:, [*range(4), *range(8, 15)]]  # those that original uses, and cutout's
    correlation = torch.corrcoef(drawn.T) - torch.eye(drawn.shape[1])
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


def test_an_empty_share_of_a_batch_is_augmented_too(images):
    """A rank may have no image of a short last batch."""
    ours = augmentation(
        "augmentation.affine_degrees=10", "augmentation.cutout=8", "augmentation.mixup=1", "augmentation.cutmix=1"
    )
    rows = ours.draw_table(1, 10)[:0]
    pixels = ours.apply(images[:0], rows)
    mixed, shares = ours.mix(pixels, pixels, rows)
    assert pixels.shape == mixed.shape == (0, 3, 32, 32)
    assert shares.shape == (0,)
