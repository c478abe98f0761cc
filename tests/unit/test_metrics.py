"""Metrics, early stopping and records."""

import math

import pytest
import torch
from torch.nn import functional

from cifar_dist.config.recipe import EarlyStoppingConfig
from cifar_dist.data.dataset import LabelledImages
from cifar_dist.run.results import EpochRecord
from cifar_dist.training.evaluation import EvaluationSet, RunningSums, confident_mistakes, summarize
from cifar_dist.training.state import EarlyStopping, monitored_value


def record(epoch: int = 1, **changes) -> EpochRecord:
    values = {
        "epoch": epoch, "step": 10 * epoch, "lr": 0.1, "train_loss": 1.0, "train_acc": 0.5, "val_loss": None,
        "val_acc": None, "images_per_second": 100.0, "epoch_seconds": 2.0, "world_size": 1,
    }  # fmt: skip
    return EpochRecord(**{**values, **changes})


def stopping(monitor="train_loss", patience=3, min_delta=1e-4, enabled=True) -> EarlyStopping:
    return EarlyStopping(EarlyStoppingConfig(enabled=enabled, monitor=monitor, patience=patience, min_delta=min_delta))


def test_an_improvement_of_just_min_delta_does_not_count():
    state = stopping(patience=1, min_delta=0.25)
    assert not state.update(record(train_loss=1.0))
    assert state.update(record(train_loss=0.75))
    assert state.best == 1.0


@pytest.mark.parametrize(
    ("losses", "last_epoch"),
    [
        ([1.0, 0.9, 0.9, 0.89995, 0.91, 0.5], 5),
        ([1.0, 0.99996, 0.99993, 0.99991, 0.5], 4),  # compared with the best, not with the epoch before
        ([1.0, 2.0, 0.5, 0.6, 0.7, 0.4], None),
    ],
)
def test_early_stopping_ends_training_after_the_original_scripts_epoch(losses, last_epoch):
    state = stopping()
    stopped = (epoch for epoch, loss in enumerate(losses, start=1) if state.update(record(epoch, train_loss=loss)))
    assert next(stopped, None) == last_epoch


def test_early_stopping_continues_from_its_state():
    first, second = stopping(), stopping()
    for epoch in (1, 2, 3):
        assert not first.update(record(epoch))
    second.load_state_dict(first.state_dict())
    assert second.update(record(4))


def test_early_stopping_that_is_off_never_stops():
    off = stopping(enabled=False, patience=1)
    assert not any(off.update(record(epoch)) for epoch in range(1, 4))


@pytest.mark.parametrize(("monitor", "value"), [("val_loss", 0.7), ("val_acc", -0.8), ("train_loss", 1.0)])
def test_a_monitored_value_falls_as_it_improves(monitor, value):
    assert monitored_value(stopping(monitor).config, record(val_loss=0.7, val_acc=0.8)) == value


def test_running_sums_add_up_batches_of_any_size():
    logits, labels = torch.randn(10, 4), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0, 1])
    sums = RunningSums(torch.device("cpu"))
    for part in (slice(0, 4), slice(4, 5), slice(5, 10)):
        loss = functional.cross_entropy(logits[part], labels[part], reduction="sum")
        sums.add(loss, logits[part], labels[part])
    hits = (logits.argmax(1) == labels).sum().item()
    expected = [functional.cross_entropy(logits, labels, reduction="sum").item(), hits, 10]
    assert list(sums.read()[:3]) == pytest.approx(expected)


def test_the_numbers_of_an_evaluation():
    labels = torch.tensor([0, 0, 1, 2, 5])
    predicted = torch.tensor([0, 1, 1, 0, 5])
    logits = functional.one_hot(predicted, 7).float() * 5
    logits[1, 0] = 4.0
    names = tuple("abcdefg")
    result = summarize(logits, labels, names)
    assert (result.num_samples, result.top1) == (5, 3 / 5)
    assert result.loss == pytest.approx(functional.cross_entropy(logits, labels).item())
    assert result.per_class_accuracy == {"a": 0.5, "b": 1.0, "c": 0.0, "d": None, "e": None, "f": 1.0, "g": None}
    assert result.confusion_matrix[0][:3] == [1, 1, 0]
    assert result.confusion_matrix[2][0] == 1
    assert sum(map(sum, result.confusion_matrix)) == 5


@pytest.mark.parametrize("num_classes", [5, 6])
def test_top5_needs_more_than_five_classes(num_classes):
    labels = torch.arange(num_classes)
    logits = -torch.arange(num_classes, dtype=torch.float32).repeat(num_classes, 1)
    result = summarize(logits, labels, tuple(map(str, labels.tolist())))
    assert result.top5 == (None if num_classes == 5 else 5 / 6)


@pytest.mark.parametrize("num_classes", [3, 10])
@pytest.mark.parametrize("is_sorted", [True, False])
def test_the_saved_images_are_of_all_classes(is_sorted, num_classes):
    labels = torch.arange(640) % num_classes  # every tenth is of one class
    labels = labels.sort().values if is_sorted else labels
    pixels = (torch.arange(640) % 256).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    data = LabelledImages(images=pixels.contiguous(), labels=labels)
    indices, names = torch.arange(639, -1, -1), tuple(map(str, range(num_classes)))
    part = EvaluationSet(data=data, indices=indices, class_names=names, recipe=None, runtime=None)
    arrays = part.figure_arrays(torch.zeros(640, num_classes))
    assert (arrays["images"][:, 0, 0, 0] == arrays["indices"][arrays["shown"]] % 256).all()
    counts = torch.bincount(torch.tensor(arrays["labels"][arrays["shown"]]), minlength=num_classes)
    assert counts.sum() == 64 and counts.min() >= 64 // num_classes - 1


def test_records_go_to_json_and_back():
    first = record(val_loss=0.5, val_acc=0.25)
    assert EpochRecord.from_json(first.to_json()) == first
    with pytest.raises(ValueError, match="not JSON compliant"):
        record(train_loss=math.nan).to_json()


def test_the_surest_mistakes_come_first():
    logits = torch.tensor([[5.0, 0, 0], [9.0, 0, 0], [0, 2.0, 0], [0, 0, 3.0], [0, 4.0, 0]])
    labels = torch.tensor([0, 1, 0, 2, 2])
    assert confident_mistakes(logits, labels).tolist() == [1, 4, 2]
    assert confident_mistakes(logits, labels, count=2).tolist() == [1, 4]
    assert confident_mistakes(logits, logits.argmax(1)).tolist() == []
