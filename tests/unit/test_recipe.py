"""Recipes: loaded, merged, checked; every refusal names its field."""

import dataclasses

import pytest
import yaml

from cifar_dist.config.errors import UserError
from cifar_dist.config.loading import parse_assignments, read_recipe, recipe_label, recipe_names
from cifar_dist.config.options import TrainOptions
from cifar_dist.config.parsing import flatten
from cifar_dist.config.plan import DatasetSizes
from cifar_dist.config.recipe import AugmentationConfig, Recipe, recipe_to_mapping, resolve_recipe
from cifar_dist.config.request import resolve_request
from tests.conftest import make_recipe


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_the_package_is_whole_and_works(name):
    recipe = make_recipe(base=name)
    assert resolve_recipe(recipe_to_mapping(recipe)) == recipe


def test_original_is_the_script_as_printed():
    recipe = make_recipe(base="original")
    optimizer, jitter = recipe.optimizer, recipe.augmentation
    assert (optimizer.name, optimizer.learning_rate, optimizer.momentum) == ("sgd", 0.01, 0.9)
    assert (optimizer.weight_decay, optimizer.nesterov, optimizer.decay_norm_and_bias) == (5e-4, False, True)
    assert (recipe.stem, recipe.global_batch_size, recipe.epochs) == ("imagenet", 128, 800)
    assert recipe.schedule.name == "constant"
    assert (jitter.crop_padding, jitter.crop_mode, jitter.flip, jitter.rotation_degrees) == (4, "zeros", "random", 10)
    assert (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) == (0.2, 0.2, 0.2, 0.2)
    assert recipe.normalization.mean == recipe.normalization.std == (0.5, 0.5, 0.5)
    stopping = recipe.early_stopping
    assert (stopping.enabled, stopping.monitor, stopping.patience, stopping.min_delta) == (True, "train_loss", 10, 1e-4)
    assert recipe.validation_size == 0


def test_plain_is_original_without_augmentation():
    plain, original = flatten(read_recipe("plain")), flatten(read_recipe("original"))
    assert {field.split(".")[0] for field in plain if plain[field] != original[field]} == {"augmentation"}
    augmentation = make_recipe(base="plain").augmentation
    off = {"none", "zeros", 0}
    assert {getattr(augmentation, field.name) for field in dataclasses.fields(AugmentationConfig)} <= off


def test_set_wins_over_flags_and_flags_over_the_recipe():
    recipe = resolve_recipe(read_recipe("original"), {"epochs": 3, "seed": 5}, parse_assignments(["epochs=4"]))
    assert (recipe.epochs, recipe.seed) == (4, 5)


def test_set_takes_numbers_as_people_write_them():
    recipe = make_recipe("optimizer.weight_decay=1e-3", "augmentation.rotation_degrees=5", "optimizer={momentum: 0.5}")
    assert (recipe.optimizer.weight_decay, recipe.augmentation.rotation_degrees) == (1e-3, 5.0)
    assert (recipe.optimizer.momentum, recipe.optimizer.learning_rate) == (0.5, 0.01)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optimzer.name=sgd", "unknown recipe field 'optimzer', did you mean 'optimizer'?"),
        ("optimizer.learning_rat=1", "unknown recipe field 'optimizer.learning_rat', did you mean 'learning_rate'?"),
        ("epochs=1.5", "epochs must be a whole number, not 1.5"),
        ("epochs=true", "epochs must be a whole number, not True"),
        ("epochs=0", "epochs must be 1 or more, not 0"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate must be a finite number, not nan"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate must be above 0, not -1.0"),
        ("optimizer.momentum=1", "optimizer.momentum must be in [0, 1), not 1.0"),
        ("stem=big", "stem must be one of cifar, small, imagenet, not 'big'"),
        ("optimizer.sgd_learning_rate=0", "optimizer.sgd_learning_rate must be above 0, or null, not 0"),
        ("lookahead_steps=5", "lookahead_steps must be 0 without ema_decay, not 5"),
        ("lookahead_steps=-1", "lookahead_steps must be 0 or more, not -1"),
        ("augmentation.hue=0.7", "augmentation.hue must be in [0, 0.5], not 0.7"),
        ("augmentation=3", "augmentation must be a mapping of its fields, not 3"),
        ("normalization.mean=[1, 2]", "normalization.mean must be a list of 3, not [1, 2]"),
        ("normalization.std=[1, 0, 1]", "normalization.std must be three numbers above 0, not [1.0, 0.0, 1.0]"),
        ("seed=-1", "seed must be in [0, 2^32), not -1"),
        ("global_batch_size=1", "global_batch_size must be 2 or more (BatchNorm), not 1"),
        ("schedule.name=step", "schedule.step_epochs must be set with schedule.name=step, and only with it, not None"),
        ("image_size_schedule=[[16, 0.5]]", "image_size_schedule must be [size, end] pairs, ends rising to 1.0"),
        ("early_stopping.monitor=val_loss", "early_stopping.monitor=val_loss needs a validation split"),
    ],
)
def test_a_bad_value_is_refused_by_name(assignment, message):
    with pytest.raises(UserError) as refusal:
        make_recipe(assignment)
    assert message in str(refusal.value)


@pytest.mark.parametrize("assignment", ["epochs", "=3", "a..b=1", ".epochs=1", "epochs=[1"])
def test_a_malformed_assignment_is_refused(assignment):
    with pytest.raises(UserError, match="--set"):
        parse_assignments([assignment])


def test_a_file_is_laid_over_standard(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 7\noptimizer: {learning_rate: 0.5}\n")
    recipe = resolve_recipe(read_recipe(str(file)))
    standard = make_recipe(base="standard")
    expected = dataclasses.replace(
        standard, epochs=7, optimizer=dataclasses.replace(standard.optimizer, learning_rate=0.5)
    )
    assert recipe == expected
    assert recipe_label(str(file)) == "mine"


def test_the_config_of_a_run_is_a_recipe_file(tmp_path):
    file = tmp_path / "config.yaml"
    recipe = make_recipe("epochs=5")
    file.write_text(yaml.safe_dump({"recipe": recipe_to_mapping(recipe), "dataset": {"name": "shapes"}}))
    assert resolve_recipe(read_recipe(str(file))) == recipe


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "is not valid YAML (line 1)"),
        (b"- 1\n", "must be a mapping"),
        (b"\xff\xfe\x00", "is not a text file"),
    ],
)
def test_a_broken_file_is_named(tmp_path, content, message):
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError) as refusal:
        read_recipe(str(file))
    assert message in str(refusal.value)
    assert "broken.yaml" in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [("orignal", "unknown recipe 'orignal', did you mean 'original'?"), ("no/such.yaml", "does not exist")],
)
def test_an_unknown_recipe_is_refused(name, message):
    with pytest.raises(UserError) as refusal:
        read_recipe(name)
    assert message in str(refusal.value)


def test_recipes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_recipe().epochs = 3  # type: ignore[misc]
    assert dataclasses.fields(Recipe)


def test_a_recipe_without_a_validation_split_takes_the_datasets_own():
    """Whether it comes by its name or, from Python, whole."""
    sizes = DatasetSizes(num_train=90, num_test=10, num_validation=8)
    for recipe in ("original", Recipe.load("original")):
        request = resolve_request(TrainOptions(recipe=recipe, dataset="shapes"), {})
        assert request.fit(sizes).validation_size == 8
    chosen = resolve_request(TrainOptions(recipe=Recipe.load("original", validation_size=7), dataset="shapes"), {})
    with pytest.raises(UserError, match="the dataset brings its own 8"):
        chosen.fit(sizes)
