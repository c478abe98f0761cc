"""Sides of the training images: fractions of `image_size`, so that training ends at the size of the test."""

from dataclasses import replace

import pytest

from cifar_dist.config.errors import UserError
from cifar_dist.config.plan import KNOWN_SIZES, DatasetSizes, make_plan
from cifar_dist.config.recipe import recipe_names
from tests.conftest import make_recipe


def plan_of(recipe, sizes: DatasetSizes):
    return make_plan(replace(recipe, validation_size=0), world_size=1, sizes=sizes, device_type="cpu")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_ends_at_the_size_of_the_test(name):
    for size in (32, 48, 64):
        recipe = make_recipe(f"image_size={size}", base=name)
        assert plan_of(recipe, DatasetSizes(num_train=51_200, num_test=10)).image_sizes[-1][0] == size


def test_the_schedule_grows_with_the_images():
    recipe = make_recipe("epochs=10", "image_size_schedule=[[0.5, 0.25], [0.75, 0.65], [1, 1]]", base="quick")
    plan = plan_of(recipe, KNOWN_SIZES["shapes"])
    assert plan.lines["image size"] == "16 x 16 to step 25, 24 x 24 to step 65, 32 x 32"
    assert [plan.image_size_at(step) for step in (0, 24, 25, 64, 65, 99)] == [16, 16, 24, 24, 32, 32]
    assert plan_of(replace(recipe, image_size=64), KNOWN_SIZES["shapes"]).image_sizes == ((32, 25), (48, 65), (64, 100))
    short = plan_of(replace(recipe, epochs=1), DatasetSizes(num_train=512, num_test=10))
    assert short.image_sizes == ((24, 1),), "a run too short for a side leaves it out"


def test_sides_in_pixels_become_fractions():
    pixels = make_recipe("image_size_schedule=[[16, 0.25], [24, 0.65], [32, 1]]", base="quick")
    assert pixels.image_size_schedule == ((0.5, 0.25), (0.75, 0.65), (1, 1))
    with pytest.raises(UserError, match=r"image_size=64, the last 1.*\[32\.0, 1\.0\]"):
        make_recipe("image_size_schedule=[[16, 0.5], [32, 1]]", "image_size=64")


@pytest.mark.parametrize(
    "schedule", ["[[16, 0.5], [24, 1]]", "[[0.5, 1]]", "[[48, 0.5], [32, 1]]", "[[0.01, 0.5], [1, 1]]"]
)
def test_a_schedule_that_does_not_end_at_image_size_is_refused(schedule):
    with pytest.raises(UserError, match=r"sides as fractions of image_size=32, the last 1"):
        make_recipe(f"image_size_schedule={schedule}")
