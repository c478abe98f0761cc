"""A note where an epoch has so few steps that little is learned."""

import pytest

from cifar_dist.config.plan import DatasetSizes, make_plan
from tests.conftest import make_recipe


def plan_of(num_train: int, *changes: str, base: str = "quick", world_size: int = 1):
    recipe = make_recipe("validation_size=0", *changes, base=base)
    sizes = DatasetSizes(num_train=num_train, num_test=10)
    return make_plan(recipe, world_size=world_size, sizes=sizes, device_type="cpu")


@pytest.mark.parametrize(
    ("num_train", "batch", "world_size", "fitting", "steps"),
    [(135, 512, 1, 8, 16), (300, 512, 1, 16, 18), (4500, 512, 1, 256, 17), (20, 512, 1, 2, 10), (300, 512, 4, 16, 18)],
)
def test_few_steps_name_a_batch_that_fits(num_train, batch, world_size, fitting, steps):
    changes = f"global_batch_size={batch}"
    note = plan_of(num_train, changes, world_size=world_size).few_steps_note
    assert note.endswith(f"may be too few to learn: --set global_batch_size={fitting} makes {steps}")
    assert "1 step an epoch" in note or "9 steps" in note
    assert plan_of(num_train, f"global_batch_size={fitting}", world_size=world_size).few_steps_note is None


def test_many_steps_or_no_smaller_batch_have_no_note():
    assert plan_of(50_000).few_steps_note is None
    assert plan_of(5120).few_steps_note is None
    assert plan_of(12, "global_batch_size=2").few_steps_note is None, "there is no smaller one"


def test_a_place_is_an_epoch_and_a_step_in_it():
    plan = plan_of(40 * 512)
    places = {0: "epoch 1, step 0", 1: "epoch 1, step 1", 40: "epoch 1, step 40", 46: "epoch 2, step 6"}
    assert {step: plan.place_of(step) for step in places} == places
