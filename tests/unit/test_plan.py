"""The plan is arithmetic of recipe, world and dataset."""

import pytest

from cifar_dist.config.errors import UserError
from cifar_dist.config.options import TrainOptions
from cifar_dist.config.plan import KNOWN_SIZES, DatasetSizes, fit_to_dataset, make_plan
from cifar_dist.run.checks import check_training
from cifar_dist.run.directory import RunDirectory
from tests.conftest import make_recipe
from tests.runs import make_metadata


def test_the_plan_of_the_original():
    plan = make_plan(make_recipe(), world_size=1, sizes=KNOWN_SIZES["cifar10"], device_type="cpu")
    assert plan.equation == "global_batch_size 128 = 128 per device x 1 process x 1 accumulation"
    assert (plan.steps_per_epoch, plan.images_per_epoch, plan.total_steps) == (391, 50_000, 391 * 800)
    assert plan.lines["images"] == "50,000 training, 0 validation, 10,000 test"
    assert plan.lines["steps"] == "391 an epoch x 800 epochs = 312,800"


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


def test_batch_norm_groups_lie_whole_on_one_rank():
    sizes, recipe = DatasetSizes(num_train=5_000, num_test=10), make_recipe("batch_norm_group_size=32")
    for world_size in (1, 2, 4):
        plan = make_plan(recipe, world_size=world_size, sizes=sizes, device_type="cpu")
        assert plan.batch_norm_groups == 4
        assert plan.equation.endswith("BatchNorm sees 32 at a time")
    with pytest.raises(UserError, match=r"divide by 8 processes: set it to null or one of: 2, 4, 8, 16$"):
        make_plan(recipe, world_size=8, sizes=sizes, device_type="cpu")
    halved = make_recipe("batch_norm_group_size=32", "gradient_accumulation_steps=2")
    assert make_plan(halved, world_size=2, sizes=sizes, device_type="cpu").batch_norm_groups == 2
    with pytest.raises(UserError, match="batch_norm_group_size=48 must cut the 128 images"):
        make_plan(make_recipe("batch_norm_group_size=48"), world_size=1, sizes=sizes, device_type="cpu")
    assert make_plan(make_recipe(), world_size=4, sizes=sizes, device_type="cpu").batch_norm_groups == 1


@pytest.mark.parametrize(("num_train", "steps", "used"), [(256, 2, 256), (257, 2, 256), (258, 3, 258), (100, 1, 100)])
def test_a_last_batch_of_one_image_is_left_out(num_train, steps, used):
    sizes = DatasetSizes(num_train=num_train, num_test=1)
    plan = make_plan(make_recipe("epochs=1"), world_size=1, sizes=sizes, device_type="cpu")
    assert (plan.steps_per_epoch, plan.images_per_epoch) == (steps, used)
    assert ("1 image left out of each" in plan.lines["steps"]) == (used != num_train)


def test_auto_holds_out_a_tenth_and_at_most_5000():
    recipe = make_recipe(base="standard")
    shapes, cifar = KNOWN_SIZES["shapes"], KNOWN_SIZES["cifar10"]
    assert fit_to_dataset(recipe, shapes).validation_size == 500
    assert fit_to_dataset(recipe, cifar).validation_size == 5_000
    typed = make_recipe("validation_size=2000", base="standard")
    assert fit_to_dataset(typed, shapes).validation_size == 2_000
    few = {499: 0, 500: 50}
    assert {n: fit_to_dataset(recipe, DatasetSizes(num_train=n, num_test=9)).validation_size for n in few} == few
    with pytest.raises(UserError, match="set it to at most 4990"):
        fit_to_dataset(make_recipe("validation_size=5000"), shapes)


def test_a_split_that_stopping_needs_and_that_has_no_image_is_refused():
    recipe = make_recipe("validation_size=auto", "early_stopping.monitor=val_loss")
    with pytest.raises(UserError, match="of 8 training images none is held out"):
        fit_to_dataset(recipe, DatasetSizes(num_train=8, num_test=4))


def test_another_machine_asks_nothing_of_a_run_that_is_not_there(tmp_path):
    """It would check, and download the data of, a run that nobody has asked for."""
    options = TrainOptions(resume=True, resume_dir=tmp_path / "run")
    assert check_training(options, world_size=6, machine_rank=1) is None
    with pytest.raises(UserError, match="there is no run in"):
        check_training(options, world_size=6)
    (tmp_path / "run").mkdir()
    RunDirectory(tmp_path / "run").write_metadata(make_metadata(recipe=make_recipe("global_batch_size=96")))
    request = check_training(options, world_size=6, machine_rank=1)
    assert (request.dataset, request.recipe.global_batch_size) == ("shapes", 96)
    new = TrainOptions(run_dir=tmp_path / "run", dataset="shapes", recipe="original")
    assert check_training(new, world_size=4, machine_rank=1).dataset == "shapes"


def plan_of(num_train: int, *changes: str, base: str = "quick", world_size: int = 1):
    recipe = make_recipe("validation_size=0", *changes, base=base)
    sizes = DatasetSizes(num_train=num_train, num_test=10)
    return make_plan(recipe, world_size=world_size, sizes=sizes, device_type="cpu")


@pytest.mark.parametrize(
    ("num_train", "batch", "world_size", "fitting", "steps"),
    [(137, 512, 1, 8, 17), (300, 512, 1, 16, 19), (4500, 512, 1, 256, 18), (20, 512, 1, 2, 10), (300, 512, 4, 16, 19)],
)
def test_few_steps_name_a_batch_that_fits(num_train, batch, world_size, fitting, steps):
    changes = f"global_batch_size={batch}"
    note = plan_of(num_train, changes, world_size=world_size).few_steps_note
    assert note.endswith(f"may be too few to learn: --set global_batch_size={fitting} gives {steps} steps")
    assert "1 step an epoch" in note or "9 steps" in note
    other = plan_of(num_train, f"global_batch_size={fitting}", world_size=world_size)
    assert (other.few_steps_note, other.steps_per_epoch) == (None, steps)


def test_many_steps_or_no_smaller_batch_have_no_note():
    assert plan_of(50_000).few_steps_note is None
    assert plan_of(5120).few_steps_note is None
    assert plan_of(12, "global_batch_size=2").few_steps_note is None, "there is no smaller one"


def test_each_epoch_shows_a_loss():
    assert plan_of(50_000, "global_batch_size=16").agree_every_steps == 31
    assert plan_of(160, "global_batch_size=16").agree_every_steps == 10


def test_a_place_is_an_epoch_and_a_step_in_it():
    plan = plan_of(40 * 512)
    places = {0: "epoch 1, step 0", 1: "epoch 1, step 1", 40: "epoch 1, step 40", 46: "epoch 2, step 6"}
    assert {step: plan.place_of(step) for step in places} == places
