"""`--budget` and `--measure`: what is planned, and that measuring changes nothing."""

import weakref
from pathlib import Path

import pytest
import torch

from cifar_dist.cli import main
from cifar_dist.commands import train as train_command
from cifar_dist.config.options import parse_duration
from cifar_dist.config.plan import DatasetSizes, make_plan
from cifar_dist.run import budget
from cifar_dist.run.directory import RunDirectory
from cifar_dist.training import measure, setup
from cifar_dist.training.measure import Pace, measure_pace
from cifar_dist.training.trainer import Trainer
from tests.commands.test_train import DATA, EVERYTHING, assert_same_run, error_of, small_world, train
from tests.conftest import make_recipe
from tests.unit.test_model import build_narrow

__all__ = ["small_world"]  # a fixture

# Of the 80 training images in steps of 32 an epoch takes 2.5 whole steps, and 16 images are validated: 251.6 s.
PACE = Pace(step_seconds={32: 100.0}, evaluation_seconds=0.1)
BUDGET = ["--budget", "900s", "--run-dir", "parts", *EVERYTHING]


@pytest.fixture
def pace(monkeypatch):
    """A machine of this pace, which is really measured too, for its traces. Returns what was measured."""
    measured = []

    def faked(recipe, runtime, **named):
        measured.append(measure_pace(recipe, runtime, **{**named, "seconds": 0.001}))
        return PACE

    monkeypatch.setattr(budget, "measure_pace", faked)
    return measured


def with_scaler(*arguments, original=train_command.start, **named):
    """Start a runtime whose gradient scaler skips the first steps, as with fp16."""
    runtime = original(*arguments, **named)
    runtime.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1e38, growth_interval=3)
    return runtime


def test_a_planned_run_is_one_of_typed_epochs_and_stays_it(capsys, monkeypatch, pace):
    monkeypatch.setattr(train_command, "start", with_scaler)
    original = Trainer._end_step

    def stop(trainer, epoch):
        if trainer.plan.epochs == 3 and trainer.state.step == 3:
            trainer.interrupt.requested = "SIGTERM"
        original(trainer, epoch)

    monkeypatch.setattr(Trainer, "_end_step", stop)
    train(*BUDGET, code=75)
    assert "--budget 900s: --epochs 3; 100 s a step of 32 x 32, 10 images/s evaluated" in capsys.readouterr().out
    assert RunDirectory(Path("parts")).read_metadata().recipe.epochs == 3
    monkeypatch.setattr(Trainer, "_end_step", original)
    train(*BUDGET, "--resume", "--budget", "1s")
    assert len(pace) == 1, "a resumed run keeps its plan"
    train("--epochs", "3", "--run-dir", "typed", *EVERYTHING)
    assert_same_run("typed", "parts", epochs=3)


def test_measuring_leaves_no_trace(monkeypatch, runtime):
    models = []

    def build(*arguments, **named):
        models.append(weakref.ref(model := build_narrow(*arguments, **named)))
        return model

    monkeypatch.setattr(setup, "build_network", build)
    before = torch.get_rng_state()
    recipe = make_recipe("global_batch_size=16", "image_size_schedule=[[16, 0.5], [32, 1.0]]", "pretrained=imagenet")
    measured = measure_pace(recipe, runtime, image_size=32, num_classes=10, seconds=0.001)
    assert set(measured.step_seconds) == {16, 32}
    assert min(*measured.step_seconds.values(), measured.evaluation_seconds) > 0
    assert torch.equal(torch.get_rng_state(), before)
    assert [model() for model in models] == [None], "its memory is kept"


def test_the_slowest_rank_and_about_the_seconds_count(monkeypatch, runtime):
    """A step takes 0.2 s, the first of each size 5 s; so does the evaluation of 500 images after its first time."""
    monkeypatch.setattr(setup, "build_network", build_narrow)
    calls = []

    def faked(action, count, runtime):
        action()
        calls.append(count)
        return 0.2 * count

    monkeypatch.setattr(measure, "seconds_of", faked)
    monkeypatch.setattr(runtime.ranks, "all_gather", lambda values: [tuple(values), tuple(2 * each for each in values)])
    monkeypatch.setattr(Trainer, "_agree", lambda trainer: (0.0, 0.0, 0.0))
    recipe = make_recipe("global_batch_size=64", "image_size_schedule=[[16, 0.5], [32, 1.0]]")
    pace = measure_pace(recipe, runtime, image_size=32, num_classes=10, seconds=2.5)
    assert calls == [1, 2, 2, 2, 1, 2, 2, 2, 1]
    assert pace.step_seconds == pytest.approx({16: 0.4, 32: 0.4})
    assert pace.evaluation_seconds == pytest.approx(0.4 / 500)


def test_the_time_of_a_plan():
    recipe = make_recipe("image_size_schedule=[[16, 0.25], [32, 1.0]]", "global_batch_size=32", "epochs=4")
    sizes = DatasetSizes(num_train=80, num_test=10, num_validation=5)  # an epoch of 2.5 whole steps is three
    plan = make_plan(recipe, world_size=1, sizes=sizes, device_type="cpu")
    pace = Pace(step_seconds={16: 1.0, 32: 3.0}, evaluation_seconds=0.1)
    assert pace.seconds(plan) == pytest.approx(1.04 * (2.5 * 1 * 1.0 + 2.5 * 3 * 3.0 + 0.1 * (4 * 5 + 10)) + 6)


@pytest.mark.parametrize("left", [42, 50, 60, 90, 120, 200, 230, 330, 480, 640, 1000])
def test_the_image_sizes_fill_the_budget(left):
    """Steps of a second at 16 pixels and 3 at 32: an epoch of 20 steps takes 50 s, and epochs are whole."""
    recipe = make_recipe("image_size_schedule=[[16, 0.25], [32, 1.0]]", "global_batch_size=100", "validation_size=0")
    sizes = DatasetSizes(num_train=2000, num_test=10)
    pace = Pace(step_seconds={16: 1.0, 32: 3.0}, evaluation_seconds=1e-9)

    def seconds_of(recipe):
        return pace.seconds(make_plan(recipe, world_size=1, sizes=sizes, device_type="cpu"))

    whole = int((left - 6) // (1.04 * 50))
    filled = budget._fill(recipe, whole, left, seconds_of)
    assert 0.95 * left < seconds_of(filled) <= left
    assert filled.epochs in (whole, whole + 1)
    ends = [end for _, end in filled.image_size_schedule]
    assert ends[0] < 1 and ends[1] == 1
    assert (filled.epochs > whole) == (ends[0] > 0.25)
    fixed = budget._fill(make_recipe("image_size_schedule=null"), whole, left, seconds_of)
    assert (fixed.epochs, fixed.image_size_schedule) == (whole, None)


def test_a_resumed_run_keeps_the_image_sizes_that_fill_its_budget(capsys, monkeypatch):
    pace = Pace(step_seconds={16: 50.0, 32: 100.0}, evaluation_seconds=0.1)
    monkeypatch.setattr(budget, "measure_pace", lambda *_, **__: pace)
    fields = ["--set", "image_size_schedule=[[16, 0.5], [32, 1.0]]", "--run-dir", "run"]
    train("--budget", "700s", *EVERYTHING, *fields)
    assert "images grow at " in capsys.readouterr().out
    stored = RunDirectory(Path("run")).read_metadata().recipe
    assert stored.image_size_schedule[0][1] != 0.5
    train("--budget", "700s", *EVERYTHING, *fields, "--resume")
    assert RunDirectory(Path("run")).read_metadata().recipe == stored


def test_a_budget_that_is_too_small_names_the_recipe_that_fits(capsys, monkeypatch):
    paces = {"quick": dict.fromkeys((16, 24, 32), 1.0), "other": dict.fromkeys((16, 24, 32), 900.0)}

    def faked(recipe, *_, **__):
        name = "quick" if recipe.stem == "small" else "other"
        return Pace(step_seconds=paces[name], evaluation_seconds=1e-9)

    monkeypatch.setattr(budget, "measure_pace", faked)
    argv = ["--recipe", "standard", *DATA, "--budget", "40s", "--set", "validation_size=16"]
    assert main(argv) == 2
    said = error_of(capsys)
    assert said.startswith("--budget 40s is too small for standard: an epoch takes ")
    assert "s are left after measuring: --recipe quick fits, with " in said
    paces["quick"] = paces["other"]
    assert main(argv) == 2
    assert error_of(capsys).endswith("allow more time, or train on a part of the images with train_size")
    assert not Path("runs").exists()


def test_a_dry_run_measures_and_writes_nothing(capsys, monkeypatch, pace):
    argv = ["--recipe", "original", *DATA, "--dry-run", "--measure"]
    assert main([*argv, "--epochs", "2"]) == 0
    # 2 x 5,000 / 128 steps of 100 s and 1,000 images, and the reserves
    assert "at most 2 h 17 min: 100 s a step of 32 x 32, 10 images/s evaluated" in capsys.readouterr().out
    assert main([*argv, "--budget", "4h", "--set", "early_stopping.enabled=false"]) == 0
    shown = capsys.readouterr().out
    assert "40 an epoch x 3 epochs = 120" in shown and "about 3 h 25 min" in shown
    assert list(Path().iterdir()) == []
    launched = []
    monkeypatch.setattr("cifar_dist.runtime.launch.launch", lambda argv, *_: launched.append(argv) or 0)
    assert main([*argv, "--num-processes", "2"]) == 0
    assert main([*argv[:-1], "--num-processes", "2"]) == 0
    assert launched == [[*argv, "--num-processes", "2"]], "only what is measured needs the processes"


def test_durations():
    texts = {"90s": 90, "10m": 600, "2h": 7200, "1h30m": 5400, "0.5m": 30}
    assert {text: parse_duration(text) for text in texts} == texts


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        *((f"--budget {text}", f"--budget must be a time such as 90s, 10m, 2h or 1h30m, not '{text}'")
          for text in ("10", "0s", "5x", "m", "1.2.3s", "30m1h")),
        ("--budget 5m --epochs 3", "--budget plans the epochs of one run"),
        ("--budget 5m --set epochs=3", "--budget plans the epochs of one run"),
        ("--budget 5m --seeds 3", "--budget plans the epochs of one run"),
        ("--budget 5m --dry-run", "add --measure"),
        ("--measure", "--measure goes with --dry-run"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(capsys, argv, message):
    assert main(argv.split()) == 2
    assert message in error_of(capsys)
