"""Loading, merging and validation of recipes."""

import dataclasses
import re

import pytest
import yaml

from cifar_dist.config.errors import UserError
from cifar_dist.config.options import TrainOptions
from cifar_dist.config.plan import DatasetSizes, num_held_out
from cifar_dist.config.recipe import (
    Recipe,
    parse_assignments,
    read_recipe,
    recipe_label,
    recipe_names,
    recipe_to_mapping,
    resolve_recipe,
)
from cifar_dist.run.directory import RunDirectory
from cifar_dist.run.resolve import resolve
from tests.conftest import make_recipe
from tests.runs import make_metadata


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_the_package_is_complete(name):
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
    original, plain = make_recipe(base="original"), make_recipe(base="plain")
    assert dataclasses.replace(original, augmentation=plain.augmentation) == plain
    assert set(dataclasses.asdict(plain.augmentation).values()) <= {"none", "zeros", 0}


def test_set_overrides_flags_and_flags_override_the_recipe():
    options = TrainOptions(recipe="original", dataset="shapes", epochs=3, seed=5, assignments={"epochs": 4})
    recipe = resolve(options).recipe
    assert (recipe.epochs, recipe.seed, recipe.global_batch_size) == (4, 5, 128)


def test_set_accepts_numbers_in_any_notation():
    recipe = make_recipe("optimizer.weight_decay=1e-3", "augmentation.rotation_degrees=5", "optimizer={momentum: 0.5}")
    assert (recipe.optimizer.weight_decay, recipe.augmentation.rotation_degrees) == (1e-3, 5.0)
    assert (recipe.optimizer.momentum, recipe.optimizer.learning_rate) == (0.5, 0.01)


BAD_VALUES = {
    "epochs": ["0", "1.5", "true"], "seed": ["-1", "4294967296"], "global_batch_size": ["1"], "image_size": ["0"],
    "gradient_accumulation_steps": ["0"], "freeze_epochs": ["-1", "2"], "validation_size": ["-1", "half"],
    "stem": ["big"],
    "dropout": ["1"], "label_smoothing": ["1"], "ema_decay": ["1"],
    "gradient_clipping": ["0"], "batch_norm_group_size": ["1"],
    "image_size_schedule": ["[]", "[[16, 0.5]]", "[[16, 0.5], [8, 0.5], [8, 1.0]]", "[[0, 1.0]]"],
    "optimizer": ["{nesterov: true, momentum: 0}"], "optimizer.learning_rate": ["0", ".inf"],
    "optimizer.momentum": ["1"], "optimizer.weight_decay": ["-1"], "optimizer.sgd_learning_rate": ["0"],
    "schedule": ["{name: step, gamma: 2, step_epochs: 1}", "{name: step, gamma: 1, step_epochs: 0}"],
    "schedule.name": ["step"], "schedule.gamma": ["0.5"], "schedule.warmup_fraction": ["1"],
    "early_stopping.patience": ["0"], "early_stopping.min_delta": ["-1"], "early_stopping.monitor": ["val_loss"],
    "augmentation": ["3"], "augmentation.hue": ["0.7"], "augmentation.brightness": ["-1"],
    "augmentation.rotation_degrees": ["181"], "augmentation.affine_translate": ["2"],
    "augmentation.affine_scale": ["1"], "normalization.mean": ["[1, 2]", "[1, 2, a]"],
    "normalization.std": ["[1, 0, 1]"],
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in BAD_VALUES for value in BAD_VALUES[field]])
def test_a_bad_value_is_refused_by_name(field, value):
    section = field.split(".")[0]
    with pytest.raises(UserError, match=rf"^{section}\S* (must be|needs) "):
        make_recipe(f"{field}={value}")


@pytest.mark.parametrize("assignment", ["epochs", "=3", "a..b=1", ".epochs=1", "epochs=[1"])
def test_a_malformed_assignment_is_refused(assignment):
    with pytest.raises(UserError, match="--set"):
        parse_assignments([assignment])


def test_a_file_overrides_standard(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 7\noptimizer: {learning_rate: 0.5}\n")
    expected = make_recipe("epochs=7", "optimizer.learning_rate=0.5", base="standard")
    assert make_recipe(base=str(file)) == expected != make_recipe(base="standard")
    assert recipe_label(str(file)) == "mine"


def test_the_config_of_a_run_is_a_recipe_file(tmp_path):
    file = tmp_path / "config.yaml"
    recipe = make_recipe("epochs=5")
    file.write_text(yaml.safe_dump({"recipe": recipe_to_mapping(recipe), "dataset": {"name": "shapes"}}))
    assert make_recipe(base=str(file)) == recipe


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a: [1", "is not valid YAML (line 1)"), (b"- 1\n", "must be a mapping"), (b"\xff\xfe", "is not a text file")],
)
def test_a_broken_file_is_named(tmp_path, content, message):
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"broken\.yaml {re.escape(message)}"):
        read_recipe(str(file))


@pytest.mark.parametrize(
    ("name", "message"),
    [("orignal", "unknown recipe 'orignal', did you mean 'original'?"), ("no/such.yaml", "does not exist")],
)
def test_an_unknown_recipe_is_refused(name, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read_recipe(name)


def test_a_validation_set_of_the_dataset_is_used_whole():
    """Whether the recipe comes by its name or, from Python, whole."""
    sizes = DatasetSizes(num_train=90, num_test=10, num_validation=8)
    for name in ("original", "quick"):  # 0 and auto
        for recipe in (name, Recipe.load(name)):
            request = resolve(TrainOptions(recipe=recipe, dataset="shapes"))
            assert num_held_out(request.recipe, sizes) == 8
    with pytest.raises(UserError, match="the dataset brings its own 8"):
        num_held_out(Recipe.load("original", validation_size=7), sizes)


def test_a_resumed_run_keeps_the_number_that_auto_meant(tmp_path):
    run = RunDirectory(tmp_path)
    run.write_metadata(make_metadata(recipe=make_recipe("validation_size=300", base="quick")))
    for named in ({}, {"recipe": "quick"}, {"assignments": {"validation_size": "auto"}}):
        assert resolve(TrainOptions(resume_dir=tmp_path, resume=True, **named)).recipe.validation_size == 300
    with pytest.raises(UserError, match="validation_size 300 -> 299"):
        resolve(TrainOptions(resume_dir=tmp_path, resume=True, assignments={"validation_size": 299}))
