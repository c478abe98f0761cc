"""Each operation against torchvision's own, each random parameter against torchvision's definition."""

import math

import pytest
import torch
import torchvision.transforms.functional as vision
from torch import Tensor
from torchvision import transforms

from cifar_dist.config.errors import UserError
from cifar_dist.data.augmentation import COLUMNS, JITTER_ORDERS, Augmentation, cutout, mix
from cifar_dist.data.transforms import AffineMove, move_pixels, shift_hue_
from tests.conftest import make_recipe

TOLERANCE = 5e-6  # float32 arithmetic in another order; one step of an 8-bit pixel is 4e-3


def make_noise(count: int) -> Tensor:
    """Draw dark to light noise (count, 3, 32, 32) uint8."""
    noise = torch.randint(256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    return (noise * torch.linspace(0.3, 1, count).view(-1, 1, 1, 1)).to(torch.uint8)


IMAGES = make_noise(40)
SOURCES = torch.arange(1024).view(1, 1, 32, 32).expand(2, 3, 32, 32).to(torch.int32) + 1
"""Each pixel has a value of its own: a move of these pixels shows where each of them came from."""


def augmentation(*assignments: str, seed: int = 0) -> Augmentation:
    fields = [f"augmentation.{assignment}" for assignment in assignments]
    return Augmentation(make_recipe(*fields).augmentation, seed=seed)


def column(table: Tensor, name: str) -> Tensor:
    return table[:, COLUMNS.index(name)]


def torchvision_augment(image: Tensor, row: Tensor, padding: int) -> Tensor:
    """Apply the script's transforms, one after the other, with the parameters of a row."""
    value = {name: row[i].item() for i, name in enumerate(COLUMNS)}
    image = vision.pad(image, padding)
    image = vision.crop(image, int(value["crop_y"]), int(value["crop_x"]), 32, 32)
    if value["flip"]:
        image = vision.hflip(image)
    image = vision.rotate(image, math.degrees(value["angle"])).float() / 255
    for index in JITTER_ORDERS[int(value["jitter_order"])].tolist():
        name = ("brightness", "contrast", "saturation", "hue")[index]
        image = getattr(vision, f"adjust_{name}")(image, value[name])
    return image


def test_the_whole_augmentation_equals_torchvisions():
    ours = augmentation()
    table, before = ours.draw_table(1, len(IMAGES)), IMAGES.clone()
    expected = torch.stack([torchvision_augment(*pair, padding=4) for pair in zip(IMAGES, table, strict=True)])
    torch.testing.assert_close(ours.apply(IMAGES, table), expected, atol=TOLERANCE, rtol=0)
    assert torch.equal(IMAGES, before), "the dataset itself was changed"


# Where the pixels come from


def full(value: float) -> Tensor:
    return torch.full((2,), float(value))


def moved_by(*moves: AffineMove, **how) -> Tensor:
    still = {"padding": 0, "crop_y": full(0), "crop_x": full(0), "reflect": False, "flip": full(0)}
    return move_pixels(SOURCES, list(moves), **{**still, **how})


@pytest.mark.parametrize(("padding", "corner"), [(4, (0, 0)), (4, (8, 8)), (4, (3, 5)), (31, (0, 62)), (31, (55, 20))])
@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_crop_equals_torchvisions(padding, corner, mode):
    y, x = (full(place) for place in corner)
    moved = moved_by(padding=padding, crop_y=y, crop_x=x, reflect=mode == "reflect")
    assert torch.equal(moved, vision.crop(vision.pad(SOURCES, padding, padding_mode=mode), *corner, 32, 32))


def test_padding_is_no_wider_than_the_image():
    with pytest.raises(UserError, match=r"crop_padding=32 is too wide for images of 32 pixels: set it to at most 31"):
        augmentation("crop_padding=32")
    Augmentation(make_recipe("augmentation.crop_padding=32").augmentation, seed=0, image_size=33)


@pytest.mark.parametrize("degrees", [-180.0, -10.0, 0.5, 7.7, 45.0, 90.0])
def test_rotation_equals_torchvisions(degrees):
    moved = moved_by(AffineMove(full(math.radians(degrees)), full(0), full(0), full(1)))
    different = moved != vision.rotate(SOURCES.float(), degrees)
    # Where a source falls exactly between two pixels, rounding may go either way: only at multiples of 45 degrees.
    assert different.float().mean() <= (0.05 if degrees == 45 else 0)


@pytest.mark.parametrize(("degrees", "y", "x", "scale"), [(15.0, 3, -2, 1.1), (-8.0, 0, 5, 0.8), (0.0, -4, 1, 1.0)])
def test_rotation_and_affine_follow_each_other_as_in_torchvision(degrees, y, x, scale):
    affine = AffineMove(full(-math.radians(degrees)), full(y), full(x), full(scale))
    for angle in (0.0, 0.2):
        rotated = vision.rotate(SOURCES.float(), math.degrees(angle))
        expected = vision.affine(rotated, degrees, [x, y], scale, [0.0, 0.0])
        moved = moved_by(AffineMove(full(angle), full(0), full(0), full(1)), affine)
        assert (moved != expected).float().mean() < 0.002


# Colours


@pytest.mark.parametrize("turns", [-0.5, -0.4, -0.2, 0.0, 0.13, 1 / 3, 0.5])
def test_hue_equals_torchvisions(turns):
    primaries = torch.tensor([[0.0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    for pixels in (IMAGES.float() / 255, primaries.view(1, -1, 3).permute(0, 2, 1).unsqueeze(3)):
        shifted = pixels.clone()
        shift_hue_(shifted, torch.full((len(pixels),), turns))
        torch.testing.assert_close(shifted, vision.adjust_hue(pixels, turns), atol=TOLERANCE, rtol=0)


# Cutout and mixing


def test_cutout_is_the_papers():
    """A square of the fill colour about the centre, cut off at the border, as in the paper's code."""
    pixels = torch.rand(3, 3, 32, 32)
    expected, fill = pixels.clone(), torch.tensor([0.1, 0.2, 0.3])
    cutout(pixels, torch.tensor([16.0, 0.0, 31.0]), torch.tensor([10.0, 0.0, 30.0]), 8, fill)
    for image, (y1, y2, x1, x2) in zip(expected, [(12, 20, 6, 14), (0, 4, 0, 4), (27, 32, 26, 32)], strict=True):
        image[:, y1:y2, x1:x2] = fill.view(3, 1, 1)
    assert torch.equal(pixels, expected)


def rows_of(**columns: Tensor) -> Tensor:
    """Return rows of the table with these columns, and 0 in the others."""
    rows = torch.zeros(len(next(iter(columns.values()))), len(COLUMNS))
    for name, values in columns.items():
        rows[:, COLUMNS.index(name)] = values.float()
    return rows


def test_cutmix_is_torchvisions():
    """The box of torchvision.transforms.v2.CutMix, by its definition, and the share that is left of the image."""
    size, count = 32, 200
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(count, generator=generator)
    y, x = torch.randint(size, (2, count), generator=generator)
    first, second = torch.zeros(count, 3, size, size), torch.ones(count, 3, size, size)
    mixed, shares = mix(first, second, rows_of(share=weight, is_box=torch.ones(count), box_y=y, box_x=x))
    for index in range(count):
        half = int(0.5 * math.sqrt(1 - weight[index].item()) * size)
        y1, y2 = max(int(y[index]) - half, 0), min(int(y[index]) + half, size)
        x1, x2 = max(int(x[index]) - half, 0), min(int(x[index]) + half, size)
        expected = torch.zeros(size, size)
        expected[y1:y2, x1:x2] = 1
        assert torch.equal(mixed[index, 0], expected)
        assert shares[index] == pytest.approx(1 - (y2 - y1) * (x2 - x1) / size**2)


# What is drawn


def test_the_distributions_are_torchvisions():
    """Compare with the bounds and moments of torchvision's transforms."""
    script = transforms.ColorJitter(0.2, 0.2, 0.2, 0.2)
    table = augmentation("cutout=8", "affine_degrees=20", "affine_translate=0.1", "affine_scale=0.2").draw_table(
        1, 40_000
    )
    bounds = {name: getattr(script, name) for name in ("brightness", "contrast", "saturation", "hue")}
    bounds |= {"angle": (math.radians(-10), math.radians(10)), "affine_angle": (math.radians(-20), math.radians(20))}
    bounds["affine_scale"] = (0.8, 1.2)
    for name, (low, high) in bounds.items():
        values = column(table, name)
        assert low <= values.min() < low + 0.001 * (high - low), name
        assert high >= values.max() > high - 0.001 * (high - low), name
        counts = torch.histc(values, bins=20, min=low, max=high)
        assert (counts / 2000 - 1).abs().max() < 0.12, f"{name} is not uniform"
    for name, count in (("crop_y", 9), ("crop_x", 9), ("flip", 2), ("jitter_order", 24), ("cutout_y", 32)):
        counts = torch.bincount(column(table, name).long(), minlength=count)
        assert len(counts) == count, name
        assert (counts * count / 40_000 - 1).abs().max() < 0.15, f"{name} is not uniform"
    low, high = transforms.ColorJitter(brightness=1.5).brightness  # cut at zero
    wide = column(augmentation("brightness=1.5").draw_table(1, 10_000), "brightness")
    assert low <= wide.min() < low + 0.01 and high >= wide.max() > high - 0.01
    for name in ("affine_y", "affine_x"):  # torchvision moves by whole pixels: at most 0.1 of 32
        assert column(table, name).unique().tolist() == [-3, -2, -1, 0, 1, 2, 3]
    correlation = torch.corrcoef(table[:, :15].T) - torch.eye(15)
    assert correlation.abs().max() < 0.03, "two parameters share their draws"


def test_shares_are_beta_distributed_and_mixup_and_cutmix_share_the_images():
    table = augmentation("mixup=0.2", "cutmix=1").draw_table(1, 40_000, num_partners=50)
    is_box, shares = column(table, "is_box").bool(), column(table, "share")
    assert is_box.float().mean() == pytest.approx(0.5, abs=0.02)
    for alpha, drawn in ((0.2, shares[~is_box]), (1.0, shares[is_box])):
        assert drawn.mean() == pytest.approx(0.5, abs=0.01)
        assert drawn.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.04)
    assert (shares.min() >= 0) & (shares.max() <= 1)
    assert column(table, "partner").unique().tolist() == list(range(50))
    assert column(augmentation("cutmix=1").draw_table(1, 100), "is_box").min() == 1


def test_flips_are_random_or_alternate():
    at_random, alternating = (
        [column(augmentation(f"flip={how}").draw_table(epoch, 1000), "flip") for epoch in range(1, 5)]
        for how in ("random", "alternating")
    )
    assert (at_random[0] == at_random[1]).float().mean() == pytest.approx(0.5, abs=0.05)
    assert alternating[0].mean() == pytest.approx(0.5, abs=0.05)
    assert torch.equal(alternating[0] + alternating[1], torch.ones(1000))
    assert torch.equal(alternating[0], alternating[2])
    assert torch.equal(alternating[1], alternating[3])


def test_the_table_depends_on_seed_and_epoch_alone():
    global_state = torch.get_rng_state()
    first = augmentation().draw_table(1, 100)
    assert torch.equal(global_state, torch.get_rng_state())
    torch.rand(5)
    later = augmentation()
    later.draw_table(9, 50)
    assert torch.equal(first, later.draw_table(1, 100))
    assert not torch.equal(first, augmentation().draw_table(2, 100))
    assert not torch.equal(first, augmentation(seed=1).draw_table(1, 100))
    less, hue = augmentation("hue=0").draw_table(1, 100), COLUMNS.index("hue")
    assert less[:, hue].abs().max() == 0
    first[:, hue] = 0
    assert torch.equal(first, less), "switching one operation off changes other draws"


# What is done to a batch


@pytest.mark.parametrize(
    "field",
    "crop_padding=1 flip=random rotation_degrees=9 affine_degrees=9 affine_translate=0.2 affine_scale=0.3"
    " brightness=0.3 contrast=0.3 saturation=0.3 hue=0.2 cutout=6 policy=trivial policy=randaugment"
    " random_erasing=0.5".split(),
)
def test_each_operation_is_done_where_only_it_is_on(field):
    off = ("crop_padding=0", "flip=none", "rotation_degrees=0", "brightness=0", "contrast=0", "saturation=0", "hue=0")
    nothing, alone = augmentation(*off), augmentation(*off, field)
    assert torch.equal(nothing.apply(IMAGES, nothing.draw_table(1, 40)), IMAGES.float() / 255)
    changed = alone.apply(IMAGES, alone.draw_table(1, 40)) != IMAGES.float() / 255
    assert changed.flatten(1).any(1).float().mean() > 0.3


def test_pixels_do_not_depend_on_the_number_of_threads():
    """tests/unit/test_stream.py has the batches, a rank's empty share of one among them."""
    ours, threads = augmentation(), torch.get_num_threads()
    # Threads may share the sum of one large image.
    large = Augmentation(make_recipe("augmentation.contrast=0.9", base="plain").augmentation, seed=0, image_size=224)
    noise = torch.randint(256, (8, 3, 224, 224), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    table, large_table = ours.draw_table(1, len(IMAGES)), large.draw_table(1, len(noise))
    whole, whole_large = ours.apply(IMAGES, table), large.apply(noise, large_table)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(ours.apply(IMAGES, table), whole)
            one_by_one = [large.apply(noise[i : i + 1], large_table[i : i + 1]) for i in range(len(noise))]
            assert torch.equal(torch.cat(one_by_one), whole_large)
    finally:
        torch.set_num_threads(threads)
