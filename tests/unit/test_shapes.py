"""The drawn dataset: always the same bytes, in which the figure tells the class and a linear model sees little."""

import hashlib
import random

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from cifar_dist.data.dataset import Dataset, LabelledImages
from cifar_dist.data.shapes import CLASS_NAMES, load_shapes

# The digest of every byte. It may change only together with a deliberate change of the drawing, which makes accuracies
# from before and after incomparable; a new NumPy or another processor must not change it.
SHA256 = "2f85d680e87ddd9fc8d49858206242af2d3206209cb6cb3a79e991c3781d4b50"


@pytest.fixture(scope="module")
def shapes() -> Dataset:
    return load_shapes()


def digest(dataset: Dataset) -> str:
    sha256 = hashlib.sha256()
    for part in (dataset.train, dataset.test):
        sha256.update(part.images.numpy().tobytes())
        sha256.update(part.labels.numpy().astype("<i8").tobytes())
    return sha256.hexdigest()


def ridge_accuracy(train: Tensor, test: Tensor, dataset: Dataset) -> float:
    """Test accuracy of ridge regression from features (N, D) to one-hot labels, with the best of three penalties."""
    mean = train.mean(0)
    train, test = train - mean, test - mean
    gram, moments = train.T @ train, train.T @ (one_hot(dataset.train.labels).float() - 0.1)
    accuracies = []
    for penalty in (1e3, 1e4, 1e5):
        weights = torch.linalg.solve(gram + penalty * torch.eye(len(gram)), moments)
        accuracies.append(((test @ weights).argmax(1) == dataset.test.labels).float().mean().item())
    return max(accuracies)


def figure_mask(part: LabelledImages) -> Tensor:
    """How far each pixel's lightness is from that of the image's border, as features (N, 1024) of about unit size."""
    grey = part.images.float().mean(1) / 64
    border = torch.cat([grey[:, 0], grey[:, -1], grey[:, :, 0], grey[:, :, -1]], dim=1).median(dim=1).values
    return (grey - border[:, None, None]).abs().flatten(1)


def test_ten_distinct_classes(shapes):
    assert shapes.name == "shapes"
    assert shapes.class_names == CLASS_NAMES
    assert len(set(CLASS_NAMES)) == len(CLASS_NAMES) == 10


@pytest.mark.parametrize(("part", "per_class"), [("train", 500), ("test", 100)])
def test_every_class_is_equally_often_in_mixed_order(shapes, part, per_class):
    drawn = getattr(shapes, part)
    assert drawn.images.shape == (10 * per_class, 3, 32, 32)
    assert drawn.images.dtype == torch.uint8
    assert drawn.images.is_contiguous()
    assert drawn.labels.bincount().tolist() == [per_class] * 10
    # In a random order a neighbour has the same class one time in ten; sorted or dealt out in turn it would be 1 or 0.
    assert 0.05 < (drawn.labels[1:] == drawn.labels[:-1]).float().mean() < 0.15


def test_every_call_returns_the_pinned_bytes(shapes):
    assert digest(shapes) == SHA256
    assert digest(load_shapes()) == SHA256


def test_global_random_state_is_neither_read_nor_changed():
    digests = set()
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        python, numpy, pytorch = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        digests.add(digest(load_shapes()))
        assert random.getstate() == python
        assert np.random.get_state()[1].tolist() == numpy
        assert torch.equal(torch.get_rng_state(), pytorch)
    assert len(digests) == 1


def test_no_image_is_drawn_twice(shapes):
    images = torch.cat([shapes.train.images, shapes.test.images]).numpy()
    assert len({image.tobytes() for image in images}) == 6000


def test_images_use_the_whole_range_of_values(shapes):
    counts = shapes.train.images.flatten().int().bincount(minlength=256)
    assert counts.min() > 0
    assert 100 < shapes.train.images.float().mean() < 156


def test_a_linear_model_of_the_pixels_learns_little(shapes):
    train, test = (part.images.flatten(1).float() / 64 for part in (shapes.train, shapes.test))
    assert ridge_accuracy(train, test, shapes) < 0.20


def test_the_figure_tells_the_class(shapes):
    # The same linear model, given the figure and not its colour: 0.1 would be chance.
    assert ridge_accuracy(figure_mask(shapes.train), figure_mask(shapes.test), shapes) > 0.4


def test_a_mirrored_figure_keeps_its_class(shapes):
    mirrored = LabelledImages(images=shapes.test.images.flip(-1), labels=shapes.test.labels)
    assert ridge_accuracy(figure_mask(shapes.train), figure_mask(mirrored), shapes) > 0.4
