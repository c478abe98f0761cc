"""One recipe trains the same model on every world: in float64, to rounding."""

import contextlib
import functools
from pathlib import Path

import pytest
import torch

from cifar_dist.config.plan import fit_to_dataset, make_plan
from cifar_dist.records import Observer
from cifar_dist.training.checkpoint import load_checkpoint
from cifar_dist.training.engine import InterruptedRun
from cifar_dist.training.run_directory import RunDirectory, UnwrittenRun
from cifar_dist.training.saving import CheckpointWriter
from cifar_dist.training.session import Session
from cifar_dist.training.setup import build_trainer
from tests.conftest import make_dataset, make_recipe
from tests.worlds.harness import models_in_float64, run_world

# All that changes a step; 35 images in batches of 8 or 16 leave 3 in the last, so that a rank of four has none of them.
# Not smaller images: of 16 pixels one is left at the end, BatchNorm sees 2 or 3 values, and a relative change of 1e-15
# in the weights grows to 1e-10 in nine steps, in the smallest groups to 1e-2. With 24 pixels it stays below 1e-13.
EVERYTHING = (
    "stem=small", "epochs=4", "image_size=24", "global_batch_size=8", "validation_size=4", "ema_decay=0.9",
    "early_stopping.enabled=false", "dropout=0.3", "label_smoothing=0.1", "optimizer.learning_rate=0.01",
    "optimizer.nesterov=true", "optimizer.momentum=0.9", "optimizer.weight_decay=0.01",
    "schedule={name: cosine, warmup_fraction: 0.3}",
    "augmentation.mixup=0.5", "augmentation.cutmix=0.5", "augmentation.cutout=8",
)  # fmt: skip
VARIANTS = {
    "accumulated": ("gradient_accumulation_steps=2", "gradient_clipping=0.5"),  # with all of ResNet-18's channels
    # with a quarter of them
    "global": (),
    "groups": ("global_batch_size=16", "batch_norm_group_size=4", "epochs=2"),
    "groups accumulated": (
        "global_batch_size=16", "batch_norm_group_size=2", "gradient_accumulation_steps=2", "epochs=2",
    ),
    "muon": (  # what the default recipe has, and what no other variant has
        "optimizer={name: muon, learning_rate: 0.02, sgd_learning_rate: 0.01, normalize_filters: true}",
        "augmentation.flip=alternating", "whitened_stem=true", "lookahead_steps=2",
        "image_size_schedule=[[24, 0.5], [32, 1.0]]", "epochs=2",
    ),
}  # fmt: skip


def in_float64(runtime, assignments, *, thin=True):
    """A trainer whose weights and images are float64."""
    dataset = make_dataset(num_train=39, num_test=10)
    recipe = fit_to_dataset(make_recipe(*EVERYTHING, *assignments), dataset.sizes, validation_size_was_typed=True)
    plan = make_plan(recipe, world_size=runtime.world.size, sizes=dataset.sizes, device_type="cpu")
    with models_in_float64(thin=thin):
        return build_trainer(recipe, plan, dataset, runtime, Observer())


def train(runtime, *, folder: Path, variant: str):
    """Train, write rank 0's weights, and tell what a rank saw and has: (samples of the epochs, epoch losses, hash)."""
    trainer, seen = in_float64(runtime, VARIANTS[variant], thin=variant != "accumulated"), []
    train_on = trainer.step.train_on

    def listening(batch, **named):
        seen.append((trainer.state.epoch + 1, trainer.state.step, batch.samples.tolist()))
        train_on(batch, **named)

    trainer.step.train_on = listening
    records = list(trainer.epochs())
    weights = trainer.state.model.state_dict() | {
        f"ema.{name}": value for name, value in trainer.state.ema.model.state_dict().items()
    }
    if runtime.is_main:
        torch.save({"weights": weights, "losses": [record.train_loss for record in records]}, folder / f"{variant}.pt")
    checksum = [float(value.double().sum()) for value in weights.values()]
    return seen, [(record.val_loss, record.step) for record in records], checksum


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """What became of each variant in worlds of 1, 2 and 4: (folder, {variant: what each rank returned})."""
    made = {}
    for size in (1, 2, 4):
        folder = tmp_path_factory.mktemp(f"world{size}")
        checks = [functools.partial(train, folder=folder, variant=variant) for variant in VARIANTS]
        made[size] = (folder, dict(zip(VARIANTS, run_world(size, *checks), strict=True)))
    return made


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_weights_do_not_depend_on_the_world(worlds, variant, size):
    alone, together = (torch.load(worlds[count][0] / f"{variant}.pt", weights_only=True) for count in (1, size))
    for name, value in alone["weights"].items():
        other = together["weights"][name]
        if value.is_floating_point():
            assert float((value - other).norm() / value.norm()) < 1e-8, name
        else:
            assert torch.equal(value, other), name
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-6)  # their sums are float32


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_all_ranks_have_the_same_weights_and_records(worlds, variant, size):
    (_, records, checksum), *others = worlds[size][1][variant]
    for _, their_records, their_checksum in others:
        assert their_records == records
        assert their_checksum == checksum


@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_image_is_trained_on_once_an_epoch_in_an_order_of_its_own(worlds, size):
    seen = [batch for ranks in worlds[size][1]["accumulated"] for batch in ranks[0]]
    epochs = {}
    for epoch, _, samples in seen:
        epochs.setdefault(epoch, []).extend(samples)
    assert len(epochs) == 4
    assert all(sorted(samples) == sorted(set(samples)) and len(samples) == 35 for samples in epochs.values())
    if size > 1:
        by_step = [{step: samples for epoch, step, samples in ranks[0]} for ranks in worlds[size][1]["accumulated"]]
        assert by_step[0][0] != by_step[0][5], "the order is the same in every epoch"
        assert all(steps.keys() == by_step[0].keys() for steps in by_step), "ranks did different steps"


MIDDLE = ("epochs=2", "global_batch_size=16", "batch_norm_group_size=4")


def run_part(runtime, *, folder: Path, stop_after: int | None = None):
    """Train, from a checkpoint in the folder if there is one, to the end or to a step in which a signal comes."""
    trainer = in_float64(runtime, MIDDLE)
    object.__setattr__(trainer.plan, "report_every_steps", 1)
    directory = (RunDirectory if runtime.is_main else UnwrittenRun)(folder)
    session = Session(CheckpointWriter(directory, {"dataset": {"fingerprint": "x"}}), trainer, make_dataset())
    end = trainer._end_step

    def signalled():
        end()
        trainer.interrupt.requested = "SIGTERM" if trainer.state.step == stop_after else None

    trainer._end_step = signalled
    if directory.last.exists():
        session.restore(load_checkpoint(directory.last))
    session.begin({})
    with contextlib.suppress(InterruptedRun):
        session.train()
    return trainer.state.step


@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2), (4, 2)])
def test_a_run_goes_on_in_another_world(tmp_path, first, second):
    assert run_world(first, functools.partial(run_part, folder=tmp_path / "parts", stop_after=4)) == [[4] * first]
    assert run_world(second, functools.partial(run_part, folder=tmp_path / "parts")) == [[6] * second]
    assert run_world(1, functools.partial(run_part, folder=tmp_path / "whole")) == [[6]]
    whole, parts = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "parts")
    ours, theirs = load_checkpoint(parts.last), load_checkpoint(whole.last)
    for part in ("model", "model_ema"):
        for name, value in theirs[part].items():
            if value.is_floating_point():
                assert float((value - ours[part][name]).norm() / value.norm()) < 1e-8, name
    losses = [[record.train_loss for record in run.read_records()] for run in (parts, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
