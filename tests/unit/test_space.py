"""The search space of `tune`: what a space file may hold, and the default ranges."""

import re

import pytest

from cifar_dist.config.errors import UserError
from cifar_dist.config.recipe import Recipe, recipe_names, recipe_to_mapping, resolve_recipe
from cifar_dist.config.schema import flatten, nested, to_mapping
from cifar_dist.config.space import Choices, Range, default_space, parse_space, read_space

SPACE = """
optimizer.learning_rate: {low: 5e-4, high: 1, log: true}
global_batch_size: {choices: [64, 0128]}
augmentation.cutout: {low: 0, high: 12, step: 4}
augmentation.flip: {choices: [none, random]}
label_smoothing: {low: 0, high: 0.2}
optimizer.sgd_learning_rate: {choices: [null, 0.1]}
"""


def test_a_space_file(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text(SPACE)
    space = read_space(file)
    assert space == {
        "optimizer.learning_rate": Range(low=0.0005, high=1.0, log=True),
        "global_batch_size": Choices(choices=(64, 128)),
        "augmentation.cutout": Range(low=0, high=12, step=4),
        "augmentation.flip": Choices(choices=("none", "random")),
        "label_smoothing": Range(low=0.0, high=0.2),
        "optimizer.sgd_learning_rate": Choices(choices=(None, 0.1)),
    }
    # The type of the numbers is that of the field.
    assert [type(each.low) for each in space.values() if isinstance(each, Range)] == [float, int, float]
    assert parse_space({name: to_mapping(each) for name, each in space.items()}, "") == space, "as study.yaml has it"


RATE = "optimizer.learning_rate"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "is empty: name a recipe field"),
        ({"lr": {}}, "unknown recipe field 'lr', did you mean 'optimizer.learning_rate'?"),
        ({"optimizer": {"learning_rate": {"low": 0.1, "high": 1}}}, "unknown recipe field 'optimizer'"),
        ({RATE: 0.1}, "must have low and high (and log or step), or choices alone"),
        ({RATE: {"low": 0.1}}, "must have low and high"),
        ({RATE: {"low": 0.1, "high": 1, "choices": [1]}}, "unknown key"),
        ({RATE: {"low": 0.1, "high": 1, "stp": True}}, "learning_rate.stp', did you mean 'step'?"),
        ({RATE: {"low": 1, "high": 0.1}}, "learning_rate.high must be at least low=1, not 0.1"),
        ({RATE: {"low": 0, "high": 1}}, "learning_rate.low must be above 0, not 0"),
        ({"optimizer.weight_decay": {"low": 0, "high": 1, "log": True}}, "log needs low above 0, and no step"),
        ({RATE: {"low": 0.1, "high": 1, "step": 0.4}}, "step=0.4 does not lead from low=0.1 to high=1"),
        ({RATE: {"low": 0.1, "high": 1, "step": 0}}, "step must be above 0, not 0"),
        ({"epochs": {"low": 1, "high": 2, "step": 0.5}}, "epochs.step must be a whole number, not 0.5"),
        ({"epochs": {"low": 1.5, "high": 2}}, "epochs.low must be a whole number, not 1.5"),
        ({"model": {"low": 1, "high": 2}}, "model.low must be text, not 1"),
        ({"optimizer.nesterov": {"low": 0, "high": 1}}, "optimizer.nesterov.low must be true or false, not 0"),
        ({"optimizer.name": {"choices": ["sgd", "adam"]}}, "must be one of sgd, adamw, muon, not 'adam'"),
        ({"optimizer.name": {"choices": []}}, "choices must be a list of values"),
        ({"normalization.mean": {"choices": [[0.5, 0.5, 0.5]]}}, "is a list, which cannot be searched"),
        ({"validation_size": {"choices": [0, 100]}}, "decides which images are held out"),
        ({"dataset": {"choices": ["cifar10", "shapes"]}}, "decides which images are held out"),
    ],
)
def test_a_mistake_is_named(values, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse_space(values, "space file x")


@pytest.mark.parametrize("name", recipe_names())
def test_the_ends_of_a_default_space_are_recipes(name):
    recipe = Recipe.load(name)
    space = default_space(recipe)
    assert parse_space({name: to_mapping(each) for name, each in space.items()}, "") == space
    rates = {name for name in space if name.endswith("learning_rate")}
    assert rates == {name for name, value in flatten(recipe_to_mapping(recipe)).items() if "_rate" in name and value}
    for end in ("low", "high"):
        values = {
            n: getattr(each, end, None) or each.choices[0] for n, each in space.items() if hasattr(each, "choices")
        }
        values |= {n: getattr(each, end) for n, each in space.items() if isinstance(each, Range)}
        resolve_recipe(recipe_to_mapping(recipe), nested(values))
    low, high = space[RATE].low, space[RATE].high
    assert low < recipe.optimizer.learning_rate < high
