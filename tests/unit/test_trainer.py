"""The training loop: what it computes, what its observer is told, and what it keeps."""

import copy
import dataclasses
import math
from types import SimpleNamespace
from unittest.mock import Mock, call

import pytest
import torch
from torch import nn
from torch.nn import functional

from cifar_dist.config.plan import make_plan
from cifar_dist.data.loader import Normalizer, resized
from cifar_dist.model.networks import build_network
from cifar_dist.run.checkpoint import load_checkpoint
from cifar_dist.run.results import Observer
from cifar_dist.training import setup
from cifar_dist.training import trainer as trainer_module
from cifar_dist.training.evaluation import EvaluationSet, batch_loss, views
from cifar_dist.training.setup import build_trainer
from cifar_dist.training.trainer import DivergedError, InterruptedRun, Recorder, Trainer
from tests.conftest import make_dataset, make_recipe
from tests.runs import begin
from tests.unit.test_model import build_narrow

SMALL = ("global_batch_size=32", "epochs=2", "optimizer.learning_rate=0.05")


@pytest.fixture(autouse=True)
def narrow_network(monkeypatch):
    monkeypatch.setattr(setup, "build_network", build_narrow)


def trainer_for(runtime, *assignments, dataset=None, observer=None) -> Trainer:
    recipe, dataset = make_recipe(*SMALL, *assignments), dataset or make_dataset()
    plan = make_plan(recipe, world_size=1, sizes=dataset.sizes, device_type="cpu")
    return build_trainer(recipe, plan, dataset, runtime, observer or Observer())


def test_dropout_differs_between_epochs_and_seeds(runtime):
    seen = {}
    for seed in (0, 1):
        trainer = trainer_for(runtime, "dropout=0.5", f"seed={seed}")
        head, masks = trainer.state.model.train().fc, []
        head.register_forward_pre_hook(lambda _, inputs, masks=masks: masks.append(inputs[0] == 0))
        for epoch in (1, 1, 2):
            trainer.step.begin_epoch(epoch)
            trainer.step.draws.begin(torch.arange(8))
            head(torch.ones(8, head.in_features))
        seen[seed] = masks
    assert torch.equal(seen[0][0], seen[0][1])
    assert not torch.equal(seen[0][0], seen[0][2])
    assert not torch.equal(seen[0][0], seen[1][0])


def test_the_first_layer_of_fastnet_is_trained_for_some_epochs(runtime, monkeypatch):
    monkeypatch.setattr(setup, "build_network", build_network)
    biases, heads = [], []

    class Watching(Observer):
        def on_epoch_end(self, record, is_best):
            biases.append(trainer.state.model.whitening.bias.tolist())
            heads.append(trainer.state.model.fc.weight.tolist())

    fields = ("model=fastnet", "stem=null", "whitening_bias_epochs=1", "epochs=2")
    trainer = trainer_for(runtime, *fields, observer=Watching())
    list(trainer.fit())
    assert biases[0] == biases[1] != [0.0] * 24
    assert heads[0] != heads[1]


@pytest.mark.parametrize(
    ("accumulation", "sizes"), [(1, [32, 32, 6]), (4, [8] * 8 + [2] * 3)], ids=["whole steps", "micro-batches"]
)
def test_an_epoch_is_what_plain_torch_computes(runtime, accumulation, sizes):
    """The same batches through a loop written down again, with torch's scheduler: equal weights, equal sums.

    BatchNorm's statistics are over a micro-batch, and so are this loop's.
    """
    fields = ("epochs=1", "schedule.name=cosine", f"gradient_accumulation_steps={accumulation}")
    trainer = trainer_for(runtime, *fields, dataset=make_dataset(num_train=70))
    model = copy.deepcopy(trainer.state.model).train()
    batches = list(trainer.batches.epoch(1))
    (record,) = trainer.fit()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
    loss_sum, correct = 0.0, 0
    for batch in batches:
        logits = model(batch.images)
        loss = functional.cross_entropy(logits, batch.labels, reduction="sum")
        (loss / batch.images_in_step).backward()
        if batch.ends_step:
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        loss_sum += loss.item()
        correct += (logits.argmax(1) == batch.labels).sum().item()
    assert [len(batch.labels) for batch in batches] == sizes
    assert [batch.images_in_step for batch in batches if batch.ends_step] == [32, 32, 6]
    assert record.step == trainer.plan.steps_per_epoch == 3
    assert record.train_loss == pytest.approx(loss_sum / 70, rel=1e-4)
    assert record.train_acc == correct / 70
    for mine, yours in zip(trainer.state.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, yours, atol=2e-4, rtol=1e-3)


def test_the_record_of_an_epoch(runtime):
    trainer = trainer_for(runtime, "validation_size=16")
    held_out, trained_on = trainer.validation.indices.tolist(), trainer.batches.indices.tolist()
    assert len(held_out) == 16 and sorted(held_out + trained_on) == list(range(96))
    first, second = trainer.fit()
    assert (first.epoch, first.step, second.epoch, second.step) == (1, 3, 2, 6)
    assert (first.lr, first.world_size) == (0.05, 1)
    for record in (first, second):
        assert record.images_per_second == pytest.approx(80 / record.epoch_seconds)
    assert trainer.state.train_seconds == pytest.approx(first.epoch_seconds + second.epoch_seconds, abs=0.01)
    assert 0 <= second.val_acc <= 1


def test_an_epoch_is_the_subset_and_the_validation_stays_whole(runtime):
    fields = ("validation_size=16", "augmentation.mixup=1")
    whole, part = (trainer_for(runtime, *fields, f"train_size={size}") for size in ("null", 40))
    assert torch.equal(part.validation.indices, whole.validation.indices)
    chosen = set(part.batches.indices.tolist())
    assert len(chosen) == 40 and chosen < set(whole.batches.indices.tolist())
    batches = list(part.batches.epoch(1))
    assert sorted(torch.cat([batch.samples for batch in batches]).tolist()) == sorted(chosen)
    labels = make_dataset().train.labels[part.batches.indices]
    assert labels.bincount().tolist() == [4] * 10, "in proportion to the classes"


def test_the_epoch_decides_order_and_pixels(runtime):
    batches = trainer_for(runtime).batches
    first, again = (list(batches.epoch(1)) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
    assert torch.equal(torch.cat([a.labels for a in first]).bincount(), make_dataset().train.labels.bincount())
    second = list(batches.epoch(2))
    assert not torch.equal(first[0].samples, second[0].samples), "the order is the same in every epoch"
    looks = []
    for epoch in (first, second):
        samples, images = (torch.cat([getattr(batch, name) for batch in epoch]) for name in ("samples", "images"))
        looks.append(images[samples.argsort()])
    assert not (looks[0] == looks[1]).flatten(1).all(1).any(), "a sample looks the same in two epochs"


def test_the_observer_is_called_in_order(runtime, monkeypatch):
    """The loss that is shown is that of the steps since the last one; the first step has one."""
    monkeypatch.setattr(trainer_module, "_AGREE_SECONDS", 1e9)
    observer = Mock(spec=Observer)
    fields = ("epochs=1", "validation_size=16")
    trainer = trainer_for(runtime, *fields, dataset=make_dataset(num_train=128), observer=observer)
    trainer.plan = dataclasses.replace(trainer.plan, agree_every_steps=2)
    (record,) = trainer.fit()
    calls = observer.method_calls
    assert [name for name, *_ in calls] == ["on_epoch_start", *["on_step"] * 4, "on_evaluation", "on_epoch_end"]
    first, second, nothing, third = (each.args[1] for each in observer.on_step.call_args_list)
    assert nothing is None
    assert first != second != third
    assert (32 * first + 32 * second + 48 * third) / 112 == pytest.approx(record.train_loss, rel=1e-5)
    assert calls[0] == call.on_epoch_start(1)
    assert calls[-2:] == [call.on_evaluation(16, 16), call.on_epoch_end(record, True)]


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only if `now` is changed."""
    faked = SimpleNamespace(now=100.0)
    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(perf_counter=lambda: faked.now))
    return faked


SLOW = "steps take more than 3 times as long as the fastest: other programs seem to use the CPUs; end them"


def steps_with_notes(runtime, clock, *fields: str, seconds: list[float], epochs: int = 1) -> list[str]:
    """Run epochs whose steps take these times on the clock, and return the notes. A last, small batch takes none."""
    observer, left = Mock(spec=Observer), iter([*seconds, 0] * epochs)
    dataset = make_dataset(num_train=32 * len(seconds) + 7)
    trainer = trainer_for(runtime, f"epochs={epochs}", *fields, dataset=dataset, observer=observer)

    def wait(*arguments, **named) -> None:
        clock.now += 60

    def step(batch) -> None:
        clock.now += next(left)

    trainer.step.train_on, observer.on_step = step, wait
    for epoch in range(1, epochs + 1):
        for _ in trainer.steps(epoch):
            wait()
    return [each.args[0] for each in observer.on_note.call_args_list]


@pytest.mark.parametrize(
    ("seconds", "is_noted"),
    [
        ([1, *[3.1] * 6], False), ([1, *[3.1] * 7], True), ([1, *[3.1] * 30], True), ([1, *[2.9] * 30], False),
        ([9, 9, 1, *[4, 1] * 7], True), ([1, *[4, 1, 1, 1] * 9], False), ([1, 3600, 1], False),
        ([0.1, *[6] * 4], True), ([0.1, *[6] * 3], False),
    ],
    ids=["not yet", "slow", "once", "3x", "some fast", "most fast", "a pause", "long steps", "long, not yet"],
)  # fmt: skip
def test_one_note_tells_of_steps_that_have_become_slow(runtime, clock, seconds, is_noted):
    assert steps_with_notes(runtime, clock, seconds=seconds) == [SLOW] * is_noted


def test_steps_are_compared_with_those_of_their_size_and_only_on_the_main_process(runtime, clock, monkeypatch):
    assert steps_with_notes(runtime, clock, seconds=[1.0] * 25, epochs=2) == []
    grown = [1.0] * 10 + [4.0] * 10
    assert steps_with_notes(runtime, clock, "image_size_schedule=[[16, 0.5], [32, 1.0]]", seconds=grown) == []
    monkeypatch.setattr(runtime, "num_threads", 2)
    advice = [f"{SLOW}, or begin a new run with OMP_NUM_THREADS=1"]
    assert steps_with_notes(runtime, clock, seconds=grown) == advice
    monkeypatch.setattr(runtime, "is_main", False)
    assert steps_with_notes(runtime, clock, seconds=grown) == []


def test_what_an_epoch_has_saved_is_not_saved_again_in_the_next(runtime):
    """Though the ranks agreed shortly before that a checkpoint is due."""
    trainer = trainer_for(runtime)
    trainer.recorder = Mock(spec=Recorder, should_save=Mock(return_value=False))
    trainer.recorder.should_save_now.side_effect = lambda: trainer.state.step == 3
    trainer.fit()
    assert trainer.recorder.on_epoch_end.call_count == 2 and trainer.recorder.save.call_count == 0


def test_ranks_agree_once_a_second_on_slow_steps(runtime, clock):
    """With steps of 0.3 s in the third step, and not only in the eighth, as the plan has it for fast ones."""
    observer = Mock(spec=Observer)
    trainer = trainer_for(runtime, dataset=make_dataset(num_train=320), observer=observer)
    trainer.plan = dataclasses.replace(trainer.plan, agree_every_steps=8)

    def step(batch) -> None:
        clock.now += 0.3

    trainer.step.train_on = step
    assert len(list(trainer.steps(1))) == 10
    shown = [number for number, loss in (each.args for each in observer.on_step.call_args_list) if loss is not None]
    assert shown == [1, 3, 6, 9]


def test_the_first_loss_after_a_resume_is_that_of_the_steps_since(runtime):
    observer = Mock(spec=Observer)
    trainer = trainer_for(runtime, observer=observer)
    trainer.plan = dataclasses.replace(trainer.plan, agree_every_steps=3)
    steps = trainer.steps(1)
    assert [next(steps), next(steps)] == [1, 2]
    before, *_ = trainer.state.sums.read()
    assert list(trainer.steps(1)) == [3], "goes on in the epoch, as a resumed run does"
    after, *_ = trainer.state.sums.read()
    _, *losses = (each.args[1] for each in observer.on_step.call_args_list)
    assert losses == [None, pytest.approx((after - before) / 32, rel=1e-5)]


def test_the_best_epoch_is_kept_by_the_monitored_metric(runtime):
    trainer = trainer_for(runtime, "validation_size=16", "epochs=4", "early_stopping.monitor=val_acc")
    copies = []
    trainer.observer.on_epoch_end = lambda *_: copies.append(copy.deepcopy(trainer.state.model.state_dict()))
    values = [record.val_acc for record in trainer.fit()]
    best = values.index(max(values))
    assert best < len(values) - 1, "the last epoch's weights would be kept by accident"
    assert trainer.state.best.epoch == best + 1
    kept = trainer.state.best.weights
    assert all(torch.equal(kept[name], copies[best][name]) for name in kept)


def test_without_a_validation_split_there_is_no_best(runtime):
    trainer = trainer_for(runtime)
    assert [(record.val_loss, record.val_acc) for record in trainer.fit()] == [(None, None)] * 2
    assert trainer.state.best is None


def test_training_stops_early_and_does_not_start_again(runtime):
    trainer = trainer_for(runtime, "epochs=9", "early_stopping={patience: 1, min_delta: 100}")
    assert [record.epoch for record in trainer.fit()] == [1, 2]
    assert trainer.stopped_early
    assert trainer.fit() == []


def test_a_validation_loss_that_is_not_finite_is_reported(runtime):
    trainer = trainer_for(runtime, "validation_size=16")
    trainer.state.model.register_forward_hook(lambda model, _, logits: logits if model.training else logits * math.inf)
    with pytest.raises(DivergedError, match=r"not finite in epoch 1, step 3"):
        trainer.fit()


def test_an_interrupted_run_is_saved_at_its_step(runtime, tmp_path):
    trainer = trainer_for(runtime)
    trainer.plan = dataclasses.replace(trainer.plan, agree_every_steps=2)
    trainer.interrupt.requested = "SIGTERM"
    run = begin(trainer, tmp_path / "run")
    with pytest.raises(InterruptedRun):
        trainer.fit()
    assert load_checkpoint(run.last)["step"] == 1


def six_views(model, pixels):
    """As arXiv 2404.00498 describes it for 32 pixels."""
    padded = functional.pad(pixels, (1, 1, 1, 1), mode="reflect")
    mean = [(model(each) + model(each.flip(3))) / 2 for each in (pixels, padded[:, :, :32, :32], padded[:, :, 2:, 2:])]
    return mean[0] / 2 + (mean[1] + mean[2]) / 4


EXPECTED = {
    "none": lambda model, pixels: model(pixels),
    "mirror": lambda model, pixels: (model(pixels) + model(pixels.flip(3))) / 2,
    "six": six_views,
}


@pytest.mark.parametrize(("count", "tta"), [(1, "none"), (250, "none"), (251, "none"), (251, "mirror"), (251, "six")])
def test_evaluation_counts_each_image_once(runtime, count, tta):
    dataset, trainer, observer = make_dataset(num_test=count), trainer_for(runtime), Mock(spec=Observer)
    model, indices = trainer.state.model.eval(), torch.arange(count).flip(0)
    images = EvaluationSet(
        data=dataset.test, indices=indices, class_names=dataset.class_names, recipe=trainer.recipe, runtime=runtime
    )
    result = images.predict(model, observer, tta=tta)
    assert torch.equal(images.labels, dataset.test.labels[indices])
    pixels = trainer.batches.normalize(dataset.test.images[indices].float() / 255)
    with torch.no_grad():
        expected = EXPECTED[tta](model, pixels)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    assert observer.method_calls[-1] == call.on_evaluation(count, count)


@pytest.mark.parametrize(("side", "shift"), [(16, 1), (32, 1), (96, 3)])
def test_shifted_views_reflect_the_border(side, shift):
    images = torch.randn(2, 3, side, side)
    seen = views(images, "six")
    assert sum(weight for _, weight in seen) == 1
    up_left, down_right = seen[2][0], seen[4][0]
    assert torch.equal(down_right[:, :, :-shift, :-shift], images[:, :, shift:, shift:])
    assert torch.equal(up_left[:, :, shift:, shift:], images[:, :, :-shift, :-shift])
    assert torch.equal(up_left[:, :, 0, shift:], images[:, :, shift, :-shift])


def test_normalization_is_torchvisions():
    from torchvision.transforms.functional import normalize

    recipe = make_recipe(base="standard")
    pixels = torch.rand(3, 3, 8, 8)
    ours = Normalizer(recipe.normalization, torch.device("cpu"), torch.channels_last)(pixels)
    theirs = normalize(pixels, list(recipe.normalization.mean), list(recipe.normalization.std))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_gradients_are_clipped(runtime):
    """With a tiny largest norm, the first step moves all weights by the learning rate times that norm."""
    trainer = trainer_for(
        runtime, "epochs=1", "gradient_clipping=0.001", "optimizer.weight_decay=0", "global_batch_size=96"
    )
    before = copy.deepcopy(trainer.state.model)
    trainer.fit()
    moved = [a - b for a, b in zip(trainer.state.model.parameters(), before.parameters(), strict=True)]
    norm = torch.cat([each.detach().flatten() for each in moved]).double().norm().item()
    assert norm == pytest.approx(0.05 * 0.001, rel=0.02)


def test_the_average_is_what_is_validated_kept_and_resumed(runtime):
    fields = ("validation_size=16", "ema_decay=0.9", "epochs=2")
    trainer = trainer_for(runtime, *fields)
    averages = []
    trainer.observer.on_epoch_end = lambda *_: averages.append(trainer.state.ema.model.fc.weight.clone())
    records = trainer.fit()
    average = trainer.state.ema.model.state_dict()
    assert not torch.equal(average["fc.weight"], trainer.state.model.state_dict()["fc.weight"])
    logits = trainer.validation.predict(trainer.state.ema.model, Observer())
    assert trainer.validation.summarize(logits).loss == records[-1].val_loss
    assert torch.equal(trainer.state.best.weights["fc.weight"], averages[trainer.state.best.epoch - 1])
    content = copy.deepcopy(trainer.state.to_mapping())
    again = trainer_for(runtime, *fields)
    again.state.restore(content)
    for name, value in again.state.ema.model.state_dict().items():
        assert torch.equal(value, average[name]), name
    assert again.state.train_seconds == trainer.state.train_seconds > 0


def test_images_grow_during_training_and_are_whole_at_evaluation(runtime):
    fields = ("epochs=4", "image_size_schedule=[[16, 0.5], [24, 0.75], [32, 1.0]]", "validation_size=16")
    trainer = trainer_for(runtime, *fields)
    sides = [[batch.images.shape[-1] for batch in trainer.batches.epoch(epoch)] for epoch in range(1, 5)]
    assert sides == [[16] * 3, [16] * 3, [24] * 3, [32] * 3]
    seen = []
    trainer.state.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    trainer.plan = dataclasses.replace(trainer.plan, epochs=1)
    trainer.fit()
    assert (seen[0], seen[-1]) == (16, 32)


def test_resizing_is_torchvisions():
    from torchvision.transforms.functional import resize

    pixels = torch.rand(3, 3, 32, 32)
    for size in (16, 24, 64):
        torch.testing.assert_close(resized(pixels, size), resize(pixels, [size, size], antialias=True))
    assert resized(pixels, 32) is pixels


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_images_count_for_both_classes(runtime, smoothing):
    trainer = trainer_for(runtime, "epochs=1", "augmentation={mixup: 1, flip: none, hue: 0}")
    batch = next(iter(trainer.batches.epoch(1)))
    logits, criterion = torch.randn(32, 10), nn.CrossEntropyLoss(label_smoothing=smoothing, reduction="none")
    own, partner = criterion(logits, batch.labels), criterion(logits, batch.partner_labels)
    expected = (own * batch.shares + partner * (1 - batch.shares)).sum()
    torch.testing.assert_close(batch_loss(logits, batch, smoothing), expected)
    assert not torch.equal(batch.labels, batch.partner_labels)
    alone = dataclasses.replace(batch, partner_labels=None, shares=None)
    torch.testing.assert_close(batch_loss(logits, alone, smoothing), own.sum())
