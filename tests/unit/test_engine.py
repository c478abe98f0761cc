"""The loop: what it computes, what it tells, what it keeps."""

import copy
import dataclasses
import math

import pytest
import torch
from torch.nn import functional

from cifar_dist.config.plan import make_plan
from cifar_dist.data.batches import Normalizer
from cifar_dist.records import Observer
from cifar_dist.training.engine import DivergedError, Trainer
from cifar_dist.training.evaluation import predict_logits
from cifar_dist.training.setup import build_trainer
from tests.conftest import make_dataset, make_recipe

SMALL = ("global_batch_size=32", "epochs=2", "optimizer.learning_rate=0.05")


class Listener(Observer):
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.events = []

    def on_epoch_start(self, epoch, lr):
        self.events.append(("start", epoch, lr))

    def on_step(self, step_in_epoch, loss):
        self.events.append(("step", step_in_epoch, loss))

    def on_evaluation(self, done, total):
        self.events.append(("evaluation", done, total))

    def on_epoch_end(self, record, is_best):
        self.events.append(("end", record.epoch, is_best))


def trainer_for(runtime, *assignments, dataset=None, observer=None) -> Trainer:
    recipe, dataset = make_recipe(*SMALL, *assignments), dataset or make_dataset()
    plan = make_plan(recipe, world_size=1, sizes=dataset.sizes, device_type="cpu")
    return build_trainer(recipe, plan, dataset, runtime, observer or Observer())


def test_an_epoch_is_what_plain_torch_computes(runtime):
    """The same batches through a loop written down again: equal weights, equal sums."""
    trainer = trainer_for(runtime, "epochs=1", dataset=make_dataset(num_train=80))
    model = copy.deepcopy(trainer.state.model)
    batches = list(trainer.batches.epoch(1))
    record = next(trainer.epochs())

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    model.train()
    loss_sum, hits = 0.0, 0
    for images, labels in batches:
        optimizer.zero_grad()
        logits = model(images)
        loss = functional.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        loss_sum += loss.item() * len(labels)
        hits += (logits.argmax(1) == labels).sum().item()
    assert [len(labels) for _, labels in batches] == [32, 32, 16]
    assert record.train_loss == pytest.approx(loss_sum / 80, rel=1e-4)
    assert record.train_acc == hits / 80
    for mine, yours in zip(trainer.state.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, yours, atol=2e-4, rtol=1e-3)


def test_the_record_of_an_epoch(runtime):
    trainer = trainer_for(runtime, "validation_size=16")
    first, second = trainer.epochs()
    assert (first.epoch, first.step, second.epoch, second.step) == (1, 3, 2, 6)
    assert (first.lr, first.world_size) == (0.05, 1)
    assert first.images_per_second == pytest.approx(80 / first.epoch_seconds)
    assert trainer.state.train_seconds == pytest.approx(first.epoch_seconds + second.epoch_seconds)
    assert 0 <= second.val_acc <= 1


def test_training_learns(runtime):
    trainer = trainer_for(runtime, "epochs=8", "optimizer.learning_rate=0.005", "augmentation.brightness=0")
    records = list(trainer.epochs())
    assert records[-1].train_acc > 0.3 > records[0].train_acc, "chance is 0.1"


def test_two_runs_are_bit_identical_and_another_seed_is_not(runtime):
    def weights(*assignments):
        trainer = trainer_for(runtime, *assignments)
        list(trainer.epochs())
        return trainer.state.model.state_dict()

    first, again, other = weights(), weights(), weights("seed=1")
    assert all(torch.equal(*pair) for pair in zip(first.values(), again.values(), strict=True))
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


def test_the_epoch_decides_order_and_pixels(runtime):
    batches = trainer_for(runtime).batches
    first, second, again = (list(batches.epoch(epoch)) for epoch in (1, 2, 1))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][1], second[0][1]), "the order is the same in every epoch"
    labels = torch.cat([labels for _, labels in first])
    assert torch.equal(labels.bincount(), make_dataset().train.labels.bincount())


def test_a_sample_looks_different_in_every_epoch(runtime):
    batches = trainer_for(runtime).batches
    looks = []
    for epoch in (1, 2):
        images = torch.cat([images for images, _ in batches.epoch(epoch)])
        looks.append(images[batches.sampler.global_order().argsort()])
    same = (looks[0] == looks[1]).flatten(1).all(1)
    assert not same.any()


def test_the_observer_hears_everything_in_order(runtime):
    listener = Listener()
    trainer = trainer_for(runtime, "epochs=1", "validation_size=16", observer=listener)
    trainer.plan = dataclasses.replace(trainer.plan, report_every_steps=2)
    list(trainer.epochs())
    kinds = [event[0] for event in listener.events]
    assert kinds == ["start", "step", "step", "step", "evaluation", "end"]
    losses = [event[2] for event in listener.events if event[0] == "step"]
    assert [loss is None for loss in losses] == [True, False, True]
    assert 0 < losses[1] < 10, "the loss shown is not a mean"
    assert listener.events[0] == ("start", 1, 0.05)
    assert listener.events[-2] == ("evaluation", 16, 16)
    assert listener.events[-1] == ("end", 1, True)


def test_the_best_epoch_is_kept_by_the_monitored_metric(runtime):
    trainer = trainer_for(runtime, "validation_size=16", "epochs=3", "early_stopping.monitor=val_acc")
    values, copies = [], []
    for record in trainer.epochs():
        values.append(record.val_acc)
        copies.append(copy.deepcopy(trainer.state.model.state_dict()))
    best = values.index(max(values))
    assert trainer.state.best.epoch == best + 1
    kept = trainer.state.best.weights
    assert all(torch.equal(kept[name], copies[best][name]) for name in kept)


def test_without_a_validation_split_there_is_no_best(runtime):
    trainer = trainer_for(runtime)
    assert [(record.val_loss, record.val_acc) for record in trainer.epochs()] == [(None, None)] * 2
    assert trainer.state.best is None


def test_validation_images_are_not_trained_on(runtime):
    trainer = trainer_for(runtime, "validation_size=16")
    held_out = set(trainer.validation.indices.tolist())
    assert len(held_out) == 16
    assert held_out.isdisjoint(trainer.batches.indices.tolist())
    assert len(held_out) + len(trainer.batches.indices) == 96


def test_training_stops_early_and_does_not_start_again(runtime):
    trainer = trainer_for(
        runtime, "epochs=9", "early_stopping.patience=1", "early_stopping.min_delta=100", "optimizer.learning_rate=1e-4"
    )
    assert [record.epoch for record in trainer.epochs()] == [1, 2]
    assert list(trainer.epochs()) == []


def test_a_loss_that_is_not_finite_is_reported(runtime):
    trainer = trainer_for(runtime)
    with torch.no_grad():
        trainer.state.model.fc.weight[0, 0] = math.nan
    with pytest.raises(DivergedError, match=r"not finite in epoch 1, step \d, at learning rate 0.05"):
        list(trainer.epochs())


def test_resuming_after_an_epoch_gives_the_same_bits(runtime):
    whole = trainer_for(runtime, "validation_size=16", "epochs=3")
    records = list(whole.epochs())
    first = trainer_for(runtime, "validation_size=16", "epochs=1")
    list(first.epochs())
    content = copy.deepcopy(first.state.to_mapping())
    second = trainer_for(runtime, "validation_size=16", "epochs=3")
    second.state.restore(content)
    resumed = list(second.epochs())
    for mine, theirs in zip(resumed, records[1:], strict=True):
        same = {"images_per_second": 0.0, "epoch_seconds": 0.0}
        assert dataclasses.replace(mine, **same) == dataclasses.replace(theirs, **same)
    for name, tensor in whole.state.model.state_dict().items():
        assert torch.equal(tensor, second.state.model.state_dict()[name]), name
    assert second.state.best.epoch == whole.state.best.epoch
    assert second.state.train_seconds > content["train_seconds"]


@pytest.mark.parametrize("count", [1, 7, 250, 251])
def test_evaluation_counts_each_image_once(runtime, count):
    dataset = make_dataset(num_test=count)
    trainer = trainer_for(runtime)
    model = trainer.state.model.eval()
    normalize = Normalizer(trainer.recipe.normalization, runtime.device, runtime.memory_format)
    indices = torch.arange(count).flip(0)
    listener = Listener()
    result = predict_logits(
        model, dataset.test, indices, num_classes=10, normalize=normalize, runtime=runtime, observer=listener
    )
    assert torch.equal(result.labels, dataset.test.labels[indices])
    with torch.no_grad():
        expected = model(normalize(dataset.test.images[indices].float() / 255))
    torch.testing.assert_close(result.logits, expected, atol=1e-4, rtol=1e-4)
    assert listener.events[-1] == ("evaluation", count, count)


def test_mirror_is_the_mean_of_both_sides(runtime):
    dataset = make_dataset(num_test=8)
    trainer = trainer_for(runtime)
    model = trainer.state.model.eval()
    normalize = Normalizer(trainer.recipe.normalization, runtime.device, runtime.memory_format)
    result = predict_logits(
        model, dataset.test, torch.arange(8), num_classes=10, normalize=normalize, runtime=runtime, mirror=True
    )
    images = normalize(dataset.test.images.float() / 255)
    with torch.no_grad():
        expected = (model(images) + model(images.flip(3))) / 2
    torch.testing.assert_close(result.logits, expected, atol=1e-4, rtol=1e-4)


def test_normalization_is_torchvisions(runtime):
    from torchvision.transforms.functional import normalize

    recipe = make_recipe(base="standard")
    pixels = torch.rand(3, 3, 8, 8)
    ours = Normalizer(recipe.normalization, torch.device("cpu"), torch.channels_last)(pixels)
    theirs = normalize(pixels, list(recipe.normalization.mean), list(recipe.normalization.std))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert ours.is_contiguous(memory_format=torch.channels_last)
