"""Shapes: ten classes of coloured figures on cluttered backgrounds, drawn at every start and read from no file.

Each figure is a signed distance function (negative inside, positive outside) sampled at the pixel centres, after Inigo
Quilez, "2D distance functions", https://iquilezles.org/articles/distfunctions2d/. Position, size, rotation, stretch and
colours are random, and the figure is as often darker as lighter than its background, so that the mean image of every
class is about the same grey: a linear model of the pixels learns next to nothing, a convolutional network a lot.

The bytes are the same on every machine. The random bits are PCG64's raw output, which NumPy promises to keep; the
pixels use only operations that IEEE 754 rounds exactly (+ - * / sqrt, min, max, floor, compare), one at a time. There
is no sin or cos, no matrix product and no floating-point sum over an axis, as their last bit depends on the library.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.random import PCG64
from numpy.typing import NDArray

from cifar_dist.data.dataset import Dataset, LabelledImages

Floats = NDArray[np.float32]

_SIZE = 32
_TRAIN_PER_CLASS, _TRAIN_SEED = 500, 1
_TEST_PER_CLASS, _TEST_SEED = 100, 2
_BLOCK = 50  # images drawn at once: few enough that the arrays stay in the processor's cache

_ROOT2, _ROOT3, _ROOT5 = math.sqrt(2), math.sqrt(3), math.sqrt(5)
_COS36, _COS72 = (_ROOT5 + 1) / 4, (_ROOT5 - 1) / 4
_SIN36, _SIN72 = math.sqrt(1 - _COS36 * _COS36), math.sqrt(1 - _COS72 * _COS72)


def _length(x: Floats, y: Floats) -> Floats:
    return np.sqrt(x * x + y * y)


def _circle(x: Floats, y: Floats) -> Floats:
    return _length(x, y) - 0.9


def _ring(x: Floats, y: Floats) -> Floats:
    return np.abs(_length(x, y) - 0.76) - 0.22


def _square(x: Floats, y: Floats) -> Floats:
    return np.maximum(np.abs(x), np.abs(y)) - 0.8


def _triangle(x: Floats, y: Floats) -> Floats:
    return np.maximum(np.abs(x) * (_ROOT3 / 2) - (y - 0.2) / 2, y - 0.2) - 0.55


def _star(x: Floats, y: Floats) -> Floats:
    # Reflections fold the ten half-arms onto one, where the outline is a single straight edge.
    x, y = np.abs(x), -y
    for normal_x, normal_y in ((_COS36, -_SIN36), (-_COS36, -_SIN36)):
        beyond = np.maximum(x * normal_x + y * normal_y, 0) * 2
        x, y = x - beyond * normal_x, y - beyond * normal_y
    return np.abs(x) * 0.8 + (y - 1.1) * 0.4


def _cross(x: Floats, y: Floats) -> Floats:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 1, np.minimum(x, y) - 0.3)


def _crescent(x: Floats, y: Floats) -> Floats:
    return np.maximum(_length(x, y) - 1, 0.8 - _length(x - 0.5, y))


def _heart(x: Floats, y: Floats) -> Floats:
    # A square that stands on a corner, and on each of its two upper sides a disc with that side as its diameter.
    side = 0.55
    u, v = (x - y) / _ROOT2 + 0.2, (-x - y) / _ROOT2 + 0.2
    square = np.maximum(np.abs(u), np.abs(v)) - side
    return np.minimum(square, np.minimum(_length(u - side, v), _length(u, v - side)) - side)


def _arrow(x: Floats, y: Floats) -> Floats:
    y = np.abs(y)
    head = np.maximum((x + y) / _ROOT2 - 1 / _ROOT2, 0.1 - x)
    shaft = np.maximum(np.abs(x + 0.4) - 0.6, y - 0.25)
    return np.minimum(head, shaft)


def _hourglass(x: Floats, y: Floats) -> Floats:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(y - 0.95, (x - y * 0.8) * 0.78 - 0.1)


_FIGURES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "circle": _circle,
    "ring": _ring,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "crescent": _crescent,
    "heart": _heart,
    "arrow": _arrow,
    "hourglass": _hourglass,
}
CLASS_NAMES: tuple[str, ...] = tuple(_FIGURES)


def _uniform(bits: PCG64, low: float, high: float, *shape: int) -> Floats:
    """Draw `shape` numbers in [low, high) from the top 24 bits of as many words, which float32 holds exactly."""
    words = np.asarray(bits.random_raw(math.prod(shape))).reshape(shape)
    return (words >> np.uint64(40)).astype(np.float32) * (2.0**-24 * (high - low)) + low


def _local_frame(bits: PCG64, count: int, reach: float, stretch: float) -> tuple[Floats, Floats]:
    """Pixel coordinates (count, 32, 32) each, seen from a random point in a random direction.

    The origin is at most `reach` pixels from the centre along each axis; x grows and y shrinks by at most `stretch`.
    """
    centre = _uniform(bits, -reach, reach, 2, count, 1, 1)
    direction = _uniform(bits, -1, 1, 2, count, 1, 1)
    cos, sin = direction / np.maximum(_length(direction[0], direction[1]), 1e-3)
    pixels = np.arange(_SIZE, dtype=np.float32) - (_SIZE - 1) / 2
    x, y = pixels - centre[0], pixels[:, None] - centre[1]
    factor = _uniform(bits, 1 / stretch, stretch, count, 1, 1)
    return (cos * x + sin * y) * factor, (cos * y - sin * x) / factor


def _colour_field(bits: PCG64, count: int, spread: float) -> Floats:
    """Smooth colour variation (count, 3, 32, 32) in [-spread, spread]: random values on a lattice, interpolated."""
    cells = 3
    lattice = _uniform(bits, -spread, spread, count, 3, cells + 1, cells + 1)
    position = (np.arange(_SIZE, dtype=np.float32) + 0.5) * (cells / _SIZE)
    low = np.floor(position)
    weight, index = position - low, low.astype(np.int64)
    rows = np.take(lattice, index, 2) + (np.take(lattice, index + 1, 2) - np.take(lattice, index, 2)) * weight[:, None]
    return np.take(rows, index, 3) + (np.take(rows, index + 1, 3) - np.take(rows, index, 3)) * weight


def _contrasting_colour(bits: PCG64, other: Floats, contrast: float) -> Floats:
    """Colours (count, 3): of eight candidates the first (else the best) whose lightness differs by `contrast`."""
    candidates = _uniform(bits, 0, 1, len(other), 8, 3)
    red, green, blue = np.moveaxis(candidates - other[:, None], -1, 0)
    difference = np.abs(red * 0.3 + green * 0.6 + blue * 0.1)
    chosen = np.argmax(np.minimum(difference, contrast), axis=1)
    return candidates[np.arange(len(other)), chosen]


def _paint(canvas: Floats, coverage: Floats, colour: Floats) -> None:
    """Blend `colour` (count, 3, 32 or 1, 32 or 1) over `canvas` (count, 3, 32, 32) where `coverage` is above 0."""
    canvas += (colour - canvas) * np.clip(coverage, 0, 1)[:, None]


def _draw_block(bits: PCG64, figure: Callable[[Floats, Floats], Floats], count: int) -> NDArray[np.uint8]:
    """Draw `count` images (count, 3, 32, 32) of one figure."""
    ground = _uniform(bits, 0, 1, count, 3)
    canvas = ground[..., None, None] + _colour_field(bits, count, 0.2)
    for _ in range(2):  # soft blobs
        x, y = _local_frame(bits, count, 16, 1.5)
        radius = _uniform(bits, 4, 9, count, 1, 1)
        _paint(canvas, 0.6 - (x * x + y * y) / (radius * radius), _uniform(bits, 0, 1, count, 3, 1, 1))
    for _ in range(3):  # strokes
        x, y = _local_frame(bits, count, 16, 1)
        half = _uniform(bits, 2, 9, count, 1, 1)
        distance = _length(np.maximum(np.abs(x) - half, 0), y)
        _paint(canvas, _uniform(bits, 0.8, 1.5, count, 1, 1) - distance, _uniform(bits, 0, 1, count, 3, 1, 1))
    x, y = _local_frame(bits, count, 6, 1.15)
    radius = _uniform(bits, 6.5, 11, count, 1, 1)
    colour = _contrasting_colour(bits, ground, 0.3)
    shade = _uniform(bits, -0.15, 0.15, count, 3, 1, 1) * (x / radius)[:, None]
    _paint(canvas, 0.5 - figure(x / radius, y / radius) * radius, colour[..., None, None] + shade)
    words = np.asarray(bits.random_raw(2 * canvas.size // 8)).astype("<u8")
    grain = words.view(np.uint8).reshape(2, *canvas.shape).astype(np.float32)
    canvas += (grain[0] - grain[1]) * (_uniform(bits, 0.02, 0.12, count, 1, 1, 1) / 255)
    return np.floor(np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)


def _draw_images(seed: int, per_class: int) -> LabelledImages:
    """Draw `per_class` images of every figure and mix their order."""
    bits = PCG64(seed)
    blocks = [
        _draw_block(bits, figure, min(_BLOCK, per_class - start))
        for figure in _FIGURES.values()
        for start in range(0, per_class, _BLOCK)
    ]
    labels = np.repeat(np.arange(len(CLASS_NAMES)), per_class)
    order = np.argsort(np.asarray(bits.random_raw(len(labels))), kind="stable")
    images = np.concatenate(blocks)[order]
    return LabelledImages(images=torch.from_numpy(images), labels=torch.from_numpy(labels[order]).to(torch.int64))


def load_shapes() -> Dataset:
    """Draw the dataset: 5,000 training and 1,000 test images, 32x32 RGB, every class equally often."""
    return Dataset(
        name="shapes",
        class_names=CLASS_NAMES,
        train=_draw_images(_TRAIN_SEED, _TRAIN_PER_CLASS),
        test=_draw_images(_TEST_SEED, _TEST_PER_CLASS),
    )
