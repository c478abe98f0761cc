"""Loading, merging and validation of recipes."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from cifar_dist.config.accelerate_config import load_accelerate_config
from cifar_dist.config.command_line import parse_arguments
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
from cifar_dist.config.schema import read_yaml
from cifar_dist.run.directory import RunDirectory
from cifar_dist.run.resolve import resolve
from cifar_dist.run.results import DatasetMetadata
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
    assert set(dataclasses.asdict(plain.augmentation).values()) <= {"none", "zeros", 0, None}


def test_set_overrides_flags_and_flags_override_the_recipe():
    options = TrainOptions(recipe="original", dataset="shapes", epochs=3, seed=5, assignments={"epochs": 4})
    recipe = resolve(options).recipe
    assert (recipe.epochs, recipe.seed, recipe.global_batch_size) == (4, 5, 128)


BAD_VALUES = {
    "epochs": ["0", "1.5", "true"], "seed": ["-1", "4294967296"], "global_batch_size": ["1"], "image_size": ["0"],
    "gradient_accumulation_steps": ["0"], "freeze_epochs": ["-1", "2"], "validation_size": ["-1", "half"],
    "train_size": ["1", "0", "1.0", "-3", "half"],
    "stem": ["big"],
    "dropout": ["1"], "label_smoothing": ["1"], "ema_decay": ["1"],
    "gradient_clipping": ["0"], "batch_norm_group_size": ["1"],
    "image_size_schedule": ["[]", "[[16, 0.5]]", "[[16, 0.5], [8, 0.5], [8, 1.0]]", "[[0, 1.0]]"],
    "optimizer": ["{nesterov: true, momentum: 0}"], "optimizer.learning_rate": ["0", ".inf"],
    "optimizer.momentum": ["1"], "optimizer.weight_decay": ["-1"], "optimizer.sgd_learning_rate": ["0"],
    "optimizer.head_learning_rate": ["0"], "optimizer.bias_learning_rate": ["-1"], "optimizer.sgd_momentum": ["1"],
    "optimizer.orthogonalization_steps": ["0"], "batch_norm_momentum": ["0", "1.1"], "batch_norm_scale": ["1"],
    "head_scale": ["0"],
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


@pytest.mark.parametrize("base", ["first", "mine.yaml"])
def test_the_dataset_of_a_recipe_is_a_default_and_no_part_of_the_experiment(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("dataset: shapes\nepochs: 2\n")
    recipe = Recipe.load(base)
    for given in (base, recipe, dataclasses.replace(recipe, epochs=3)):
        assert resolve(TrainOptions(recipe=given)).dataset == "shapes"
        assert resolve(TrainOptions(recipe=given, dataset="cifar100")).dataset == "cifar100"
    assert resolve(TrainOptions()).dataset == resolve(TrainOptions(recipe="quick")).dataset == "cifar10"
    assert recipe == dataclasses.replace(recipe, dataset=None) and "dataset" not in recipe_to_mapping(recipe)


def test_a_resumed_run_keeps_its_dataset_whatever_the_recipe_names(tmp_path):
    dataset = DatasetMetadata(name="cifar10", data_dir="data", fingerprint="x")
    RunDirectory(tmp_path).write_metadata(make_metadata(recipe=make_recipe(base="first"), dataset=dataset))
    for named in ({}, {"recipe": "first"}, {"recipe": "first", "dataset": "cifar10"}):
        assert resolve(TrainOptions(resume_dir=tmp_path, resume=True, **named)).dataset == "cifar10"
    with pytest.raises(UserError, match="this differs: dataset cifar10 -> shapes"):
        resolve(TrainOptions(resume_dir=tmp_path, resume=True, recipe="first", dataset="shapes"))


def test_the_config_of_a_run_is_a_recipe_file(tmp_path):
    file = tmp_path / "config.yaml"
    recipe = make_recipe("epochs=5")
    content = {"recipe": recipe_to_mapping(recipe), "dataset": {"name": "shapes"}}
    file.write_text(yaml.safe_dump(content))
    assert make_recipe(base=str(file)) == recipe and recipe_label(str(file)) == tmp_path.name
    file.write_text(yaml.safe_dump({"recipe_name": "quick", **content}))
    assert recipe_label(str(file)) == "quick"


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


@pytest.mark.parametrize(
    ("typed", "directory"),
    [
        ([], "quick-shapes-seed0"),
        (["model=resnet34"], "quick-resnet34-shapes-seed0"),
        (["model=mynet.py:net"], "quick-net-shapes-seed0"),
        (["model=resnet18"], "quick-shapes-seed0"),
        (["model=__main__:make.<locals>.<lambda>"], "quick-lambda-shapes-seed0"),
        (["model=../../up"], "quick-up-shapes-seed0"),
    ],
)
def test_the_run_directory_names_another_network(typed, directory):
    words = ["--recipe", "quick", "--dataset", "shapes", *(["--set", *typed] if typed else [])]
    options = parse_arguments(words)[1]
    assert resolve(options).default_directory == Path("runs", directory)
