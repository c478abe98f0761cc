"""The world is read once; the plan is arithmetic."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from cifar_dist.config.errors import UserError
from cifar_dist.config.plan import KNOWN_SIZES, DatasetSizes, fit_to_dataset, make_plan
from cifar_dist.config.unsupported import refuse_several_processes
from cifar_dist.config.world import AccelerateConfig, World, load_accelerate_config, wished_precision
from tests.conftest import ROOT, make_recipe

CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


@pytest.mark.parametrize(
    ("environ", "world"),
    [
        ({}, World()),
        ({"WORLD_SIZE": "1", "RANK": "0"}, World()),
        (
            {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"},
            World(rank=3, size=4, local_rank=1, launcher="torchrun"),
        ),
        (
            {"SLURM_PROCID": "2", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "3", "SLURM_LOCALID": "0"},
            World(rank=2, size=3, local_rank=0, launcher="slurm"),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "3"}, World()),  # a salloc shell is no task
    ],
)
def test_the_world_is_read_from_the_environment(environ, world):
    assert World.from_environment(environ) == world


@pytest.mark.parametrize(
    "environ", [{"WORLD_SIZE": "two"}, {"WORLD_SIZE": "2", "RANK": "2"}, {"WORLD_SIZE": "2", "RANK": "-1"}]
)
def test_a_broken_world_is_refused(environ):
    with pytest.raises(UserError, match=r"RANK|WORLD_SIZE"):
        World.from_environment(environ)


@pytest.mark.parametrize(("world", "asked"), [(World(rank=0, size=2), 1), (World(), 2)])
def test_several_processes_are_refused_for_now(world, asked):
    with pytest.raises(UserError, match="2 processes were asked for"):
        refuse_several_processes(world, asked)


def test_the_folder_holds_the_configs_of_this_version():
    assert [path.stem for path in CONFIGS] == ["cpu", "mps"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_config_is_a_genuine_accelerate_config(path):
    theirs, ours = load_config_from_file(str(path)), load_accelerate_config(str(path))
    assert theirs.num_processes == ours.num_processes == 1
    assert theirs.use_cpu == ours.use_cpu == (path.stem == "cpu")
    assert ours.mixed_precision is None
    comment = path.read_text().split("compute_environment")[0]
    assert f"accelerate_configs/{path.name}" in comment


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: 3", "unknown key 'epochs'; hyperparameters belong in a recipe"),
        ("use_cpuu: true", "unknown key 'use_cpuu', did you mean 'use_cpu'?"),
        ("distributed_type: MPS", "write distributed_type: 'NO' for a Mac"),
        ("mixed_precision: no", "quote it"),
        ("mixed_precision: fp8", "must be 'no', 'fp16' or 'bf16'"),
        ("num_processes: -1", "num_processes must be a whole number, 1 or more"),
        ("use_cpu: 1", "use_cpu must be true or false"),
    ],
)
def test_a_bad_config_is_refused(tmp_path, text, message):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as refusal:
        load_accelerate_config(str(file))
    assert message in str(refusal.value)


def test_a_missing_config_is_named():
    with pytest.raises(UserError, match=r"cannot read Accelerate config no-such\.yaml"):
        load_accelerate_config("no-such.yaml")


def test_the_flag_wins_over_the_config_over_the_environment():
    config, none = AccelerateConfig(mixed_precision="fp16"), AccelerateConfig()
    outer = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    assert wished_precision("no", config, outer) == "no"
    assert wished_precision(None, config, outer) == "fp16"
    assert wished_precision(None, none, outer) == "bf16"
    assert wished_precision(None, none, {"ACCELERATE_MIXED_PRECISION": "no"}) == "auto"
    assert wished_precision(None, none, {}) == "auto"


def test_the_plan_of_the_original():
    plan = make_plan(make_recipe(), world_size=1, sizes=KNOWN_SIZES["cifar10"], device_type="cpu")
    assert plan.equation == "global_batch_size 128 = 128 per device x 1 process x 1 accumulation"
    assert (plan.steps_per_epoch, plan.images_per_epoch, plan.total_steps) == (391, 50_000, 391 * 800)
    assert plan.images_line == "50,000 training, 0 validation, 10,000 test"
    assert plan.steps_line == "391 an epoch x 800 epochs = 312,800"


def test_the_batch_is_cut_by_the_world():
    sizes = DatasetSizes(num_train=5_000, num_test=10)
    plan = make_plan(make_recipe("gradient_accumulation_steps=2"), world_size=4, sizes=sizes, device_type="cuda")
    assert (
        plan.equation
        == "global_batch_size 128 = 16 per device x 4 processes x 2 accumulation; BatchNorm sees 64 at a time"
    )
    with pytest.raises(UserError) as refusal:
        make_plan(make_recipe(), world_size=3, sizes=sizes, device_type="cpu")
    assert str(refusal.value).endswith("does not divide by 3 processes x 1 accumulation: set it to 126 or 129")


@pytest.mark.parametrize(("num_train", "steps", "used"), [(256, 2, 256), (257, 2, 256), (258, 3, 258), (100, 1, 100)])
def test_a_last_batch_of_one_image_is_left_out(num_train, steps, used):
    sizes = DatasetSizes(num_train=num_train, num_test=1)
    plan = make_plan(make_recipe("epochs=1"), world_size=1, sizes=sizes, device_type="cpu")
    assert (plan.steps_per_epoch, plan.images_per_epoch) == (steps, used)
    assert ("1 image left out of each" in plan.steps_line) == (used != num_train)


def test_an_untyped_validation_size_is_cut_to_a_tenth():
    recipe = make_recipe(base="standard")
    shapes, cifar = KNOWN_SIZES["shapes"], KNOWN_SIZES["cifar10"]
    assert fit_to_dataset(recipe, shapes, validation_size_was_typed=False).validation_size == 500
    assert fit_to_dataset(recipe, cifar, validation_size_was_typed=False).validation_size == 5_000
    typed = make_recipe("validation_size=2000", base="standard")
    assert fit_to_dataset(typed, shapes, validation_size_was_typed=True).validation_size == 2_000
    with pytest.raises(UserError, match="set it to at most 4998"):
        fit_to_dataset(make_recipe("validation_size=5000"), shapes, validation_size_was_typed=True)


def test_configs_are_where_the_tests_look():
    assert Path(CONFIGS[0]).is_file()
