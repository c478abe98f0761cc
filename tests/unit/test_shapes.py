"""The drawn dataset `shapes`."""

import hashlib
import random

import numpy as np
import pytest
import torch

from cifar_dist.data.dataset import Dataset
from cifar_dist.data.shapes import CLASS_NAMES, load_shapes

# The digest of every byte. It may change only together with a deliberate change of the drawing, which makes accuracies
# from before and after incomparable; a new NumPy or another processor must not change it. Then check by hand that a
# linear model of the pixels stays below 20 % accuracy, and that no image is drawn twice.
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
    python, numpy, pytorch = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert digest(load_shapes()) == SHA256
    assert random.getstate() == python
    assert np.random.get_state()[1].tolist() == numpy
    assert torch.equal(torch.get_rng_state(), pytorch)
