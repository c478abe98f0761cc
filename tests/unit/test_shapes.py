"""The drawn dataset `shapes`."""

import hashlib
import random

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from cifar_dist.data.dataset import Dataset
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
    """Test accuracy of ridge regression from features (N, D) to one-hot labels."""
    mean = train.mean(0)
    train, test = train - mean, test - mean
    gram, moments = train.T @ train, train.T @ (one_hot(dataset.train.labels).float() - 0.1)
    weights = torch.linalg.solve(gram + 1e4 * torch.eye(len(gram)), moments)
    return ((test @ weights).argmax(1) == dataset.test.labels).float().mean().item()


def figure_mask(images: Tensor) -> Tensor:
    """How far each pixel's lightness is from that of the image's border, as features (N, 1024) of about unit size."""
    grey = images.float().mean(1) / 64
    border = torch.cat([grey[:, 0], grey[:, -1], grey[:, :, 0], grey[:, :, -1]], dim=1).median(dim=1).values
    return (grey - border[:, None, None]).abs().flatten(1)


def test_every_class_is_equally_frequent_in_mixed_order(shapes):
    assert shapes.name == "shapes"
    assert shapes.class_names == CLASS_NAMES and len(set(CLASS_NAMES)) == 10
    for part, per_class in ((shapes.train, 500), (shapes.test, 100)):
        assert part.images.shape == (10 * per_class, 3, 32, 32)
        assert part.images.dtype == torch.uint8 and part.images.is_contiguous()
        assert part.labels.bincount().tolist() == [per_class] * 10
        # In a random order a neighbour has the same class one time in ten; sorted or in turn it would be 1 or 0.
        assert 0.05 < (part.labels[1:] == part.labels[:-1]).float().mean() < 0.15


def test_the_bytes_are_pinned_and_global_random_states_are_left_alone():
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        python, numpy, pytorch = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        assert digest(load_shapes()) == SHA256
        assert random.getstate() == python
        assert np.random.get_state()[1].tolist() == numpy
        assert torch.equal(torch.get_rng_state(), pytorch)


@pytest.mark.full
def test_the_figure_tells_the_class_and_a_linear_model_of_pixels_does_not(shapes):
    """Holds as long as the pinned bytes do. Chance is 0.1."""
    train, test = (part.images.flatten(1).float() / 64 for part in (shapes.train, shapes.test))
    assert ridge_accuracy(train, test, shapes) < 0.20
    figures, held_out = figure_mask(shapes.train.images), shapes.test.images
    assert ridge_accuracy(figures, figure_mask(held_out), shapes) > 0.4
    assert ridge_accuracy(figures, figure_mask(held_out.flip(-1)), shapes) > 0.4
    images = torch.cat([shapes.train.images, shapes.test.images]).numpy()
    assert len({image.tobytes() for image in images}) == 6000
    counts = shapes.train.images.flatten().int().bincount(minlength=256)
    assert counts.min() > 0 and 100 < shapes.train.images.float().mean() < 156
