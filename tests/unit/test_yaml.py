"""What YAML means: in recipe files, in `--set`, in Accelerate configs and in what a run wrote."""

import pytest
import yaml

from cifar_dist.config.accelerate_config import load_accelerate_config
from cifar_dist.config.errors import UserError
from cifar_dist.config.options import parse_arguments
from cifar_dist.config.recipe import Recipe, read_recipe, resolve_recipe
from cifar_dist.config.schema import read_yaml
from tests.conftest import make_recipe


def from_file(folder, text: str) -> Recipe:
    (folder / "own.yaml").write_text(text)
    return resolve_recipe(read_recipe(str(folder / "own.yaml")))


@pytest.mark.parametrize(("text", "number"), [("010", 10), ("08", 8), ("00", 0), ("0", 0), ("1_0", 10), ("+7", 7)])
def test_an_integer_is_decimal_wherever_it_stands(tmp_path, text, number):
    assert parse_arguments(["--seed", text])[1].seed == number
    assert make_recipe(f"seed={text}").seed == number
    schedule = f"image_size: {text}1\nimage_size_schedule: [[{text}1, 1.0]]"
    assert from_file(tmp_path, f"seed: {text}\n{schedule}").seed == number
    (tmp_path / "world.yaml").write_text(f"main_process_port: {text}1")
    assert load_accelerate_config(str(tmp_path / "world.yaml")).main_process_port == int(f"{text}1")


@pytest.mark.parametrize("text", ["0x10", "0b11", "1:30", "0o17", "'10'", "1.0"])
def test_another_notation_is_no_integer(tmp_path, text):
    with pytest.raises(UserError, match=r"^seed must be a whole number, not "):
        make_recipe(f"seed={text}")
    with pytest.raises(UserError, match=r"^seed must be a whole number, not "):
        from_file(tmp_path, f"seed: {text}")


@pytest.mark.parametrize(("text", "number"), [("010", 10), ("00.5", 0.5), ("0.5", 0.5), ("5e-4", 5e-4), (".5", 0.5)])
def test_a_decimal_fraction_may_have_leading_zeros(text, number):
    assert make_recipe(f"optimizer.learning_rate={text}").optimizer.learning_rate == number


def test_names_of_digits_come_back_as_they_were_written(tmp_path):
    """Class folders are often numbered; PyYAML quotes those that it would read as numbers, and no others."""
    names = [*(f"{number:02}" for number in range(12)), "1:30", "0x1f", "1e5", "0_1"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"class_names": names}))
    assert read_yaml(tmp_path / "config.yaml", "config") == {"class_names": names}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nepochs: 2\nseed: 3", r"own.yaml is not valid YAML \(line 3\): the key 'seed' stands twice"),
        ("optimizer:\n  name: sgd\n  name: adamw", r"\(line 3\): the key 'name' stands twice"),
        ("recipe: {seed: 1, seed: 1}", r"\(line 1\): the key 'seed' stands twice"),
        ("optimizer.momentum: 0\noptimizer: {momentum: 1}", "recipe field 'optimizer.momentum' stands twice"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        from_file(tmp_path, text)


def test_so_it_is_in_accelerate_configs_and_in_set(tmp_path):
    (tmp_path / "world.yaml").write_text("num_processes: 1\nuse_cpu: true\nnum_processes: 2\n")
    with pytest.raises(UserError, match=r"world.yaml is not valid YAML \(line 3\): the key 'num_processes' stands"):
        load_accelerate_config(str(tmp_path / "world.yaml"))
    with pytest.raises(UserError, match=r"--set optimizer: .* is not valid YAML .*the key 'name' stands twice"):
        make_recipe("optimizer={name: sgd, name: adamw}")


def test_merged_keys_may_be_overridden(tmp_path):
    (tmp_path / "a.yaml").write_text("base: &base {x: 1, y: 2}\nmore: {<<: *base, x: 3}")
    assert read_yaml(tmp_path / "a.yaml", "file")["more"] == {"x": 3, "y": 2}


def test_dotted_names_work_in_a_file_as_in_set(tmp_path):
    assignments = ("optimizer.learning_rate=0.2", "optimizer.momentum=0.5", "seed=3")
    typed = make_recipe(*assignments, base="standard")
    text = "\n".join(assignment.replace("=", ": ") for assignment in assignments)
    assert from_file(tmp_path, text) == typed
    assert from_file(tmp_path, f"recipe: {{{text.replace(chr(10), ', ')}}}") == typed


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("normalization.mean=[125.3, 123.0, 113.9]", r"mean must be of pixels in \[0, 1\] .* by 255\), not \[125.3, "),
        ("normalization.std=[63.0, 62.1, 66.7]", r"std must be of pixels in \[0, 1\] .* by 255\), not \[63.0, "),
        ("normalization.mean=[-0.1, 0.5, 0.5]", "mean must be of pixels"),
        ("pretrained=none", "pretrained must not be the text 'none', did you mean null"),
        ("pretrained=None", "pretrained must not be the text 'None', did you mean null"),
        ("gradient_clipping=none", "gradient_clipping must not be the text 'none', did you mean null"),
        ("image_size_schedule=None", "did you mean null"),
        ("augmentation=mixup", "augmentation must be a mapping of its fields, not 'mixup'"),
    ],
)
def test_a_value_in_another_unit_or_form_is_refused_with_the_right_one(assignment, message):
    with pytest.raises(UserError, match=message):
        make_recipe(assignment)


def test_the_limits_of_normalization_are_allowed():
    assert make_recipe("normalization.mean=[0, 1, 0]", "normalization.std=[1, 1, 1]").normalization.std == (1, 1, 1)
