"""The loop: what it computes, what it tells, what it keeps."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torchvision.models import resnet18

from cifar_dist.config.plan import make_plan
from cifar_dist.data.augmentation import COLUMNS
from cifar_dist.data.batches import Normalizer, resized
from cifar_dist.records import Observer
from cifar_dist.training.engine import DivergedError, Trainer
from cifar_dist.training.evaluation import EvaluationSet
from cifar_dist.training.metrics import batch_loss
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


def test_dropout_falls_otherwise_in_each_epoch_and_with_each_seed(runtime):
    seen = {}
    for seed in (0, 1):
        trainer = trainer_for(runtime, "dropout=0.5", f"seed={seed}")
        head, masks = trainer.state.model.train().fc, []
        head.register_forward_pre_hook(lambda _, inputs, masks=masks: masks.append(inputs[0] == 0))
        for epoch in (1, 1, 2):
            trainer.step.begin_epoch(epoch)
            trainer.step.dropout.set_samples(torch.arange(4))
            head(torch.ones(4, 512))
        seen[seed] = masks
    assert torch.equal(seen[0][0], seen[0][1])
    assert not torch.equal(seen[0][0], seen[0][2])
    assert not torch.equal(seen[0][0], seen[1][0])


def test_an_epoch_is_what_plain_torch_computes(runtime):
    """The same batches through a loop written down again: equal weights, equal sums."""
    trainer = trainer_for(runtime, "epochs=1", dataset=make_dataset(num_train=80))
    model = copy.deepcopy(trainer.state.model)
    batches = list(trainer.batches.epoch(1))
    record = next(trainer.epochs())

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    model.train()
    loss_sum, hits = 0.0, 0
    for batch in batches:
        labels = batch.labels
        optimizer.zero_grad()
        logits = model(batch.images)
        loss = functional.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        loss_sum += loss.item() * len(labels)
        hits += (logits.argmax(1) == labels).sum().item()
    assert [len(batch.labels) for batch in batches] == [32, 32, 16]
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
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
    assert not torch.equal(first[0].samples, second[0].samples), "the order is the same in every epoch"
    labels = torch.cat([batch.labels for batch in first])
    assert torch.equal(labels.bincount(), make_dataset().train.labels.bincount())


def test_a_sample_looks_different_in_every_epoch(runtime):
    batches = trainer_for(runtime).batches
    looks = []
    for epoch in (1, 2):
        images = torch.cat([batch.images for batch in batches.epoch(epoch)])
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


def test_the_loss_that_is_shown_is_that_of_the_steps_since_the_last_one(runtime):
    listener = Listener()
    trainer = trainer_for(runtime, "epochs=1", dataset=make_dataset(num_train=80), observer=listener)
    trainer.plan = dataclasses.replace(trainer.plan, report_every_steps=1)
    (record,) = trainer.epochs()
    shown = [event[2] for event in listener.events if event[0] == "step"]
    assert len(shown) == 3 and shown[0] != shown[1]
    assert sum(loss * images for loss, images in zip(shown, (32, 32, 16), strict=True)) / 80 == pytest.approx(
        record.train_loss, rel=1e-5
    )


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


def test_a_validation_loss_that_is_not_finite_is_reported(runtime):
    trainer = trainer_for(runtime, "validation_size=16")
    trainer.state.model.register_forward_hook(lambda model, _, logits: logits if model.training else logits * math.inf)
    with pytest.raises(DivergedError, match=r"not finite in epoch 1, step 3"):
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
    images = EvaluationSet(
        data=dataset.test, indices=indices, class_names=dataset.class_names, recipe=trainer.recipe, runtime=runtime
    )
    result = images.predict(model, listener)
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
    both = EvaluationSet(
        data=dataset.test, indices=torch.arange(8), class_names=dataset.class_names, recipe=trainer.recipe,
        runtime=runtime,
    )  # fmt: skip
    result = both.predict(model, Observer(), mirror=True)
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


def weights_after(runtime, *assignments, **how) -> dict:
    trainer = trainer_for(runtime, "epochs=1", *assignments, **how)
    list(trainer.epochs())
    return trainer.state.model.state_dict()


def test_accumulation_is_the_mean_over_micro_batches(runtime):
    """Statistics are over the micro-batch, so the reference is a loop over micro-batches written down again."""
    trainer = trainer_for(runtime, "epochs=1", "gradient_accumulation_steps=4", dataset=make_dataset(num_train=70))
    model = copy.deepcopy(trainer.state.model).train()
    batches = list(trainer.batches.epoch(1))
    assert [len(batch.labels) for batch in batches] == [8] * 8 + [2, 2, 2]
    assert sum(batch.ends_step for batch in batches) == trainer.plan.steps_per_epoch == 3
    record = next(trainer.epochs())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for batch in batches:
        loss = functional.cross_entropy(model(batch.images), batch.labels, reduction="sum") / batch.images_in_step
        loss.backward()
        if batch.ends_step:
            optimizer.step()
            optimizer.zero_grad()
    assert record.step == 3
    for mine, yours in zip(trainer.state.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, yours, atol=5e-3, rtol=1e-2)


def test_label_smoothing_arrives(runtime):
    trainer = trainer_for(runtime, "epochs=1", "label_smoothing=0.2")
    batch = next(iter(trainer.batches.epoch(1)))
    logits = torch.randn(32, 10)
    ours = batch_loss(logits, batch, 0.2)
    torch.testing.assert_close(ours, nn.CrossEntropyLoss(label_smoothing=0.2, reduction="sum")(logits, batch.labels))
    smooth, plain = weights_after(runtime, "label_smoothing=0.2"), weights_after(runtime)
    assert not torch.equal(smooth["fc.weight"], plain["fc.weight"])


def test_gradients_are_clipped(runtime):
    """With a tiny largest norm, the first step moves all weights by the learning rate times that norm."""
    trainer = trainer_for(
        runtime, "epochs=1", "gradient_clipping=0.001", "optimizer.weight_decay=0", "global_batch_size=96"
    )
    before = copy.deepcopy(trainer.state.model)
    list(trainer.epochs())
    moved = [a - b for a, b in zip(trainer.state.model.parameters(), before.parameters(), strict=True)]
    norm = torch.cat([each.detach().flatten() for each in moved]).double().norm().item()
    assert norm == pytest.approx(0.05 * 0.001, rel=0.02)


def test_the_average_is_what_is_validated_kept_and_resumed(runtime):
    fields = ("validation_size=16", "ema_decay=0.9", "epochs=2")
    trainer = trainer_for(runtime, *fields)
    averages, records = [], []
    for each in trainer.epochs():
        records.append(each)
        averages.append(trainer.state.ema.model.fc.weight.clone())
    average = trainer.state.ema.model.state_dict()
    assert not torch.equal(average["fc.weight"], trainer.state.model.state_dict()["fc.weight"])
    assert trainer.validation.evaluate(trainer.state.ema.model, Observer()).loss == records[-1].val_loss
    assert torch.equal(trainer.state.best.weights["fc.weight"], averages[trainer.state.best.epoch - 1])
    content = copy.deepcopy(trainer.state.to_mapping())
    again = trainer_for(runtime, *fields)
    again.state.restore(content)
    for name, value in again.state.ema.model.state_dict().items():
        assert torch.equal(value, average[name]), name


def test_the_weights_go_on_from_the_average_every_so_many_steps(runtime):
    trainer = trainer_for(runtime, "ema_decay=0.5", "lookahead_steps=3", "epochs=1", "global_batch_size=16")
    state, together, averages = trainer.state, [], []
    for _ in trainer.steps(1):
        together.append(torch.equal(state.model.fc.weight, state.ema.model.fc.weight))
        averages.append(state.ema.model.fc.weight.clone())
    assert together == [(step + 1) % 3 == 0 for step in range(len(together))] and len(together) >= 6
    assert torch.equal(averages[3], averages[4]) and not torch.equal(averages[4], averages[5])


def test_dropout_arrives_and_two_runs_agree(runtime):
    first, again = (weights_after(runtime, "dropout=0.5") for _ in range(2))
    assert torch.equal(first["fc.weight"], again["fc.weight"])
    assert not torch.equal(first["fc.weight"], weights_after(runtime)["fc.weight"])


def test_the_body_is_frozen_while_the_head_is_trained(runtime):
    fields = ("pretrained=imagenet", "freeze_epochs=1", "epochs=2")
    dataset = make_dataset()
    weights = resnet18(num_classes=1000).state_dict()
    recipe = make_recipe(*SMALL, *fields)
    plan = make_plan(recipe, world_size=1, sizes=dataset.sizes, device_type="cpu")
    trainer = build_trainer(recipe, plan, dataset, runtime, Observer(), pretrained=weights)
    head = trainer.state.model.fc.weight.detach().clone()
    epochs = trainer.epochs()
    next(epochs)
    body = dict(trainer.state.model.named_parameters())
    for name, value in body.items():
        if not name.startswith("fc."):
            assert torch.equal(value, weights[name]), name
    assert not torch.equal(head, trainer.state.model.fc.weight)
    next(epochs)
    assert not torch.equal(body["conv1.weight"], weights["conv1.weight"])


def test_the_last_steps_of_a_run_reach_its_averaged_weights(runtime):
    """Else a run of fewer steps than `lookahead_steps` would test the network that it began with."""
    trainer = trainer_for(runtime, "epochs=1", "ema_decay=0.5", "lookahead_steps=5")
    before = copy.deepcopy(trainer.state.model.state_dict())
    list(trainer.epochs())
    assert trainer.state.step == 3
    assert not torch.equal(trainer.state.ema.model.fc.weight, before["fc.weight"])


def test_images_grow_during_training_and_are_whole_at_evaluation(runtime):
    fields = ("epochs=4", "image_size_schedule=[[16, 0.5], [24, 0.75], [32, 1.0]]", "validation_size=16")
    trainer = trainer_for(runtime, *fields)
    sides = [[batch.images.shape[-1] for batch in trainer.batches.epoch(epoch)] for epoch in range(1, 5)]
    assert sides == [[16] * 3, [16] * 3, [24] * 3, [32] * 3]
    seen = []
    trainer.state.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    next(trainer.epochs())
    assert (seen[0], seen[-1]) == (16, 32)


def test_resizing_is_torchvisions():
    from torchvision.transforms.functional import resize

    pixels = torch.rand(3, 3, 32, 32)
    for size in (16, 24, 64):
        torch.testing.assert_close(resized(pixels, size), resize(pixels, [size, size], antialias=True))
    assert resized(pixels, 32) is pixels


def test_mixed_images_count_for_both_classes(runtime):
    trainer = trainer_for(runtime, "epochs=1", "augmentation.mixup=1", "augmentation.flip=none", "augmentation.hue=0")
    batch = next(iter(trainer.batches.epoch(1)))
    logits = torch.randn(32, 10)
    expected = sum(
        share * functional.cross_entropy(logits[i : i + 1], batch.labels[i : i + 1])
        + (1 - share) * functional.cross_entropy(logits[i : i + 1], batch.partner_labels[i : i + 1])
        for i, share in enumerate(batch.shares)
    )
    torch.testing.assert_close(batch_loss(logits, batch, 0.0), expected)
    smoothed = [
        functional.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
        for labels in (batch.labels, batch.partner_labels)
    ]
    expected = (smoothed[0] * batch.shares + smoothed[1] * (1 - batch.shares)).sum()
    torch.testing.assert_close(batch_loss(logits, batch, 0.1), expected)
    assert not torch.equal(batch.labels, batch.partner_labels)


def test_a_partner_is_a_training_image_as_it_looks_itself(runtime):
    """With everything else off, a mixed image is the blend of two images of the training set."""
    dataset = make_dataset()
    fields = ("augmentation.mixup=0.5", "validation_size=16", "global_batch_size=80", "normalization.mean=[0, 0, 0]")
    recipe = make_recipe(*fields, "normalization.std=[1, 1, 1]", "epochs=1", base="plain")
    plan = make_plan(recipe, world_size=1, sizes=dataset.sizes, device_type="cpu")
    batches = build_trainer(recipe, plan, dataset, runtime, Observer()).batches
    batch = next(iter(batches.epoch(1)))
    table = batches.augmentation.draw_table(1, 96, num_partners=80)
    pixels = dataset.train.images.float() / 255
    partners = batches.indices[table[batch.samples, COLUMNS.index("partner")].long()]
    shares = table[batch.samples, COLUMNS.index("share")].view(-1, 1, 1, 1)
    torch.testing.assert_close(batch.images, shares * pixels[batch.samples] + (1 - shares) * pixels[partners])
    assert torch.equal(batch.partner_labels, dataset.train.labels[partners])
