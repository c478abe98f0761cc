"""Sides of the training images: fractions of `image_size`, so that training ends at the size of the test."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from cifar_dist.cli import main
from cifar_dist.config.errors import UserError
from cifar_dist.config.plan import KNOWN_SIZES, DatasetSizes, make_plan
from cifar_dist.config.recipe import recipe_names, recipe_to_mapping
from tests.commands.test_train import small_world, train
from tests.conftest import make_recipe

__all__ = ["small_world"]


def sizes_of(recipe, num_train: int = 51_200):
    sizes = DatasetSizes(num_train=num_train, num_test=10)
    return make_plan(replace(recipe, validation_size=0), world_size=1, sizes=sizes, device_type="cpu").image_sizes


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_ends_at_the_size_of_the_test(name):
    for size in (32, 48, 64):
        assert sizes_of(make_recipe(f"image_size={size}", base=name))[-1][0] == size


def test_the_schedule_grows_with_the_images():
    recipe = make_recipe("epochs=10", base="quick")
    assert sizes_of(recipe) == ((16, 250), (24, 650), (32, 1000))
    assert sizes_of(replace(recipe, image_size=64)) == ((32, 250), (48, 650), (64, 1000))
    recipe = replace(recipe, validation_size=0)
    plan = make_plan(recipe, world_size=1, sizes=KNOWN_SIZES["shapes"], device_type="cpu")
    assert plan.lines["image size"] == "16 x 16 to step 25, 24 x 24 to step 65, 32 x 32"
    assert [plan.image_size_at(step) for step in (0, 24, 25, 64, 65, 99)] == [16, 16, 24, 24, 32, 32]


def test_a_run_too_short_for_a_side_leaves_it_out():
    assert sizes_of(make_recipe("epochs=1", base="quick"), num_train=512) == ((24, 1),)


def test_pixels_are_fractions_as_older_recipes_have_them():
    pixels = make_recipe("image_size_schedule=[[16, 0.25], [24, 0.65], [32, 1]]", base="quick")
    assert pixels == make_recipe(base="quick")
    odd = make_recipe("image_size=48", "image_size_schedule=[[20, 0.5], [48, 1]]")
    assert sizes_of(odd)[0][0] == 20
    assert make_recipe(f"image_size_schedule={list(map(list, odd.image_size_schedule))}", "image_size=48") == odd


@pytest.mark.parametrize(
    "schedule", ["[[16, 0.5], [24, 1]]", "[[0.5, 1]]", "[[48, 0.5], [32, 1]]", "[[0.01, 0.5], [1, 1]]"]
)
def test_a_schedule_that_does_not_end_at_image_size_is_refused(schedule):
    with pytest.raises(UserError, match=r"sides as fractions of image_size=32, the last 1"):
        make_recipe(f"image_size_schedule={schedule}")
    with pytest.raises(UserError, match=r"image_size=64, the last 1.*\[32\.0, 1\.0\]"):
        make_recipe("image_size_schedule=[[16, 0.5], [32, 1]]", "image_size=64")


def test_a_run_with_a_schedule_in_pixels_resumes(capsys):
    """As config.yaml and checkpoints have it that were written before sides were fractions."""
    fields = ("early_stopping.enabled=false", "image_size_schedule=[[0.5, 0.5], [1, 1]]")
    train("--run-dir", "run", "--epochs", "1", "--set", *fields)
    config, file = Path("run/config.yaml"), Path("run/checkpoints/last.pt")
    stored, checkpoint = yaml.safe_load(config.read_text()), torch.load(file, weights_only=True)
    for values in (stored, checkpoint):
        assert values["recipe"]["image_size_schedule"] == [[0.5, 0.5], [1.0, 1.0]]
        values["recipe"]["image_size_schedule"] = [[16, 0.5], [32, 1.0]]
    config.write_text(yaml.safe_dump(stored))
    torch.save(checkpoint, file)
    assert main(["--resume", "run", "--epochs", "2"]) == 0
    assert "after 2 of 2 epochs" in capsys.readouterr().out
    recipe = make_recipe(*fields, "epochs=2", "global_batch_size=32")
    assert yaml.safe_load(config.read_text())["recipe"] == recipe_to_mapping(recipe)
